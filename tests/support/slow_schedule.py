"""Tables of all families, drawn at random, and the obvious simulation of a table: what fast code is compared with."""

from collections.abc import Callable

from hypothesis import strategies as st

from counterflow.schedule import FAMILIES, Action, Costs, ScheduleTable, Span, build
from counterflow.schedule.dependencies import find_input, find_result

Change = Callable[[int, Action], float]


def _make_table(name: str, ranks: int, extra: int, vpp: int, ep_overlap: bool) -> ScheduleTable:
    if name == "interleaved":
        return build(name, ranks, ranks * (1 + extra % 4), vpp=vpp, ep_overlap=ep_overlap)
    if name == "dualpipe":
        return build(name, ranks + ranks % 2, 2 * (ranks + ranks % 2) + 2 * (extra // 2))
    return build(name, ranks, 2 * ranks + extra)


any_table = st.builds(
    _make_table, st.sampled_from(sorted(FAMILIES)), st.integers(2, 6), st.integers(0, 9), st.integers(2, 4), st.booleans()
)


def change_nothing(rank: int, action: Action) -> float:
    return 0.0


def run_slowly(
    table: ScheduleTable, costs: Costs, longer: Change = change_nothing, later: Change = change_nothing, began: float = 0.0
) -> tuple[list[list[Span]], list[list[Span]]]:
    """Run each rank's next action as soon as its inputs are there; return each rank's spans of actions, and of reductions.

    The run begins at ``began``. An action takes so much ``longer``, and begins so much ``later``, than it could.
    """
    costs = costs.spread(table.layout.last_stage + 1)
    made: dict[object, tuple[int, float]] = {}
    reached: dict[tuple[int, int], float] = {}
    clock, left = [began] * table.ranks, [list(row) for row in table.actions]
    spans: list[list[Span]] = [[] for _ in left]
    while any(left):
        for rank, row in enumerate(left):
            while row:
                action = row[0]
                needs = [need for one in action.singles() if (need := find_input(one, table.layout.last_stage))]
                if not all(need in made for need in needs):
                    break
                row.pop(0)
                if action.kind == "R":
                    reached[rank, action.stage] = clock[rank]
                    continue
                arrivals = [end + (costs.p2p if maker != rank else 0.0) for maker, end in map(made.__getitem__, needs)]
                start = max(clock[rank], *arrivals, began) + later(rank, action)
                clock[rank] = start + costs.time(action) + longer(rank, action)
                spans[rank].append(Span(rank, action, start, clock[rank]))
                made |= {find_result(one): (rank, clock[rank]) for one in action.singles()}
    return spans, _run_reductions(table, costs, reached)


def _run_reductions(table: ScheduleTable, costs: Costs, reached: dict[tuple[int, int], float]) -> list[list[Span]]:
    """Return each rank's reductions: one after the other, each once all ranks with the stage have come to it."""
    spans: list[list[Span]] = [[] for _ in table.actions]
    for rank, row in enumerate(table.actions):
        free = 0.0
        for action in (action for action in row if action.kind == "R"):
            mates = [other for other, held in enumerate(table.layout.stages) if action.stage in held]
            start = max(free, *(reached[mate, action.stage] for mate in mates))
            free = start + costs.reduce[action.stage]  # type: ignore[index]
            spans[rank].append(Span(rank, action, start, free))
    return spans
