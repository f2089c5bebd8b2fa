"""A message between stages is a tuple of tensors.

An F sends its stage's output to the next stage. An I or B sends back the gradients of its stage's input, one for each member. A
member that needs no gradient, such as a mask, has None there, and nothing is sent for it. A single tensor is a tuple of one.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from counterflow.errors import ScheduleError
from counterflow.schedule.dependencies import Result

# Runs a backward from roots and their gradients; tells whether it has.
Start = Callable[[Sequence[torch.Tensor], Sequence[torch.Tensor]], bool]
Message = tuple[torch.Tensor | None, ...]
"""The members of one message; () where there is nothing to receive: the first stage's input, the last one's gradient."""

# Room in the header of a message whose form varies.
MAX_MEMBERS = 8
MAX_DIMENSIONS = 6
HEADER_SIZE = 1 + MAX_MEMBERS * (3 + MAX_DIMENSIONS)
# A header names a type by its place here.
DTYPES = (
    torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8,
    torch.bool, torch.complex64, torch.complex128, torch.float8_e4m3fn, torch.float8_e5m2,
)  # fmt: skip


class Member(NamedTuple):
    """One member of every stage's output, as it is known before a step.

    ``shape`` is None if it varies; such a member may also be None in a message. ``gradient`` says whether the member's gradient
    is sent back; gradients of integers and truth values never are.
    """

    shape: tuple[int, ...] | None
    dtype: torch.dtype
    gradient: bool = True

    @property
    def returns(self) -> bool:
        """Whether its gradient is sent back."""
        return self.gradient and (self.dtype.is_floating_point or self.dtype.is_complex)

    def __str__(self) -> str:
        return f"{self.shape or 'any shape'} {self.dtype}{'' if self.returns else ' without gradient'}"


Form = tuple[Member, ...]
"""The members of every stage's output: the same on all ranks, and between all stages."""


class Announced:
    """What each stage hands on and gives back, by its first message: the headers of one run say it, later runs send none.

    It is for programs whose stages each hand on tensors of their own, the same for every micro-batch. A mailbox notes and reads
    them. A message that differs is refused; ``remedy`` says what allows it. All ranks have to take an empty one in the same runs.
    """

    def __init__(self, remedy: str) -> None:
        self._remedy = remedy
        self._first: dict[tuple[str, int], list[Member | None]] = {}
        self.is_complete = False

    def list_sent(self, message: Result) -> list[tuple[int, Member]]:
        """Return the members that are sent of a message, each with its place."""
        return [(index, member) for index, member in enumerate(self._first[message[:2]]) if member is not None]

    def count(self, message: Result) -> int:
        """Return how many members a message has, missing ones too."""
        return len(self._first[message[:2]])

    def require_like(self, message: Result, members: list[Member | None]) -> None:
        """Note the members of a stage's first message; raise `ScheduleError` for a later one with others."""
        first = self._first.setdefault(message[:2], members)
        if members != first:
            what = "gradients of " if message.kind == "B" else ""
            now, before = (", ".join(map(str, them)) for them in (members, first))
            raise ScheduleError(
                f"stage {message.stage} gave {what}{now} for micro-batch {message.microbatch} and {before} before: {self._remedy}"
            )


def list_members(message: Message) -> list[Member | None]:
    """Return the members of a message; ``gradient`` says whether one needs a gradient."""
    return [one if one is None else Member(tuple(one.shape), one.dtype, one.requires_grad) for one in message]


def share(message: Message) -> Message:
    """Return the message for a stage on the same rank: tensors with the same storage, detached from the autograd graph."""
    with torch._C.DisableTorchFunction():
        return tuple(None if member is None else member.detach().requires_grad_(member.requires_grad) for member in message)


