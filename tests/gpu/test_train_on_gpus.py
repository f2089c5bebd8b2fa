"""The example on real GPUs; ready for a machine that has two or more. Not run so far."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from counterflow.balance.files.recorded import read_record
from counterflow.schedule import load_record
from counterflow.schedule.sharing import find_sharing

torch = pytest.importorskip("torch")
TRAIN = Path(__file__).resolve().parents[2] / "examples" / "pretrain_moe" / "train.py"
LOSS = re.compile(r"^step +\d+/\d+  loss ([\d.]+)", re.MULTILINE)

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


def train(directory: Path, schedule: str, *flags: str, ranks: int = 2) -> list[float]:
    command = [sys.executable, str(TRAIN), "--dir", str(directory), "--platform", "cuda", "--schedule", schedule]
    done = subprocess.run([*command, "--iters", "8", "--ranks", str(ranks), *flags], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [float(loss) for loss in LOSS.findall(done.stdout)]


def test_dualpipev_over_nccl_learns_and_its_recorded_timeline_is_on_one_clock(tmp_path: Path) -> None:
    losses = train(tmp_path / "run", "dualpipev", "--cf-record", str(tmp_path / "record"))
    assert losses[-1] < losses[0]
    timeline = load_record(tmp_path / "record", step=5)
    assert all(span.end > span.start for span in timeline.spans)
    assert 0 < timeline.bubble < 1


def test_schedules_agree_over_nccl_from_one_checkpoint(tmp_path: Path) -> None:
    train(tmp_path / "run", "dualpipev")
    start = ["--load", str(tmp_path / "run" / "checkpoints"), "--finetune", "--no-load-optim", "--no-load-rng"]
    reference = train(tmp_path / "a", "1f1b", *start)
    assert train(tmp_path / "b", "dualpipev", *start) == pytest.approx(reference, rel=1e-3)


def test_overlapped_pairs_agree_on_cuda_streams(tmp_path: Path) -> None:
    flags = ["--bf16", "--expert-model-parallel-size", "2"]
    if torch.cuda.device_count() < 4:
        pytest.skip("needs four GPUs: two pipeline ranks of two expert-parallel ranks")
    train(tmp_path / "run", "dualpipev", *flags, ranks=4)
    start = ["--load", str(tmp_path / "run" / "checkpoints"), "--finetune", "--no-load-optim", "--no-load-rng"]
    reference = train(tmp_path / "a", "dualpipev", *flags, *start, ranks=4)
    found = train(tmp_path / "b", "dualpipev", *flags, *start, "--cf-overlap", ranks=4)
    assert found == pytest.approx(reference, rel=1e-3)


HANDED_OVER = {
    "alltoall": [],
    "alltoall, recomputed": ["--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", "1"],
    "allgather": ["--moe-token-dispatcher-type", "allgather"],
    "flex": ["--moe-grouped-gemm", "--moe-token-dispatcher-type", "flex", "--moe-flex-dispatcher-backend", "deepep"],
}


@pytest.mark.parametrize("kind", HANDED_OVER)
def test_pairs_by_hand_over_are_recorded_on_cuda_streams(tmp_path: Path, kind: str) -> None:
    """The losses are those without, and CUDA events give turns, waits and, of torch's own transfers, completions."""
    if torch.cuda.device_count() < 4:
        pytest.skip("needs four GPUs: two pipeline ranks of two expert-parallel ranks")
    if kind == "flex":
        pytest.importorskip("transformer_engine")
        pytest.importorskip("deep_ep")
    flags = ["--bf16", "--expert-model-parallel-size", "2", *HANDED_OVER[kind]]
    train(tmp_path / "run", "dualpipev", *flags, ranks=4)
    start = ["--load", str(tmp_path / "run" / "checkpoints"), "--finetune", "--no-load-optim", "--no-load-rng"]
    reference = train(tmp_path / "a", "dualpipev", *flags, *start, ranks=4)
    overlapped = [*start, "--cf-overlap", "--cf-record", str(tmp_path / "record")]
    assert train(tmp_path / "b", "dualpipev", *flags, *overlapped, ranks=4) == pytest.approx(reference, rel=1e-3)
    timeline = load_record(tmp_path / "record", step=5)
    pairs = [span for span in timeline.spans if span.action.parts]
    assert timeline.communications and len(timeline.turns) == len(pairs)
    assert all((one.complete is None) == (kind == "flex") for one in timeline.communications)
    found = [sharing for sharing in find_sharing(timeline) if sharing.span.action.parts]
    assert all(part.computes for sharing in found for part in sharing.parts), "a part never had the rank"
    assert sum(sharing.hidden for sharing in found) > 0


