"""The two flows of an overlapped pair share a rank: whose turn it is, what goes along with each, how a pair ends."""

import _thread
import contextvars
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from counterflow.errors import SeamError
from counterflow.runtime import communicate, defer_weight_grad
from counterflow.runtime.communication import Mark, defer, run_marked
from counterflow.runtime.handover import Carried, HandOver, find_flow
from counterflow.schedule.actions import Action

F, B = Action("F", 2, 1), Action("B", 1, 0)
# 50 pairs, by the profile nightly 1,000.
PAIRS = settings.default.max_examples // 2


class Exchange(torch.autograd.Function):
    """The identity, which communicates forward and backward and writes down when."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, name: str, log: list[str], delays: list[float]) -> torch.Tensor:
        ctx.given = name, log, delays
        return _exchange(x, name, log, delays)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        name, log, delays = ctx.given
        return _exchange(grads[0], f"{name}'", log, delays), None, None, None


def _exchange(x: torch.Tensor, name: str, log: list[str], delays: list[float]) -> torch.Tensor:
    def start() -> None:
        log.append(f"+{name}")

    def finish(_: None) -> torch.Tensor:
        time.sleep(delays.pop() if delays else 0.0)
        log.append(f"-{name}")
        return x.clone()

    return communicate(start, finish)


class Linear(torch.autograd.Function):
    """w * x, whose weight gradient can wait."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, log: list[str]) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.log = log
        return x * weight

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        x, weight = ctx.saved_tensors
        (grad,) = grads

        def compute() -> None:
            ctx.log.append("w")
            weight.grad = (grad * x).sum() + (0 if weight.grad is None else weight.grad)

        defer_weight_grad(compute)
        return grad * weight, None, None


def make_stage(name: str, layers: list[bool], log: list[str], delays: list[float]) -> tuple[torch.Tensor, Callable[[], Any]]:
    """Return a stage's weight, and its forward; of ``layers`` those that are true communicate."""
    weight = torch.tensor(1.1, requires_grad=True)

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.linspace(-1.0, 1.0, 4, requires_grad=True)
        y = x
        for number, communicates in enumerate(layers):
            y = torch.sin(Linear.apply(y, weight, log))
            y = Exchange.apply(y, f"{name}{number}", log, delays) if communicates else y
        return x, y.sum()

    return weight, run


def run_pair(handover: HandOver, forward: Callable[[], Any], backward: Callable[[], Any]) -> None:
    handover.run_pair(F, forward, B, backward)
    assert find_flow() is None


def test_the_backward_begins_and_each_communication_hands_over() -> None:
    log: list[str] = []
    _, first = make_stage("b", [True, True], log, [])
    _, second = make_stage("f", [True, True], log, [])
    _, loss = first()
    log.clear()
    handover = HandOver()
    run_pair(handover, second, loss.backward)
    assert log == ["+b1'", "+f0", "-b1'", "+b0'", "w", "-f0", "+f1", "-b0'", "w", "-f1"]
    assert handover.list_counts() == [(1, 0, 2), (2, 2, 0)]


def test_weight_gradients_of_the_end_wait_for_the_forwards_next_communication() -> None:
    log: list[str] = []
    _, first = make_stage("b", [True], log, [])
    _, second = make_stage("f", [True, True, True], log, [])
    _, loss = first()
    handover = HandOver()
    with handover.run_single(F):
        second()
    log.clear()
    run_pair(handover, second, loss.backward)
    assert log == ["+b0'", "+f0", "-b0'", "-f0", "+f1", "w", "-f1", "+f2", "-f2"]


stages = st.lists(st.booleans(), min_size=1, max_size=7)
delays = st.lists(st.sampled_from((0.0, 0.0, 0.0005, 0.002)), max_size=12)


