"""Figures of traces beside an independent analyser's, and what must not change them."""

import copy
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest

from counterflow.analysis import Device, analyze_trace, read_trace
from counterflow.analysis.figures import describe_device
from tests.support.made_trace import (
    COMMUNICATE,
    COMPUTE,
    EPOCH,
    EXPORTS,
    PUBLISHED,
    Event,
    load_oracle,
    make_events,
    make_kernel,
    make_launch,
    make_range,
    write_export,
    write_trace,
)

# The independent analyser's words for ours.
WORDS = {
    "window_us": "window", "busy_us": "busy", "idle_us": "idle", "compute_us": "compute", "communication_us": "comm",
    "hidden_us": "hidden", "exposed_us": "exposed", "kernels": "kernels",
}  # fmt: skip


def analyze(path: Path) -> list[dict[str, Any]]:
    return [describe_device(device) for device in analyze_trace(read_trace(path))]


def compare(path: Path) -> list[dict[str, Any]]:
    """Compare all figures of a file with the independent analyser's; return ours."""
    oracle = load_oracle().analyse(str(path))
    found = analyze(path)
    assert [str(device["device"]) for device in found] == list(oracle["devices"])
    for device in found:
        expected = oracle["devices"][str(device["device"])]
        assert {word: device[word] for word in WORDS} == {word: expected[theirs] for word, theirs in WORDS.items()}
        assert device["copies"] == {"kernels": expected["copies"], "us": expected["copy_union"]}
        for kind, figures in expected["comm_kinds"].items():
            own = device["kinds"]["other_communication" if kind == "other" else kind]
            assert own == {"kernels": figures["kernels"], "us": figures["union"], "exposed_us": figures["exposed"]}, kind
        phases = {phase["name"]: phase for phase in device["phases"]}
        assert set(phases) == set(expected.get("phases", {}))
        for name, figures in expected.get("phases", {}).items():
            ours = [phases[name][key] for key in ("kernels", "compute_us", "communication_us", "exposed_us")]
            assert ours == [figures[key] for key in ("kernels", "compute", "comm", "exposed")], name
        chunks = expected.get("chunks", expected["overlap"])
        for key, theirs in (("pair_overlap", "factor"), ("perfect_overlap", "bound")):
            assert device["chunks"][key] == pytest.approx(chunks[theirs], abs=2e-6)
        for part in {"F", "I", "W"} & set(chunks):
            assert device["chunks"][part] == {"compute_us": chunks[part]["compute"], "communication_us": chunks[part]["comm"]}
    left_out: dict[str, int] = {}
    for device in found:
        for reason, count in device["left_out"].items():
            left_out[reason] = left_out.get(reason, 0) + count
    assert left_out == oracle["dropped"]
    return found


@pytest.mark.parametrize("path", [p for p in (*PUBLISHED, *EXPORTS) if "cpu_only" not in p.name], ids=lambda path: path.name)
def test_published_traces_give_the_independent_figures(path: Path) -> None:
    compare(path)


def test_the_kinds_of_computation_of_a_training_step() -> None:
    if not PUBLISHED[0].is_file():
        pytest.skip("the published trace is not there")
    (device,) = load_oracle().analyse(str(PUBLISHED[0]))["devices"].values()
    (found,) = analyze(PUBLISHED[0])
    for kind in ("gemm", "grouped_gemm", "attention"):
        classes = device["compute_classes"][kind]
        assert (found["kinds"][kind]["kernels"], found["kinds"][kind]["us"]) == (classes["kernels"], classes["union"])
    assert sum(row["us"] for row in found["unclassified"]) < 0.001 * found["compute_us"]


@pytest.mark.parametrize("seed", range(6))
def test_made_traces_give_the_independent_figures(seed: int, tmp_path: Path) -> None:
    found = compare(write_trace(tmp_path / "made.json.gz", make_events(seed, 80, devices=(2, 3))))
    assert all(device["exposed_us"] and device["hidden_us"] and device["phases"] for device in found)


