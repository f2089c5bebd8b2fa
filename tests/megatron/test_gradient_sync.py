"""When a chunk's reduction starts: where the table of a run has its R, and nowhere else."""

from types import SimpleNamespace
from typing import Any

import pytest

from counterflow.megatron.pipeline.gradient_sync import GradientSync
from counterflow.megatron.state import of_chunk
from counterflow.options import Options
from counterflow.schedule import ScheduleTable, add_reductions, build, from_csv
from counterflow.trainer.tables import build_table


class Chunk:
    """A model chunk that tells when its buckets are started, all at once."""

    ddp_config = SimpleNamespace(overlap_grad_reduce=True)

    def __init__(self, said: list[str], number: int) -> None:
        self.start_grad_sync = lambda: said.append(f"start {number}")
        of_chunk(self).clones = SimpleNamespace(start_homecoming=lambda: said.append(f"home {number}"))  # type: ignore[assignment]


def run_row(table: ScheduleTable, grad_sync_func: Any = None) -> list[str]:
    """Make the calls of rank 0's row; return what was started, and each B in which gradient hooks may start buckets."""
    said: list[str] = []
    chunks = [Chunk(said, number) for number in range(table.layout.chunks)]
    config = SimpleNamespace(no_sync_func=None, grad_sync_func=grad_sync_func, param_sync_func=None)
    sync = GradientSync(config, chunks, table, 0, forward_only=False)
    sync.pause()
    for single in table.singles(0):
        if single.kind in "BI":
            sync.before_backward(single.stage, single.microbatch)
            said += [f"hooks {single}"] if sync._no_sync is None else []
        if single.kind in "BW":
            sync.pause()
        if single.kind == "R":
            sync.reduce(single.stage)
            assert sync._no_sync is not None, "the next backward would start a reduction"
    return said


def test_in_a_b_the_hooks_start_the_buckets_after_a_w_one_call_does() -> None:
    assert run_row(add_reductions(build("1f1b", 2, 3))) == ["hooks 0B2", "home 0"]
    assert run_row(add_reductions(build("zb-h1", 2, 3))) == ["start 0", "home 0"]


def test_a_reduction_that_is_written_later_starts_later() -> None:
    table = from_csv("0F0,1F0,1B0,0B0,0REDUCE_GRAD,1REDUCE_GRAD")
    assert run_row(table) == ["hooks 0B0", "home 0", "start 1", "home 1"]


@pytest.mark.parametrize("schedule", ["zb-h1", "zbv", "dualpipev", "dualpipe", "interleaved"])
def test_a_run_without_zero_bubble_starts_them_from_the_hooks_of_its_last_whole_backwards(schedule: str) -> None:
    chunks = 1 if schedule == "zb-h1" else 2
    table = build_table(Options(schedule=schedule, zero_bubble=False), 2, 8, chunks)
    assert not {single.kind for rank in range(table.ranks) for single in table.singles(rank)} & set("IW")
    said = run_row(table)
    assert len(said) == 2 * chunks and all(what.startswith(("hooks", "home")) for what in said)


def test_a_run_reduces_every_chunk_once_and_a_file_may_say_where(tmp_path: Any) -> None:
    for schedule, chunks in (("1f1b", 1), ("zbv", 2), ("dualpipe", 2), ("auto", 2)):
        table = build_table(Options(schedule=schedule), 2, 8, chunks)
        for rank, row in enumerate(table.actions):
            assert sorted(action.stage for action in row if action.kind == "R") == sorted(table.layout.stages[rank])
    path = tmp_path / "late.csv"
    path.write_text("0F0,0F1,0B0,0B1,0REDUCE_GRAD\n1F0,1B0,1F1,1B1,1REDUCE_GRAD\n")
    assert build_table(Options(schedule=str(path)), 2, 2, 1).actions == from_csv(path.read_text()).actions