@settings(max_examples=PAIRS)
@given(stages, stages, delays)
def test_pairs_of_unequal_stages_end_with_the_gradients_of_one_after_the_other(
    first: list[bool], second: list[bool], slow: list[float]
) -> None:
    found = []
    handover = HandOver()
    for paired in (False, True):
        log: list[str] = []
        pace = list(slow)
        (b_weight, run_b), (f_weight, run_f) = make_stage("b", first, log, pace), make_stage("f", second, log, pace)
        x, loss = run_b()
        outputs: list[Any] = []
        if paired:
            run_pair(handover, lambda outputs=outputs, run_f=run_f: outputs.append(run_f()), loss.backward)
        else:
            outputs.append(run_f())
            loss.backward()
        outputs[0][1].backward()
        found.append((x.grad, outputs[0][0].grad, b_weight.grad, f_weight.grad))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_the_order_does_not_follow_the_clock() -> None:
    logs = []
    for pace in ([], [0.02, 0.0, 0.02], [0.0, 0.02, 0.0, 0.02]):
        log: list[str] = []
        (_, run_b), (_, run_f) = make_stage("b", [True, False, True], log, []), make_stage("f", [True] * 3, log, list(pace))
        _, loss = run_b()
        log.clear()
        run_pair(HandOver(), run_f, loss.backward)
        logs.append(log)
    assert logs[0] == logs[1] == logs[2]


def fail(message: str, after: int = 0) -> None:
    for _ in range(after):
        communicate(lambda: None, lambda _: None)
    raise FloatingPointError(message)


@pytest.mark.parametrize("after", [0, 1, 3])
@pytest.mark.parametrize("failing", ["F", "B"])
def test_an_error_in_one_part_ends_the_other_with_one_trace(failing: str, after: int) -> None:
    handover, endless = HandOver(), partial(fail, "this part does not end by itself", 10_000)
    broken = partial(fail, "an expert gave up", after)
    with pytest.raises(FloatingPointError, match="an expert gave up") as raised:
        run_pair(handover, *((broken, endless) if failing == "F" else (endless, broken)))
    trace = "".join(traceback.format_exception(raised.value))
    assert "in fail" in trace and trace.count("Traceback") == 1, trace
    run_pair(handover, lambda: None, lambda: None)


def test_a_forward_cannot_swallow_the_end_of_its_pair() -> None:
    def go_on() -> None:
        try:
            communicate(lambda: None, lambda _: None)
        except Exception:
            raise AssertionError("the other part's error is none of this one") from None

    with pytest.raises(FloatingPointError, match="gave up"):
        run_pair(HandOver(), go_on, partial(fail, "gave up"))


@pytest.fixture
def interrupts() -> Iterator[None]:
    """Have an interrupt raise, as where tests run in the foreground; shells start background jobs that ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interrupts")
@pytest.mark.parametrize("at", ["while the backward computes", "at its communication"])
def test_an_interrupt_ends_both_parts(at: str) -> None:
    ended = threading.Event()

    def interrupt() -> None:
        try:
            if at == "at its communication":
                communicate(lambda: None, lambda _: None)
            _thread.interrupt_main()
            for _ in range(500):
                time.sleep(0.01)
                communicate(lambda: None, lambda _: None)
        finally:
            ended.set()

    def wait() -> None:
        for _ in range(500):
            communicate(lambda: None, lambda _: None)

    handover = HandOver()
    with pytest.raises(KeyboardInterrupt):
        run_pair(handover, wait, interrupt)
    assert ended.wait(5)
    run_pair(handover, lambda: None, lambda: None)


class Doubling(TorchFunctionMode):
    """Stands for a mode that a platform or a user keeps on."""

    seen = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        Doubling.seen += func is torch.sin
        return func(*args, **(kwargs or {}))


variable: contextvars.ContextVar[int] = contextvars.ContextVar("variable", default=0)


def test_each_part_has_the_settings_that_torch_keeps_by_thread() -> None:
    found: list[tuple[bool, bool, int]] = []

    def look() -> None:
        found.append((torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), variable.get()))
        torch.sin(torch.ones(1))

    def run_forward() -> None:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            communicate(lambda: None, lambda _: None)
            look()

    def run_backward() -> None:
        communicate(lambda: None, lambda _: None)
        look()

    variable.set(3)
    Doubling.seen = 0
    with Doubling():
        run_pair(HandOver(), run_forward, run_backward)
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            run_pair(HandOver(), lambda: None, look)
    assert found == [(True, False, 3), (False, True, 3), (False, True, 3)]
    assert Doubling.seen == 3


def test_random_numbers_are_those_of_one_after_the_other_with_recomputed_dropout() -> None:
    """The recomputed forward, which communicates, sets random numbers back; the other part must not notice."""

    def run(x: torch.Tensor) -> torch.Tensor:
        y = torch.nn.functional.dropout(x, 0.5)
        for _ in range(3):
            y = torch.nn.functional.dropout(Exchange.apply(y, "", [], []), 0.1)
        return y

    found = []
    for paired in (False, True):
        torch.manual_seed(7)
        x = torch.ones(64, requires_grad=True)
        loss = checkpoint(run, x, use_reentrant=True).sum()
        outputs: list[torch.Tensor] = []
        if paired:
            run_pair(HandOver(), lambda outputs=outputs: outputs.append(run(torch.ones(64))), loss.backward)
        else:
            outputs.append(run(torch.ones(64)))
            loss.backward()
        found.append((x.grad, outputs[0], torch.rand(4)))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_backwards_that_autograd_runs_on_threads_of_its_own() -> None:
    """Beyond 60 backwards inside each other torch's engine goes on with another thread; such a one communicates here."""
    threads: set[int] = set()

    class Look(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *grads: torch.Tensor) -> Any:
            threads.add(threading.get_ident())
            return communicate(lambda: None, lambda _: grads[0] * 2)

    def nest(x: torch.Tensor, depth: int) -> torch.Tensor:
        return Look.apply(x) if not depth else checkpoint(nest, Look.apply(x), depth - 1, use_reentrant=True)

    x = torch.ones(2, requires_grad=True)
    loss = nest(x, 70).sum()
    turns: list[int] = []

    def run_forward() -> None:
        for turn in range(20):
            communicate(lambda: None, lambda _: None)
            turns.append(turn)

    run_pair(HandOver(), run_forward, loss.backward)
    assert turns == list(range(20)) and len(threads) > 1
    assert x.grad is not None and x.grad[0] == 2.0**71


