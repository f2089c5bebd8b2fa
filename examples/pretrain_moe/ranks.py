"""Start ranks on this machine with torch's elastic launcher, follow one log, say in a line what failed."""

import logging
import os
import re
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

POLL_SECONDS = 0.2
OURS = "counterflow: "
EXCEPTION = re.compile(r"(?:\[rank\d+\]: )?((?:[\w.]+\.)?\w*(?:Error|Exception|Exit|Interrupt)\b.*)")


class RankError(RuntimeError):
    """A rank ended badly; the message says which and how."""


def start_ranks(
    count: int, command: list[str], logs: Path, on_line: Callable[[str], None] | None = None, speaker: int = -1
) -> Path:
    """Run ``command`` on ``count`` ranks and wait; return the folder of their logs, ``<rank>/stdout.log``.

    Each line that the rank ``speaker`` prints, counted from behind if negative, goes to ``on_line``, and what the plugin says on
    rank 0. Raises `RankError` when a rank fails; the others are ended then.
    """
    run = f"run-{uuid.uuid4().hex[:8]}"
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id=run,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=POLL_SECONDS,
        logs_specs=DefaultLogsSpecs(log_dir=str(logs), redirects=Std.ALL),
    )
    # Each rank computes with one thread: the ranks share the cores.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ["PYTHONUNBUFFERED"] = "1"
    # The launcher reports a failed rank in a page of its own; `RankError` says it in a line.
    level = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with _follow(lambda: _find_attempt(logs, run), speaker % count, on_line):
            elastic_launch(config, entrypoint=command[0])(*command[1:])
    except ChildFailedError as error:
        raise RankError(_describe_failure(error, _find_attempt(logs, run))) from None
    finally:
        logging.disable(level)
    attempt = _find_attempt(logs, run)
    assert attempt is not None
    return attempt


def _find_attempt(logs: Path, run: str) -> Path | None:
    return next(iter(logs.glob(f"{run}*/attempt_0")), None)


def _describe_failure(error: ChildFailedError, attempt: Path | None) -> str:
    rank, failure = min(error.failures.items(), key=lambda item: item[1].timestamp)
    log = attempt / str(failure.local_rank) / "stderr.log" if attempt is not None else None
    if failure.exitcode < 0:
        return f"rank {rank} was killed ({failure.signal_name()})"
    # Our own refusals stand alone on a line, on rank 0; else the last exception's line names the cause.
    if said := [line for line in _read_all(attempt, "stderr.log") if line.startswith(OURS)]:
        return said[-1].removeprefix(OURS)
    lines = log.read_text(errors="replace").splitlines() if log is not None and log.exists() else []
    last = next((line for line in reversed(lines) if line.strip()), "it printed nothing")
    raised = next((found[1] for line in reversed(lines) if (found := EXCEPTION.match(line))), last)
    return f"rank {rank} failed: {raised} (exit status {failure.exitcode}; log: {log})"


def _read_all(attempt: Path | None, name: str) -> list[str]:
    files = sorted(attempt.glob(f"*/{name}")) if attempt is not None else []
    return [line for file in files for line in file.read_text(errors="replace").splitlines()]


@contextmanager
def _follow(find: Callable[[], Path | None], speaker: int, on_line: Callable[[str], None] | None) -> Iterator[None]:
    """Call ``on_line`` for each whole line of the rank ``speaker``, and of the plugin's on rank 0, until the block ends."""
    if on_line is None:
        yield
        return
    ended = threading.Event()
    # Of each rank that is followed, how far its log is read, and the line that has not ended there.
    read = dict.fromkeys((0, speaker), (0, ""))

    def follow() -> None:
        while True:
            last_look = ended.wait(POLL_SECONDS)
            folder = find()
            if folder is not None:
                for rank in read:
                    lines = read_on(rank, folder / str(rank) / "stdout.log")
                    for line in lines if rank == speaker else filter(is_ours, lines):
                        on_line(line)
            if last_look:
                return

    def is_ours(line: str) -> bool:
        return line.startswith(OURS)

    def read_on(rank: int, log: Path) -> list[str]:
        if not log.exists():
            return []
        position, rest = read[rank]
        with log.open(errors="replace") as file:
            file.seek(position)
            *lines, rest = (rest + file.read()).split("\n")
            read[rank] = file.tell(), rest
        return lines

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
