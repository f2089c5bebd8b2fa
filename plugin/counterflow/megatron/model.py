"""Build the model chunks and data sets of a V layout with Megatron's own builders."""

from collections.abc import Callable
from functools import partial
from typing import Any

from megatron.core import parallel_state

from counterflow.megatron.embeddings import copy_embedding
from counterflow.megatron.mirror import hold_mirrored_rank, mirror_collection, run_mirrored

WAY_BACK = 1


def lay_out_as_v(build_chunk: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a builder of one model chunk: chunk 1 is built as on the mirrored pipeline rank.

    ``build_chunk`` takes ``vp_stage``, ``pre_process`` and ``post_process`` by keyword and the
    process groups by keyword or as its first argument, as both of Megatron's build paths call it.
    """

    built: list[Any] = []

    def build(*args: Any, vp_stage: int | None = None, **kwargs: Any) -> Any:
        if vp_stage != WAY_BACK:
            built[:] = [build_chunk(*args, vp_stage=vp_stage, **kwargs)]
            return built[0]
        if "pg_collection" in kwargs:
            kwargs["pg_collection"] = mirror_collection(kwargs["pg_collection"])
        else:
            args = (mirror_collection(args[0]), *args[1:])
        with hold_mirrored_rank():
            # Chunk 1 is the last of its rank's chunks: it ends the model on the mirrored last rank.
            kwargs["pre_process"] = False
            kwargs["post_process"] = parallel_state.is_pipeline_last_stage(ignore_virtual=True)
            chunk = build_chunk(*args, vp_stage=vp_stage, **kwargs)
        chunk.sharded_state_dict = run_mirrored(chunk.sharded_state_dict)
        copy_embedding([*built, chunk])
        built.clear()
        return chunk

    return build


def is_for_way_back(provider: Any) -> bool:
    """Tell whether Megatron builds chunk 1's data sets with this provider."""
    return isinstance(provider, partial) and provider.keywords.get("vp_stage") == WAY_BACK


def mirror_dataset_provider(provider: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a data set provider: for chunk 1 it decides as on the mirrored pipeline rank."""
    if is_for_way_back(provider):
        mirrored = run_mirrored(provider)
        mirrored.is_distributed = getattr(provider, "is_distributed", False)  # type: ignore[attr-defined]
        return mirrored
    return provider