def test_global_variables_of_a_trainer_go_with_their_part() -> None:
    place = {"rank": 0, "buffer": "the forward's"}
    carried = [
        Carried(lambda: place["rank"], lambda value: place.update(rank=value)),
        Carried(lambda: place["buffer"], lambda value: place.update(buffer=value), lambda: "the backward's"),
    ]
    seen: list[Any] = []

    def run_forward() -> None:
        place["rank"] = 7
        for _ in range(3):
            communicate(lambda: None, lambda _: None)
            seen.append(("F", place["rank"], place["buffer"]))

    def run_backward() -> None:
        for step in range(1, 4):
            seen.append(("B", place["rank"], place["buffer"]))
            place["rank"] = -step
            communicate(lambda: None, lambda _: None)

    run_pair(HandOver(carried), run_forward, run_backward)
    assert [one for one in seen if one[0] == "F"] == [("F", 7, "the forward's")] * 3
    assert [one for one in seen if one[0] == "B"] == [("B", -step, "the backward's") for step in range(3)]
    assert place == {"rank": 7, "buffer": "the forward's"}


def test_where_the_parts_stand_is_told_by_their_communications() -> None:
    handover, said = HandOver(), []

    def look() -> None:
        communicate(lambda: None, lambda _: None, "dispatch of layer 4")
        communicate(lambda: None, lambda _: said.append(handover.describe()), "combine of layer 4")

    run_pair(handover, look, lambda: communicate(lambda: None, lambda _: None))
    assert said == ["2F1 waiting for communication 2 (combine of layer 4), 1B0 behind communication 1"]
    assert handover.describe() == ""


def make_collective(log: list[Any]) -> Callable[..., Any]:
    """Stands for `all_to_all_single`: what it writes is there when it has been waited for."""

    class Work:
        def __init__(self, output: torch.Tensor, given: torch.Tensor) -> None:
            self.output, self.given = output, given.clone()

        def wait(self) -> None:
            log.append("waited")
            self.output.copy_(self.given)

    def collective(output: torch.Tensor, given: torch.Tensor, *, async_op: bool = False) -> Work | None:
        log.append("issued")
        work = Work(output, given)
        return work if async_op else work.wait()

    return defer(collective)


