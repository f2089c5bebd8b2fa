"""The page of profiled steps in a real browser: what it draws and tells, and how fast with very many kernels."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from counterflow.analysis import analyze_trace, read_trace
from counterflow.analysis.gains import list_gains
from counterflow.analysis.overlap import Device
from counterflow.report import Findings, render_findings_html
from counterflow.report.colours import DARK, LIGHT
from tests.support.made_trace import (
    EPOCH,
    Event,
    make_events,
    make_kernel,
    make_large_trace,
    make_launch,
    make_range,
    write_trace,
)

WIDTH = 1400
GEMM = "void cutlass::device_kernel<dpsk::grouped_gemm::cuda::fp8::Gemm>(Params)"
DISPATCH, REDUCE = "void deep_ep::internode::dispatch<8>(int4*)", "ncclDevKernel_AllReduce_Sum_f32_RING_LL(ncclDevComm*)"
# A product of 400 us, a transfer of 300 us from 200 us on (so 100 us of it exposed), and from 700 us on an all-reduce of 200 us.
STEP = [
    make_kernel(GEMM, EPOCH, 400, 7, correlation=1),
    make_kernel(DISPATCH, EPOCH + 200, 300, 23, correlation=2),
    make_kernel(REDUCE, EPOCH + 700, 200, 24, correlation=3),
    make_launch(1, EPOCH - 90),
    make_launch(2, EPOCH - 70),
    make_launch(3, EPOCH - 50),
    make_range("mlp(F)", EPOCH - 95, 15),
    make_range("dispatch(F)", EPOCH - 75, 15),
]


class Opened:
    """An open page, and what a test asks of it."""

    def __init__(self, page: Any, read_pixel: Callable[[Any, int, float, float], str]) -> None:
        self.page, self._read_pixel = page, read_pixel

    def ask(self, script: str) -> Any:
        return self.page.evaluate(script)

    def settle(self) -> None:
        self.ask("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")

    def locate(self, lane: str, milliseconds: float, device: int = 0) -> tuple[float, float]:
        rows = [title for title, _ in self.ask(f"counterflow.lanes[{device}]")]
        point = self.ask(f"counterflow.locate({device}, {rows.index(lane)}, {milliseconds})")
        return point["x"], point["y"]

    def pixel(self, lane: str, milliseconds: float) -> str:
        return self._read_pixel(self.page, 0, *self.locate(lane, milliseconds))

    def hover(self, lane: str, milliseconds: float) -> list[str]:
        self.page.mouse.move(*self.locate(lane, milliseconds))
        self.settle()
        return self.page.inner_text("#tooltip").splitlines() if self.page.is_visible("#tooltip") else []

    def view(self) -> tuple[float, float]:
        begin, end = self.ask("[counterflow.view.from, counterflow.view.to]")
        return begin, end


def analyze(path: Path, events: list[Event]) -> list[Device]:
    return analyze_trace(read_trace(write_trace(path, events)))


def render(devices: list[Device], title: str = "a step") -> str:
    return render_findings_html(Findings(devices, [list_gains(device) for device in devices]), title)


@pytest.fixture
def open_devices(open_text: Callable[..., Any], read_pixel: Any, tmp_path: Path) -> Callable[..., Opened]:
    def open_events(events: list[Event], scheme: str = "light", width: int = WIDTH, title: str = "a step") -> Opened:
        opened = Opened(open_text(render(analyze(tmp_path / "made.json", events), title), scheme, width), read_pixel)
        opened.settle()
        return opened

    return open_events


@pytest.mark.parametrize(("scheme", "colours"), [("light", LIGHT), ("dark", DARK)])
def test_lanes_show_what_ran_and_what_is_exposed(open_devices: Any, scheme: str, colours: dict[str, str]) -> None:
    page = open_devices(STEP, scheme)
    window = [page.pixel("window", time) for time in (0.1, 0.3, 0.45, 0.6, 0.8)]
    assert window == [colours[name] for name in ("alone", "communication", "waiting", "idle", "waiting")]
    assert page.pixel("computation", 0.35) == colours["products"]
    assert page.pixel("communication", 0.49) == colours["exchange"]
    # A pale band marks exposed time in all lanes.
    assert page.pixel("computation", 0.45) not in (colours["ground"], page.pixel("computation", 0.6))


def test_hovering_a_kernel_tells_kind_phase_and_what_is_exposed(open_devices: Any) -> None:
    page = open_devices(STEP)
    name, kind, phase, times, exposed = page.hover("communication", 0.3)
    assert name == DISPATCH and kind == "ep_dispatch, stream 23" and phase == "phase dispatch(F)"
    assert times == "start 200 µs, duration 300 µs" and exposed == "exposed 100 µs"
    assert page.hover("window", 0.45)[0] == "exposed communication"
    assert page.hover("window", 0.6) == []


def test_a_phase_and_a_kind_are_shown_alone(open_devices: Any) -> None:
    page = open_devices(STEP)
    page.page.locator("tr[data-pin=phase]", has_text="dispatch(F)").click()
    page.settle()
    assert page.pixel("computation", 0.35) == LIGHT["hatch"] and page.pixel("communication", 0.49) == LIGHT["exchange"]
    assert page.pixel("window", 0.45) == LIGHT["waiting"]
    page.page.locator("tr[data-pin=kind]", has_text="gemm").click()
    page.settle()
    assert page.pixel("computation", 0.35) == LIGHT["products"] and page.pixel("communication", 0.49) == LIGHT["hatch"]
    page.page.keyboard.press("Escape")
    page.settle()
    assert page.pixel("computation", 0.35) == LIGHT["products"] and page.pixel("communication", 0.49) == LIGHT["exchange"]
    page.page.mouse.click(*page.locate("computation", 0.1))
    page.settle()
    assert page.pixel("communication", 0.49) == LIGHT["hatch"]


def test_the_wheel_zooms_dragging_pans_and_home_shows_all(open_devices: Any) -> None:
    page = open_devices(STEP)
    whole = page.view()
    page.page.mouse.move(*page.locate("computation", 0.3))
    page.page.mouse.wheel(0, -800)
    page.settle()
    begin, end = page.view()
    assert end - begin < 0.5 * (whole[1] - whole[0]) and begin < 0.3 < end
    x, y = page.locate("computation", 0.3)
    page.page.mouse.down()
    page.page.mouse.move(x + 60, y, steps=4)
    page.page.mouse.up()
    page.settle()
    assert page.locate("computation", 0.3)[0] == pytest.approx(x + 60, abs=5)
    page.page.keyboard.press("Home")
    page.settle()
    assert page.view() == whole


def test_names_from_a_file_run_nothing(open_devices: Any) -> None:
    harm = """</script><script>window.harm = 1</script><img src=x onerror="window.harm = 2">' " & é"""
    events = [make_kernel(harm, EPOCH, 400, 7, correlation=1), make_launch(1, EPOCH - 90), make_range(harm, EPOCH - 95, 15)]
    page = open_devices(events, title=harm)
    assert page.hover("computation", 0.2)[0] == harm
    assert page.ask("window.harm") is None
    assert page.page.locator("h1").inner_text() == harm
    assert page.page.locator("tr[data-pin=phase] td").first.inner_text() == harm


