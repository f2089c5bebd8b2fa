"""The search's inner loop, compiled: a greedy that builds a table from a few numbers, and a climb over those numbers.

The greedy runs all ranks on one clock. Whenever a rank is next to act it weighs what it could do: its next F, its next I,
both as an overlapped pair, or a queued W. Each choice has the time at which it could start; the policy adds a handicap (in
time) to it, and the smallest sum wins. So a policy can wait for a partner, hold forwards back, or hurry an input gradient.

Which chunk's F or I is next follows from availability and from the place of the micro-batch in a regular order: in the
steady state each slot has one F and one B on every rank; stage s of a micro-batch that entered at slot n falls on slot n + s,
and its B on slot n + 2S - 1 - s. How much that order counts against availability is part of the policy too.

`simulate` is the reference for the times found here.
"""

from typing import NamedTuple

import numpy as np

from counterflow.arrays import Array
from counterflow.compiling import compile_fast

# Tokens of a row, in the order of execution. Which stage and micro-batch they mean follows from the chunk orders.
F, I, W, PAIR = range(4)  # noqa: E741

# A rank's policy: handicaps in time, unless said otherwise.
RAMP = 0  # so many first backwards are the ramp (a count)
PAIR_IN_RAMP = 1
PAIR_LATER = 2  # an advantage
LATE_F = 3  # a lone F after the first backward
LONE_F = 4  # so many lone F's are free (a count)
FURTHER_F = 5  # each lone F beyond
I_IN_RAMP = 6  # an advantage
I_LATER = 7  # a lone I while there are forwards left
W_IN_RAMP = 8
W_LATER = 9
W_IN_DRAIN = 10
ORDER_F_FIRST = 11  # weight of the regular order among F's before the first backward
ORDER_F = 12
ORDER_B = 13
LAST = 14  # so many last F's hurry (a count)
F_IN_LAST = 15  # an advantage of a lone F among them
RESERVE = 16  # chunks of memory that an F leaves free for each deeper chunk of the rank (a count)
POLICY = 17

NEVER = 1e18
# Besides the slowest rank, all ranks count a little: it tells near from far among equals.
MEAN_WEIGHT = 0.05


class Problem(NamedTuple):
    """What a table is built for.

    ``stages[rank, chunk]``, ``rank_of[stage]``, ``entry[micro-batch]`` the slot of its stage 0 in the regular order, ``slot`` its
    length, ``costs[F/I/W, stage]``, ``reduce[stage]`` of a chunk's gradient reduction, and the cap in chunks: on a rank's live
    activations, and on its queued weight gradients.
    """

    stages: Array
    rank_of: Array
    entry: Array
    costs: Array
    reduce: Array
    slot: float
    p2p: float
    overlap: float
    cap: int


class Rows(NamedTuple):
    """Rows of a table: ``tokens[rank, n]``, ``lengths[rank]`` how many there are, ``chunks[F or I, rank, n]`` of its n-th."""

    tokens: Array
    lengths: Array
    chunks: Array


