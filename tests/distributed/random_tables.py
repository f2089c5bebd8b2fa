"""Random valid tables: any order in which the work of all ranks could have been done."""

import random

from counterflow.schedule import Action, ScheduleTable, lay_bidirectional, lay_passes, pair
from counterflow.schedule.dependencies import Result, find_input, find_result


def make_random_table(rng: random.Random, ranks: int) -> ScheduleTable:
    """Return a valid table on a random layout, with B, I and W and pairs, micro-batches in any order."""
    microbatches = rng.randint(1, 6)
    if ranks % 2 == 0 and rng.random() < 0.2:
        layout, microbatches = lay_bidirectional(ranks), 2 * microbatches
    else:
        layout = lay_passes(ranks, "".join(rng.choice("ud") for _ in range(rng.randint(1, 3))))
    empty = ScheduleTable("random", layout, microbatches, ((),) * ranks)
    rows: list[list[Action]] = [[] for _ in range(ranks)]
    made: set[Result] = set()
    open_work = {(stage, m): rng.choice(("FB", "FIW")) for stage in range(layout.last_stage + 1) for m in range(microbatches)}

    def list_ready() -> list[Action]:
        singles = (Action(kinds[0], stage, m) for (stage, m), kinds in open_work.items())
        return [s for s in singles if (needed := find_input(s, layout.last_stage)) is None or needed in made]

    def do(single: Action) -> None:
        key = (single.stage, single.microbatch)
        open_work[key] = open_work[key][1:]
        if not open_work[key]:
            del open_work[key]
        if result := find_result(single):
            made.add(result)

    while open_work:
        ready = list_ready()
        single = rng.choice(ready)
        rank = empty.rank_of(single.stage, single.microbatch)
        mates = [s for s in ready if s.kind == "B" and empty.rank_of(s.stage, s.microbatch) == rank]
        if single.kind == "F" and mates and rng.random() < 0.5:
            backward = rng.choice(mates)
            rows[rank].append(pair(single, backward))
            do(single)
            do(backward)
        else:
            rows[rank].append(single)
            do(single)
    return ScheduleTable("random", layout, microbatches, tuple(map(tuple, rows)))