def test_transformer_engine_leaves_weight_gradients_to_the_w(tmp_path: Path) -> None:
    pytest.importorskip("transformer_engine")
    train(tmp_path / "run", "zbv")
    start = ["--load", str(tmp_path / "run" / "checkpoints"), "--finetune", "--no-load-optim", "--no-load-rng"]
    reference = train(tmp_path / "a", "zbv", *start, "--no-cf-zero-bubble")
    found = train(tmp_path / "b", "zbv", *start, "--cf-zero-bubble", "--cf-record", str(tmp_path / "record"))
    assert found == pytest.approx(reference, rel=1e-3)
    spans = load_record(tmp_path / "record", step=5).spans
    spent = {kind: sum(s.end - s.start for s in spans if s.action.kind == kind) for kind in "IW"}
    assert spent["W"] > 0.2 * spent["I"], f"a W does no work: {spent}"


EXPERT_KINDS = {
    "one by one": [],
    "grouped": ["--moe-grouped-gemm"],
    "grouped, FP8": ["--moe-grouped-gemm", "--fp8-format", "e4m3", "--fp8-recipe", "blockwise"],
    "flex": ["--moe-grouped-gemm", "--moe-token-dispatcher-type", "flex", "--moe-flex-dispatcher-backend", "deepep"],
}


@pytest.mark.parametrize("kind", EXPERT_KINDS)
@pytest.mark.parametrize("split", ["exact", "even"])
def test_clones_leave_the_losses_as_they_are(tmp_path: Path, kind: str, split: str) -> None:
    if torch.cuda.device_count() < 4:
        pytest.skip("needs four GPUs: two pipeline ranks of two expert-parallel ranks")
    if kind != "one by one":
        pytest.importorskip("transformer_engine")
    if kind == "flex":
        pytest.importorskip("deep_ep")
    flags = ["--bf16", "--expert-model-parallel-size", "2", *EXPERT_KINDS[kind]]
    train(tmp_path / "run", "dualpipev", *flags, ranks=4)
    start = ["--load", str(tmp_path / "run" / "checkpoints"), "--finetune", "--no-load-optim", "--no-load-rng"]
    reference = train(tmp_path / "a", "dualpipev", *flags, *start, ranks=4)
    balanced = ["--eplb", "--cf-eplb-split", split, "--cf-record", str(tmp_path / "record")]
    assert train(tmp_path / "b", "dualpipev", *flags, *start, *balanced, ranks=4) == pytest.approx(reference, rel=1e-2)
    record = read_record(tmp_path / "record")
    assert record.figures["clones"].sum() > 0, "nothing was cloned"
    assert record.after.mean() > record.before.mean()


def test_a_nan_loss_ends_all_ranks_over_nccl(tmp_path: Path) -> None:
    command = [sys.executable, str(TRAIN), "--dir", str(tmp_path), "--platform", "cuda", "--schedule", "dualpipev"]
    flags = ["--iters", "400", "--ranks", "2", "--cf-stall-limit", "30", "--lr", "1e30", "--rerun-mode", "disabled"]
    done = subprocess.run([*command, *flags], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 1
    assert "NaN" in done.stderr
