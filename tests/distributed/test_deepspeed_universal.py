"""Optimizer states move between schedules, and to and from plain DeepSpeed, through DeepSpeed's own ``ds_to_universal``."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.test_deepspeed import SEEDS, STEPS, make_case, run_cases
from tests.support.asked import list_asked
from tests.support.comparing import assert_same_steps

pytest.importorskip("deepspeed")
pytestmark = pytest.mark.slow
# With gradients reduced in fp32: cross-linked replicas add up a tied layer's uses in other groups before it.
TIED = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}, "communication_data_type": "fp32"}
AT = STEPS // 2


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder, asked = tmp_path_factory.mktemp("universal"), list_asked(request, "move")
    loaded = {saver for saver, _ in asked}
    cases = {"whole": make_case("tied", None, SEEDS[0], **TIED)}
    for schedule in loaded | list_asked(request, "saver"):
        cases[f"save {schedule}"] = make_case("tied", schedule, SEEDS[0], **TIED) | {
            "steps": AT,
            "save": str(folder / f"{schedule}"),
        }
    saved = run_cases(cases, folder)
    for saver in loaded:
        # Plain DeepSpeed saves nothing for the script.
        convert(folder / f"{saver}", *(["--inject_missing_state"] if saver is None else []))
    cases = {}
    for saver, schedule in asked:
        case = make_case("tied", schedule, SEEDS[0] + 1, **TIED, checkpoint={"load_universal": True})
        cases[f"{saver} to {schedule}"] = case | {"load": {"load_dir": str(folder / f"{saver}")}}
    (folder / "loaded").mkdir()
    return saved | run_cases(cases, folder / "loaded") | {"folder": folder}


MOVES: list[tuple[str | None, str | None]] = [("dualpipev", "1f1b"), (None, "dualpipev")]
MORE_MOVES = [("dualpipev", None), ("interleaved", "dualpipe")]


def convert(folder: Path, *options: str) -> None:
    source, target = folder / f"global_step{AT}", folder / f"global_step{AT}_universal"
    workers = ("--num_extract_workers", "1", "--num_merge_workers", "1")
    command = ["-m", "deepspeed.checkpoint.ds_to_universal", "--input_folder", source, "--output_folder", target]
    done = subprocess.run([sys.executable, *command, *workers, *options], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("move", [*MOVES, *(pytest.param(move, marks=pytest.mark.nightly) for move in MORE_MOVES)])
def test_training_resumes_under_another_schedule(runs: dict[str, Any], move: tuple[str | None, str | None]) -> None:
    run = runs["{} to {}".format(*move)]
    assert [step["iteration"] for step in run["steps"]] == list(range(AT + 1, STEPS + 2))
    assert_same_steps(run, runs["whole"])


@pytest.mark.parametrize(("saver", "patterns"), [("dualpipev", []), ("interleaved", [r"tied_modules\.words\."])])
def test_a_checkpoint_says_what_is_on_several_ranks(runs: dict[str, Any], saver: str, patterns: list[str]) -> None:
    import torch

    file = runs["folder"] / saver / f"global_step{AT}" / "mp_rank_00_model_states.pt"
    info = torch.load(file, weights_only=False)["universal_checkpoint_info"]
    # The script would take a tied layer of several ranks from the last that it reads, in the parts of another one.
    assert info["pipeline_replicated_parameter_patterns"] == patterns
