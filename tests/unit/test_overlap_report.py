"""Pictures and files of profiled steps: what they hold adds up to the figures, whatever names stand in a trace."""

import json
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from counterflow.analysis import analyze_trace, read_trace
from counterflow.analysis.overlap import Device
from counterflow.errors import TraceError
from counterflow.report import Findings, lanes, render_findings_html, render_findings_svg, render_findings_trace
from counterflow.report.lanes import EXPOSED, HIDDEN, NAMES, list_lanes
from counterflow.report.overlap_trace import pack_tracks
from tests.support.made_trace import EPOCH, make_events, make_kernel, write_trace
from tests.support.running import run_command

HARM = "</script><b>\ud800\x1b[31m&'\""


def analyze(path: Path, events: list[dict[str, Any]]) -> list[Device]:
    return analyze_trace(read_trace(write_trace(path, events)))


def test_lanes_hold_every_kernel_once_and_the_window_adds_up(tmp_path: Path) -> None:
    (device,) = analyze(tmp_path / "made.json", make_events(2))
    window, *others = list_lanes(device)
    assert sorted(np.concatenate([lane.rows for lane in others]).tolist()) == list(range(len(device.rows)))
    lengths = window.end - window.start
    assert lengths[window.kinds == EXPOSED].sum() == device.exposed
    assert lengths[window.kinds == HIDDEN].sum() == device.hidden
    assert (window.start[1:] >= window.end[:-1]).all()


def test_streams_beyond_the_busiest_share_a_lane(tmp_path: Path) -> None:
    events = [make_kernel("gemm", EPOCH + 10 * n, 5 + n, stream=n) for n in range(9)]
    (device,) = analyze(tmp_path / "made.json", events)
    assert [lane.detail for lane in list_lanes(device)[1:]] == ["stream 8", "stream 7", "stream 6", "6 more streams"]


def test_tracks_for_perfetto_never_overlap_and_sum_to_the_figures(tmp_path: Path) -> None:
    devices = analyze(tmp_path / "made.json", make_events(4, devices=(0, 1)))
    trace = json.loads(render_findings_trace(devices))
    for number, device in enumerate(devices):
        own = [event for event in trace["traceEvents"] if event["pid"] == number]
        names = {event["tid"]: event["args"]["name"] for event in own if event["name"] == "thread_name"}
        slices = [event for event in own if event["ph"] == "X"]
        assert len(slices) == len(device.rows) + len(list_lanes(device)[0].rows)
        tracks = {re.sub(r" \(\d+\)$", "", names[event["tid"]]) for event in slices}
        copies = {NAMES[lanes.COPIES]} if device.copies[0] else set()
        assert tracks == {"how the window was spent", *device.kinds} | copies
        assert sum(event["dur"] for event in slices if event["cat"] == NAMES[EXPOSED]) == pytest.approx(device.exposed / 1000)
        for track in names:
            spans = sorted((event["ts"], event["ts"] + event["dur"]) for event in slices if event["tid"] == track)
            assert all(end <= begin + 1e-6 for (_, end), (begin, _) in zip(spans, spans[1:], strict=False))


def test_a_track_is_used_again_once_it_is_free() -> None:
    assert pack_tracks(np.array([0, 1, 2, 5, 6]), np.array([4, 2, 9, 6, 7])).tolist() == [0, 1, 1, 0, 0]


def test_a_picture_shows_as_much_exposed_time_as_there_is(tmp_path: Path) -> None:
    events = [make_kernel("gemm", EPOCH, 600, 7), make_kernel("ncclDevKernel_AllReduce_Sum(int)", EPOCH + 400, 600, 8)]
    (device,) = analyze(tmp_path / "made.json", events)
    root = ElementTree.fromstring(render_findings_svg([device]))
    widths = dict.fromkeys(("alone", "communication", "waiting"), 0.0)
    for node in root.iter("{http://www.w3.org/2000/svg}rect"):
        if node.get("class") in widths and float(node.get("x", 0)) >= 170 and float(node.get("y", 0)) > 40:
            widths[node.get("class", "")] += float(node.get("width", 0))
    assert widths == pytest.approx({"alone": 320, "communication": 160, "waiting": 320}, abs=1)


def test_hostile_names_are_escaped_everywhere(tmp_path: Path) -> None:
    devices = analyze(tmp_path / "made.json", [make_kernel(HARM, EPOCH, 10, stream=HARM)])
    page = render_findings_html(Findings(devices, [[]], notes=[HARM]), HARM)
    page.encode()
    assert page.count("</script>") == 2 and HARM[:12] not in page
    for node in ElementTree.fromstring(render_findings_svg(devices)).iter():
        assert node.tag.rpartition("}")[2] in ("svg", "rect", "title", "text", "line")
    assert any(event["name"].startswith(HARM[:12]) for event in json.loads(render_findings_trace(devices))["traceEvents"])


def test_more_than_a_page_can_show_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    devices = analyze(tmp_path / "made.json", make_events(1))
    monkeypatch.setattr(lanes, "MAX_KERNELS", 10)
    for render in (lambda: render_findings_html(Findings(devices, [[]]), ""), lambda: render_findings_svg(devices)):
        with pytest.raises(TraceError, match="shows at most 10: record fewer steps"):
            render()


def test_the_command_writes_page_picture_and_trace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    about = [{"rank": rank, "world_size": 2} for rank in (0, 1)]
    names = [tmp_path / f"profile-rank0000{rank}.json.gz" for rank in (0, 1)]
    paths = [write_trace(names[rank], make_events(rank), distributedInfo=about[rank]) for rank in (0, 1)]
    outputs = {name: tmp_path / f"out.{name}" for name in ("html", "svg", "trace")}
    options = [text for name, path in outputs.items() for text in (f"--{name}", str(path))]
    code, _, err = run_command(["analyze", *map(str, paths), "--against", str(tmp_path), *options], capsys)
    assert (code, err) == (0, "")
    page = outputs["html"].read_text()
    for words in ("Ranks side by side", "rank 0 GPU 0", "rank 1 GPU 0", "Compared", "What if", "dispatch(F)", "assuming"):
        assert words in page
    assert outputs["svg"].read_text().count("window") >= 2
    assert len(json.loads(outputs["trace"].read_text())["traceEvents"]) > 120
