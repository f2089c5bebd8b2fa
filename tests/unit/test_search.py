"""The search: exact against `simulate` and a brute force, never worse than a family, never below its bound."""

import math
from collections.abc import Iterator
from importlib import import_module
from time import process_time
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from counterflow.schedule import Costs, Layout, ScheduleError, add_reductions, build, greedy, lay_passes, simulate, validate
from counterflow.schedule.bound import bound_makespan
from counterflow.schedule.search import _Bench, _Candidate, _make_table, list_families, list_layouts, merge_costs, search

UNEVEN = [0.25, 0.5, 0.5, 1.0, 1.0, 2.0]


def find_best_by_brute_force(layout: Layout, microbatches: int, costs: Costs, cap: int) -> float:
    """Try every order of F, I, W, B and pairs: each next action of any rank, in rising order of start."""
    costs = costs.spread(layout.last_stage + 1)
    f, i, w = list(costs.f), list(costs.i), list(costs.w)  # type: ignore[arg-type]
    last, ranks = layout.last_stage, layout.ranks
    best = math.inf
    everything = microbatches * layout.chunks
    State = tuple[Any, ...]  # noqa: N806

    def arrive(ends: dict[tuple[int, int], float], stage: int, m: int, rank: int) -> float | None:
        end = ends.get((stage, m))
        return None if end is None else end + (costs.p2p if layout.rank_of[stage] != rank else 0.0)

    def choices(rank: int, fs: dict[Any, float], bs: dict[Any, float], queue: tuple[int, ...], live: int) -> Iterator[State]:
        forwards, backwards = [], []
        for stage in layout.stages[rank]:
            m = sum((stage, n) in fs for n in range(microbatches))
            ready = 0.0 if stage == 0 else arrive(fs, stage - 1, m, rank)
            if m < microbatches and ready is not None and live < cap:
                forwards.append((ready, stage, m))
            m = sum((stage, n) in bs for n in range(microbatches))
            ready = 0.0 if stage == last else arrive(bs, stage + 1, m, rank)
            if m < microbatches and ready is not None and (stage, m) in fs:
                backwards.append((ready, stage, m))
        for ready, stage, m in forwards:
            yield ready, f[stage], ((stage, m),), (), queue, live + 1
        for ready, stage, m in backwards:
            yield ready, i[stage], (), ((stage, m),), (*queue, stage), live - 1
            for other, front, n in forwards:
                time = costs.overlap * (f[front] + i[stage] + w[stage])
                yield max(ready, other), time, ((front, n),), ((stage, m),), queue, live
        if queue:
            yield 0.0, w[queue[0]], (), (), queue[1:], live

    def descend(clock: tuple[float, ...], since: float, fs: Any, bs: Any, queues: Any, live: tuple[int, ...]) -> None:
        nonlocal best
        if not any(queues) and len(bs) == everything * ranks:
            best = min(best, max(clock))
            return
        for rank in range(ranks):
            for ready, time, new_f, new_b, queue, held in choices(rank, fs, bs, queues[rank], live[rank]):
                start = max(clock[rank], ready)
                if start < since - 1e-12 or start + time >= best:
                    continue
                end = start + time
                descend(
                    (*clock[:rank], end, *clock[rank + 1 :]), start,
                    fs | dict.fromkeys(new_f, end), bs | dict.fromkeys(new_b, end),
                    (*queues[:rank], queue, *queues[rank + 1 :]), (*live[:rank], held, *live[rank + 1 :]),
                )  # fmt: skip

    descend((0.0,) * ranks, 0.0, {}, {}, ((),) * ranks, (0,) * ranks)
    return best


@pytest.mark.parametrize(
    ("passes", "microbatches", "costs", "cap"),
    [
        ("u", 2, Costs(overlap=0.8), 2),
        ("u", 2, Costs(1, 2, 0.5, p2p=0.25, overlap=0.7), 2),
        ("u", 2, Costs([1, 3], [1, 3], [1, 3], overlap=0.8), 1),
    ],
)
def test_the_bound_is_below_and_the_search_at_the_best_of_all_tables(
    passes: str, microbatches: int, costs: Costs, cap: int
) -> None:
    layout = lay_passes(2, passes)
    best = find_best_by_brute_force(layout, microbatches, costs, cap)
    assert bound_makespan(layout, microbatches, costs, cap) <= best + 1e-9
    found = search(2, microbatches, costs, max_chunks=len(passes), max_activations=cap, seconds=0.5)
    assert found.timeline.makespan == pytest.approx(best)