@compile_fast
def build_greedily(policy: Array, shift: Array, problem: Problem, given: Rows, stop: int, rows: Rows) -> float:
    """Fill ``rows`` with a table; return its score.

    ``policy[rank]`` holds the numbers above, ``shift[F/I/pair, rank, n]`` a handicap of the rank's n-th F, I or pair. The rows
    ``given`` come first. With ``stop`` F's per rank below all, ends once every rank has run them. Score: the makespan, or what a
    stopped table still allows, and a little of the ranks' mean; `NEVER` where the cap is too small.
    """
    # One long function on purpose: taken apart, with its state handed over, it ran four to ten times slower.
    stages, rank_of, entry, costs, reduce, slot, p2p, overlap, cap = problem
    f, i, w = costs[0], costs[1], costs[2]
    given_tokens, given_lengths, given_chunks = given
    tokens, lengths, chunks = rows
    ranks, per_rank = stages.shape
    total = rank_of.shape[0]
    microbatches = entry.shape[0]
    goal = per_rank * microbatches
    f_end = np.full((total, microbatches), -1.0)
    b_end = np.full((total, microbatches), -1.0)
    f_next = np.zeros((ranks, per_rank), np.int64)
    b_next = np.zeros((ranks, per_rank), np.int64)
    f_done = np.zeros(ranks, np.int64)
    b_done = np.zeros(ranks, np.int64)
    held = np.zeros(ranks, np.int64)
    lone_f = np.zeros(ranks, np.int64)
    lone_b = np.zeros(ranks, np.int64)
    clock = np.zeros(ranks)
    # Of each stage, the micro-batches whose weight gradient is there; of each rank, when its last reduction ends.
    weighted = np.zeros(total, np.int64)
    reduced = np.zeros(ranks)
    worked = np.zeros(ranks)
    allowed = np.full(ranks, -1.0)
    queue = np.zeros((ranks, goal), np.int64)
    head = np.zeros(ranks, np.int64)
    tail = np.zeros(ranks, np.int64)
    # Each rank's best choice, found anew when something it depends on has changed.
    choice = np.full(ranks, -1)
    start = np.zeros(ranks)
    f_choice = np.zeros(ranks, np.int64)
    b_choice = np.zeros(ranks, np.int64)
    changed = np.ones(ranks, np.bool_)
    lengths[:] = 0
    finished = 0
    stopped = 0
    while finished < ranks and stopped < ranks:
        acting = -1
        for rank in range(ranks):
            if changed[rank]:
                changed[rank] = False
                choice[rank] = -1
                mine = policy[rank]
                now = clock[rank]
                forced = given_tokens[rank, lengths[rank]] if lengths[rank] < given_lengths[rank] else -1
                f_time = b_time = NEVER
                if f_done[rank] < goal and (forced < 0 or forced in (F, PAIR)):
                    weight = slot * (mine[ORDER_F] if b_done[rank] else mine[ORDER_F_FIRST])
                    best = NEVER
                    for chunk in range(per_rank):
                        m = f_next[rank, chunk]
                        if m >= microbatches:
                            continue
                        if forced >= 0:
                            if given_chunks[0, rank, f_done[rank]] != chunk:
                                continue
                        elif held[rank] + 1 > cap - (per_rank - 1 - chunk) * mine[RESERVE]:
                            continue
                        stage = stages[rank, chunk]
                        time = now
                        if stage > 0:
                            before = f_end[stage - 1, m]
                            if before < 0:
                                continue
                            if rank_of[stage - 1] != rank:
                                before += p2p
                            time = max(time, before)
                        key = time + weight * (entry[m] + stage)
                        if key < best:
                            best = key
                            f_time = time
                            f_choice[rank] = chunk
                if b_done[rank] < goal and forced != F and forced != W:
                    weight = slot * mine[ORDER_B]
                    best = NEVER
                    for chunk in range(per_rank):
                        m = b_next[rank, chunk]
                        if m >= f_next[rank, chunk] or (forced >= 0 and given_chunks[1, rank, b_done[rank]] != chunk):
                            continue
                        stage = stages[rank, chunk]
                        time = now
                        if stage < total - 1:
                            before = b_end[stage + 1, m]
                            if before < 0:
                                continue
                            if rank_of[stage + 1] != rank:
                                before += p2p
                            time = max(time, before)
                        key = time + weight * (entry[m] + total - 1 - stage)
                        if key < best:
                            best = key
                            b_time = time
                            b_choice[rank] = chunk
                if forced >= 0:
                    both = max(f_time, b_time)
                    time = f_time if forced == F else now if forced == W else both if forced == PAIR else b_time
                    if time < NEVER:
                        choice[rank] = forced
                        start[rank] = time
                else:
                    ramp = b_done[rank] < mine[RAMP]
                    forwards_left = f_done[rank] < goal
                    best = NEVER
                    if f_time < NEVER and b_time < NEVER:
                        time = max(f_time, b_time)
                        key = time + (mine[PAIR_IN_RAMP] if ramp else -mine[PAIR_LATER]) + shift[2, rank, f_done[rank]]
                        if key < best:
                            best = key
                            choice[rank] = PAIR
                            start[rank] = time
                    if f_time < NEVER:
                        key = f_time + shift[0, rank, f_done[rank]]
                        if b_done[rank] > 0:
                            key += mine[LATE_F]
                        if goal - f_done[rank] <= mine[LAST]:
                            key -= mine[F_IN_LAST]
                        elif lone_f[rank] >= mine[LONE_F]:
                            key += mine[FURTHER_F]
                        if key < best:
                            best = key
                            choice[rank] = F
                            start[rank] = f_time
                    if b_time < NEVER and tail[rank] - head[rank] < cap:
                        handicap = -mine[I_IN_RAMP] if ramp else mine[I_LATER] if forwards_left else 0.0
                        key = b_time + shift[1, rank, b_done[rank]] + handicap
                        if key < best:
                            best = key
                            choice[rank] = I
                            start[rank] = b_time
                    if head[rank] < tail[rank]:
                        handicap = mine[W_IN_RAMP] if ramp else mine[W_LATER] if forwards_left else mine[W_IN_DRAIN]
                        key = now + (handicap if b_done[rank] < goal else 0.0)
                        if key < best:
                            best = key
                            choice[rank] = W
                            start[rank] = now
            if choice[rank] >= 0 and (acting < 0 or start[rank] < start[acting]):
                acting = rank
        if acting < 0:
            return NEVER
        rank = acting
        kind = choice[rank]
        tokens[rank, lengths[rank]] = kind
        lengths[rank] += 1
        f_stage = b_stage = w_stage = -1
        f_m = b_m = 0
        if kind in (F, PAIR):
            chunk = f_choice[rank]
            f_stage = stages[rank, chunk]
            f_m = f_next[rank, chunk]
            f_next[rank, chunk] += 1
            chunks[0, rank, f_done[rank]] = chunk
            f_done[rank] += 1
        if kind in (I, PAIR):
            chunk = b_choice[rank]
            b_stage = stages[rank, chunk]
            b_m = b_next[rank, chunk]
            b_next[rank, chunk] += 1
            chunks[1, rank, b_done[rank]] = chunk
            b_done[rank] += 1
        if kind == F:
            work = f[f_stage]
            held[rank] += 1
            lone_f[rank] += 1
        elif kind == I:
            work = i[b_stage]
            queue[rank, tail[rank]] = b_stage
            tail[rank] += 1
            lone_b[rank] += 1
            held[rank] -= 1
        elif kind == W:
            w_stage = queue[rank, head[rank]]
            work = w[w_stage]
            head[rank] += 1
        else:
            work = f[f_stage] + i[b_stage] + w[b_stage]
        end = start[rank] + (overlap * work if kind == PAIR else work)
        clock[rank] = end
        worked[rank] += work
        changed[rank] = True
        if kind == PAIR:
            w_stage = b_stage
        if w_stage >= 0:
            weighted[w_stage] += 1
            if weighted[w_stage] == microbatches:
                reduced[rank] = max(reduced[rank], end) + reduce[w_stage]
        if f_stage >= 0:
            f_end[f_stage, f_m] = end
            if f_stage < total - 1:
                changed[rank_of[f_stage + 1]] = True
        if b_stage >= 0:
            b_end[b_stage, b_m] = end
            if b_stage > 0:
                changed[rank_of[b_stage - 1]] = True
        if f_stage >= 0 and f_done[rank] == stop and stop < goal:
            stopped += 1
            # The rank's makespan if from here on it never idles and pairs all that can still be paired.
            everything = 0.0
            back = 0.0
            for chunk in range(per_rank):
                stage = stages[rank, chunk]
                everything += microbatches * (f[stage] + i[stage] + w[stage])
                back += (i[stage] + w[stage]) / per_rank
            alone = max(0, lone_f[rank] - lone_b[rank]) * back
            allowed[rank] = end + overlap * (everything - worked[rank]) + (1.0 - overlap) * alone
        if f_done[rank] == goal and b_done[rank] == goal and head[rank] == tail[rank]:
            finished += 1
            choice[rank] = -1
            changed[rank] = False
    if stop < goal:
        return float(allowed.max() + MEAN_WEIGHT * allowed.mean())
    ends = np.maximum(clock, reduced)
    return float(ends.max() + MEAN_WEIGHT * ends.mean())


