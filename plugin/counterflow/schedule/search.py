"""Find a fast table for measured costs under a memory cap, and say how far from the best possible it can be.

The good tables are regular: a ramp, a steady state in which every slot of every rank is an overlapped pair, a drain.
So the search is over that structure. For each layout (passes up and down the ranks, up to a number of chunks), with a regular
order in which micro-batches enter:

1. Ramp: climb over greedy policies (`greedy`), scored by what the ramp leaves possible, on a few micro-batches.
2. Drain: from the best ramps, climb over policies for the rest, scored by the makespan.
3. Stretch: the same policies build the table for all micro-batches; climb on with what time is left.

The result is never worse than the best family that fits the cap, and comes with a lower bound over the same layouts (`bound`).
"""

import itertools
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from counterflow.arrays import Array
from counterflow.bounds import show, take_number, take_whole
from counterflow.errors import ScheduleError
from counterflow.schedule import greedy
from counterflow.schedule.bound import bound_makespan
from counterflow.schedule.costs import SMALLEST_COST, Costs, PerStage
from counterflow.schedule.families import FAMILIES, build, require_size
from counterflow.schedule.families.rows import Row
from counterflow.schedule.greedy import Problem, Rows
from counterflow.schedule.layouts import Layout, lay_passes
from counterflow.schedule.reductions import add_reductions
from counterflow.schedule.simulation import simulate
from counterflow.schedule.table import ScheduleTable
from counterflow.schedule.timeline import Timeline
from counterflow.schedule.validation import validate

# Up to this many chunks a rank all ways up and down are tried; beyond, the regular ones.
MAX_FREE_PASSES = 4
RAMPS_KEPT = 3
PLANS_KEPT = 4
CANDIDATES_STRETCHED = 3
# Shares of the time: looking for plans on few micro-batches, then stretching them to all.
PLANNING_SHARE = 0.6
MAX_TURN_SECONDS = 0.6
MIN_STEPS = 30
PACE_BUILDS = 8
# The bound's programs grow with the square of the stages.
MAX_STAGES = 2**10
MAX_SEED = 2**32 - 1


@dataclass(frozen=True)
class Found:
    """What `search` found: the table, its simulation, and what to compare it with.

    ``lower_bound``: no table on the layouts that were searched is faster. ``family`` is the best family that fits
    the cap (None where none does), ``family_makespan`` its time.
    """

    table: ScheduleTable
    timeline: Timeline
    lower_bound: float
    family: str | None
    family_makespan: float | None

    @property
    def gap(self) -> float:
        """How much longer than the lower bound the table takes, as a share of it."""
        return self.timeline.makespan / self.lower_bound - 1.0


