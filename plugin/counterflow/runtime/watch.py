"""Report why a pipeline stalled or failed.

A thread of each rank writes the rank's state to the store of the process group about once a second: step, action, the message it
waits for, its last actions. When a wait fails or takes too long, or an action raises, the rank writes why it ends. It then reads
the state of the rank that it waited for, of the rank that one waits for, and so on to the rank where the trouble began. A killed
rank writes no more, but its last state is still in the store. If a connection broke, the rank reports at once, since a launcher
ends all ranks as soon as it sees one dead.
"""

import json
import threading
import time
import weakref
from collections import deque
from functools import partial
from typing import Any, TypedDict

import torch.distributed as dist

from counterflow.errors import PipelineError
from counterflow.runtime.handover import HandOver
from counterflow.runtime.lowering import Instruction
from counterflow.runtime.mailbox import Mailbox
from counterflow.schedule.actions import Action

RECENT = 6
# The heartbeats of all ranks that the store takes in a second; in larger runs each rank writes less often.
BEATS_PER_SECOND = 1000
# How many heartbeats to wait until a peer writes why it ends, or that it still runs.
LISTEN_BEATS = 2.5


class State(TypedDict):
    """The state that a rank writes to the store. Times are seconds, ``time`` since the epoch."""

    time: float
    step: int
    is_evaluation: bool
    action: str
    position: int
    seconds: float
    waits: str | None
    waits_for: int | None
    flows: str
    recent: list[str]
    ended: str | None


class Watch:
    """Writes this rank's state for the others; ``rank`` is its place among the pipeline's global ranks.

    A wait that fails before ``limit`` seconds means a broken connection; one that lasts so long means that a rank is late.
    """

    def __init__(self, store: Any, pipeline_ranks: list[int], rank: int, limit: float) -> None:
        self._store = dist.distributed_c10d.PrefixStore("counterflow/watch", store)
        self._pipeline_ranks, self._rank = pipeline_ranks, rank
        self._limit = limit
        self._step_number, self._is_evaluation = 0, False
        self._position = 0
        self._action: Action | None = None
        self._since = time.monotonic()
        self._recent: deque[Action] = deque(maxlen=RECENT)
        self.mailbox: Mailbox | None = None
        self.handover: HandOver | None = None
        self._stop = threading.Event()
        self._interval = max(1.0, dist.get_world_size() / BEATS_PER_SECOND)
        # The thread ends with this object, not the other way round.
        weakref.finalize(self, self._stop.set)
        beat = partial(_beat, weakref.ref(self), self._stop, self._interval)
        threading.Thread(target=beat, daemon=True, name="counterflow-watch").start()

    def begin(self, step: int, *, is_evaluation: bool = False) -> None:
        """Begin a training step, or a step of an evaluation that follows that training step."""
        self._step_number, self._is_evaluation = step, is_evaluation

    def enter(self, position: int, instruction: Instruction) -> None:
        """Begin an action."""
        if self._action is not None:
            self._recent.append(self._action)
        self._position, self._action, self._since = position, instruction.action, time.monotonic()

    def tell(self) -> None:
        """Write this rank's state to the store."""
        self._write(self._describe(None))

    def _write(self, state: State) -> None:
        self._store.set(self._key(self._rank), json.dumps(state))

    def _describe(self, ended: str | None) -> State:
        waiting = self.mailbox.waiting if self.mailbox is not None else None
        return State(
            time=time.time(),
            step=self._step_number,
            is_evaluation=self._is_evaluation,
            action=str(self._action),
            position=self._position,
            seconds=round(time.monotonic() - self._since, 1),
            waits=str(waiting) if waiting else None,
            waits_for=waiting.transfer.peer if waiting else None,
            flows=self.handover.describe() if self.handover is not None and not waiting else "",
            recent=[str(action) for action in tuple(self._recent)],  # the other thread adds to it
            ended=ended,
        )

    def explain(self, error: Exception) -> PipelineError:
        """Write that this rank ends; return the error to raise, which has the states of the ranks that were waited for."""
        # Gloo adds advice to its first sentence.
        first = (str(error).splitlines() or [""])[0].partition(". ")[0]
        self._stop.set()
        mine = self._describe(f"{type(error).__name__}: {first}")
        is_late = mine["waits"] is not None and mine["seconds"] >= 0.9 * self._limit
        try:
            self._write(mine)
            others = self._follow(mine, LISTEN_BEATS * self._interval if is_late else 0.0)
        except Exception as failure:  # the store may have ended with its rank
            others = [f"the others could not be asked ({type(failure).__name__}): the rank that keeps the store is gone"]
        return PipelineError("; ".join([self._phrase(self._rank, mine, f"ended with {mine['ended']}"), *others]))

    def _follow(self, state: State, patience: float) -> list[str]:
        """Describe the rank that is waited for, the rank which that one waits for, and so on, one line each."""
        lines: list[str] = []
        seen = {self._rank}
        while state["waits_for"] is not None and state["waits_for"] not in seen:
            rank = state["waits_for"]
            seen.add(rank)
            heard, lives = self._listen(rank, patience)
            if heard is None:
                return [*lines, f"rank {rank} has never said anything"]
            state = heard
            age = f"last heard {time.time() - state['time']:.0f} s ago"
            if state["ended"]:
                lines.append(self._phrase(rank, state, f"ended with {state['ended']}"))
            elif lives:
                lines.append(self._phrase(rank, state, f"still runs, {age}"))
            else:
                lines.append(self._phrase(rank, state, f"is gone, {age}: killed, or its machine lost"))
                break
        return lines

    def _listen(self, rank: int, patience: float) -> tuple[State | None, bool]:
        """Return the last state of a rank, and whether it was written while this waited, up to ``patience`` seconds.

        Returns sooner if the rank has written that it ends.
        """
        key, first = self._key(rank), None
        deadline = time.monotonic() + patience
        while True:
            state: State | None = json.loads(self._store.get(key)) if self._store.check([key]) else None
            first = first or (state and state["time"])
            if (state is not None and state["ended"] is not None) or time.monotonic() >= deadline:
                return state, state is not None and state["time"] != first
            time.sleep(0.1)

    def _phrase(self, rank: int, state: State, end: str) -> str:
        step = f"{'evaluation after ' if state['is_evaluation'] else ''}step {state['step']}"
        where = f"{state['action']} ({step}, position {state['position']})"
        if state["flows"]:
            where += f" [{state['flows']}]"
        doing = f"waited {state['seconds']} s in {where} for {state['waits']}" if state["waits"] else f"was in {where}"
        recent = " ".join(state["recent"]) or "none"
        return f"rank {rank} (global rank {self._pipeline_ranks[rank]}) {doing}, {end}, actions before: {recent}"

    def _key(self, rank: int) -> str:
        return str(self._pipeline_ranks[rank])


def _beat(find_watch: "weakref.ref[Watch]", stop: threading.Event, interval: float) -> None:
    while not stop.wait(interval):
        watch = find_watch()
        if watch is None:
            return
        try:
            watch.tell()
        except Exception:  # the store ends before this rank does
            return
        del watch


def find_store() -> Any:
    """Return the store that the default process group was made with."""
    return dist.distributed_c10d._get_default_store()
