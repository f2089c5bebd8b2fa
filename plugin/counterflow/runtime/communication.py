"""Marks a model's communications, the places where a flow of an overlapped pair hands over (`counterflow.runtime.handover`).

`communicate` is the mark in an autograd function of one's own. `run_marked` marks a function that autograd goes through and that
calls collectives of ``torch.distributed`` which `defer` has wrapped: its backward is marked as well.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch

from counterflow.errors import SeamError
from counterflow.runtime.handover import Flow, find_flow


def communicate[Handle, Result](start: Callable[[], Handle], finish: Callable[[Handle], Result], name: str = "") -> Result:
    """Issue a communication by ``start`` and return ``finish`` of what it returned, which waits for it.

    In an overlapped pair the other part computes between the two; elsewhere one follows the other. ``start`` must not wait. It
    is for the forward and the backward of an autograd function: each has the mark of its own. ``name`` is for reports. All ranks
    that take part in the communication must come to it in the same order of forwards and backwards.

        class Exchange(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                y = torch.empty_like(x)
                return communicate(lambda: dist.all_to_all_single(y, x, async_op=True), lambda work: (work.wait(), y)[1])

            @staticmethod
            def backward(ctx, grad):
                return Exchange.apply(grad)
    """
    flow = find_flow()
    return finish(start()) if flow is None else flow.communicate(start, finish, name)


@dataclass(frozen=True)
class Mark:
    """A function that communicates: its name, and whether its collectives travel ``together``, with one hand-over behind them.

    What they write must then be what the function returns: nobody may read it before.
    """

    name: str
    together: bool


class Region:
    """The communication that a flow is in the middle of issuing: what is under way, and where it writes."""

    def __init__(self, flow: Flow, mark: Mark, state: Sequence[dict[str, Any]] = ()) -> None:
        self._flow, self.mark, self._state = flow, mark, state
        self._works: list[Any] = []
        self._written: set[int] = set()

    def add(self, start: Callable[[], Any], output: torch.Tensor) -> None:
        """Take up a collective that ``start`` issues and that writes ``output``."""
        if self.mark.together:
            if (work := start()) is not None:
                self._works.append(work)
                self._written.add(output.data_ptr())
            return
        self._hand_over(start, lambda work: work.wait() if work is not None else None)

    def close(self, returned: Sequence[Any]) -> None:
        """Hand over and wait, where anything is under way; ``returned`` is what the function returns."""
        works, self._works = self._works, []
        if not works:
            return
        self._hand_over(lambda: works, lambda under_way: [work.wait() for work in under_way])
        for tensor in returned:
            if torch.is_tensor(tensor) and tensor.numel() and tensor.data_ptr() not in self._written:
                raise SeamError(
                    f"{self.mark.name} reads what its transfers bring before they are there, which --cf-overlap does not know: "
                    "drop --cf-overlap"
                )

    def wait_for(self, finish: Callable[[], Any]) -> None:
        """Hand over, then wait by ``finish`` for what has been issued already."""
        self._hand_over(lambda: None, lambda _: finish())

    def _hand_over(self, start: Callable[[], Any], finish: Callable[[Any], Any]) -> None:
        # The other flow may run the very objects whose attributes hold what this one needs afterwards.
        kept = [dict(one) for one in self._state] if self._flow.other is not None else []
        self._flow.region = None
        self._flow.communicate(start, finish, self.mark.name)
        self._flow.region = self
        for one, values in zip(self._state, kept, strict=False):
            one.update(values)


class _IsUnderWay:
    """What the caller of a deferred collective gets; the region waits."""

    def wait(self, *args: Any) -> bool:
        """Return at once."""
        return True

    def is_completed(self) -> bool:
        """Return True: whoever asks goes on."""
        return True


def defer(collective: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a collective of ``torch.distributed`` that takes output and input first: inside a marked function it does not wait."""

    @wraps(collective)
    def issue(output: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        flow = find_flow()
        region = flow.region if flow is not None else None
        if region is None:
            return collective(output, *args, **kwargs)
        kwargs["async_op"] = True
        region.add(lambda: collective(output, *args, **kwargs), output)
        return _IsUnderWay()

    return issue


def run_marked(function: Callable[..., Any], *inputs: Any, mark: Mark, state: Sequence[dict[str, Any]] = ()) -> Any:
    """Return ``function(*inputs)``, a communication; so is its backward.

    ``state`` are dictionaries, an object's attributes say, whose values are the flow's: they are put back after a hand-over.
    """
    flow = find_flow()
    if flow is None and not torch.is_grad_enabled():
        return function(*inputs)
    inputs = _apply(_Last, mark, inputs)
    region = Region(flow, mark, state) if flow is not None else None
    if flow is not None:
        flow.region = region
    try:
        outputs = function(*inputs)
        several = outputs if isinstance(outputs, tuple) else (outputs,)
        if region is not None:
            region.close(several)
    finally:
        if flow is not None:
            flow.region = None
    marked = _apply(_First, mark, several)
    return marked if isinstance(outputs, tuple) else marked[0]


def _apply(node: type[torch.autograd.Function], mark: Mark, values: tuple[Any, ...]) -> tuple[Any, ...]:
    """Put a node of the autograd graph behind those values that need a gradient."""
    places = [place for place, value in enumerate(values) if torch.is_tensor(value) and value.requires_grad]
    if not places or not torch.is_grad_enabled():
        return values
    behind = dict(zip(places, node.apply(mark, *(values[place] for place in places)), strict=True))
    return tuple(behind.get(place, value) for place, value in enumerate(values))


class _First(torch.autograd.Function):
    """The first node in the backward of a marked function: from here on its collectives belong together."""

    @staticmethod
    def forward(ctx: Any, mark: Mark, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Hand the tensors on."""
        ctx.mark = mark
        ctx.set_materialize_grads(False)
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> Any:
        """Begin the communication."""
        if (flow := find_flow()) is not None:
            flow.region = Region(flow, ctx.mark)
        return None, *grads


class _Last(torch.autograd.Function):
    """The last node in the backward of a marked function: here its collectives are waited for."""

    @staticmethod
    def forward(ctx: Any, mark: Mark, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Hand the tensors on."""
        ctx.set_materialize_grads(False)
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> Any:
        """End the communication."""
        flow = find_flow()
        if flow is not None and flow.region is not None:
            flow.region.close(grads)
            flow.region = None
        return None, *grads
