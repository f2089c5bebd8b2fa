"""Lead the balanced layers of one rank through a trainer's steps, evaluations and checkpoints.

An adapter calls a `Balancer` from the trainer's own functions, on every rank: what needs all ranks happens on those without MoE
layers too.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial, wraps
from pathlib import Path
from typing import Any
from weakref import ref

import torch
import torch.distributed as dist

from counterflow.errors import BalanceError
from counterflow.trainer.balanced_layers import BalancedLayers
from counterflow.trainer.balancing_log import FORCED_SHARE, StepFigures, announce_clones, end_step

# The folder in a checkpoint for the last loads.
LOADS_FOLDER = "counterflow"


class Balancer[Layers: BalancedLayers]:
    """Steps, evaluations and checkpoints of ``layers``, which is None on a rank without MoE layers."""

    def __init__(self) -> None:
        self.layers: Layers | None = None
        self.figures: StepFigures | None = None
        """Those of the last step (`end_step`), over all ranks."""
        self._highest = 0

    def take(self, layers: Layers | None, clones_per_rank: int) -> None:
        """Lead these layers from now on (a collective call); rank 0 prints the memory of their clones."""
        self.layers = layers
        self._highest = announce_clones(layers, clones_per_rank)

    def begin_step(self, step: int, microbatches: int | None = None) -> None:
        """Take the plan that is due, and start sending weights to clones, in a step of so many micro-batches if that is known."""
        if self.layers is not None:
            self.layers.begin_step(step, microbatches)

    def end_step(self, microbatches: int, measured: tuple[float, float] | None = None) -> None:
        """Bring the gradients of clones home, sum the loads and start the next plan (a collective call).

        ``measured``: seconds of this step's forward passes with as many tokens on every rank, and as routed.
        """
        if self.layers is not None:
            self.layers.measured = measured
        self.figures = end_step(self.layers, microbatches, self._highest)
        if measured is not None:
            self.figures.all[FORCED_SHARE] = measured[0] / measured[1]

    @contextmanager
    def evaluate(self) -> Iterator[None]:
        """Have clones with the weights of their homes inside the block, which changes no weight."""
        if self.layers is not None:
            self.layers.refresh()
        yield
        if self.layers is not None:
            self.layers.finish_evaluation()

    @contextmanager
    def save(self, folder: Path | None) -> Iterator[None]:
        """Have homes where the trainer puts them inside the block; keep the last loads with a checkpoint in ``folder``."""
        if self.layers is None:
            yield
            return
        with self.layers.be_at_home():
            yield
        if folder is not None:
            self.layers.save_loads(folder / LOADS_FOLDER)

    @contextmanager
    def load(self, folder: Path | None, microbatches: int) -> Iterator[None]:
        """Take what the block reads into the homes; plan from the loads that were kept with the checkpoint in ``folder``."""
        if self.layers is not None:
            self.layers.bring_homes_back()
        yield
        if self.layers is not None:
            self.layers.take_over()
            self.resume(folder, microbatches)

    def guard_order(self, module: torch.nn.Module, remedy: str) -> None:
        """Refuse to hand out a layer's weights while they are not where the trainer puts them; ``remedy`` is the error's end."""
        module.register_state_dict_pre_hook(partial(_require_order, ref(self), remedy))  # type: ignore[no-untyped-call]

    def resume(self, folder: Path | None, microbatches: int) -> None:
        """Plan the first step from the loads that were kept with the checkpoint in ``folder``, if there is one."""
        if self.layers is not None:
            self.layers.load_loads(None if folder is None else folder / LOADS_FOLDER, microbatches)


def _require_order(find: Callable[[], Balancer[Any] | None], remedy: str, *_: Any) -> None:
    """Refuse to hand out weights of experts that are elsewhere: whoever reads them takes them for others."""
    balancer = find()
    if balancer is not None and balancer.layers is not None and balancer.layers.are_away:
        raise BalanceError(
            f"eplb: state_dict() is called while homes of experts are on other ranks than the trainer puts them: {remedy}"
        )


def led_by[B](balancers: Mapping[Any, B], lead: Callable[[B, Any], AbstractContextManager[None]]) -> Callable[..., Any]:
    """Return a wrapper of a method: a call on an object that has a balancer runs inside what ``lead`` returns for both."""

    def wrap(method: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(method)
        def run(self: Any, *args: Any, **kwargs: Any) -> Any:
            balancer = balancers.get(self)
            with nullcontext() if balancer is None else lead(balancer, self):
                return method(self, *args, **kwargs)

        return run

    return wrap


class Waiting:
    """Reductions of expert gradients that wait for the gradients of clones."""

    def __init__(self) -> None:
        self._due: list[Callable[[], None]] = []

    def add(self, reduce: Callable[[], None]) -> None:
        """Let a reduction wait."""
        self._due.append(reduce)

    def start(self) -> None:
        """Start them, in the order in which they came."""
        while self._due:
            self._due.pop(0)()


class StepwiseBalancer[Layers: BalancedLayers](Balancer[Layers]):
    """A balancer for trainers that are called for each micro-batch: a step begins with its first forward."""

    def __init__(self) -> None:
        super().__init__()
        self.waiting = Waiting()
        self.is_in_step = False
        self._microbatches = 0

    @contextmanager
    def run_forward(self, step: int, *, is_training: bool) -> Iterator[None]:
        """Begin step ``step`` if there is none yet, or an evaluation."""
        if not is_training:
            with nullcontext() if self.is_in_step else self.evaluate():
                yield
            return
        if not self.is_in_step:
            self.is_in_step, self._microbatches = True, 0
            self.begin_step(step)
        self._microbatches += 1
        yield

    def finish_step(self, microbatches: int | None = None) -> bool:
        """Bring the gradients of clones home, then start the reductions that waited; tell whether there was a step to end.

        ``microbatches`` are as many as forwards were run, unless a forward ran several.
        """
        if not self.is_in_step:
            return False
        self.end_step(self._microbatches if microbatches is None else microbatches)
        self.is_in_step = False
        self.waiting.start()
        return True


def say_idle(option: str) -> None:
    """Print on rank 0 that there is nothing to balance, since ``option``, the number of expert-parallel ranks, is 1."""
    if dist.get_rank() == 0:
        print(
            f"counterflow: eplb: {option} is 1, every rank computes all experts: there is nothing to balance, training goes on "
            "without it",
            flush=True,
        )
