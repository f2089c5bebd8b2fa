"""The emulated device of `make bench-eplb`: what sleeps and for how long, and that training on it computes what is drawn."""

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.device import CAUSES, COMPUTE, Device, Speeds, cap_counts, route_counts
from benchmarks.device_contestants import BIAS_STEPS, place_by_eplb, round_rows, route_without_loss
from counterflow.balance import make_workload
from tests.support.forked_ranks import run_ranks
from tests.support.training import drop_flags, list_base_flags

RANKS, EXPERTS, TOKENS, TOP_K = 4, 16, 128, 3
SPEEDS = Speeds(
    token_time=3e-4,
    token_bytes=1e3,
    expert_bytes=1e6,
    weights=3 * 32 * 16,
    node_speed=1e9,
    network_speed=1e8,
    node_of_rank=(0, 0, 1, 1),
    stretch=2.0,
)


def test_links_take_their_bytes_and_the_own_rank_none() -> None:
    # To itself nothing; 1 MB in the node 1 ms; 2 + 3 MB across 50 ms.
    assert SPEEDS.time_links(np.array([7e6, 1e6, 2e6, 3e6]), 0) == pytest.approx(1e-3 + 50e-3)


def test_a_link_sends_one_thing_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 0)
    device = Device(SPEEDS)
    weights = [torch.zeros(SPEEDS.weights, dtype=torch.bfloat16)]
    gradients = [torch.zeros(SPEEDS.weights, dtype=torch.float32)]
    # 1 MB in the node takes 1 ms; what comes later waits; gradients have twice the bytes; links do not disturb others.
    assert device.occupy("sends", 10.0, weights, 1) == pytest.approx(10.001)
    assert device.occupy("sends", 10.0, gradients, 1) == pytest.approx(10.003)
    assert device.occupy("sends", 20.0, weights, 2) == pytest.approx(20.01)
    assert device.occupy("receives", 10.0, weights, 1) == pytest.approx(10.001)


@pytest.mark.parametrize("kind", ["hot_set", "spread", "zero_ranks"])
def test_routes_have_the_counts_and_no_expert_twice(kind: str) -> None:
    counts = cap_counts(make_workload(kind, 2, 1, EXPERTS, RANKS, TOKENS, TOP_K, seed=3), TOKENS)
    assert counts.max() <= TOKENS and (counts.sum(2) == TOKENS * TOP_K).all()
    for row in counts[:, 0]:
        routed = route_counts(row, TOKENS)
        assert np.array_equal(routed.sum(0), row) and (routed.sum(1) == TOP_K).all()


def test_rounded_rows_keep_their_sums() -> None:
    shares = np.array([[1 / 3, 1 / 3, 1 / 3, 5.0], [0.5, 0.5, 0.5, 0.5]])
    assert np.array_equal(round_rows(shares).sum(1), [6, 2])


def test_what_others_do_is_done() -> None:
    counts = make_workload("hot_set", 32, 1, tokens=4096, seed=1)
    slots = place_by_eplb(counts)
    assert slots.shape == (32, 1, 72) and np.array_equal(slots.sum(2), counts.sum(2))
    fixed, theirs, biased = (loads[8:].reshape(24, 8, -1).sum(2).max(1) for loads in (counts, slots, route_without_loss(counts)))
    assert BIAS_STEPS and theirs.mean() < 0.8 * fixed.mean() and biased.mean() < 0.8 * fixed.mean()


def test_training_on_the_device_computes_what_was_drawn_and_takes_its_time(text: Path, tmp_path: Path) -> None:
    drawn = np.random.default_rng(0).multinomial(TOKENS * TOP_K, np.r_[0.3, np.full(15, 0.7 / 15)], (4, 1))
    counts = cap_counts(drawn, TOKENS)
    np.save(tmp_path / "counts.npy", counts)
    model = f"""
        --num-layers 1 --moe-layer-freq 1 --num-experts {EXPERTS} --moe-router-topk {TOP_K} --expert-model-parallel-size {RANKS}
        --global-batch-size {2 * RANKS} --eval-interval 1000 --eval-iters 0 --train-iters 2 --bf16 --cf-eplb
    """
    dropped = "--moe-router-num-groups", "--moe-router-group-topk", "--moe-router-enable-expert-bias"
    flags = drop_flags([*list_base_flags(text, tmp_path), *model.split()], *dropped, "--moe-router-bias-update-rate")
    case = {"name": "device", "plugin": True, "flags": flags, "counts": str(tmp_path / "counts.npy"), "tokens": TOKENS}
    job = {"case": {**case, "speeds": asdict(SPEEDS), "warmup": 0}, "results": str(tmp_path / "result.json")}
    run_ranks("device_worker", job, RANKS, tmp_path / "logs")
    ranks = json.loads((tmp_path / "result.json").read_text())["ranks"]
    notes = np.array([rank["notes"] for rank in ranks])
    assert notes.shape == (RANKS, 4, 5) and np.array_equal(notes[:, :, 4].sum(0), counts.sum((1, 2)))
    # The first step has homes alone, the second may have clones: no slower rank.
    homes = counts.reshape(4, RANKS, -1).sum(2)
    assert np.array_equal(notes[:, :2, 4].T, homes[:2]), "a rank computed other tokens than were drawn for its experts"
    assert (notes[:, 2:, 4].max(0) <= homes[2:].max(1)).all()
    slept = notes[:, :, 4] * SPEEDS.token_time
    forward, backward = notes[:, :, 1] - notes[:, :, 0], notes[:, :, 3] - notes[:, :, 2]
    assert (forward >= slept / 3).all() and (backward >= slept * 2 / 3).all(), "experts did not take their time"
    # Nobody leaves a layer before the slowest rank has computed: the second all-to-all waits for it.
    assert (notes[:, :, 1].min(0) - notes[:, :, 0].max(0) >= slept.max(0) / 3 - 1e-9).all()
    times = np.array([rank["times"] for rank in ranks])
    wall, clock = times[:, :, 1] - times[:, :, 0], times[:, :, 3] - times[:, :, 2]
    assert (np.ptp(clock, 0) < 1e-9).all(), "ranks disagree on how long a step took"
    account = times[:, :, 4:]
    assert np.allclose(account.sum(2), clock, atol=1e-9), "the account is not that of all the time"
    slowest, computed = slept.max(0).reshape(2, 2).sum(1), account[0, :, CAUSES.index(COMPUTE)]
    # Without clones the rank with most tokens holds up the others; with clones it may be one that waits for them.
    assert computed[0] == pytest.approx(slowest[0]) and computed[1] <= slowest[1] + 1e-9
    assert (wall.max(0) >= slept.reshape(RANKS, 2, 2).sum(2).max(0) * SPEEDS.stretch).all(), "sleeps were not stretched"