@compile_fast
def draw_policy(policy: Array, unit: float) -> None:
    """Draw one random policy for all ranks; ``unit`` is a chunk's F."""
    ranks = policy.shape[0]
    one = np.zeros(POLICY)
    one[RAMP] = np.random.uniform(0.0, 2.0 * ranks)
    one[PAIR_IN_RAMP] = np.random.normal() * 2.0 * unit
    one[LONE_F] = np.random.uniform(0.5, 8.0) * ranks
    for name in (PAIR_LATER, I_IN_RAMP, W_IN_RAMP, F_IN_LAST):
        one[name] = np.random.exponential() * 2.0 * unit
    for name in (LATE_F, W_IN_DRAIN):
        one[name] = np.random.exponential() * unit
    for name in (FURTHER_F, I_LATER, W_LATER):
        one[name] = np.random.exponential() * 4.0 * unit
    weights = (0.0, 0.01, 0.3, 1.0, 3.0)
    for name in (ORDER_F_FIRST, ORDER_F, ORDER_B):
        one[name] = weights[np.random.randint(5)]
    one[RESERVE] = np.random.randint(2)
    slope_ramp = np.random.normal() * 2.0
    slope_f = np.random.normal()
    last = np.random.uniform(-2.0, 6.0)
    slope_last = np.random.normal() * 0.7
    for rank in range(ranks):
        policy[rank] = one
        from_middle = rank - (ranks - 1) / 2
        policy[rank, RAMP] = max(0.0, one[RAMP] + slope_ramp * from_middle)
        policy[rank, LONE_F] = one[LONE_F] + slope_f * from_middle
        policy[rank, LAST] = last + slope_last * from_middle


