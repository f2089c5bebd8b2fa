"""HybridModel's ``--hybrid-layer-pattern``: its segments, parted by ``|``, are the stages of the pipeline.

A pattern has one symbol for a layer, ``E`` for one of experts, and behind ``/`` the layers of multi-token prediction, which stand
on the last stage. Segment i is stage i of a model of PP x chunks stages, on every layout.
"""

import importlib.util
from typing import Any, NamedTuple

from counterflow.errors import OptionError
from counterflow.options import Options
from counterflow.schedule.layouts import LOOPED, STRAIGHT, Layout, V, lay_named

FLAG = "--hybrid-layer-pattern"
PIPE, PREDICTION, EXPERTS = "|", "/", "E"
HOME = "megatron.core.models.hybrid.hybrid_layer_allocation"
# The number of stages, and what they hold, is the pattern's to say.
_RIVALS = {
    "num_virtual_stages_per_pipeline_rank": "--num-virtual-stages-per-pipeline-rank",
    "num_layers_per_virtual_pipeline_stage": "--num-layers-per-virtual-pipeline-stage",
    "pipeline_model_parallel_layout": "--pipeline-model-parallel-layout",
}
_UNEVEN = {
    "decoder_first_pipeline_num_layers": "--decoder-first-pipeline-num-layers",
    "decoder_last_pipeline_num_layers": "--decoder-last-pipeline-num-layers",
}


def find_pattern(args: Any) -> str | None:
    """Return the pattern that the arguments give, by its flag of today or of yesterday; None for another model."""
    return getattr(args, "hybrid_layer_pattern", None) or getattr(args, "hybrid_override_pattern", None)


def list_segments(pattern: str) -> list[str]:
    """Return the layers of each stage, without those of multi-token prediction."""
    return pattern.split(PREDICTION)[0].split(PIPE)


def cut_pattern(pattern: str, stages: int) -> str:
    """Return the pattern cut into this many segments, whose layers differ by one at most; the first have more."""
    main, *predictions = pattern.split(PREDICTION)
    layers = main.replace(PIPE, "")
    size, longer = divmod(len(layers), stages)
    ends = [(size + 1) * min(i, longer) + size * max(i - longer, 0) for i in range(stages + 1)]
    cut = PIPE.join(layers[begin:end] for begin, end in zip(ends, ends[1:], strict=False))
    return PREDICTION.join([cut, *predictions])


class _Wanted(NamedTuple):
    """What a schedule asks of a pattern: ``chunks`` on each of ``ranks`` pipeline ranks, or more where it leaves that open."""

    flag: str
    ranks: int
    chunks: int
    is_open: bool

    @property
    def stages(self) -> int:
        """The number of stages, the least that will do."""
        return self.ranks * self.chunks


def fit_pattern(args: Any, owner: Any, ranks: int, layout: Layout, model_layout: str, options: Options) -> int:
    """Return the chunks per rank that the pattern has; one without ``|`` is cut evenly, in ``owner``, and rank 0 says how.

    ``args`` are the arguments in one namespace, ``owner`` is the one of Megatron's that holds the pattern. ``layout`` is the
    table's, ``model_layout`` the name of the model's. Raises `OptionError` where the pattern does not fit, with the pattern that
    would.
    """
    pattern = find_pattern(args)
    assert pattern is not None
    is_open = model_layout == LOOPED and options.schedule_file is None
    chunks = {STRAIGHT: 1, V: 2, LOOPED: 2 if is_open else layout.chunks}[model_layout]
    wanted = _Wanted(f"--cf-schedule {options.schedule}", ranks, chunks, is_open)
    _check_symbols(pattern, wanted)
    _refuse_rivals(args, pattern, wanted)
    if len(list_segments(pattern)) > 1:
        return _count_chunks(pattern, wanted)
    uneven = [flag for name, flag in _UNEVEN.items() if getattr(args, name, None)]
    if not uneven:
        _cut_evenly(args, owner, pattern, wanted)
    elif chunks > 1:
        raise OptionError(
            f"{' and '.join(uneven)} given with {wanted.flag}, whose stages are the segments (|) of {FLAG}: drop it; to cut "
            f"unevenly, {_propose(pattern, wanted.stages)}"
        )
    return chunks


def count_predictions(args: Any) -> int | None:
    """Return how many prediction layers the pattern has, or, where it names none, the flag; None for none."""
    pattern = find_pattern(args) or ""
    return len([one for one in pattern.split(PREDICTION)[1:] if one]) or getattr(args, "mtp_num_layers", None)


def has_experts(pattern: str) -> bool:
    """Tell whether a pattern has a layer of experts."""
    return EXPERTS in pattern


def check_same_cut(saved_args: Any, args: Any) -> None:
    """Refuse optimizer state that fits one cut only, where the checkpoint's model was cut elsewhere."""
    saved, now = find_pattern(saved_args), find_pattern(args)
    if saved is None or now is None or PIPE not in saved or PIPE not in now or list_segments(saved) == list_segments(now):
        return
    raise OptionError(
        f"the checkpoint's optimizer state was saved with {FLAG} '{saved}' in a form that only fits that cut; this run has "
        f"'{now}': resume with that pattern, or save with --dist-ckpt-optim-fully-reshardable, or load the weights alone "
        "with --no-load-optim"
    )


