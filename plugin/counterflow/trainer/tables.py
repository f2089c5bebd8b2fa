"""Choose the layout and build the table of a ``--cf-schedule`` for a run's sizes.

There are two layouts. The table's covers all ranks that the table spans. The model's is the one by which the trainer deals
stages to the ranks of one replica. They differ only in full DualPipe, whose bidirectional table spans two replicas of a V model.
"""

from dataclasses import replace
from typing import Any

from counterflow.errors import OptionError, ScheduleError
from counterflow.options import AUTO, Options
from counterflow.schedule import (
    Family,
    ScheduleTable,
    add_reductions,
    build,
    lay_looped,
    lay_straight,
    validate,
)
from counterflow.schedule.actions import make_whole
from counterflow.schedule.families import list_names
from counterflow.schedule.families.dualpipev import DUALPIPEV
from counterflow.schedule.families.zbv import ZBV
from counterflow.schedule.layouts import BIDIRECTIONAL, LOOPED, STRAIGHT, Layout, V, lay_named

# The families that ``auto`` runs until it has found a table; both are on a V. ZB-V runs F, I and W one by one, so that each can
# be measured. With ``--cf-overlap`` DualPipeV follows, whose pairs are measured.
AUTO_FAMILY, AUTO_FAMILY_WITH_PAIRS = ZBV, DUALPIPEV


def choose_layout(options: Options, ranks: int, chunks: int) -> Layout:
    """Return the layout of the schedule's table on ``ranks`` pipeline ranks; without a schedule, Megatron's own layout.

    ``chunks`` per rank are used by a schedule that allows several numbers of them.
    """
    family = find_family(options)
    if family is not None:
        layout = lay_named(family.layout, family.replicas * ranks, chunks)
    elif options.schedule_file is not None:
        layout = options.file_table.layout
    else:
        return lay_looped(ranks, chunks) if chunks > 1 else lay_straight(ranks)
    if layout.name not in (STRAIGHT, LOOPED, V, BIDIRECTIONAL):
        raise OptionError(
            f"--cf-schedule {options.schedule} is a table on the {layout.name} layout; this version builds Megatron "
            f"models for {STRAIGHT}, {LOOPED}, {V} and {BIDIRECTIONAL} layouts: give a table on one of them"
        )
    _require_costs(options, layout)
    return layout


def _require_costs(options: Options, layout: Layout) -> None:
    """Refuse a file of costs of other stages than the layout's."""
    if options.file_costs is None:
        return
    try:
        options.file_costs.spread(layout.last_stage + 1)
    except ScheduleError as error:
        raise OptionError(f"--cf-costs {options.costs}: {error}, of {layout.ranks} pipeline ranks with two chunks each") from None


def find_family(options: Options) -> Family | None:
    """Return the family of a run: the named one; under ``auto`` the one that runs until a table is found; None for a file."""
    if options.schedule == AUTO:
        return AUTO_FAMILY_WITH_PAIRS if options.overlap else AUTO_FAMILY
    return options.family


def name_model_layout(layout: Layout) -> str:
    """Return the name of the layout of a model that runs a table on ``layout``."""
    return V if layout.name == BIDIRECTIONAL else layout.name


def count_replicas(layout: Layout) -> int:
    """Return how many data-parallel replicas a table on ``layout`` spans."""
    return 2 if layout.name == BIDIRECTIONAL else 1


def build_table(options: Options, ranks: int, microbatches: int, chunks: int, group: int | None = None) -> ScheduleTable:
    """Build, validate and prepare (`prepare_table`) the training table for these sizes, each of one replica.

    A file's table must have these sizes.
    """
    if options.schedule_file is not None:
        table = options.file_table
        replicas = count_replicas(table.layout)
        found = (table.ranks, table.microbatches, table.layout.chunks)
        needed = (replicas * ranks, replicas * microbatches, chunks)
        if found != needed:
            pair = f" (two replicas of {ranks} and {microbatches})" if replicas == 2 else ""
            raise OptionError(
                f"--cf-schedule {options.schedule_file} is a table for {found[0]} pipeline ranks, {found[1]} micro-batches "
                f"and {found[2]} chunks per rank; this run has {needed[0]}, {needed[1]} and {needed[2]}{pair}"
            )
        _require_rising_forwards(table)
        _require_mirrored_rows(table)
    else:
        table = _build_named(options, ranks, microbatches, {"vpp": chunks, "group": group, "ep_overlap": options.overlap})
    _require_training(table, options)
    require_pairs_to_overlap(options, table)
    return prepare_table(table, splits=options.zero_bubble is not False)


def splits_backward(options: Options) -> bool:
    """Tell whether linears leave weight gradients: to a W, or, in a pair, to behind its next communication.

    Without a schedule nobody would compute them.
    """
    if options.schedule is None or options.zero_bubble is False:
        return False
    return options.overlap or options.family is None or options.family.splits


