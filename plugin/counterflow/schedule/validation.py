"""Does a table compute everything exactly once, in order, and without waiting for ever?"""

from counterflow.errors import ScheduleError
from counterflow.schedule.actions import Action
from counterflow.schedule.table import ScheduleTable


def validate(table: ScheduleTable) -> None:
    """Raise `ScheduleError`, naming rank, position and action, unless the table can run.

    A table has each (stage, micro-batch) forward once and then its backward once, whole (B) or split
    (I, then W), or has forwards alone. Sends never block (their data waits for the receiver).
    """
    forward_only = not any(single.kind != "F" for rank in range(table.ranks) for single in table.singles(rank))
    for rank in range(table.ranks):
        _check_row(table, rank, forward_only)
    _check_progress(table)


def _check_row(table: ScheduleTable, rank: int, forward_only: bool) -> None:
    held = table.layout.stages[rank]
    seen: set[tuple[str, int, int]] = set()
    needs = {"F": "", "B": "F", "I": "F", "W": "I"}
    for position, action in enumerate(table.actions[rank]):
        for single in action.singles():
            stage, m = single.stage, single.microbatch
            if stage not in held:
                raise _error(rank, position, action, f"stage {stage} is not on this rank, which holds {list(held)}")
            if not 0 <= m < table.microbatches:
                raise _error(rank, position, action, f"micro-batches are 0 to {table.microbatches - 1}")
            if (single.kind, stage, m) in seen or (single.kind in "BI" and {("B", stage, m), ("I", stage, m)} & seen):
                raise _error(rank, position, action, f"{single} is computed twice")
            if needs[single.kind] and (needs[single.kind], stage, m) not in seen:
                raise _error(rank, position, action, f"{single} comes before {stage}{needs[single.kind]}{m}")
            seen.add((single.kind, stage, m))
    for kinds in ("F",) if forward_only else ("F", "BI"):
        for stage in held:
            for m in range(table.microbatches):
                if not any((kind, stage, m) in seen for kind in kinds):
                    raise ScheduleError(f"rank {rank}: {stage}{kinds[0]}{m} is missing")
    for kind, stage, m in sorted(seen):
        if kind == "I" and ("W", stage, m) not in seen:
            raise ScheduleError(f"rank {rank}: {stage}I{m} has no {stage}W{m}")


def _check_progress(table: ScheduleTable) -> None:
    """Run every rank as far as its data allow; a rank that is left waiting is a deadlock."""
    done: set[tuple[str, int, int]] = set()
    position = [0] * table.ranks
    rows = [list(table.singles(rank)) for rank in range(table.ranks)]
    moved = True
    while moved:
        moved = False
        for rank, row in enumerate(rows):
            while position[rank] < len(row) and find_missing_input(row[position[rank]], table.layout.last_stage, done) is None:
                single = row[position[rank]]
                done.add(("F" if single.kind == "F" else "B", single.stage, single.microbatch))
                position[rank] += 1
                moved = True
    for rank, row in enumerate(rows):
        if position[rank] < len(row):
            single = row[position[rank]]
            missing = find_missing_input(single, table.layout.last_stage, done)
            raise _error(rank, position[rank], single, f"waits for ever for {missing}: the ranks wait for each other")


def find_missing_input(single: Action, last_stage: int, done: set[tuple[str, int, int]]) -> str | None:
    """Return the action whose result ``single`` still needs from a neighbouring stage, if any."""
    stage, m = single.stage, single.microbatch
    if single.kind == "F" and stage > 0 and ("F", stage - 1, m) not in done:
        return f"{stage - 1}F{m}"
    if single.kind in "BI" and stage < last_stage and ("B", stage + 1, m) not in done:
        return f"{stage + 1}B{m}"
    return None


def _error(rank: int, position: int, action: Action, what: str) -> ScheduleError:
    return ScheduleError(f"rank {rank}, position {position}, action {action}: {what}")