def make_marked(collective: Callable[..., Any], reads: bool = False) -> Callable[..., Any]:
    class Send(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            output = torch.full_like(x, torch.nan)
            collective(output, x)
            return output

        @staticmethod
        def backward(ctx: Any, *grads: torch.Tensor) -> Any:
            return Send.apply(grads[0])

    def send(tokens: torch.Tensor, probs: torch.Tensor) -> Any:
        sent = Send.apply(tokens)
        return (sent.double() if reads else sent), Send.apply(probs)

    return send


def test_collectives_of_a_marked_function_travel_together_forward_and_backward() -> None:
    log: list[Any] = []
    send = make_marked(make_collective(log))
    mark = Mark("dispatch", together=True)
    tokens, probs = torch.ones(3, requires_grad=True), torch.full((3,), 2.0, requires_grad=True)

    def run() -> torch.Tensor:
        sent, weights = run_marked(send, tokens, probs, mark=mark)
        return (sent * weights).sum()

    loss = run()
    assert log == ["issued", "waited"] * 2, "outside of pairs nothing is deferred"
    log.clear()
    losses: list[torch.Tensor] = []
    run_pair(HandOver(), lambda: losses.append(run()), loss.backward)
    assert log == ["issued"] * 4 + ["waited"] * 4, "one hand-over for both transfers of each part"
    assert losses[0] == 6.0
    assert torch.equal(tokens.grad, torch.full((3,), 2.0)) and torch.equal(probs.grad, torch.ones(3))  # type: ignore[arg-type]


def test_a_marked_function_that_reads_too_early_is_refused() -> None:
    send = make_marked(make_collective([]), reads=True)
    mark = Mark("dispatch of layer 3", together=True)
    with pytest.raises(SeamError, match="dispatch of layer 3 reads what its transfers bring before they are there"):
        run_pair(HandOver(), lambda: run_marked(send, torch.ones(2), torch.ones(2), mark=mark), lambda: None)
    one_by_one = Mark("combine", together=False)
    found: list[Any] = []
    run_pair(HandOver(), lambda: found.append(run_marked(send, torch.ones(2), torch.ones(2), mark=one_by_one)), lambda: None)
    assert torch.equal(found[0][0], torch.ones(2, dtype=torch.float64))


def test_what_an_object_keeps_between_dispatch_and_combine_is_its_parts() -> None:
    """A recomputed forward runs the very layer in which the other part waits for its dispatch."""
    dispatcher = {"splits": 0}
    send = make_marked(make_collective([]))
    mark, found = Mark("dispatch", together=True), []

    def run(splits: int) -> None:
        def dispatch(*given: torch.Tensor) -> Any:
            dispatcher["splits"] = splits
            return send(*given)

        for _ in range(3):
            run_marked(dispatch, torch.ones(2), torch.ones(2), mark=mark, state=[dispatcher])
            found.append((splits, dispatcher["splits"]))

    run_pair(HandOver(), partial(run, 1), partial(run, 2))
    assert len(found) == 6 and all(expected == seen for expected, seen in found)


class Clock:
    """A rank and its link in a time of their own: one computes at a time, and one transfer travels at a time."""

    def __init__(self) -> None:
        self.now = self.link = 0.0

    def compute(self) -> None:
        self.now += 1.0

    def travel(self, length: float) -> None:
        def start() -> float:
            self.link = max(self.link, self.now) + length
            return self.link

        communicate(start, lambda arrival: setattr(self, "now", max(self.now, arrival)))


@pytest.mark.parametrize("layers", [2, 4, 8])
@pytest.mark.parametrize("length", [0.8, 1.2, 1.5, 1.6, 2.4])
def test_a_pair_hides_what_a_perfect_interleaving_could(layers: int, length: float) -> None:
    """Attention and experts take 1 each in F, I and W, a transfer ``length``: 0.8 of a layer's share of a pair is 1.2."""
    clock, handover = Clock(), HandOver()

    def run_forward() -> None:
        for _ in range(2 * layers):
            clock.compute()
            clock.travel(length)

    def run_backward() -> None:
        for _ in range(2 * layers):
            clock.travel(length)
            clock.compute()
            defer_weight_grad(clock.compute)

    handover.run_pair(F, run_forward, B, run_backward)
    computes, travels = 6.0 * layers, 4 * layers * length
    hidden, possible = (1 - (time - computes) / travels for time in (clock.now, max(computes, travels)))
    assert hidden >= 0.95 * possible, f"{hidden:.3f} of {possible:.3f}"
