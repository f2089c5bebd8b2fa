"""Made-up loads: nine kinds, those of the reference tool where that is there, and what each kind says of itself."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from counterflow.balance.files.loads import read_trace
from counterflow.balance.workloads import WORKLOADS, make_workload
from counterflow.errors import BalanceError
from tests.support import ROOT
from tests.support.running import check_refusal, load_module

TOOL = "shared/tools/imbalance.py"
Command = Callable[..., str]


def load_tool() -> Any:
    """The reference tool, which lies beside the repository; tests that want it skip where it is not there."""
    found = next((up / TOOL for up in ROOT.parents if (up / TOOL).exists()), None)
    if found is None:
        pytest.skip(f"no {TOOL} beside the repository")
    return load_module(found)


@pytest.mark.parametrize("kind", WORKLOADS)
def test_loads_are_those_of_the_reference_tool(kind: str) -> None:
    tool = load_tool()
    for seed, experts, ranks in ((0, 64, 8), (7, 128, 16)):
        ours = make_workload(kind, 24, 2, experts, ranks, seed=seed)
        assert np.array_equal(ours, tool.loads(kind, seed, experts, ranks, 24)), f"seed {seed}, {experts} experts"


def test_kinds_are_those_of_the_reference_tool() -> None:
    assert list(WORKLOADS) == load_tool().KINDS


@pytest.mark.parametrize("seed", [1, 2])
def test_a_workload_is_what_its_name_says(seed: int) -> None:
    made = {kind: make_workload(kind, 80, 1, seed=seed)[:, 0] for kind in WORKLOADS}
    for counts in made.values():
        assert counts.shape == (80, 64) and (counts.sum(1) == 16384 * 6).all() and counts.max() < 1.3 * 16384
    share = {kind: counts / counts.sum(1, keepdims=True) for kind, counts in made.items()}
    top = {kind: np.sort(rows, 1)[:, -4:].sum(1) for kind, rows in share.items()}
    assert top["balanced"].max() < 0.15
    assert (top["hot_set"] > 0.35).all() and len(set(np.argsort(made["hot_set"].sum(0))[-4:])) == 4
    assert share["hot_rank"][:, 24:32].sum(1).mean() == pytest.approx(0.4, abs=0.02)
    assert not made["zero_ranks"][:, :16].any() and (made["zero_ranks"][:, 16:] > 0).all()
    assert np.std(np.log(share["spread"].mean(0))) == pytest.approx(1, abs=0.35)
    hot = {kind: [frozenset(np.argsort(row)[-4:]) for row in made[kind]] for kind in ("rotating_step", "rotating_micro")}
    assert [len(set(hot["rotating_step"][first : first + 8])) for first in range(0, 80, 8)] == [1] * 10
    assert len(set(hot["rotating_step"])) == 10 and len(set(hot["rotating_micro"])) == 80
    assert np.flatnonzero(top["burst"] > 0.3).tolist() == list(range(7, 80, 10))
    far, near = (np.abs(share["drift"][lag:] - share["drift"][:-lag]).sum(1).mean() for lag in (60, 1))
    assert far > 1.5 * near


def test_the_command_writes_what_replay_reads(tmp_path: Path, command: Command) -> None:
    out = tmp_path / "loads.npz"
    said = command("balance workload drift --microbatches 12 --layers 3 --experts 16 --ranks 4 --seed 5 --out", out)
    assert np.array_equal(read_trace(out), make_workload("drift", 12, 3, 16, 4, seed=5))
    assert "drift" in said and str(out) in said and "12 micro-batches" in said
    command("balance replay --ranks 4 --warmup 4", out)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ("tepid --out {out}", "workload 'tepid'; allowed: balanced, hot_set"),
        ("hot_rank --ranks 2 --out {out}", "workload hot_rank on 2 ranks; allowed: 4 ranks or more"),
        ("zero_ranks --ranks 2 --out {out}", "workload zero_ranks on 2 ranks; allowed: 3 ranks or more"),
        (
            "drift --experts 9 --ranks 2 --out {out}",
            "9 experts on 2 ranks; allowed: more than 4 experts, a multiple of the ranks",
        ),
        ("drift --experts 4 --ranks 2 --out {out}", "4 experts on 2 ranks"),
        ("drift --top-k 65 --out {out}", "top-k 65 of 64 experts; allowed: 1 to 64"),
        ("drift --tokens 1000000000 --out {out}", "6000000000 choices of experts in a micro-batch; allowed: 2147483647"),
        ("drift --microbatches 100000000 --out {out}", "12800000000 counts of micro-batches, layers and experts"),
        ("drift --seed -1 --out {out}", "--seed -1 given; allowed: a whole number from 0 up"),
        ("drift --out {out}.txt", "allowed: a name that ends in .npz"),
        ("drift", "the following arguments are required: --out"),
    ],
)
def test_bad_input_gets_one_line(argv: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check_refusal(["balance", "workload", *argv.format(out=tmp_path / "w.npz").split()], said, capsys)


def test_sizes_that_cannot_be_are_refused() -> None:
    for wrong in ({"layers": 0}, {"ranks": 1.5}, {"seed": -1}):
        with pytest.raises(BalanceError, match="allowed: a whole number from"):
            make_workload("balanced", **wrong)
