"""Transfers one at a time in each direction between two ranks, over a wire that takes them as NCCL does."""

import os
import random
import threading
import time
from collections import defaultdict, deque
from datetime import timedelta
from typing import Any

import pytest
import torch

from counterflow.devices import load_kernels_early
from counterflow.runtime.lanes import Lanes, say_if_kernels_are_lazy
from counterflow.runtime.lowering import Part, lower
from counterflow.runtime.mailbox import Mailbox
from counterflow.runtime.messages import Member
from counterflow.schedule import build
from counterflow.schedule.table import ScheduleTable
from random_tables import make_random_table

LIMIT = timedelta(seconds=20)
CPU = torch.device("cpu")
FAMILIES = ("1f1b", "gpipe", "interleaved", "zb-h1", "zbv", "dualpipev", "dualpipe")


class Wire:
    """Both ends of a transfer have to be issued before it ends, a little later, as two kernels that wait for each other."""

    def __init__(self, seed: int) -> None:
        self._lock, self._random = threading.Lock(), random.Random(seed)
        self._ends: dict[tuple[int, int, bool], deque[End]] = defaultdict(deque)
        self.behind = 0

    def issue(self, sender: int, receiver: int, tensor: torch.Tensor, *, is_send: bool) -> "End":
        with self._lock:
            end, others = End(tensor), self._ends[sender, receiver, not is_send]
            if others:
                other = others.popleft()
                source, target = (tensor, other.tensor) if is_send else (other.tensor, tensor)
                target.copy_(source)
                end.time = other.time = time.monotonic() + self._random.random() * 1e-3
            else:
                mine = self._ends[sender, receiver, is_send]
                self.behind += len(mine)
                mine.append(end)
            return end


class End:
    """One end of a transfer."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor, self.time = tensor, float("inf")

    def is_completed(self) -> bool:
        return time.monotonic() >= self.time

    def wait(self) -> None:
        assert self.is_completed(), "only what has ended may be waited for: a stream that waits holds up others"


class Channels:
    """As those of the runtime on a GPU, over a `Wire`."""

    timeout = LIMIT

    def __init__(self, wire: Wire, rank: int) -> None:
        self._wire, self._rank, self._lanes = wire, rank, Lanes(LIMIT)

    def start_send(self, tensor: torch.Tensor, receiver: int, tag: int) -> Any:
        issue: Any = lambda: self._wire.issue(self._rank, receiver, tensor, is_send=True)  # noqa: E731
        return self._lanes.send(self._rank, receiver, issue)

    def start_receive(self, buffer: torch.Tensor, sender: int, tag: int) -> Any:
        issue: Any = lambda: self._wire.issue(sender, self._rank, buffer, is_send=False)  # noqa: E731
        return self._lanes.receive(sender, self._rank, issue)


def run_row(table: ScheduleTable, wire: Wire, rank: int, wrong: list[str]) -> None:
    """Run one rank's program with numbers in the place of tensors; a message says which it is."""
    # Nothing waits for ever as where a stream waits; CPU tensors stand in for a GPU's.
    channels: Any = Channels(wire, rank)
    mailbox = Mailbox(channels, (Member((2,), torch.float32), Member((1,), torch.float32)), CPU)
    mailbox._limit = ()
    for instruction in lower(table, rank).instructions:
        mailbox.post(instruction.posts)
        for part in instruction.parts:
            run_part(part, mailbox, wrong)
    mailbox.finish()


def run_part(part: Part, mailbox: Mailbox, wrong: list[str]) -> None:
    if part.receive is not None:
        arrived = mailbox.receive(part.receive, part.delivered)
        wrong += [f"{part.receive} brought {one}" for one in arrived if one is not None and one.flatten()[0] != part.receive.tag]
    if part.send is not None:
        mailbox.send(part.send, (torch.full((2,), float(part.send.tag)), torch.full((1,), float(part.send.tag))))


def run_table(table: ScheduleTable, seed: int) -> None:
    wire, wrong = Wire(seed), list[str]()

    def run(rank: int) -> None:
        try:
            run_row(table, wire, rank, wrong)
        except Exception as error:
            wrong.append(f"rank {rank}: {error}")

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(table.ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT.total_seconds())
    assert not any(thread.is_alive() for thread in threads), f"{table.name}: ranks wait for each other"
    assert not wrong
    assert wire.behind == 0, "a transfer was issued behind one that had not ended"


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_ends_and_nothing_is_issued_behind_what_waits(family: str) -> None:
    run_table(build(family, 4, 8), 0)


@pytest.mark.parametrize("seed", range(8))
def test_random_tables_end(seed: int) -> None:
    run_table(make_random_table(random.Random(seed), 3), seed)


def test_a_rank_that_never_sends_is_waited_for_no_longer_than_the_limit() -> None:
    lanes = Lanes(timedelta(seconds=0.05))
    never: Any = End(torch.zeros(1))
    with pytest.raises(TimeoutError, match=r"timed out after 0\.05 s"):
        lanes.receive(1, 0, lambda: never).wait()


@pytest.mark.parametrize(
    ("loading", "rank", "is_said"), [(None, 0, True), ("LAZY", 0, True), ("EAGER", 0, False), (None, 1, False)]
)
def test_rank_0_says_that_a_kernel_loaded_late_may_wait_for_ever(
    loading: str | None, rank: int, is_said: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No driver answers here, so the environment does."""
    monkeypatch.setattr("ctypes.CDLL", raise_missing)
    set_loading(monkeypatch, loading)
    monkeypatch.setattr("torch.distributed.get_rank", lambda: rank)
    say_if_kernels_are_lazy()
    assert ("CUDA_MODULE_LOADING=EAGER" in capsys.readouterr().out) == is_said


@pytest.mark.parametrize(
    ("loading", "cuda", "has_started", "after"),
    [(None, "13.0", False, "EAGER"), ("LAZY", "13.0", False, "LAZY"), (None, "13.0", True, None), (None, None, False, None)],
    ids=["unset", "chosen by the user", "too late", "no CUDA"],
)
def test_kernels_are_loaded_early_where_nobody_chose(
    loading: str | None, cuda: str | None, has_started: bool, after: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_loading(monkeypatch, loading)
    monkeypatch.setattr("torch.version.cuda", cuda)
    monkeypatch.setattr("torch.cuda.is_initialized", lambda: has_started)
    load_kernels_early()
    assert os.environ.get("CUDA_MODULE_LOADING") == after


def set_loading(monkeypatch: pytest.MonkeyPatch, loading: str | None) -> None:
    """Set or unset when CUDA loads kernels; undone after the test."""
    monkeypatch.setenv("CUDA_MODULE_LOADING", loading or "")
    if loading is None:
        monkeypatch.delenv("CUDA_MODULE_LOADING")


def raise_missing(_: str) -> None:
    raise OSError("no such library")
