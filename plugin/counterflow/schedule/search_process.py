"""Search a table in a process of its own, while the process that asked goes on with its work.

The process has the lowest priority and no torch in it, and ends with whoever started it. Its task and its answer are JSON in
files without names: whoever is slow to read a pipe holds its writer.
"""

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import counterflow
from counterflow.errors import ScheduleError
from counterflow.schedule.costs import Costs
from counterflow.schedule.families import build
from counterflow.schedule.files import from_csv, to_csv
from counterflow.schedule.simulation import simulate
from counterflow.schedule.table import ScheduleTable

LOWEST_PRIORITY = 19
# A search takes the seconds that it is given, and a minute more where its kernels are to be compiled first.
MOST_SECONDS = 600.0
PARENT_POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Task:
    """A table is wanted on the layout of ``family`` that takes less time than it, by ``costs``, within a cap on activations."""

    family: str
    ranks: int
    microbatches: int
    costs: Costs
    max_activations: float
    seconds: float


@dataclass(frozen=True)
class Answer:
    """The table that was found and what it promises, beside the family's; times in the unit of the costs."""

    table: ScheduleTable
    makespan: float
    bubble: float
    activations: float
    family_makespan: float
    family_bubble: float

    @property
    def gain(self) -> float:
        """The share of the family's time that the table saves."""
        return 1.0 - self.makespan / self.family_makespan if self.family_makespan else 0.0


class SearchProcess:
    """A search that has been started. Raises `OSError` where no process can be; ends it when let go of."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self._begun = time.monotonic()
        self._output, self._errors = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115
        paths = [str(Path(counterflow.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}
        with tempfile.TemporaryFile() as task_file:
            task_file.write(json.dumps({"parent": os.getpid(), **asdict(task)}).encode())
            task_file.seek(0)
            # -P: not from the working directory, where a training may have modules of any name.
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", __name__],
                env=environment, stdin=task_file, stdout=self._output, stderr=self._errors,
            )  # fmt: skip
        os.setpriority(os.PRIO_PROCESS, self._process.pid, LOWEST_PRIORITY)
        weakref.finalize(self, _end, self._process)

    @property
    def seconds(self) -> float:
        """How long ago it was started."""
        return time.monotonic() - self._begun

    def is_done(self) -> bool:
        """Tell, without waiting, whether it has ended; one that takes far too long is ended."""
        if self._process.poll() is None and self.seconds > MOST_SECONDS:
            _end(self._process)
        return self._process.poll() is not None

    def read(self) -> Answer:
        """Return what it found, once it is done; raises `ScheduleError` that says how it failed."""
        with self._output, self._errors:
            self._output.seek(0)
            self._errors.seek(0)
            output, errors = self._output.read(), self._errors.read().decode(errors="replace").strip()
        status = self._process.returncode
        if status != 0:
            last = errors.splitlines()[-1] if errors else "no word"
            raise ScheduleError(f"exit status {status} after {self.seconds:.0f} s, {last}")
        try:
            answer = json.loads(output)
            table = from_csv(answer.pop("table"), name="auto")
            result = Answer(table, **{name: float(value) for name, value in answer.items()})
        except (ScheduleError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise ScheduleError(f"its answer cannot be read: {type(error).__name__}: {error}") from None
        known = build(self._task.family, self._task.ranks, self._task.microbatches)
        if table.layout != known.layout or table.microbatches != known.microbatches:
            raise ScheduleError(
                f"its answer is a table of {table.ranks} ranks, {table.microbatches} micro-batches and layout {table.layout.name}"
            )
        return result


def _end(process: "subprocess.Popen[bytes]") -> None:
    if process.poll() is None:
        process.kill()
        process.wait()


def answer_task(task: Task) -> dict[str, Any]:
    """Search; return the answer as JSON has it."""
    from counterflow.schedule.search import search  # loads a compiler

    known = build(task.family, task.ranks, task.microbatches)
    found = search(
        task.ranks, task.microbatches, task.costs,
        max_activations=task.max_activations, seconds=task.seconds, layout=known.layout,
    )  # fmt: skip
    family = simulate(known, task.costs.spread(known.layout.last_stage + 1))
    return {
        "table": to_csv(found.table),
        "makespan": found.timeline.makespan,
        "bubble": found.timeline.bubble,
        "activations": max(found.timeline.peak_activations),
        "family_makespan": family.makespan,
        "family_bubble": family.bubble,
    }


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(PARENT_POLL_SECONDS)
    os._exit(1)


def main() -> None:
    """Read a task, write the answer."""
    fields = json.load(sys.stdin)
    threading.Thread(target=_end_with, args=(fields.pop("parent"),), daemon=True).start()
    json.dump(answer_task(Task(**fields | {"costs": Costs(**fields["costs"])})), sys.stdout)


if __name__ == "__main__":
    main()