def test_an_export_of_nsight_gives_the_independent_figures(tmp_path: Path) -> None:
    random = Random(0)
    rows = []
    for number in range(50):
        start = 10**18 + 1000 * number + random.randrange(900)
        name = random.choice(("void deep_ep::intranode::dispatch<1>(int)", "gemm_kernel"))
        rows.append((name, start, start + random.randrange(3000), number % 2, random.choice((7, 8)), number))
    (first, second) = compare(write_export(tmp_path / "made.sqlite", rows))
    assert first["phases"] == [] or {phase["name"] for phase in first["phases"]} <= {"whole", "(none)"}
    assert second["kinds"].keys() == {"ep_dispatch", "gemm"}


def shuffle(events: list[Event]) -> None:
    Random(3).shuffle(events)


def permute_streams(events: list[Event]) -> None:
    for event in events:
        if event.get("cat") == "kernel":
            event["args"]["stream"] = {7: 23, 23: 24, 24: 7}.get(event["args"]["stream"], event["args"]["stream"])


def shift_clock(events: list[Event]) -> None:
    for event in events:
        if "ts" in event:
            event["ts"] += 10**15


def write_floats(events: list[Event]) -> None:
    for event in events:
        event |= {key: float(event[key]) for key in ("ts", "dur") if key in event}


def write_text(events: list[Event]) -> None:
    for event in events:
        event |= {key: str(event[key]) for key in ("ts", "dur") if key in event}


def rename_library(events: list[Event]) -> None:
    for event in events:
        for old in ("dpsk::ep::", "deep_ep::"):
            event["name"] = event["name"].replace(old, "primus_turbo::deep_ep::" if event["ts"] % 2 else "uccl_ep::")


CHANGES: list[Callable[[list[Event]], None]] = [shuffle, permute_streams, shift_clock, write_floats, write_text, rename_library]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("path", [None, *PUBLISHED[:1]], ids=lambda path: path.name if path else "made")
def test_figures_stay_when(change: Callable[[list[Event]], None], path: Path | None, tmp_path: Path) -> None:
    if path is not None and not path.is_file():
        pytest.skip("the published trace is not there")
    events = make_events(1) if path is None else json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    if path is None:
        # A clock that is shifted far needs whole microseconds: a float of 2.7e15 has no eighths.
        events = [event | {key: int(event[key]) for key in ("ts", "dur") if key in event} for event in events]
    before = analyze(write_trace(tmp_path / "before.json", events))
    changed = copy.deepcopy(events)
    change(changed)
    after = analyze(write_trace(tmp_path / "after.json", changed))
    for figures in (*before, *after):
        for key in ("file", "same_stream_overlaps"):
            del figures[key]
        for phase in figures["phases"]:
            del phase["waited_for"]
    assert after == before


def test_a_float_would_lose_what_text_keeps(tmp_path: Path) -> None:
    starts = ["1740461679471346.125", "1740461679471347.250", "1740461679471348.375"]
    events = [make_kernel("gemm", start, "1.125", number) for number, start in enumerate(starts)]
    text = json.dumps({"traceEvents": events})
    for start in (*starts, "1.125"):
        text = text.replace(f'"{start}"', start)
    (tmp_path / "exact.json").write_text(text)
    (found,) = analyze(tmp_path / "exact.json")
    assert (found["window_us"], found["busy_us"], found["idle_us"]) == (3.375, 3.375, 0.0)


def analyze_events(tmp_path: Path, events: list[Event]) -> Device:
    return analyze_trace(read_trace(write_trace(tmp_path / "t.json", events)))[0]


def test_every_nanosecond_of_the_window_has_one_owner(tmp_path: Path) -> None:
    for seed in range(5):
        device = analyze_events(tmp_path, make_events(seed, 120))
        assert sum(device.owned.values()) == device.window and min(device.owned.values()) >= 0
        assert sum(sum(phase.causes.values()) for phase in device.phases) == device.exposed