def describe_run(options: Options, chunks: int, model: str, layers: str) -> list[str]:
    """Return what the options ask for, then what that does to a ``model`` and to its MoE ``layers``, a line for each part."""
    given = [f"{name} {value}" for name, value in options.model_dump(exclude_unset=True).items() if value is not None]
    lines = [", ".join(given) or "nothing is asked for: training runs as without the plugin"]
    if options.eplb:
        lines.append(
            f"clone slots on a rank in each of {layers}: {options.layer_clones}; steps between plans: {options.eplb_interval}"
        )
        if options.shared_clones:
            lines.append(f"clone slots on a rank that {layers} share: {options.shared_clones}")
    if options.schedule is not None:
        layout = choose_layout(options, 2, chunks)
        lines.append(f"a {model} is cut into {layout.chunks} stages a rank, laid out {name_model_layout(layout)}")
        splits = options.family is None or options.family.splits
        behind = "wait for their W" if splits else "wait for the next communication in a pair"
        lines.append(f"weight gradients {behind if splits_backward(options) else 'are computed in the B'}")
    require_pairs_to_overlap(options)
    return lines


def require_pairs_to_overlap(options: Options, table: ScheduleTable | None = None) -> None:
    """Raise `OptionError` if overlapped pairs are asked for and ``table``, or without one the family of the run, has none."""
    if not options.overlap:
        return
    if table is None:
        has_pairs, where = options.family is None or options.family.pairs, ""
    else:
        has_pairs = any(action.parts for row in table.actions for action in row)
        replicas = count_replicas(table.layout)
        where = f" with {table.microbatches // replicas} micro-batches on {table.ranks // replicas} ranks"
    if not has_pairs:
        raise OptionError(
            f"--cf-overlap runs overlapped pairs F&B and {options.schedule} has none{where}: choose "
            f"{', '.join(list_names(pairs=True))} or {AUTO}, give a table with OVERLAP_F_B cells, or drop --cf-overlap"
        )


def prepare_table(table: ScheduleTable, *, splits: bool) -> ScheduleTable:
    """Return a training table with a reduction after the last gradients of each chunk, unless it has reductions already.

    Without ``splits``, each I becomes a B and each W is dropped, so that backwards run whole.
    """
    if not splits:
        table = replace(table, actions=tuple(tuple(make_whole(row)) for row in table.actions))
    return add_reductions(table)


def _build_named(options: Options, ranks: int, microbatches: int, offered: dict[str, Any]) -> ScheduleTable:
    """Build the table of the run's family from the ``offered`` options that the family takes; sizes are of one replica."""
    family = find_family(options)
    assert family is not None
    taken = {name: offered[name] for name in family.options if offered.get(name) is not None}
    try:
        return build(family.name, family.replicas * ranks, family.replicas * microbatches, **taken)
    except ScheduleError as error:
        if family.replicas == 1:
            raise
        raise ScheduleError(
            f"{error}; it spans {family.replicas} replicas, each of {ranks} pipeline ranks and {microbatches} micro-batches"
        ) from None


def _require_training(table: ScheduleTable, options: Options) -> None:
    try:
        validate(table, training=True)
    except ScheduleError as error:
        if options.schedule_file is None:
            raise
        raise ScheduleError(f"--cf-schedule {options.schedule_file} cannot train: {error}", error.place) from None


def _require_rising_forwards(table: ScheduleTable) -> None:
    # Each chunk draws micro-batches from its own data iterator, in order.
    for rank in range(table.ranks):
        reached: dict[int, int] = {}
        for single in table.singles(rank):
            first = 0 if table.rank_of(single.stage, 0) == rank else table.microbatches // 2
            if single.kind == "F" and single.microbatch != reached.setdefault(single.stage, first):
                raise OptionError(
                    f"{table.name}: rank {rank}: {single} is out of order; "
                    f"there each stage takes micro-batches {first}, {first + 1}, {first + 2}, …"
                )
            if single.kind == "F":
                reached[single.stage] += 1


def _require_mirrored_rows(table: ScheduleTable) -> None:
    # Ranks r and P-1-r are data-parallel peers: they reduce gradients, and expert-parallel groups that span the
    # pair exchange tokens, in the order of their rows.
    if table.layout.name != BIDIRECTIONAL:
        return
    for rank in range(table.ranks // 2):
        peer = table.ranks - 1 - rank
        here, there = ([[(s.kind, s.stage) for s in a.singles()] for a in table.actions[r]] for r in (rank, peer))
        if here != there:
            raise OptionError(
                f"{table.name}: ranks {rank} and {peer} are data-parallel peers and must run the same stages "
                "in the same order, each with its own micro-batches; their rows differ"
            )
