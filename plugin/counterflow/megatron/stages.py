"""What stages hold where a flag says so: an explicit layout, and layers that stand beside the embedding.

Layers that route by a hash of token ids (``--moe-n-hash-layers``) read ids that no message carries, so they stand on the
embedding's stage. The layout or the pattern of layers has to say so.
"""

from typing import Any

from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

from counterflow.errors import OptionError
from counterflow.megatron.patterns import EXPERTS, FLAG, PIPE, find_pattern, list_segments
from counterflow.megatron.streams import cut_error

LAYOUT = "--pipeline-model-parallel-layout"
HASHED = "--moe-n-hash-layers"


def count_stages(layout: Any) -> int:
    """Return the number of stages of ``--pipeline-model-parallel-layout``, a string or a list. Raises `OptionError`."""
    if not isinstance(layout, str):
        return len(layout)
    try:
        return int(PipelineParallelLayerLayout.get_num_stages_from_str(layout))
    except Exception as error:  # whatever its parser stumbles over
        raise OptionError(f"{LAYOUT} '{layout}' cannot be read: {cut_error(error)}; give for instance 'Et|tt|tt|tL'") from None


def check_stages(args: Any, ranks: int, schedule: str) -> None:
    """Refuse an explicit layout that Megatron would, and layers that route by token ids beyond the embedding's stage.

    Where a model is built, Megatron does so itself, with an assertion.
    """
    layout = getattr(args, "pipeline_model_parallel_layout", None)
    stages = None if layout is None else _read_layout(layout, ranks, args)
    hashed = getattr(args, "moe_n_hash_layers", None) or 0
    if not hashed:
        return
    ours = f"--cf-schedule {schedule}: {HASHED} {hashed} given, and these layers stand on the embedding's stage;"
    pattern = find_pattern(args)
    if pattern is not None:
        first, layers = list_segments(pattern)[0], "".join(list_segments(pattern))
        if EXPERTS in layers[len(first) : hashed]:
            raise OptionError(
                f"{ours} the first segment of {FLAG} '{pattern}' has {len(first)} layers, and some of experts (E) up to layer "
                f"{hashed} behind it: move the first {PIPE} to after layer {hashed}"
            )
    elif stages is None:
        raise OptionError(f"{ours} on several pipeline ranks Megatron takes an explicit layout for it: give {LAYOUT}")
    elif (held := stages.layout[0][0].count(LayerType.decoder)) < hashed:
        raise OptionError(f"{ours} the first stage of {LAYOUT} '{layout}' has {held} layers (t): move {hashed} there")


def _read_layout(layout: Any, ranks: int, args: Any) -> Any:
    """Return Megatron's reading of an explicit layout, checked against the number of layers where one is given."""
    ours = f"{LAYOUT} '{layout}' on {ranks} pipeline ranks:"
    if (count := count_stages(layout)) % ranks:
        raise OptionError(f"{ours} it has {count} stages, give a multiple of {ranks}")
    layers = getattr(args, "num_layers", None)
    obstacle = None
    try:
        stages = PipelineParallelLayerLayout(layout, ranks)
        held = stages.flatten_layout.count(LayerType.decoder)
        if layers not in (None, held):
            obstacle = f"it has {held} layers (t) and --num-layers is {layers}: change one of the two"
        elif layers is not None:
            stages.validate_layer_layout(layers, getattr(args, "mtp_num_layers", None))
    except (AssertionError, ValueError) as error:
        obstacle = cut_error(error)
    if obstacle:
        raise OptionError(f"{ours} {obstacle}")
    return stages
