"""One rank of the tests of a loop over megatron-core without its trainer: runs examples/core_loop/train.py.

A case is {"name", "flags", "wrong"}; ``wrong`` names what the loop does wrongly.
"""

import contextlib
import io
import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import megatron.core.pipeline_parallel
import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import schedules

import counterflow
from counterflow.errors import OptionError
from worker import write_result

loop = SimpleNamespace(**runpy.run_path(str(Path(__file__).resolve().parents[2] / "examples" / "core_loop" / "train.py")))


def build_with_own_groups(config: Any, vp_stage: int | None = None) -> Any:
    """Build a chunk as from process groups that the builder kept from before."""
    chunk = loop.build_chunk(config, vp_stage)
    group = parallel_state.get_pipeline_model_parallel_group()
    chunk.pg_collection = SimpleNamespace(pp=getattr(group, "_group", group))
    return chunk


# Each of these is one line that a loop of one's own lacks, or has in the wrong place.
WRONG: dict[str, Callable[[], Any]] = {
    "chunks not laid out": lambda: mock.patch.object(counterflow, "lay_out_chunks", lambda build: build),
    "groups of its own": lambda: mock.patch.dict(loop.build_model.__globals__, {"build_chunk": build_with_own_groups}),
    "partner's samples not read": lambda: mock.patch.object(counterflow, "find_data_rank", lambda stage: 0),
}


def run_case(case: dict[str, Any]) -> dict[str, Any]:
    """Run the loop once; return what it printed per step, or the refusal that ended it."""
    sys.argv = ["train.py", *case["flags"]]
    given = loop.read_arguments(sys.argv[1:])
    wrong = case.get("wrong")
    own = schedules.get_forward_backward_func
    counterflow.enable({} if given.plain else loop.OPTIONS)
    said, printed = None, io.StringIO()
    with contextlib.ExitStack() as stack:
        if wrong == "schedule taken too early":
            stack.enter_context(mock.patch.object(megatron.core.pipeline_parallel, "get_forward_backward_func", own))
        elif wrong in WRONG:
            stack.enter_context(WRONG[wrong]())
        stack.enter_context(contextlib.redirect_stdout(printed))
        try:
            loop.train(given)
        except OptionError as error:
            said = str(error)
    return {"name": case["name"], "steps": list(read_steps(printed.getvalue())), "error": said}


def read_steps(text: str) -> Iterator[dict[str, float]]:
    """Yield each step's numbers, under the names that Megatron's trainer gives them elsewhere in these tests."""
    for line in text.splitlines():
        if line.startswith("step "):
            words = line.split()
            yield {"iteration": int(words[1]), "loss": float(words[3]), "grad_norm": float(words[6]), "skipped": 0}


def run(job: dict[str, Any]) -> None:
    """Run the job's case; the last rank writes what it logged."""
    first = counterflow.enable()
    torch.distributed.init_process_group("gloo")
    first.undo()
    write_result(job, run_case(job["case"]))
