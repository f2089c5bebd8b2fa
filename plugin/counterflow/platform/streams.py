"""CUDA's streams and events on the CPU platform: a stream is a worker with a queue, an event is a point in a queue.

Work that is submitted to a stream runs on the stream's own thread, piece by piece, while the submitting thread goes on. torch's
operators and gloo's waits release Python's lock, so two streams really run at the same time. A stream without submitted work has
no thread. Python code in a ``with torch.cuda.stream(…)`` block runs on the calling thread, after the work that the stream has
queued. So a program that submits nothing runs in program order, at no extra cost.

An exception in a worker ends its stream: all work queued behind it fails with the same exception, as does every stream that
waits for it. A thread that synchronises with the stream gets the exception.
"""

import contextlib
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from contextvars import copy_context
from functools import partial
from queue import SimpleQueue
from typing import Any

import torch

from counterflow.platform.devices import CPU, CudaOnCpu

# A point in a stream's order: the time in seconds at which it was reached, or a future of it.
Point = float | Future[float]
# Work, the grad mode under which it runs, and the future of its result; None ends the worker.
_Queue = SimpleQueue[tuple[Callable[[], Any], bool, Future[Any]] | None]


class Stream:
    """A worker with a queue; the default stream has no worker and stands for the calling thread."""

    device = CPU
    cuda_stream = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._queue: _Queue = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()
        self._newest: Future[Any] | None = None

    @staticmethod
    def priority_range() -> tuple[int, int]:
        """Return the least and the greatest priority: there is one."""
        return 0, 0

    def submit(self, work: Callable[[], Any]) -> Future[Any]:
        """Queue ``work`` on the stream; it runs under the caller's context variables and grad mode."""
        done: Future[Any] = Future()
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._serve, args=(self._queue,), name="cpu stream", daemon=True)
                self._thread.start()
                _started.add(self)
            self._newest = done
            # torch keeps some of its settings (the compiler's, say) in context variables.
            self._queue.put((partial(copy_context().run, work), torch.is_grad_enabled(), done))
        return done

    def _serve(self, queue: _Queue) -> None:
        _here.home = _here.current = self
        failure: BaseException | None = None
        with CudaOnCpu():
            while (item := queue.get()) is not None:
                work, grad, done = item
                try:
                    if failure is not None:
                        raise failure
                    with torch.set_grad_enabled(grad):
                        done.set_result(work())
                except BaseException as error:
                    failure = error
                    done.set_exception(error)
                self._forget(done)
                # A waiting worker must not keep tensors alive.
                del item, work, done

    def _forget(self, done: Future[Any]) -> None:
        with self._lock:
            if self._newest is done and done.exception() is None:
                self._newest = None

    def stop(self) -> None:
        """End the worker after all queued work; the next `submit` starts another."""
        with self._lock:
            if self._thread is not None:
                self._queue.put(None)
                self._thread, self._queue = None, SimpleQueue()

    def mark(self) -> Point:
        """Return the point behind all work so far; inside the worker itself, the point where it is now."""
        if self is _here.home or self.query():
            return time.perf_counter()
        return self.submit(time.perf_counter)

    def wait_point(self, point: Point) -> None:
        """Let what comes later on this stream wait for ``point``."""
        if isinstance(point, float):
            return
        if self is _here.home:
            point.result()
        elif not point.done() or point.exception() is not None:
            self.submit(point.result)

    def synchronize(self) -> None:
        """Wait until all work is done; raises the exception that ended the stream, if any."""
        newest = self._newest
        if self is not _here.home and newest is not None:
            newest.result()

    def wait_stream(self, stream: "Stream") -> None:
        """Let what comes later on this stream wait for all work so far of the other."""
        self.wait_point(stream.mark())

    def wait_event(self, event: "Event") -> None:
        """Let what comes later on this stream wait for the event's last record."""
        self.wait_point(event.point)

    def record_event(self, event: "Event | None" = None) -> "Event":
        """Record ``event`` (or a new one) behind all work so far."""
        event = event or Event()
        event.record(self)
        return event

    def query(self) -> bool:
        """Tell whether all work is done."""
        newest = self._newest
        return newest is None or (newest.done() and newest.exception() is None)

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *exc: object) -> None:
        pass


class Event:
    """A point in a stream's order, with its wall-clock time in seconds."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.point: Point = time.perf_counter()

    def record(self, stream: Stream | None = None) -> None:
        """Set the event behind all work so far of ``stream``, the current one by default."""
        self.point = (stream or _here.current).mark()

    def wait(self, stream: Stream | None = None) -> None:
        """Let what comes later on ``stream``, the current one by default, wait for the last record."""
        (stream or _here.current).wait_point(self.point)

    def synchronize(self) -> None:
        """Wait for the last record."""
        self._read()

    def query(self) -> bool:
        """Tell whether the last record has been reached."""
        return isinstance(self.point, float) or self.point.done()

    def elapsed_time(self, end: "Event") -> float:
        """Return the milliseconds from this event to ``end``."""
        return (end._read() - self._read()) * 1000.0

    def _read(self) -> float:
        return self.point if isinstance(self.point, float) else self.point.result()


DEFAULT = Stream()
_started: "weakref.WeakSet[Stream]" = weakref.WeakSet()


class _Here(threading.local):
    """The streams of a thread: ``home``, whose work the thread itself runs, and ``current``, to which work is issued."""

    home = DEFAULT
    current = DEFAULT


_here = _Here()


def get_current() -> Stream:
    """Return this thread's current stream."""
    return _here.current


def is_home(stream: Stream) -> bool:
    """Tell whether this thread runs the work of ``stream`` itself."""
    return stream is _here.home


def set_current(stream: Stream) -> None:
    """Make ``stream`` this thread's current one."""
    _here.current = stream


@contextlib.contextmanager
def issue_to(stream: Stream) -> Iterator[None]:
    """Make ``stream`` the current one inside the block, for work that is submitted there."""
    before, _here.current = _here.current, stream
    try:
        yield
    finally:
        _here.current = before


@contextlib.contextmanager
def run_on(stream: Stream | None) -> Iterator[Stream | None]:
    """Replace ``torch.cuda.stream``: the block's Python code runs on this thread, after the work that the stream has queued."""
    if stream is None:
        yield None
        return
    stream.synchronize()
    with issue_to(stream):
        yield stream


def join(*streams: Stream) -> None:
    """Wait for all work of ``streams``; the first exception of any of them is raised at once."""
    ends = [end for stream in streams if isinstance(end := stream.mark(), Future)]
    for done in wait(ends, return_when=FIRST_EXCEPTION).done:
        done.result()


def synchronize_all() -> None:
    """Wait for all work of all streams."""
    join(*_started)


def stop_all() -> None:
    """End all workers."""
    for stream in list(_started):
        stream.stop()