def test_exposed_time_belongs_to_the_kernel_that_ends_last(tmp_path: Path) -> None:
    names = ("deep_ep::intranode::dispatch", "deep_ep::intranode::combine")
    events = [
        make_kernel(names[0], EPOCH, 100, 7, correlation=1), make_kernel(names[1], EPOCH + 50, 150, 8, correlation=2),
        make_range("all", EPOCH - 100, 10_000),
    ]  # fmt: skip
    (phase,) = analyze_events(tmp_path, events).phases
    assert phase.causes == {names[0]: 50_000, names[1]: 150_000}


def test_devices_are_never_pooled(tmp_path: Path) -> None:
    events = [make_kernel("gemm", EPOCH, 100, device=4), make_kernel("ncclDevKernel_AllGather", EPOCH, 100, device=11)]
    first, second = analyze_trace(read_trace(write_trace(tmp_path / "two.json", events)))
    assert (first.label, first.exposed, second.label, second.exposed) == (4, 0, 11, 100_000)


def test_kernels_past_the_next_of_their_stream_are_told(tmp_path: Path) -> None:
    device = analyze_events(tmp_path, [make_kernel("gemm", EPOCH, 100), make_kernel("gemm", EPOCH + 40, 100)])
    assert device.clashes == (1, 60_000)
    assert device.compute.length == 140_000


@pytest.mark.parametrize("seed", range(3))
def test_layers_are_those_open_where_their_kernels_were_launched(seed: int, tmp_path: Path) -> None:
    random, events = Random(seed), list[Event]()
    expected: dict[tuple[str, bool], int] = {}
    names = ("10 (F)", "9 (B)", "mtp 1 (F)", "9 (W)")
    # Two threads, a layer open on each; a third has none.
    for thread in (1, 2):
        for number in range(20):
            name = random.choice(names)
            events.append(make_range(f"counterflow layer {name}", EPOCH + 100 * number, 90, thread))
            events.append(make_range("stage 1 (F)", EPOCH + 100 * number - 5, 99, thread))
            length, correlation = random.choice((7, 40)), 1000 * thread + number
            kernel = random.choice((COMPUTE[0], COMMUNICATE[0]))
            events.append(make_launch(correlation, EPOCH + 100 * number + 30, thread))
            # Kernels of one name and layer do not meet: their union is their sum.
            start = EPOCH + 5000 + 100 * number + 50 * (thread - 1)
            events.append(make_kernel(kernel, start, length, 7 + thread, correlation=correlation))
            key = name, kernel == COMMUNICATE[0]
            expected[key] = expected.get(key, 0) + 1000 * length
    events += [make_launch(7, EPOCH + 50, 3), make_kernel("gemm", EPOCH + 9000, 30, correlation=7)]
    device = analyze_events(tmp_path, events)
    found = {f"{layer.name} ({layer.part})": (layer.compute, layer.communication) for layer in device.layers}
    assert found == {name: (expected.get((name, False), 0), expected.get((name, True), 0)) for name, _ in expected}
    assert {phase.name for phase in device.phases} == {"stage 1 (F)"}, "layers are no phases"
    places = [(layer.name, layer.part) for layer in device.layers]
    assert places == sorted(places, key=lambda place: (place[0] == "mtp 1", int(place[0].split()[-1]), "FBW".index(place[1])))


def test_a_kernel_without_a_launch_has_the_layer_of_its_stream(tmp_path: Path) -> None:
    layer = {
        **make_range("counterflow layer 2 (B)", EPOCH, 100),
        "cat": "gpu_user_annotation",
        "args": {"device": 0, "stream": 7},
    }
    (found,) = analyze_events(
        tmp_path, [layer, make_kernel("gemm", EPOCH + 10, 20), make_kernel("gemm", EPOCH + 10, 20, 8)]
    ).layers
    assert (found.name, found.part, found.kernels, found.compute) == ("2", "B", 1, 20_000)