@compile_fast
def change_policy(policy: Array, unit: float, scratch: Array) -> None:
    """Change one number of the policy: on all ranks, along the ranks, or on one."""
    ranks = policy.shape[0]
    name = np.random.randint(RESERVE)
    counts = name in (RAMP, LONE_F, LAST)
    way = np.random.randint(4)
    if way == 0:
        draw_policy(scratch, unit)
        policy[:, name] = scratch[:, name]
    elif way == 1 and counts:
        slope = np.random.normal() * 0.5
        for rank in range(ranks):
            policy[rank, name] += slope * (rank - (ranks - 1) / 2)
    else:
        scale = np.random.normal() * 0.3
        step = np.random.normal() * (2.0 if counts else 0.1 * unit)
        only = np.random.randint(ranks)
        for rank in range(ranks):
            if way < 3 or rank == only:
                policy[rank, name] += scale * policy[rank, name] + step


@compile_fast
def change_shift(shift: Array, unit: float, low: int, high: int) -> None:
    """Change the handicap of one to three actions among each rank's ``low``-th to ``high``-th."""
    for _ in range(1 + np.random.randint(3)):
        kind = np.random.randint(3)
        rank = np.random.randint(shift.shape[1])
        place = low + np.random.randint(high - low)
        if np.random.randint(5) == 0:
            shift[kind, rank, place] = 0.0
        else:
            shift[kind, rank, place] += np.random.normal() * 2.0 * unit


@compile_fast
def climb(
    policy: Array, shift: Array, problem: Problem, given: Rows, stop: int, rows: Rows, seed: int, draws: int, steps: int,
    low: int, high: int,
) -> float:  # fmt: skip
    """Improve a policy in place: the best of itself and ``draws`` random ones, then ``steps`` changes, accepted as in annealing.

    Of each rank's actions, the ``low``-th to ``high``-th get handicaps of their own. Leaves the best table in ``rows``; returns
    its score.
    """
    np.random.seed(seed)
    unit = problem.slot / (3.0 * problem.overlap)
    scratch = policy.copy()
    best_policy = policy.copy()
    best_shift = shift.copy()
    best = NEVER
    for draw in range(draws + 1):
        if draw > 0:
            draw_policy(policy, unit)
        score = build_greedily(policy, shift, problem, given, stop, rows)
        if score < best:
            best = score
            best_policy[:] = policy
    policy[:] = best_policy
    current = best
    kept_policy = policy.copy()
    kept_shift = shift.copy()
    for step in range(steps):
        warmth = 0.06 * unit * 0.1 ** (step / steps)
        if step < steps // 3 or np.random.randint(10) < 4:
            change_policy(policy, unit, scratch)
        else:
            change_shift(shift, unit, low, high)
        score = build_greedily(policy, shift, problem, given, stop, rows)
        if score <= current or np.random.random() < np.exp((current - score) / warmth):
            current = score
            kept_policy[:] = policy
            kept_shift[:] = shift
            if score < best - 1e-9:
                best = score
                best_policy[:] = policy
                best_shift[:] = shift
        else:
            policy[:] = kept_policy
            shift[:] = kept_shift
    policy[:] = best_policy
    shift[:] = best_shift
    return build_greedily(policy, shift, problem, given, stop, rows)
