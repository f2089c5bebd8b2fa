"""Streams of the CPU platform are ordered workers, events are points in their order, errors come out."""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from counterflow.platform import streams  # noqa: E402
from counterflow.platform.megatron_cpu import _run_on_workers  # noqa: E402
from counterflow.platform.streams import Event, Stream  # noqa: E402

pytestmark = pytest.mark.timeout(60)


@pytest.fixture(autouse=True)
def ended_workers() -> Iterator[None]:
    yield
    streams.stop_all()


def test_a_stream_on_which_nothing_was_submitted_costs_no_thread() -> None:
    before = threading.active_count()
    stream, event = Stream(), Event()
    event.record(stream)
    stream.wait_stream(streams.DEFAULT)
    streams.DEFAULT.wait_event(event)
    stream.synchronize()
    streams.synchronize_all()
    assert stream.query()
    assert event.query()
    assert threading.active_count() == before


def test_work_of_a_stream_runs_in_its_order_beside_the_program() -> None:
    stream, gate, done = Stream(), threading.Event(), []
    stream.submit(gate.wait)
    for number in range(5):
        stream.submit(lambda number=number: done.append(number))
    assert not stream.query()
    assert done == []
    gate.set()
    stream.synchronize()
    assert done == list(range(5))


def test_two_streams_run_at_once() -> None:
    meeting = threading.Barrier(2)
    one, other = Stream(), Stream()
    for stream in (one, other):
        stream.submit(lambda: meeting.wait(timeout=20))
    streams.join(one, other)


def test_what_waits_for_an_event_comes_after_what_was_recorded_and_not_after_later_records() -> None:
    first, second, third, event, done = Stream(), Stream(), Stream(), Event(), []
    gate, later = threading.Event(), threading.Event()
    first.submit(gate.wait)
    first.submit(lambda: done.append("first"))
    event.record(first)
    event.wait(second)
    second.submit(lambda: done.append("second"))
    # The next record of the same event, as of Megatron's plans, does not hold up who waited for the one before.
    third.submit(later.wait)
    event.record(third)
    assert not event.query()
    gate.set()
    second.synchronize()
    assert done == ["first", "second"]
    later.set()
    event.synchronize()
    assert event.query()


def test_elapsed_time_is_that_of_the_stream() -> None:
    stream, begin, end = Stream(), Event(), Event()
    begin.record(stream)
    stream.submit(lambda: time.sleep(0.05))
    end.record(stream)
    assert 50 <= begin.elapsed_time(end) < 5000


def test_a_worker_takes_the_callers_grad_mode_and_cuda_means_the_cpu_there() -> None:
    stream = Stream()
    with torch.no_grad():
        off = stream.submit(torch.is_grad_enabled)
    assert off.result() is False
    assert stream.submit(torch.is_grad_enabled).result() is True
    assert stream.submit(lambda: torch.zeros(1, device="cuda").device.type).result() == "cpu"


def test_inside_a_worker_its_own_stream_is_current_and_never_waited_for() -> None:
    stream, side = Stream(), Stream()

    def synchronise_with_a_side_stream() -> bool:
        # What Megatron's token dispatcher does between its copies to the host.
        side.wait_stream(streams.get_current())
        with streams.run_on(side):
            pass
        event = side.record_event()
        streams.get_current().wait_event(event)
        event.synchronize()
        streams.get_current().synchronize()
        return streams.get_current() is stream

    assert stream.submit(synchronise_with_a_side_stream).result(timeout=20)
    assert streams.get_current() is streams.DEFAULT


def test_a_block_on_a_stream_runs_here_after_what_is_queued() -> None:
    stream, done = Stream(), []
    stream.submit(lambda: time.sleep(0.02))
    stream.submit(lambda: done.append("queued"))
    with streams.run_on(stream):
        done.append(threading.current_thread() is threading.main_thread())
        assert streams.get_current() is stream
    assert done == ["queued", True]


def test_an_exception_ends_its_stream_and_who_waits_for_it_and_comes_out_at_once() -> None:
    failing, waiting, blocked, gate, done = Stream(), Stream(), Stream(), threading.Event(), []
    blocked.submit(gate.wait)
    failing.submit(lambda: 1 // 0)
    waiting.wait_stream(failing)
    for stream in (failing, waiting):
        stream.submit(lambda: done.append("ran on"))
    with pytest.raises(ZeroDivisionError):
        # The blocked stream, in a collective say, is not waited for.
        streams.join(blocked, waiting)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            failing.synchronize()
    assert done == []
    assert not blocked.query()
    gate.set()
    blocked.synchronize()


def test_a_stopped_stream_starts_again() -> None:
    stream = Stream()
    assert isinstance(stream.submit(lambda: 1), Future)
    stream.stop()
    assert stream.submit(lambda: 2).result() == 2


def test_what_a_plan_sends_to_another_rank_is_a_tensor_that_is_made() -> None:
    compute, communication, gate, sent = Stream(), Stream(), threading.Event(), []

    def make(value: float) -> torch.Tensor:
        gate.wait()
        return torch.full((2,), value)

    def run(forward: object, backward: object, post_forward: Any, post_backward: Any) -> Any:
        # Megatron's own interleaved schedule has its plans send what their nodes made, and go on.
        output, gradient = communication.submit(lambda: make(1.0)), compute.submit(lambda: make(2.0))
        gate.set()
        post_forward(output, 0)
        post_backward(gradient, 1)
        return output

    def send(made: Any, stage: int) -> None:
        sent.append((made, stage))

    run_on_workers = _run_on_workers(run, compute, lambda: communication)
    output = run_on_workers(None, None, post_forward=send, post_backward=send)
    assert [(made.tolist(), stage) for made, stage in sent] == [([1.0, 1.0], 0), ([2.0, 2.0], 1)]
    assert output is sent[0][0]
