"""Optimizer states move between schedules, and to and from plain DeepSpeed, through DeepSpeed's own ``ds_to_universal``."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.test_deepspeed import SEEDS, STEPS, make_case, run_cases
from tests.support.comparing import assert_same_steps

pytest.importorskip("deepspeed")
pytestmark = pytest.mark.slow
# With gradients reduced in fp32: cross-linked replicas add up a tied layer's uses in other groups before it.
TIED = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}, "communication_data_type": "fp32"}
AT = STEPS // 2


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("universal")
    cases = {"whole": make_case("tied", None, SEEDS[0], **TIED)}
    for schedule in ("dualpipev", "interleaved", None):
        cases[f"save {schedule}"] = make_case("tied", schedule, SEEDS[0], **TIED) | {
            "steps": AT,
            "save": str(folder / f"{schedule}"),
        }
    saved = run_cases(cases, folder)
    convert(folder / "dualpipev")
    convert(folder / "interleaved")
    # Plain DeepSpeed saves nothing for the script.
    convert(folder / "None", "--inject_missing_state")
    cases = {}
    for saver, schedule in MOVES:
        case = make_case("tied", schedule, SEEDS[0] + 1, **TIED, checkpoint={"load_universal": True})
        cases[f"{saver} to {schedule}"] = case | {"load": {"load_dir": str(folder / f"{saver}")}}
    (folder / "loaded").mkdir()
    return saved | run_cases(cases, folder / "loaded") | {"folder": folder}


MOVES = [("dualpipev", "1f1b"), ("dualpipev", None), ("interleaved", "dualpipe"), (None, "dualpipev")]


def convert(folder: Path, *options: str) -> None:
    source, target = folder / f"global_step{AT}", folder / f"global_step{AT}_universal"
    workers = ("--num_extract_workers", "1", "--num_merge_workers", "1")
    command = ["-m", "deepspeed.checkpoint.ds_to_universal", "--input_folder", source, "--output_folder", target]
    done = subprocess.run([sys.executable, *command, *workers, *options], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("saver", "schedule"), MOVES)
def test_training_resumes_under_another_schedule(runs: dict[str, Any], saver: str | None, schedule: str | None) -> None:
    run = runs[f"{saver} to {schedule}"]
    assert [step["iteration"] for step in run["steps"]] == list(range(AT + 1, STEPS + 2))
    assert_same_steps(run, runs["whole"])


@pytest.mark.parametrize(("schedule", "patterns"), [("dualpipev", []), ("interleaved", [r"tied_modules\.words\."])])
def test_a_checkpoint_says_what_is_on_several_ranks(runs: dict[str, Any], schedule: str, patterns: list[str]) -> None:
    import torch

    file = runs["folder"] / schedule / f"global_step{AT}" / "mp_rank_00_model_states.pt"
    info = torch.load(file, weights_only=False)["universal_checkpoint_info"]
    # The script would take a tied layer of several ranks from the last that it reads, in the parts of another one.
    assert info["pipeline_replicated_parameter_patterns"] == patterns
