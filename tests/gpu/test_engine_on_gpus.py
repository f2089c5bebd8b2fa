"""The trainings of `tests/distributed/te_cases.py` on four GPUs, with a Transformer Engine compiled for them. Not run so far.

Plain Megatron's run of each model is the reference, as on the CPU. Kernels add in orders of their own, so a bound is compared.
"""

import importlib
import sys
from importlib.util import find_spec

import pytest

from data import prepare_text
from ranks import start_ranks
from te_cases import RECIPES, list_cases
from tests.support import ROOT
from tests.support.comparing import find_difference
from tests.support.run_cases import Case, Run, Runs
from tests.support.training import drop_flags
from train import STEP

torch = pytest.importorskip("torch")
SCRIPT = ROOT / "examples" / "pretrain_moe" / "pretrain_moe.py"
RANKS = 4
# Relative, on losses: of BF16, and of clones in FP8, whose largest values are those of fewer tokens.
ROUNDING, OF_CLONES = 1e-3, 1e-2
ASKED = {"mxfp8": "is_mxfp8_available", "blockwise": "is_fp8_block_scaling_available"}

pytestmark = [
    pytest.mark.skipif(
        torch.cuda.device_count() < RANKS, reason="needs four GPUs: two pipeline ranks of two expert-parallel ranks"
    ),
    pytest.mark.skipif(find_spec("transformer_engine") is None, reason="needs Transformer Engine, compiled"),
]


class RunsOnGpus(Runs):
    """What each case logged on GPUs, by its name."""

    def run(self, case: Case) -> Run:
        """Run one case by the launcher, without the plugin where the case is plain Megatron's."""
        flags = drop_flags(case["flags"], "--distributed-backend")
        # Megatron's own linears add weight gradients by Apex's kernel.
        flags += [] if find_spec("fused_weight_gradient_mlp_cuda") else ["--no-gradient-accumulation-fusion"]
        start = ["-m", "counterflow.launch"] if case["plugin"] else []
        steps: list[dict[str, float]] = []

        def read(line: str) -> None:
            if match := STEP.search(line):
                steps.append({"iteration": int(match["step"]), "loss": float(match["loss"]), "grad_norm": float(match["norm"])})

        script = str(case.get("script", SCRIPT))
        start_ranks(
            RANKS, [sys.executable, "-W", "ignore", *start, script, *flags], self._directory / "logs" / case["name"], read
        )
        return {"steps": steps, "error": None}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    directory = tmp_path_factory.mktemp("engine")
    return RunsOnGpus("", list_cases(prepare_text(directory / "text", max_bytes=2**21), directory), directory)


def require_recipe(recipe: str) -> None:
    manager = importlib.import_module("transformer_engine.pytorch.fp8").FP8GlobalStateManager
    is_there, reason = getattr(manager, ASKED.get(recipe, "is_fp8_available"))()
    if not is_there:
        pytest.skip(reason)


def assert_alike(runs: Runs, name: str, reference: str, bound: float) -> None:
    assert runs[name]["steps"], "no step was logged"
    assert find_difference(runs[name], runs[reference], "loss") <= bound


@pytest.mark.parametrize("family", ["zbv", "dualpipev", "dualpipev, whole backwards", "dualpipev, overlapped pairs", "dualpipe"])
def test_bf16(runs: Runs, family: str) -> None:
    assert_alike(runs, f"bf16, {family}", "bf16", ROUNDING)


def test_clones_in_bf16(runs: Runs) -> None:
    assert_alike(runs, "bf16, dualpipev, clones", "bf16", ROUNDING)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("kind", ["dualpipev", "overlapped pairs"])
def test_fp8(runs: Runs, recipe: str, kind: str) -> None:
    require_recipe(recipe)
    assert_alike(runs, f"{recipe}, {kind}", recipe, ROUNDING)


@pytest.mark.parametrize("recipe", RECIPES)
def test_fp8_weights_that_are_gathered(runs: Runs, recipe: str) -> None:
    require_recipe(recipe)
    assert_alike(runs, f"{recipe}, gathered, dualpipev", f"{recipe}, gathered", ROUNDING)


@pytest.mark.parametrize("recipe", [recipe for recipe in RECIPES if recipe != "delayed"])
def test_clones_in_fp8(runs: Runs, recipe: str) -> None:
    require_recipe(recipe)
    assert_alike(runs, f"{recipe}, dualpipev, clones", recipe, OF_CLONES)


def test_megatrons_own_hybrid_model(runs: Runs) -> None:
    assert_alike(runs, "hybrid bf16, dualpipev", "hybrid bf16", ROUNDING)
