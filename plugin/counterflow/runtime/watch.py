"""Let a stalled or failed pipeline explain itself.

Each rank tells the others where it is: a thread writes its state (step, action, what it waits for, its last actions) to
the store of the process group about once a second. When a wait fails or takes too long, or an action raises, a rank writes why it
ends, reads what the others last said, and follows who waits for whom to the rank where it began. A rank that was
killed has said nothing for a while; its last words are there all the same. Where a connection broke, a rank speaks at once:
a launcher ends the others as soon as it sees the first one dead.
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
# Ranks whose heartbeat the store takes in a second; larger runs speak less often.
BEATS_PER_SECOND = 1000
# How many heartbeats to wait for a peer that is ending too to say so, or that still runs to be heard again.
LISTEN_BEATS = 2.5


class State(TypedDict):
    """What a rank says of itself. Times are seconds, ``time`` since the epoch."""

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
    """Where this rank is, told to the others. ``rank`` is its place among the pipeline's global ranks.

    A wait that ends with an error before ``limit`` seconds was cut off; one that lasted as long was for a rank that is late.
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
        """A training step begins, or one of an evaluation after that training step."""
        self._step_number, self._is_evaluation = step, is_evaluation

    def enter(self, position: int, instruction: Instruction) -> None:
        """The rank has come to this action."""
        if self._action is not None:
            self._recent.append(self._action)
        self._position, self._action, self._since = position, instruction.action, time.monotonic()

    def tell(self) -> None:
        """Write where this rank is to the store."""
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
        """Tell the others that this rank ends; return the error to raise, with what the others say."""
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
        """Return what the rank waited for says, and the one that it waits for, to where it began."""
        said: list[str] = []
        seen = {self._rank}
        while state["waits_for"] is not None and state["waits_for"] not in seen:
            rank = state["waits_for"]
            seen.add(rank)
            heard, lives = self._listen(rank, patience)
            if heard is None:
                return [*said, f"rank {rank} has never said anything"]
            state = heard
            age = f"last heard {time.time() - state['time']:.0f} s ago"
            if state["ended"]:
                said.append(self._phrase(rank, state, f"ended with {state['ended']}"))
            elif lives:
                said.append(self._phrase(rank, state, f"still runs, {age}"))
            else:
                said.append(self._phrase(rank, state, f"is gone, {age}: killed, or its machine lost"))
                break
        return said

    def _listen(self, rank: int, patience: float) -> tuple[State | None, bool]:
        """Return the last words of a rank, and whether it speaks again; one that is ending too gets time to say so."""
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