def search(
    ranks: int,
    microbatches: int,
    costs: Costs,
    *,
    max_chunks: int = 2,
    max_activations: float | None = None,
    seconds: float = 10.0,
    seed: int = 0,
    layout: Layout | None = None,
) -> Found:
    """Find a fast table on at most ``max_chunks`` chunks a rank, or on one ``layout`` that has as many.

    ``costs`` are those of the finest cut, ``max_chunks`` stages a rank (a number, or one per stage in forward order); layouts
    with fewer chunks merge neighbours. ``max_activations`` caps every rank's live activations, in micro-batches of 1/P of the
    model; queued weight gradients of tables that are found keep to the same number. Takes about ``seconds``, once compiled.
    Raises `ScheduleError` for sizes, costs, caps or seconds that nothing can meet, and for transfers that stop the ranks.
    """
    require_size(ranks, microbatches, max_chunks)
    if ranks * max_chunks > MAX_STAGES:
        raise ScheduleError(f"search: {ranks} ranks x {max_chunks} chunks given; allowed: {MAX_STAGES} stages at most")
    take_number(seconds, "search: seconds", error=ScheduleError)
    take_whole(seed, "search: seed", 0, MAX_SEED, ScheduleError)
    if not costs.p2p_overlaps:
        raise ScheduleError(
            "search: transfers that stop the ranks given; it plans for transfers that overlap, so drop that option"
        )
    cap = _choose_cap(max_activations, microbatches)
    asked = costs.spread(ranks * max_chunks)
    costs, unit = _change_unit(asked)
    _compile()
    deadline = time.monotonic() + seconds
    families = [
        known for known in list_families(ranks, microbatches, costs, max_chunks, cap) if layout in (None, known[0].layout)
    ]
    best = min(families, key=lambda known: known[1].makespan, default=None)
    layouts = list_layouts(ranks, max_chunks) if layout is None else [layout]
    candidates = _list_candidates(layouts, microbatches, costs, cap)
    lower_bound = unit * min(candidate.bound for candidate in candidates)
    tables = _search_tables(candidates, microbatches, deadline, seed, best[1].makespan if best else math.inf)
    found = [(table, _simulate_merged(table, costs)) for table in tables] + families
    if not found:
        raise ScheduleError(f"search: no table found for a cap of {cap:g} activations in {seconds:g} s; allow more of either")
    table = min(found, key=lambda known: known[1].makespan)[0]
    validate(table, max_activations=cap)
    family = (best[0].name, unit * best[1].makespan) if best else (None, None)
    return Found(table, _simulate_merged(table, asked), lower_bound, *family)


def _choose_cap(max_activations: float | None, microbatches: int) -> float:
    """Return the cap on live activations; one above all micro-batches is none."""
    if max_activations is None:
        return float(microbatches)
    if not isinstance(max_activations, int | float | np.number) or not max_activations >= 1:
        raise ScheduleError(
            f"search: a cap of {show(max_activations)} activations given; no schedule fits: the smallest cap that does is 1"
        )
    return float(min(max_activations, microbatches))


def _change_unit(costs: Costs) -> tuple[Costs, float]:
    """Return spread costs in a unit in which the largest is about 1, and that unit: a search has tolerances of its own.

    The unit is a power of two, so that no cost is rounded. Raises `ScheduleError` where nothing takes any time.
    """
    times = np.array([costs.f, costs.i, costs.w, costs.reduce])
    if not times[:3].any():
        raise ScheduleError("search: costs f, i and w of 0 given; allowed: one or more above 0, else all orders are as fast")
    unit = 2.0 ** math.frexp(max(float(times.max()), costs.p2p))[1]
    scaled = np.where(times / unit < SMALLEST_COST, 0.0, times / unit).tolist()
    p2p = costs.p2p / unit if costs.p2p / unit >= SMALLEST_COST else 0.0
    f, i, w, reduce = map(tuple, scaled)
    return replace(costs, f=f, i=i, w=w, reduce=reduce, p2p=p2p), unit


def _compile() -> None:
    """Compile the greedy, or load it compiled, so that neither counts as searching."""
    smallest = _Bench(_Candidate(lay_passes(1, "u"), (1, 1), Costs().spread(1), 1, 0.0), 1)
    smallest.build(smallest.no_policy(), smallest.no_shift(), smallest.nothing, smallest.goal)


def list_families(
    ranks: int, microbatches: int, costs: Costs, max_chunks: int, cap: float
) -> Iterator[tuple[ScheduleTable, Timeline]]:
    """Yield the families that fit the cap, simulated: each on every number of chunks that divides ``max_chunks``.

    ``costs`` are spread over the finest cut. Full DualPipe is not among them: it holds every parameter twice.
    """
    for name, options in _list_variants(max_chunks):
        try:
            table = _reduce_at_cost(build(name, ranks, microbatches, **options), costs)
        except ScheduleError:
            continue  # not for this number of micro-batches
        if max_chunks % table.layout.chunks:
            continue
        timeline = _simulate_merged(table, costs)
        if max(timeline.peak_activations) <= cap + 1e-9:
            yield table, timeline