@settings(max_examples=60)
@given(st.integers(1, 5), st.text("ud", min_size=1, max_size=3), st.integers(1, 9), st.integers(0, 2**31), st.data())
def test_the_compiled_times_are_those_of_the_simulation(
    ranks: int, passes: str, microbatches: int, seed: int, data: st.DataObject
) -> None:
    layout = lay_passes(ranks, passes)
    f, i, w, reduce = (
        data.draw(st.lists(st.sampled_from(UNEVEN), min_size=ranks * len(passes), max_size=ranks * len(passes))) for _ in "fiwr"
    )
    costs = Costs(
        f, i, w, reduce=reduce, p2p=data.draw(st.sampled_from([0, 0.3])), overlap=data.draw(st.sampled_from([0.7, 1.0]))
    )
    bench = _Bench(_Candidate(layout, (ranks, 2), costs, data.draw(st.integers(2, 20)), 0.0), microbatches)
    score, built = bench.climb(bench.no_policy(), bench.no_shift(), seed, 3, 10, bench.nothing, bench.goal)
    if score < greedy.NEVER:
        table = _make_table(layout, microbatches, built, costs)
        validate(table)
        timeline = simulate(table, costs)
        spans = timeline.spans + timeline.reductions
        ends = [max(span.end for span in spans if span.rank == rank) for rank in range(ranks)]
        assert score == pytest.approx(max(ends) + greedy.MEAN_WEIGHT * sum(ends) / ranks)


@settings(max_examples=300)
@given(
    st.data(),
    st.sampled_from(["gpipe", "1f1b", "zb-h1", "zbv", "dualpipev", "interleaved"]),
    st.integers(1, 5),
    st.integers(0, 8),
)
@pytest.mark.slow
def test_no_family_beats_the_bound(data: st.DataObject, name: str, ranks: int, extra: int) -> None:
    options = {"ep_overlap": True, "vpp": data.draw(st.integers(2, 4))} if name == "interleaved" else {}
    ranks = max(2, ranks) if options else ranks
    table = build(name, ranks, ranks * (1 + extra % 4) if options else 2 * ranks + extra, **options)
    stages = table.layout.last_stage + 1
    f, i, w, reduce = (data.draw(st.lists(st.sampled_from(UNEVEN), min_size=stages, max_size=stages)) for _ in range(4))
    p2p, overlap = data.draw(st.sampled_from([0, 0.1, 1.5])), data.draw(st.sampled_from([0.6, 0.8, 1.0]))
    costs = Costs(f, i, w, p2p=p2p, overlap=overlap, reduce=reduce)
    timeline = simulate(add_reductions(table), costs)
    bound = bound_makespan(table.layout, table.microbatches, costs, max(timeline.peak_activations))
    assert bound <= timeline.makespan * (1 + 1e-9), "a bound above a table that exists"


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(
    ("ranks", "microbatches", "chunks", "cap", "costs"),
    [
        (4, 12, 2, 4.5, Costs(0.5, 0.5, 0.5, overlap=0.8)),
        (4, 8, 4, 6.0, Costs([0.25] * 15 + [0.75], 0.25, 0.25, p2p=0.1, overlap=0.7)),
        (3, 7, 1, 2.0, Costs(1, 1, 1, p2p=0.5)),
        (1, 3, 2, 1.0, Costs(overlap=0.5)),
        (2, 40, 2, None, Costs(overlap=0.9)),
    ],
)
def test_what_is_found_is_valid_and_no_worse_than_a_family(
    ranks: int, microbatches: int, chunks: int, cap: float | None, costs: Costs, seed: int
) -> None:
    found = search(ranks, microbatches, costs, max_chunks=chunks, max_activations=cap, seconds=0.5, seed=seed)
    validate(found.table, max_activations=cap)
    spread = costs.spread(ranks * chunks)
    again = simulate(found.table, merge_costs(spread, found.table.layout.last_stage + 1))
    assert again.makespan == found.timeline.makespan
    assert found.lower_bound <= found.timeline.makespan + 1e-9
    for table, timeline in list_families(ranks, microbatches, spread, chunks, math.inf if cap is None else cap):
        assert found.timeline.makespan <= timeline.makespan + 1e-9, f"{table.name} is faster"


@pytest.mark.slow
def test_a_search_beats_the_families_where_stages_are_uneven(monkeypatch: pytest.MonkeyPatch) -> None:
    # Two seconds of the processor: on a busy machine two of the wall clock may be hardly any.
    module = import_module("counterflow.schedule.search")
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=process_time))
    each = [0.5] * 7 + [1.0]
    found = search(4, 16, Costs(each, each, each, overlap=0.8), max_chunks=2, max_activations=6, seconds=2)
    assert found.family is not None and found.family_makespan is not None
    assert found.timeline.makespan < 0.995 * found.family_makespan
    assert found.gap < 0.1


def test_layouts_cover_looped_v_and_zigzag() -> None:
    names = {layout.name for layout in list_layouts(4, 4)}
    assert {"straight", "looped", "v", "zigzag", "uddu"} <= names
    assert {layout.chunks for layout in list_layouts(2, 6)} == {1, 2, 3, 6}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"max_activations": 0.5}, "a cap of 0.5 activations given; no schedule fits: the smallest cap that does is 1"),
        ({"max_activations": math.nan}, "a cap of nan activations given"),
        ({"max_chunks": 0}, "chunks 0 given; allowed: a whole number from 1"),
        ({"costs": Costs(p2p_overlaps=False)}, "transfers that stop the ranks given"),
        ({"costs": Costs(f=[1, 2, 3])}, "cost f has 3 numbers; the layout has 8 stages"),
    ],
)
def test_what_cannot_be_searched_is_named(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ScheduleError, match=said):
        search(4, 8, **({"costs": Costs(), "seconds": 0.1} | arguments))
