"""Does a table compute everything exactly once, in order, without waiting for ever, and within its memory?"""

from counterflow.errors import ScheduleError
from counterflow.schedule.actions import REDUCTION, Action
from counterflow.schedule.costs import Costs
from counterflow.schedule.layouts import BIDIRECTIONAL
from counterflow.schedule.reductions import find_peer
from counterflow.schedule.simulation import simulate
from counterflow.schedule.table import ScheduleTable
from counterflow.schedule.timeline import HELD_AFTER
from counterflow.schedule.transport import require_transport

# What a table has to hold of every stage and micro-batch if a model is to be trained with it.
COMPLETE = "a table to train with has an F and either a B or an I with its W for every stage and micro-batch"
# What a (stage, micro-batch) needs on its own rank before each kind of action.
NEEDS = {"F": "", "B": "F", "I": "F", "W": "I"}


def validate(
    table: ScheduleTable,
    *,
    training: bool = False,
    transport: str | None = None,
    receives_ahead: int = 0,
    max_activations: float | None = None,
    max_queued: float | None = None,
) -> None:
    """Raise `ScheduleError`, naming rank, position and action, unless the table can run.

    A table has each (stage, micro-batch) forward once and then its backward once, whole (B) or split
    (I, then W), or has forwards alone, which train nothing: with ``training`` they are not enough. Gradients are reduced (R) once
    for every chunk of every rank, after its last B or W there, or nowhere. Without ``transport``, sends
    never wait, as in this project's runtime; ``blocking`` and ``batched`` are checked with ``receives_ahead`` as in `transport`.
    ``max_activations`` and ``max_queued`` bound the live activations and queued weight gradients of a rank, in micro-batches of
    1/P of the model.
    """
    if table.layout.name == BIDIRECTIONAL and table.microbatches % 2:
        raise ScheduleError(f"{table.name}: {table.microbatches} micro-batches in two directions; it needs an even number")
    forward_only = table.is_forward_only and not training
    for rank in range(table.ranks):
        _check_row(table, rank, forward_only)
        _check_memory(table, rank, max_activations, max_queued)
    _check_reductions(table)
    simulate(table, Costs())  # raises where ranks wait for each other for ever
    if transport is not None:
        require_transport(table, transport, receives_ahead)


def _check_row(table: ScheduleTable, rank: int, forward_only: bool) -> None:
    held = dict.fromkeys(table.layout.stages[rank])
    seen: set[tuple[str, int, int]] = set()
    for position, action in enumerate(table.actions[rank]):
        for single in action.singles():
            stage, m = single.stage, single.microbatch
            if stage not in held:
                raise _error(rank, position, action, f"stage {stage} is not on this rank, which holds {list(held)}")
            if single.kind in "BWR" and (REDUCTION, stage, 0) in seen:
                raise _error(
                    rank, position, action, f"{single} comes after {Action(REDUCTION, stage)}, which is the last of its chunk"
                )
            if single.kind == REDUCTION:
                seen.add((REDUCTION, stage, 0))
                continue
            if not 0 <= m < table.microbatches:
                raise _error(rank, position, action, f"micro-batches are 0 to {table.microbatches - 1}")
            if table.rank_of(stage, m) != rank:
                raise _error(rank, position, action, f"{single} belongs to rank {table.rank_of(stage, m)}")
            if (single.kind, stage, m) in seen or (single.kind in "BI" and {("B", stage, m), ("I", stage, m)} & seen):
                raise _error(rank, position, action, f"{single} is computed twice")
            if NEEDS[single.kind] and (NEEDS[single.kind], stage, m) not in seen:
                raise _error(rank, position, action, f"{single} comes before {stage}{NEEDS[single.kind]}{m}")
            seen.add((single.kind, stage, m))
        if action.parts and len({(single.stage, single.microbatch) for single in action.parts}) == 1:
            raise _error(rank, position, action, f"{action.parts[1]} needs {action.parts[0]}: the two cannot overlap")
    rule = "" if forward_only else f"; {COMPLETE}"
    for kinds in ("F",) if forward_only else ("F", "BI"):
        for stage in held:
            for m in range(table.microbatches):
                if table.rank_of(stage, m) == rank and not any((kind, stage, m) in seen for kind in kinds):
                    raise ScheduleError(f"rank {rank}: {stage}{kinds[0]}{m} is missing{rule}", (rank, None))
    for kind, stage, m in sorted(seen):
        if kind == "I" and ("W", stage, m) not in seen:
            raise ScheduleError(f"rank {rank}: {stage}I{m} has no {stage}W{m}{rule}", (rank, None))


def _check_reductions(table: ScheduleTable) -> None:
    """A table reduces the gradients of every chunk or of none; two ranks that reduce together do it in one order."""
    rows = [[action.stage for action in row if action.kind == REDUCTION] for row in table.actions]
    for rank, stages in enumerate(rows):
        if missing := sorted(set(table.layout.stages[rank]) - set(stages)) if any(rows) else []:
            raise ScheduleError(
                f"rank {rank}: {Action(REDUCTION, missing[0])} is missing; a table reduces every chunk, or none and leaves "
                "it to the trainer",
                (rank, None),
            )
        peer = find_peer(table, rank)
        if stages != rows[peer]:
            raise ScheduleError(
                f"rank {rank}: reduces the gradients of stages {stages}, and rank {peer}, which holds the same stages, those of "
                f"{rows[peer]}: the two would wait for each other for ever; give both the same order",
                (rank, None),
            )


def _check_memory(table: ScheduleTable, rank: int, max_activations: float | None, max_queued: float | None) -> None:
    share = table.layout.chunk_share
    activations = queued = 0
    for position, action in enumerate(table.actions[rank]):
        for single in action.singles():
            more, queue = HELD_AFTER[single.kind]
            activations, queued = activations + more, queued + queue
            for held, most, what in (
                (activations * share, max_activations, "live activations"),
                (queued * share, max_queued, "queued weight gradients"),
            ):
                if most is not None and held > most + 1e-9:
                    raise _error(rank, position, action, f"{held:g} micro-batches of {what}; at most {most:g} are allowed")


def _error(rank: int, position: int, action: Action, what: str) -> ScheduleError:
    return ScheduleError(f"rank {rank}, position {position}, action {action}: {what}", (rank, position))