def run_backward(inputs: Message, outputs: Message, gradients: Message, start: Start | None = None) -> Message:
    """Run a stage's backward from the gradients of its outputs; return its inputs' gradients, None for an input without one.

    Only outputs that have a gradient take part. Without ``gradients`` the outputs are losses, each with the gradient 1. The data
    of outputs may have been freed. ``start`` may run the backward in place of autograd. Raises `ScheduleError` if the gradients
    do not fit the outputs.
    """
    if gradients and len(gradients) != len(outputs):
        raise ScheduleError(f"the next stage gave {len(gradients)} gradients back; it was sent {len(outputs)} tensors")
    roots, starts = [], []
    for index, output in enumerate(outputs):
        gradient = gradients[index] if gradients else None if output is None else torch.ones_like(output)
        if gradient is None or output is None or not output.requires_grad:
            continue
        if gradient.dtype != output.dtype:
            raise ScheduleError(f"the next stage gave a {gradient.dtype} gradient of member {index}, which is {output.dtype}")
        roots.append(output)
        starts.append(gradient)
    if roots and not (start is not None and start(roots, starts)):
        # Not torch.autograd.backward, which compares shapes with outputs that may have been freed.
        torch.autograd.Variable._execution_engine.run_backward(
            tuple(roots), tuple(starts), False, False, (), allow_unreachable=True, accumulate_grad=True
        )
    return take_gradients(inputs)


def take_gradients(inputs: Message) -> Message:
    """Return the gradients of a stage's inputs after its backward, None for an input without one."""
    return tuple(None if member is None or not member.requires_grad else member.grad for member in inputs)


def pack(outputs: Any, stage: int) -> Message:
    """Return what a stage returned, a tensor or a tuple of tensors, as a message; raises `ScheduleError` for anything else.

    After a tuple of one comes None: a single tensor is a message of one.
    """
    if isinstance(outputs, torch.Tensor):
        return (outputs,)
    if not isinstance(outputs, tuple | list) or not outputs or not all(isinstance(one, torch.Tensor) for one in outputs):
        raise ScheduleError(f"stage {stage} hands on a {type(outputs).__name__}; a tensor or a tuple of tensors is expected")
    return (outputs[0], None) if len(outputs) == 1 else tuple(outputs)


def unpack(message: Message) -> Any:
    """Return what `pack` made a message of."""
    return message[0] if len(message) == 1 else tuple(member for member in message if member is not None)


def describe_message(message: Message) -> str:
    """Return shapes and types of a message's members, for error messages."""
    return ", ".join("None" if member is None else f"{tuple(member.shape)} {member.dtype}" for member in message) or "nothing"


def describe_form(form: Form | None) -> str:
    """Return the members of a form in words, for error messages."""
    return "any tensors" if form is None else ", ".join(map(str, form))


def write_header(message: Message) -> list[int]:
    """Return a header: the number of members, then type, need of a gradient, and shape of each; type 0 is a missing member.

    Raises `ScheduleError` for more members or dimensions than a header has room for, and for an unknown type.
    """
    header = [len(message)]
    for member in message:
        if member is None:
            header += [0] * (3 + MAX_DIMENSIONS)
        elif member.dtype not in DTYPES or member.dim() > MAX_DIMENSIONS:
            raise ScheduleError(
                f"a tensor of {member.dim()} dimensions of {member.dtype} given; a stage may hand on up to {MAX_DIMENSIONS} of "
                f"{', '.join(map(str, DTYPES))}"
            )
        else:
            padding = [0] * (MAX_DIMENSIONS - member.dim())
            header += [1 + DTYPES.index(member.dtype), int(member.requires_grad), member.dim(), *member.shape, *padding]
    if len(message) > MAX_MEMBERS:
        raise ScheduleError(f"a message of {len(message)} tensors given; at most {MAX_MEMBERS}")
    return header + [0] * (HEADER_SIZE - len(header))


def read_header(header: list[int]) -> list[Member | None]:
    """Return the members that a header announces; ``gradient`` says whether the sender's member needed one."""
    members: list[Member | None] = []
    for begin in range(1, 1 + header[0] * (3 + MAX_DIMENSIONS), 3 + MAX_DIMENSIONS):
        dtype, needs_gradient, dimensions, *shape = header[begin : begin + 3 + MAX_DIMENSIONS]
        members.append(Member(tuple(shape[:dimensions]), DTYPES[dtype - 1], bool(needs_gradient)) if dtype else None)
    return members
