"""Messages of several tensors: they arrive whole under every table, and ends that disagree are told so."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from counterflow.errors import ScheduleError
from counterflow.runtime.lowering import Transfer
from counterflow.runtime.mailbox import Mailbox, Waiting
from counterflow.runtime.messages import (
    HEADER_SIZE,
    MAX_MEMBERS,
    Announced,
    Form,
    Member,
    read_header,
    run_backward,
    share,
    write_header,
)
from counterflow.schedule.dependencies import Result
from tests.support.forked_ranks import run_ranks

CPU = torch.device("cpu")
FORM = (Member((2, 2), torch.float32), Member((2,), torch.bool), Member((3,), torch.float32, gradient=False))
GOOD = (torch.ones(2, 2, requires_grad=True), torch.ones(2, dtype=torch.bool), torch.ones(3))
OUTPUT, GRADIENT = Transfer(Result("F", 4, 7), 1, 20), Transfer(Result("B", 4, 7), 1, 21)


def test_every_table_gives_the_gradients_of_one_piece(tmp_path: Path) -> None:
    said = run_ranks("runtime_worker", "messages", 4, tmp_path)
    assert all(text.count("ran 17 tables and 20 random ones") == 3 for text in said)
    assert all(text.count("ran 0 tables and 20 random ones") == 3 for text in said)
    assert all("refused what differs" in text for text in said), "ranks that send other messages were not noticed"


class Wire:
    """Channels that keep what is sent, by tag, and hand it to whoever receives."""

    timeout = None

    def __init__(self) -> None:
        self.sent: dict[int, torch.Tensor] = {}

    def start_send(self, tensor: torch.Tensor, receiver: int, tag: int) -> Any:
        self.sent[tag] = tensor.clone()
        return SimpleNamespace(wait=lambda *limit: None)

    def start_receive(self, buffer: torch.Tensor, sender: int, tag: int) -> Any:
        return SimpleNamespace(wait=lambda *limit: buffer.copy_(self.sent[tag]))


def open_ends(form: Form | None, other: Form | None = None) -> tuple[Wire, Mailbox, Mailbox]:
    wire: Any = Wire()
    return wire, Mailbox(wire, form, CPU), Mailbox(wire, other or form, CPU)


def test_where_the_form_is_known_tensors_alone_travel_and_gradients_only_where_they_are_wanted() -> None:
    wire, sender, receiver = open_ends(FORM)
    sender.send(OUTPUT, GOOD)
    assert len(wire.sent) == 3
    receiver.post((OUTPUT,))
    arrived = receiver.receive(OUTPUT)
    assert [member.requires_grad for member in arrived if member is not None] == [True, False, False]
    sender.send(GRADIENT, (torch.ones(2, 2), None, None))
    assert len(wire.sent) == 4
    receiver.post((GRADIENT,))
    assert [member is None for member in receiver.receive(GRADIENT)] == [False, True, True]


def test_headers_are_sent_in_the_first_run_alone_and_what_changes_is_refused() -> None:
    ends = Announced("say so"), Announced("say so")
    sent = []
    for _ in range(2):
        wire: Any = Wire()
        sender, receiver = (Mailbox(wire, end, CPU) for end in ends)
        for transfer, message in ((OUTPUT, (*GOOD, None)), (GRADIENT, (torch.ones(2, 2), None, None, None))):
            sender.send(transfer, message)
            receiver.post((transfer,))
            arrived = receiver.receive(transfer)
            assert [None if one is None else (one.shape, one.dtype, one.requires_grad) for one in arrived] == [
                None if one is None else (one.shape, one.dtype, one.requires_grad) for one in message
            ]
        sender.finish()
        receiver.finish()
        sent.append(len(wire.sent))
    assert sent == [6, 4]
    sender = Mailbox(wire, ends[0], CPU)
    for changed in (torch.ones(2, 3, requires_grad=True), torch.ones(2, 2), torch.ones(2, 2, dtype=torch.bfloat16), None):
        with pytest.raises(
            ScheduleError, match=r"stage 4 gave .* for micro-batch 7 and \(2, 2\) torch.float32, .* before: say so"
        ):
            sender.send(OUTPUT, (changed, *GOOD[1:], None))
    # Within the first run too.
    first = Mailbox(wire, Announced(""), CPU)
    first.send(OUTPUT, GOOD)
    with pytest.raises(ScheduleError, match="before"):
        first.send(Transfer(Result("F", 4, 8), 1, 22), GOOD[:2])


def test_no_output_needs_a_gradient_in_an_evaluation() -> None:
    _, sender, receiver = open_ends(FORM)
    sender.send(OUTPUT, GOOD)
    receiver.post((OUTPUT,))
    with torch.no_grad():
        assert not any(member is not None and member.requires_grad for member in receiver.receive(OUTPUT))


@pytest.mark.parametrize(
    ("transfer", "message", "said"),
    [
        (OUTPUT, GOOD[:2], r"stage 4 gave \(2, 2\) torch.float32, \(2,\) torch.bool for micro-batch 7; the pipeline sends"),
        (OUTPUT, (GOOD[0].double(), *GOOD[1:]), r"gave \(2, 2\) torch.float64, "),
        (OUTPUT, (torch.ones(2, 3), *GOOD[1:]), r"gave \(2, 3\) torch.float32, "),
        (OUTPUT, (GOOD[0], None, GOOD[2]), r"gave \(2, 2\) torch.float32, None, "),
        # Its gradient would be lost.
        (OUTPUT, (*GOOD[:2], torch.ones(3, requires_grad=True)), r"sends .*, \(3,\) torch.float32 without gradient: all stages"),
        (GRADIENT, (None, None, None), r"stage 4 gave gradients None, None, None for micro-batch 7"),
    ],
    ids=["count", "dtype", "shape", "missing", "needs a gradient", "no gradient"],
)
def test_a_stage_that_gives_something_else_is_told_what_the_pipeline_sends(transfer: Transfer, message: Any, said: str) -> None:
    wire, sender, _ = open_ends(FORM)
    with pytest.raises(ScheduleError, match=said):
        sender.send(transfer, message)
    assert not wire.sent


def test_a_receiver_that_expects_something_else_says_so() -> None:
    varying = tuple(member._replace(shape=None) for member in FORM)
    for other in (varying[:2], (varying[0]._replace(dtype=torch.bfloat16), *varying[1:])):
        _, sender, receiver = open_ends(varying, other)
        sender.send(OUTPUT, GOOD)
        receiver.post((OUTPUT,))
        with pytest.raises(ScheduleError, match=r"4F7 of rank 1 \(tag 20\) brings .*; here .* is expected"):
            receiver.receive(OUTPUT)


def test_what_is_waited_for_is_named() -> None:
    assert str(Waiting(OUTPUT, 2, False)) == "member 2 of 4F7 of rank 1 (tag 20)"
    assert str(Waiting(OUTPUT, -1, False)) == "the header of 4F7 of rank 1 (tag 20)"
    assert str(Waiting(OUTPUT, 0, True)) == "4F7 of rank 1 (tag 20)"


def test_a_header_says_all_of_a_message_and_refuses_what_has_no_room() -> None:
    message = (GOOD[0], None, torch.zeros(()), torch.zeros(1, 2, 3, 4, dtype=torch.bfloat16), GOOD[1])
    header = write_header(message)
    assert len(header) == HEADER_SIZE
    given = [m if m is None else (tuple(m.shape), m.dtype, m.requires_grad) for m in message]
    assert [m if m is None else tuple(m) for m in read_header(header)] == given
    with pytest.raises(ScheduleError, match=f"a message of {MAX_MEMBERS + 1} tensors given; at most {MAX_MEMBERS}"):
        write_header((GOOD[0],) * (MAX_MEMBERS + 1))
    with pytest.raises(ScheduleError, match="a tensor of 7 dimensions"):
        write_header((torch.zeros((1,) * 7),))


def test_gradients_that_do_not_fit_the_outputs_are_refused() -> None:
    x = torch.ones(2, requires_grad=True)
    outputs = (x * 2, x > 0)
    with pytest.raises(ScheduleError, match="gave 3 gradients back; it was sent 2 tensors"):
        run_backward((x,), outputs, (torch.ones(2), None, None))
    with pytest.raises(ScheduleError, match=r"gave a torch.float64 gradient of member 0, which is torch.float32"):
        run_backward((x,), outputs, (torch.ones(2, dtype=torch.float64), None))


def test_backward_takes_the_members_that_have_gradients() -> None:
    x, unused, mask = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True), torch.tensor([True, False])
    outputs = (x * 2, x * 3, mask, x)  # the last one is handed on as it came
    gradients = run_backward((x, unused, mask), outputs, (torch.ones(2), None, None, torch.ones(2)))
    assert gradients[0] is not None and gradients[0].tolist() == [3.0, 3.0]
    assert gradients[1:] == (None, None)


def test_what_stays_on_the_rank_keeps_storage_and_leaves_the_graph() -> None:
    x = torch.ones(2, requires_grad=True)
    y = x * 2
    shared, nothing, mask = share((y, None, GOOD[1]))
    assert shared is not None and shared.is_leaf and shared.requires_grad and shared.data_ptr() == y.data_ptr()
    assert nothing is None and mask is not None and not mask.requires_grad