def _list_variants(max_chunks: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the names of families that hold parameters once, with the options to try: first those of one number of chunks."""
    single = sorted((family for family in FAMILIES.values() if family.replicas == 1), key=lambda family: "vpp" in family.options)
    for family in single:
        chunks = [{"vpp": vpp} for vpp in range(2, max_chunks + 1)] if "vpp" in family.options else [{}]
        overlaps = [{"ep_overlap": on} for on in (False, True)] if "ep_overlap" in family.options else [{}]
        yield from ((family.name, {**vpp, **overlap}) for vpp in chunks for overlap in overlaps)


def merge_costs(costs: Costs, stages: int) -> Costs:
    """Return costs spread over more stages as costs of ``stages`` stages: neighbours are added up.

    Raises `ScheduleError` where the finer cut does not divide by the stages.
    """

    def merge(cost: PerStage | None) -> tuple[float, ...] | None:
        if cost is None:
            return None
        assert isinstance(cost, Sequence), "spread first"
        if len(cost) % stages:
            raise ScheduleError(
                f"costs of {len(cost)} slices of the model given for a table of {stages} stages; allowed: a multiple of "
                f"{stages}, so give more or fewer chunks a rank (--max-chunks), or leave that table out"
            )
        each = len(cost) // stages
        return tuple(sum(cost[stage * each : (stage + 1) * each]) for stage in range(stages))

    names = ("f", "i", "w", "reduce", "activation_bytes", "queued_bytes")
    merged: dict[str, Any] = {name: merge(getattr(costs, name)) for name in names}
    return replace(costs, **merged)


def _simulate_merged(table: ScheduleTable, costs: Costs) -> Timeline:
    return simulate(table, merge_costs(costs, table.layout.last_stage + 1))


def list_layouts(ranks: int, max_chunks: int) -> Iterator[Layout]:
    """Yield the layouts that are searched: looped, V, zigzag and their mixtures."""
    for chunks in (count for count in range(1, max_chunks + 1) if max_chunks % count == 0):
        if ranks == 1:
            ways = {"u" * chunks}
        elif chunks <= MAX_FREE_PASSES:
            ways = {"u" + "".join(rest) for rest in itertools.product("ud", repeat=chunks - 1)}
        else:
            ways = {"u" * chunks, ("ud" * chunks)[:chunks], ("uddu" * chunks)[:chunks]}
        for passes in sorted(ways):
            yield lay_passes(ranks, passes)


def list_entries(layout: Layout) -> list[tuple[int, int]]:
    """Return regular ways for micro-batches to enter: (how many in a group, slots between them).

    A group of n takes n x chunks slots. Best are those in which no rank has two forwards in one slot.
    """
    sizes = sorted({layout.ranks, max(1, layout.ranks // 2)}, reverse=True)
    ways = [(group, spacing) for group in sizes for spacing in (1, 2)]
    collisions = [_count_collisions(layout, *way) for way in ways]
    return [way for way, count in zip(ways, collisions, strict=True) if count == min(collisions)][:1]


def _count_collisions(layout: Layout, group: int, spacing: int) -> int:
    period = group * layout.chunks
    count = 0
    for held in layout.stages:
        slots = [(stage + spacing * place) % period for stage in held for place in range(group)]
        count += len(slots) - len(set(slots))
    return count


@dataclass(order=True)
class _Ramp:
    """A policy and handicaps for the first forwards of every rank, and the rows' beginnings that come of them."""

    score: float
    policy: Array = field(compare=False)
    shift: Array = field(compare=False)
    fixed: Rows = field(compare=False)


@dataclass(order=True)
class _Plan:
    """What builds a whole table: a ramp of so many forwards a rank, then a policy and handicaps for the rest."""

    makespan: float
    ramp: _Ramp | None = field(compare=False)
    forwards_in_ramp: int = field(compare=False)
    policy: Array = field(compare=False)
    shift: Array = field(compare=False)


@dataclass
class _Candidate:
    """A layout and a regular order, with what has been found for it on few micro-batches."""

    layout: Layout
    entry: tuple[int, int]
    costs: Costs
    cap: int
    bound: float
    ramps: list[_Ramp] = field(default_factory=list)
    plans: list[_Plan] = field(default_factory=list)
    turns: int = 0
    pace: float = 0.0

    @property
    def makespan(self) -> float:
        """The best so far."""
        return self.plans[0].makespan if self.plans else math.inf


def _list_candidates(layouts: Iterable[Layout], microbatches: int, costs: Costs, cap: float) -> list[_Candidate]:
    candidates = []
    for layout in layouts:
        merged = merge_costs(costs, layout.last_stage + 1)
        bound = bound_makespan(layout, microbatches, merged, cap)
        chunks = int(cap * layout.chunks + 1e-9)
        candidates += [_Candidate(layout, entry, merged, chunks, bound) for entry in list_entries(layout)]
    return sorted(candidates, key=lambda candidate: candidate.bound)


class _Bench:
    """The arrays that the greedy reads and fills for one candidate and number of micro-batches."""

    def __init__(self, candidate: _Candidate, microbatches: int) -> None:
        layout, (group, spacing) = candidate.layout, candidate.entry
        costs, self.microbatches = candidate.costs, microbatches
        self.ranks, self.goal = layout.ranks, layout.chunks * microbatches
        stages = layout.last_stage + 1
        each = np.asarray([costs.f, costs.i, costs.w], dtype=float)
        number = np.arange(microbatches)
        self._problem = Problem(
            stages=np.asarray(layout.stages),
            rank_of=np.asarray([layout.rank_of[stage] for stage in range(stages)]),
            entry=(number // group * group * layout.chunks + number % group * spacing).astype(float),
            costs=each,
            reduce=np.asarray(costs.reduce, dtype=float),
            slot=max(costs.overlap * float(each.sum()) / stages, 1e-9),
            p2p=float(costs.p2p),
            overlap=float(costs.overlap),
            cap=candidate.cap,
        )
        self.nothing = self.empty()

    def empty(self) -> Rows:
        """Return room for a table."""
        return Rows(
            tokens=np.zeros((self.ranks, 3 * self.goal), np.int64),
            lengths=np.zeros(self.ranks, np.int64),
            chunks=np.zeros((2, self.ranks, self.goal), np.int64),
        )

    def no_shift(self) -> Array:
        return np.zeros((3, self.ranks, self.goal))

    def no_policy(self) -> Array:
        return np.zeros((self.ranks, greedy.POLICY))

    def climb(self, policy: Array, shift: Array, seed: int, draws: int, steps: int, fixed: Rows, stop: int) -> tuple[float, Rows]:
        """Improve policy and shift in place; return the score and the table."""
        rows = self.empty()
        low, high = (0, stop) if stop < self.goal else (self._count_forwards(fixed), self.goal)
        score = greedy.climb(policy, shift, self._problem, fixed, stop, rows, seed, draws, steps, min(low, high - 1), high)
        return score, rows

    def build(self, policy: Array, shift: Array, fixed: Rows, stop: int) -> Rows:
        """Return the table of one policy."""
        return self.climb(policy, shift, 0, 0, 0, fixed, stop)[1]

    def _count_forwards(self, fixed: Rows) -> int:
        rows = zip(fixed.tokens, fixed.lengths, strict=True)
        return min(int(np.isin(tokens[:count], (greedy.F, greedy.PAIR)).sum()) for tokens, count in rows)

    def cut(self, rows: Rows, forwards: int) -> Rows:
        """Keep each rank's tokens up to its ``forwards``-th forward."""
        done = np.cumsum(np.isin(rows.tokens, (greedy.F, greedy.PAIR)), axis=1)
        return rows._replace(lengths=np.argmax(done >= forwards, axis=1) + 1)

    def measure_pace(self) -> float:
        """Return the seconds that one table takes to build."""
        begun = time.monotonic()
        self.climb(self.no_policy(), self.no_shift(), 0, PACE_BUILDS, 0, self.nothing, self.goal)
        return max(1e-6, (time.monotonic() - begun) / (PACE_BUILDS + 2))

    def measure(self, built: Rows, candidate: _Candidate) -> float:
        return simulate(_make_table(candidate.layout, self.microbatches, built, candidate.costs), candidate.costs).makespan


def _search_tables(
    candidates: list[_Candidate], microbatches: int, deadline: float, seed: int, known: float
) -> list[ScheduleTable]:
    """Return the best table found until the deadline, none where no candidate could beat ``known`` or fits the cap."""
    ranks = candidates[0].layout.ranks
    few = _choose_few(ranks, microbatches)
    begun = time.monotonic()
    turns = itertools.count(seed * 1_000_003)
    planning_ends = deadline if few == microbatches else begun + PLANNING_SHARE * (deadline - begun)
    # Halve the candidates again and again: each time those that are left have the same time between them.
    alive = [(candidate, _Bench(candidate, few)) for candidate in candidates if candidate.bound < known]
    hopeful = [candidate for candidate, _ in alive]
    rounds = max(1, math.ceil(math.log2(len(alive) or 1)) + 1)
    for number in range(rounds):
        ends = begun + (planning_ends - begun) * (number + 1) / rounds
        for place, (candidate, bench) in enumerate(alive):
            if time.monotonic() > deadline and (known < math.inf or any(one.plans for one in hopeful)):
                break
            now = time.monotonic()
            _take_turns(candidate, bench, now + max(0.0, ends - now) / (len(alive) - place), turns)
        alive.sort(key=lambda one: one[0].makespan)
        alive = alive[: math.ceil(len(alive) / 2)]
    chosen = sorted((c for c in hopeful if c.plans), key=lambda c: c.makespan)[:CANDIDATES_STRETCHED]
    if few == microbatches:
        # What was measured is the whole table.
        return [_Stretched(candidate, microbatches, candidate.plans[0]).table for candidate in chosen[:1]]
    stretched: list[_Stretched] = []
    for candidate in chosen:
        for plan in candidate.plans:
            if not stretched or time.monotonic() < deadline:
                stretched.append(_Stretched(candidate, microbatches, plan))
    best = min(stretched, key=lambda one: one.makespan, default=None)
    if best is None or best.makespan == math.inf:
        return []
    best.improve(deadline, turns)
    return [best.table]


def _choose_few(ranks: int, microbatches: int) -> int:
    """Return a number of micro-batches with a ramp, a steady state and a drain, the same modulo the ranks as all are.

    All of them where that is not many more.
    """
    few = math.ceil(2.5 * ranks)
    return microbatches if microbatches <= 4 * ranks else few + (microbatches - few) % ranks


def _take_turns(candidate: _Candidate, bench: _Bench, deadline: float, turns: Iterator[int]) -> None:
    """Look for ramps and for drains after known ramps, or for both at once, in turn; at least for a table."""
    if not candidate.pace:
        candidate.pace = bench.measure_pace()
    seconds = min(MAX_TURN_SECONDS, (deadline - time.monotonic()) / 4)
    steps = max(MIN_STEPS, int(seconds / candidate.pace))
    while True:
        _take_turn(candidate, bench, next(turns), steps)
        if time.monotonic() > deadline - seconds / 2 and candidate.turns > 1:
            break


def _take_turn(candidate: _Candidate, bench: _Bench, seed: int, steps: int) -> None:
    turn, draws = candidate.turns % 4, steps // 6
    candidate.turns += 1
    policy, shift, half = bench.no_policy(), bench.no_shift(), bench.goal // 2
    if turn == 0 and half:
        score, built = bench.climb(policy, shift, seed, draws, 2 * steps, bench.nothing, half)
        if score < greedy.NEVER:
            candidate.ramps = sorted([*candidate.ramps, _Ramp(score, policy, shift, bench.cut(built, half))])[:RAMPS_KEPT]
        return
    ramp = candidate.ramps[seed % len(candidate.ramps)] if candidate.ramps and turn < 3 else None
    fixed = ramp.fixed if ramp else bench.nothing
    score, built = bench.climb(policy, shift, seed, draws, steps, fixed, bench.goal)
    if score < greedy.NEVER:
        plan = _Plan(bench.measure(built, candidate), ramp, half, policy, shift)
        candidate.plans = sorted([*candidate.plans, plan])[:PLANS_KEPT]


class _Stretched:
    """A plan's table for all micro-batches."""

    def __init__(self, candidate: _Candidate, microbatches: int, plan: _Plan) -> None:
        self._candidate, self._bench = candidate, _Bench(candidate, microbatches)
        bench = self._bench
        self._fixed = bench.nothing
        if plan.ramp:
            built = bench.build(plan.ramp.policy, self._spread(plan.ramp.shift), bench.nothing, plan.forwards_in_ramp)
            self._fixed = bench.cut(built, plan.forwards_in_ramp)
        self._policy, self._shift = plan.policy.copy(), self._spread(plan.shift)
        self._keep(bench.build(self._policy, self._shift, self._fixed, bench.goal))

    def _spread(self, shift: Array) -> Array:
        # The first half counts from the start, the second from the end.
        spread, half = self._bench.no_shift(), shift.shape[2] // 2
        spread[:, :, :half] = shift[:, :, :half]
        spread[:, :, spread.shape[2] - (shift.shape[2] - half) :] = shift[:, :, half:]
        return spread

    def _keep(self, built: Rows) -> None:
        self.table = _make_table(self._candidate.layout, self._bench.microbatches, built, self._candidate.costs)
        complete = all(sum(1 for _ in self.table.singles(rank)) >= 2 * self._bench.goal for rank in range(self.table.ranks))
        self.makespan = simulate(self.table, self._candidate.costs).makespan if complete else math.inf

    def improve(self, deadline: float, turns: Iterator[int]) -> None:
        """Climb on until the deadline."""
        steps = max(MIN_STEPS, int(MAX_TURN_SECONDS / self._bench.measure_pace()))
        while time.monotonic() < deadline:
            policy, shift = self._policy.copy(), self._shift.copy()
            score, built = self._bench.climb(policy, shift, next(turns), 0, steps, self._fixed, self._bench.goal)
            if score < greedy.NEVER and self._bench.measure(built, self._candidate) < self.makespan:
                self._policy, self._shift = policy, shift
                self._keep(built)


def _make_table(layout: Layout, microbatches: int, built: Rows, costs: Costs) -> ScheduleTable:
    """Write the greedy's tokens as actions, with reductions where these cost anything."""
    rows = []
    for held, tokens, count, f_chunks, b_chunks in zip(layout.stages, built.tokens, built.lengths, *built.chunks, strict=True):
        row = Row()
        forwards, backwards = iter(f_chunks), iter(b_chunks)
        for token in tokens[:count]:
            match int(token):
                case greedy.F:
                    row.forward(held[next(forwards)])
                case greedy.W:
                    row.weight()
                case greedy.PAIR:
                    row.overlap(held[next(forwards)], held[next(backwards)])
                case _:
                    row.backward(held[next(backwards)], split=True)
        rows.append(tuple(row.actions))
    return _reduce_at_cost(ScheduleTable("searched", layout, microbatches, tuple(rows)), costs)


def _reduce_at_cost(table: ScheduleTable, costs: Costs) -> ScheduleTable:
    return add_reductions(table) if any(np.atleast_1d(costs.reduce)) else table