@pytest.mark.parametrize("width", [380, 700, 1400])
def test_nothing_is_cut_or_covered(open_devices: Any, find_overlaps: Any, width: int, tmp_path: Path) -> None:
    page = open_devices(make_events(3, devices=(0, 1)), width=width)
    page.page.evaluate("document.querySelectorAll('details').forEach((node) => { node.open = true; })")
    page.page.screenshot(path=str(tmp_path / "screen.png"), full_page=True)  # pytest keeps it for a look
    assert page.ask("document.documentElement.scrollWidth") <= width
    assert find_overlaps(page.page) == []


def test_300_000_kernels_open_and_pan_fluently(open_text: Any, read_pixel: Any) -> None:
    (device,) = analyze_trace(make_large_trace(300_000))
    page = Opened(open_text(render([device]), "light", WIDTH), read_pixel)
    page.settle()
    assert page.ask("counterflow.stats.opened") < 2000
    assert page.ask("counterflow.stats.columns") > 3000, "no lane is drawn by columns"
    for share in (1.0, 0.5, 0.1, 0.01):
        page.ask(f"counterflow.setView(0, counterflow.total * {share})")
        page.settle()
        assert find_frame_time(page) < 1 / 30, f"at {share} of the window"
    assert page.hover("computation", page.view()[0] + 0.001)[0] == device.trace.names[0]


def find_frame_time(page: Opened, frames: int = 15, tries: int = 4) -> float:
    """Return the seconds that a frame takes while panning, at best: others share the machine."""
    pan = f"""new Promise((done) => {{
        let left = {frames};
        const step = (counterflow.view.to - counterflow.view.from) / 50, length = counterflow.view.to - counterflow.view.from;
        const turn = () => {{ counterflow.setView(counterflow.view.from + (length < counterflow.total ? step : 0), length);
                              if (left--) requestAnimationFrame(turn); else done(); }};
        requestAnimationFrame(turn);
    }})"""
    times = []
    for _ in range(tries):
        began = time.perf_counter()
        page.ask(pan)
        times.append((time.perf_counter() - began) / frames)
    return min(times)
