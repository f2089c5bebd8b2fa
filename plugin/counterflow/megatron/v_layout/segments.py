"""Which segment of a HybridModel's pattern the second chunk of a V holds."""

from collections.abc import Callable
from functools import wraps
from typing import Any

from counterflow.megatron.v_layout.mirror import MirroredGroup


def select_mirrored(select_segment: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap Megatron's choice of a chunk's segment: with a mirrored group, that of the mirrored rank.

    Megatron asks torch for this process's rank in the group, which a `MirroredGroup` cannot answer. Without a group it takes the
    virtual stage's number for the segment's.
    """

    @wraps(select_segment)
    def select(main_pattern: str, pp_group: Any, vp_stage: int | None, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(pp_group, MirroredGroup):
            return select_segment(main_pattern, pp_group, vp_stage, *args, **kwargs)
        return select_segment(main_pattern, None, (vp_stage or 0) * pp_group.size() + pp_group.rank(), *args, **kwargs)

    return select
