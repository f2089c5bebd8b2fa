"""``--cf-profile`` on a run whose stages sleep: traces that analyze reads, and costs from them that predict the step."""

import sys
from pathlib import Path
from typing import Any

import pytest

from counterflow.analysis import analyze_trace, read_traces
from counterflow.analysis.chunks import find_costs
from counterflow.schedule import Costs, build, simulate
from ranks import start_ranks

RANKS, MICROBATCHES, MILLISECONDS, STEPS = 2, 6, 20.0, 2


@pytest.fixture(scope="module", params=["zbv", "dualpipev"])
def profiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp("profile")
    words = f"--schedule {request.param} --microbatches {MICROBATCHES} --milliseconds {MILLISECONDS} --steps {STEPS}".split()
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.profile_rank", *words, "--out", str(folder)]
    start_ranks(RANKS, command, folder)
    return request.param, folder


def analyze(folder: Path) -> list[Any]:
    return [device for trace in read_traces(folder) for device in analyze_trace(trace)]


def test_costs_from_the_traces_predict_the_step(profiled: tuple[str, Path]) -> None:
    name, folder = profiled
    devices = analyze(folder)
    costs = find_costs(devices, "")
    for key, share in (("f", 1.0), ("i", 1.5), ("w", 0.5)):
        # Sleeps are never short; a busy machine makes them longer.
        assert all(share * MILLISECONDS <= value < share * MILLISECONDS + 20 for value in costs[key]), costs
    predicted = simulate(
        build(name, RANKS, MICROBATCHES), Costs(costs["f"], costs["i"], costs["w"], costs["p2p"], costs["overlap"])
    ).makespan  # fmt: skip
    spans = [span for device in devices for span in device.trace.timeline.spans]
    measured = 1000 * (max(span.end for span in spans) - min(span.start for span in spans))
    # make bench-analyze has the figure, on a machine that does nothing else.
    assert predicted == pytest.approx(measured, rel=0.15)


def test_every_action_computes_in_its_phase(profiled: tuple[str, Path]) -> None:
    _, folder = profiled
    for device in analyze(folder):
        sleeps = sum(phase.compute for phase in device.phases if phase.name != "(none)") / 1e6
        assert sleeps >= 2 * MICROBATCHES * 3 * MILLISECONDS
        assert device.trace.rank in (0, 1) and device.trace.steps == {str(STEPS)}
        assert device.kinds["send_recv"].kernels
