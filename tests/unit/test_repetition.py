"""Layers told from the repetition of kernels, in traces without annotations, and not told where it is not plain."""

from collections.abc import Sequence
from pathlib import Path
from random import Random

import pytest

from counterflow.analysis import analyze_trace, read_trace
from counterflow.analysis.overlap import Device
from counterflow.analysis.repetition import Repetition, find_repetitions
from tests.support.made_trace import EPOCH, PUBLISHED, make_kernel, make_launch, make_range, write_trace

FORWARD = ("norm", "qkv", "flash_fwd_kernel", "proj", "norm", "up", "silu", "down")
BACKWARD = ("down_dx", "down_dw", "silu_dx", "up_dx", "up_dw", "norm_dx", "flash_bwd_kernel", "qkv_dx", "qkv_dw")
EXCHANGE = "ncclDevKernel_AllReduce_Sum(int)"


def make_step(layers: int, microbatches: int) -> list[str]:
    batch = ["embed", *FORWARD * layers, "loss", *BACKWARD * layers, "embed_dw"]
    return batch * microbatches + ["adam"] * 20


def analyze(path: Path, names: Sequence[str], lengths: dict[str, int] | None = None, phase: str = "") -> Device:
    events, time = [], float(EPOCH)
    for number, name in enumerate(names):
        # Shapes, and so template arguments, differ from layer to layer.
        length = (lengths or {}).get(name, 20 if name in BACKWARD else 10)
        events.append(make_kernel(f"void {name}<{number % 3}>(int)", time, length, correlation=number))
        time += length + 1
        if name == "proj":
            events.append(make_kernel(EXCHANGE, time, 3, stream=9))
            time += 4
    if phase:
        events += [make_launch(0, EPOCH - 5), make_range(phase, EPOCH - 9, 8)]
    (device,) = analyze_trace(read_trace(write_trace(path, events)))
    return device


def test_layers_of_forwards_and_backwards_are_found(tmp_path: Path) -> None:
    device = analyze(tmp_path / "step.json", make_step(5, 3))
    forward, backward = find_repetitions(device)
    assert (forward.name, forward.kernels, forward.repeats, len(forward.starts)) == ("forward of a layer", len(FORWARD), 5, 3)
    assert (backward.name, backward.kernels, backward.repeats) == ("backward of a layer", len(BACKWARD), 5)
    assert forward.compute == 80_000 and backward.compute == 180_000 and forward.exposed == 3_000 and backward.exposed == 0
    assert forward.length == pytest.approx(92_000, abs=500)
    assert forward.starts[0] == 11_000


def find_names(path: Path, names: Sequence[str], **given: dict[str, int]) -> list[str]:
    return [one.name for one in find_repetitions(analyze(path, names, **given))]


def test_units_that_may_be_anything_have_no_direction(tmp_path: Path) -> None:
    path = tmp_path / "step.json"
    # An inference repeats one unit; where the second takes as long as the first it may be another layer, not its backward.
    assert find_names(path, [*FORWARD * 12]) == ["unit 1"]
    assert find_names(path, make_step(5, 3), lengths=dict.fromkeys(BACKWARD, 9)) == ["unit 1", "unit 2"]


def test_nothing_is_told_where_it_is_not_plain(tmp_path: Path) -> None:
    path = tmp_path / "step.json"
    shuffled = make_step(5, 3)
    Random(0).shuffle(shuffled)
    assert find_names(path, shuffled) == []
    # Twice is no repetition, and a loop of one kernel is no layer.
    assert find_names(path, ["embed", *FORWARD * 2, "loss"]) == []
    assert find_names(path, ["adam"] * 200) == []
    # A small part of a step that is otherwise different throughout.
    assert find_names(path, [*FORWARD * 3, *(f"other_{n}" for n in range(200))]) == []


def test_known_phases_stay_as_they_are(tmp_path: Path) -> None:
    assert find_repetitions(analyze(tmp_path / "step.json", make_step(5, 3), phase="mlp(F)")) == []


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.name)
def test_what_is_told_of_published_traces_covers_most_of_them(path: Path) -> None:
    if not path.is_file() or "cpu_only" in path.name:
        pytest.skip("no such trace")
    for device in analyze_trace(read_trace(path)):
        found: list[Repetition] = find_repetitions(device)
        assert not found or 0.6 <= sum(one.share for one in found) <= 1.0