def _count_chunks(pattern: str, wanted: _Wanted) -> int:
    segments = len(list_segments(pattern))
    given, left = divmod(segments, wanted.ranks)
    if not left and (given == wanted.chunks or (wanted.is_open and given > wanted.chunks)):
        return given
    more, multiple = (" or more", f" or another multiple of {wanted.ranks}") if wanted.is_open else ("", "")
    raise OptionError(
        f"{wanted.flag} holds {wanted.chunks}{more} model chunk{'s' if wanted.chunks > 1 else ''} on each of {wanted.ranks} "
        f"pipeline ranks, so {FLAG} has {wanted.stages} segments{multiple} and '{pattern}' has {segments}: "
        f"{_propose(pattern, wanted.stages)}"
    )


def _propose(pattern: str, stages: int) -> str:
    layers = "".join(list_segments(pattern))
    if len(layers) < stages:
        return f"give {stages} layers or more"
    return f"give for instance '{cut_pattern(pattern, stages)}'"


def check_logged_experts(args: Any, ranks: int, model_layout: str, chunks: int, schedule: str) -> None:
    """Refuse a pipeline rank without experts where auxiliary losses are logged: Megatron sums them up over ranks in two sizes."""
    pattern = find_pattern(args) or ""
    kinds = str(getattr(args, "moe_router_load_balancing_type", None) or "none")
    coefficient = getattr(args, "moe_aux_loss_coeff", None)
    is_weighted = any(coefficient) if isinstance(coefficient, list) else bool(coefficient)
    is_logged = ("aux_loss" in kinds and is_weighted) or getattr(args, "moe_z_loss_coeff", None) is not None
    segments = list_segments(pattern)
    if not is_logged or not has_experts(pattern) or len(segments) != ranks * chunks:
        return
    segments[-1] += pattern.partition(PREDICTION)[2]
    for rank, stages in enumerate(lay_named(model_layout, ranks, chunks).stages):
        held = [segments[stage] for stage in stages]
        if not any(map(has_experts, held)):
            raise OptionError(
                f"--cf-schedule {schedule}: pipeline rank {rank} holds {' and '.join(map(repr, held))} of {FLAG} '{pattern}', no "
                "layer of experts (E): Megatron's log of auxiliary losses and z-losses fails there; cut the pattern so that each "
                "rank has one, or drop --moe-aux-loss-coeff and --moe-z-loss-coeff"
            )


def _refuse_rivals(args: Any, pattern: str, wanted: _Wanted) -> None:
    for name, flag in _RIVALS.items():
        if (value := getattr(args, name, None)) is not None:
            raise OptionError(
                f"{flag} {value} given with {FLAG} '{pattern}', whose segments (|) are the stages: drop {flag}; for "
                f"{wanted.stages} stages {_propose(pattern, wanted.stages)}"
            )


def _check_symbols(pattern: str, wanted: _Wanted) -> None:
    if importlib.util.find_spec(HOME.rpartition(".")[0]) is None:
        raise OptionError(f"{FLAG} given: schedules run it as a HybridModel, which Megatron-Core has since 0.18")
    from megatron.core.models.hybrid.hybrid_layer_allocation import Symbols, parse_hybrid_pattern

    known = sorted(Symbols.VALID_LAYERS)
    unknown = [one for one in dict.fromkeys(pattern) if one not in (*known, PIPE, PREDICTION)]
    if unknown:
        raise OptionError(
            f"{FLAG} '{pattern}': no layer of this Megatron-Core is {' or '.join(map(repr, unknown))}; allowed are "
            f"{' '.join(known)} (capitals, without blanks), {PIPE} between stages and {PREDICTION} before prediction layers"
        )
    if not "".join(list_segments(pattern)):
        raise OptionError(f"{FLAG} '{pattern}' has no layers but those of prediction: {_propose(pattern, wanted.stages)}")
    try:
        parse_hybrid_pattern(pattern)
    except ValueError as error:
        raise OptionError(f"{FLAG} '{pattern}': {error}") from None


def _cut_evenly(args: Any, owner: Any, pattern: str, wanted: _Wanted) -> None:
    layers, stages = len(list_segments(pattern)[0]), wanted.stages
    if not layers or layers % stages:
        raise OptionError(
            f"{FLAG} '{pattern}' has {layers} layers and no |, which cannot be cut evenly into {stages} stages "
            f"({wanted.chunks} on each of {wanted.ranks} pipeline ranks): {_propose(pattern, stages)}"
        )
    name = "hybrid_layer_pattern" if getattr(args, "hybrid_layer_pattern", None) else "hybrid_override_pattern"
    cut = cut_pattern(pattern, stages)
    setattr(owner, name, cut)
    if getattr(args, "rank", None) == 0:
        print(
            f"counterflow: {FLAG} '{pattern}' has no |: cut evenly into the {stages} stages of {wanted.flag}, '{cut}'", flush=True
        )
