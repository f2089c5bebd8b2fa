"""``counterflow analyze`` as a user runs it: output, files, several ranks, comparisons and refusals."""

import json
from pathlib import Path
from typing import Any

import pytest

from counterflow.analysis import analyze_trace, read_trace
from counterflow.analysis.cluster import compare_ranks
from counterflow.analysis.comparison import compare_devices
from counterflow.analysis.gains import list_cluster_gains, list_gains
from tests.support import ROOT
from tests.support.made_trace import EPOCH, PUBLISHED, Event, make_events, make_kernel, make_launch, make_range, write_trace
from tests.support.running import check_refusal, run_command

PROFILE = ROOT / "examples" / "profile"
DISPATCH, NOTIFY = "void deep_ep::internode::dispatch<8>(int)", "void deep_ep::internode::cached_notify<8>(int)"


def analyze(argv: list[Any], capsys: pytest.CaptureFixture[str]) -> Any:
    code, out, err = run_command(["analyze", *map(str, argv), "--json"], capsys)
    assert (code, err) == (0, "")
    return json.loads(out, parse_constant=lambda constant: pytest.fail(constant))


def run_text(argv: list[Any], capsys: pytest.CaptureFixture[str]) -> str:
    code, out, err = run_command(["analyze", *map(str, argv)], capsys)
    assert (code, err) == (0, "")
    return out


def test_a_trace_in_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_trace(tmp_path / "made.json.gz", make_events(1), distributedInfo={"rank": 4, "world_size": 8})
    out = run_text([path], capsys)
    assert out.startswith("rank 4 GPU 0  window ") and "exposed  " in out and "costs    F " in out and "what if" in out
    assert all(len(line) < 400 for line in out.splitlines())


def test_the_published_step(capsys: pytest.CaptureFixture[str]) -> None:
    if not PUBLISHED[0].is_file():
        pytest.skip("the published trace is not there")
    out = run_text([PUBLISHED[0]], capsys)
    for words in (
        "window 129.0 ms   busy 99.6 %   computation 124.3 ms   communication 113.4 ms, 96.3 % hidden, 4.2 ms exposed",
        "exposed  dispatch(B) 1.9 ms   combine(B) 1.4 ms",
        "F 35.9 + 61.5 ms   I 59.7 + 51.9 ms   W 29.8 ms   pair overlap 0.54 (perfect 0.52)",
    ):
        assert words in out
    (device,) = analyze([PUBLISHED[0]], capsys)["devices"]
    waiting = device["kinds"]["ep_notify"]["us"] / device["communication_us"]
    assert waiting == pytest.approx(0.287, abs=0.001)


def test_costs_go_into_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_trace(tmp_path / "made.json", make_events(1))
    (device,) = analyze([path, "--costs", tmp_path / "costs.json"], capsys)["devices"]
    costs = json.loads((tmp_path / "costs.json").read_text())
    chunk = device["chunks"]
    for key, part in (("f", "F"), ("i", "I"), ("w", "W")):
        assert costs[key] == pytest.approx((chunk[part]["compute_us"] + chunk[part]["communication_us"]) / 1000)
    assert costs["overlap"] == min(2.0, chunk["pair_overlap"]) and costs["unit"] == "ms" and "made.json" in costs["source"]


def test_a_cut_file_is_used_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_trace(tmp_path / "made.json.gz", make_events(1, 3000))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    (file,) = analyze([path], capsys)["files"]
    assert file["truncated"] and "gzip stream ends too early" in file["read_in_part"]
    assert "was read in part" in run_text([path], capsys).splitlines()[0]


def test_names_from_a_file_do_not_reach_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    events = [make_kernel("\x1b[31mred\n<script>", EPOCH, 5), make_kernel(f"{DISPATCH}\x07", EPOCH + 5, 5, 8)]
    out = run_text([write_trace(tmp_path / "t.json", [*events, make_range("a\rb(F)\x1b[2J", EPOCH, 50)])], capsys)
    assert all(character.isprintable() or character == "\n" for character in out)


def make_rank(rank: int, late: int, products: int, path: Path, step: int = 5, **head: Any) -> Path:
    """Write a rank that comes ``late`` (microseconds) to each of three all-reduces of 10, after grouped products."""
    time, events = EPOCH, [make_range(f"ProfilerStep#{step}", EPOCH - 10, 10)]
    for _ in range(3):
        events.append(make_kernel("m_grouped_gemm", time, products, rank + 1))
        events.append(make_kernel("ncclDevKernel_AllReduce_Sum", time + products, 10 + 100 - late, 30 + rank))
        time += products + 10 + 100 - late
    return write_trace(path / f"rank{rank}.json", events, distributedInfo={"rank": rank, "world_size": 2}, **head)


def test_ranks_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [make_rank(0, 0, 50, tmp_path), make_rank(1, 100, 150, tmp_path)]
    found = analyze(files, capsys)
    first, second = found["ranks"]
    assert (first["waiting_us"], first["exposed_waiting_us"]) == (300, 300)
    assert (second["waiting_us"], second["exposed_waiting_us"]) == (0, 0)
    gains = {gain["change"]: gain["gain_us"] for gain in found["what_if"]}
    assert gains == {"no stragglers": 150, "balanced experts": 150}
    assert "most computation: 1 GPU 0" in run_text(files, capsys)


def test_ranks_whose_kernels_do_not_match_are_not_guessed_at(tmp_path: Path) -> None:
    one = write_trace(tmp_path / "a.json", [make_kernel("ncclDevKernel_AllReduce", EPOCH, 10)])
    two = write_trace(tmp_path / "b.json", [make_kernel("ncclDevKernel_AllReduce", EPOCH + 20 * n, 10) for n in range(2)])
    devices = [device for path in (one, two) for device in analyze_trace(read_trace(path))]
    ranks = compare_ranks(devices)
    assert [rank.waiting for rank in ranks] == [None, None]
    assert list_cluster_gains(ranks) == []


def test_what_would_gain_how_much(tmp_path: Path) -> None:
    events = [
        make_kernel("gemm", EPOCH, 100, 1), make_kernel(DISPATCH, EPOCH + 50, 100, 2), make_kernel(NOTIFY, EPOCH + 140, 30, 3),
        make_kernel("gemm", EPOCH + 190, 10, 1),
    ]  # fmt: skip
    (device,) = analyze_trace(read_trace(write_trace(tmp_path / "t.json", events)))
    gains = {gain.change: gain.time for gain in list_gains(device)}
    # Communication from 50 to 170, of which 70 exposed; computation 110. Notify runs alone from 150 to 170.
    assert gains["all communication hidden"] == 110_000 + 70_000 - 120_000
    assert gains["no waiting for peers in notify kernels"] == gains["no idle time"] == 20_000


def test_a_difference_is_explained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, after = (write_trace(tmp_path / f"{seed}.json", make_events(seed, 100)) for seed in (1, 2))
    (found,) = analyze([after, "--against", before], capsys)["against"]
    for table in ("kinds", "phases", "parts"):
        changes = sum(row["difference_us"] for row in found[table])
        assert changes == pytest.approx(found["step"]["difference_us"], abs=0.1)
    assert found["explained"] == pytest.approx(1, abs=1e-6) and found["step"]["difference_us"]
    assert "explain 100.0 % of it" in run_text([after, "--against", before], capsys)


def test_windows_of_several_steps_compare_by_the_step(tmp_path: Path) -> None:
    def make(name: str, steps: int) -> Any:
        events: list[Event] = []
        for step in range(steps):
            events += [make_kernel("gemm", EPOCH + 100 * step, 80), make_kernel(DISPATCH, EPOCH + 100 * step + 80, 20, 8)]
            events.append(make_range(f"ProfilerStep#{step}", EPOCH + 100 * step, 100))
        return analyze_trace(read_trace(write_trace(tmp_path / name, events)))

    (found,) = compare_devices(make("one.json", 1), make("three.json", 3))
    assert (found.step.before, found.step.after) == (100_000, 100_000)
    assert all(change.difference == 0 for change in found.kinds)


def test_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_trace(tmp_path / "t.json", [make_kernel("gemm", EPOCH, 5)])
    copy = tmp_path / "copy.json"
    copy.write_bytes(path.read_bytes())
    plain = write_trace(tmp_path / "u.json", [make_kernel("gemm", EPOCH + 10**7, 5)])
    check_refusal(["analyze", str(path), str(path)], "given twice", capsys)
    check_refusal(["analyze", str(path), str(copy)], "hold the same rank", capsys)
    check_refusal(["analyze", str(path), str(plain)], "share no time", capsys)
    check_refusal(["analyze", str(path), "--costs", str(tmp_path / "costs.json")], "no costs are known", capsys)
    assert not (tmp_path / "costs.json").exists()
    check_refusal(["analyze", str(tmp_path / "none.json")], "no such file", capsys)
    check_refusal(["analyze", str(tmp_path)], "no recorded step", capsys)
    check_refusal(["analyze", str(path), "--classes", str(path)], "cannot be read as a table", capsys)
    check_refusal(["analyze", str(path), "--against", str(tmp_path / "none.json")], "no such file", capsys)
    files = [str(make_rank(rank, 0, 50, tmp_path, step=5 + rank)) for rank in range(2)]
    check_refusal(["analyze", *files], "holds step 5", capsys)
    (tmp_path / "again").mkdir()
    same = [str(make_rank(1, 0, 60 + number, tmp_path / folder)) for number, folder in enumerate(("", "again"))]
    check_refusal(["analyze", *same], "hold the same rank (rank 1)", capsys)


def test_ranks_that_run_equally_many_are_matched(tmp_path: Path) -> None:
    """Two groups of two ranks: each waits for its own."""
    devices = []
    for rank, (count, length) in enumerate(((2, 30), (2, 10), (3, 8), (3, 5))):
        events = [make_kernel("ncclDevKernel_AllReduce_Sum", EPOCH + 100 * number, length) for number in range(count)]
        path = write_trace(tmp_path / f"{rank}.json", events, distributedInfo={"rank": rank, "world_size": 4})
        devices += analyze_trace(read_trace(path))
    assert [rank.waiting for rank in compare_ranks(devices)] == [40_000, 0, 9_000, 0]


def write_simulation(path: Path, ranks: int, command: Any) -> Path:
    command("schedule show 1f1b --microbatches 4 --ranks", ranks, "--trace", path)
    return path


def test_what_cannot_be_compared_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], command: Any) -> None:
    kernels = write_trace(tmp_path / "t.json", [make_kernel("gemm", EPOCH, 5)])
    two = write_trace(tmp_path / "two.json", [make_kernel("gemm", EPOCH, 5, device=device) for device in (4, 5)])
    simulated = [write_simulation(tmp_path / f"simulated{ranks}.json", ranks, command) for ranks in (2, 4)]
    check_refusal(["analyze", str(two), "--against", str(kernels)], "t.json has 1 rank and", capsys)
    check_refusal(["analyze", str(kernels), "--against", str(simulated[0])], "they have no part in common", capsys)
    check_refusal(["analyze", str(simulated[1]), "--against", str(simulated[0])], "has 2 ranks and", capsys)


def test_a_trace_with_phases_compares_with_a_simulation(tmp_path: Path, capsys: pytest.CaptureFixture[str], command: Any) -> None:
    simulated = write_simulation(tmp_path / "simulated.json", 2, command)
    events = make_events(1, 40, devices=(0, 1))
    found = analyze([write_trace(tmp_path / "t.json", events), "--against", simulated], capsys)["against"]
    assert len(found) == 2
    for one in found:
        assert sum(row["difference_us"] for row in one["parts"]) == pytest.approx(one["step"]["difference_us"], rel=0.02)
        assert {"F", "I"} <= {row["name"] for row in one["parts"]}


def make_chunk(path: Path, dispatch: int) -> Path:
    """Write a forward, a backward and weight gradients one after the other, a dispatch of so many us exposed in the first two."""
    events, time = [], EPOCH
    for number, (name, compute) in enumerate((("mlp(F)", 100), ("mlp(B)", 120), ("mlp(W)", 60))):
        for kernel, length in (("gemm", compute), *([(DISPATCH, dispatch)] if number < 2 else [])):
            correlation = len(events) + 1
            events += [make_kernel(kernel, time, length, 7, correlation=correlation), make_launch(correlation, time)]
            events.append(make_range(name, time - 1, 2))
            time += length
    return write_trace(path, events)


def test_pairs_are_assumed_to_hide_what_they_can_where_none_ran(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = analyze([make_chunk(tmp_path / "t.json", 80)], capsys)
    chunks = found["devices"][0]["chunks"]
    assert (chunks["pair_overlap"], chunks["perfect_overlap"]) == (1.0, round(280 / 440, 6))
    (gain,) = found["what_if"]
    assert (
        "with overlapped pairs instead of 1f1b" in gain["change"]
        and "hide all they can (0.64 of their parts)" in gain["assumption"]
    )
    assert gain["flags"].endswith("--cf-overlap")


def test_what_one_file_cannot_tell_is_said_and_gains_are_ranked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = make_chunk(tmp_path / "t.json", 80)
    (said,) = analyze([path], capsys)["what_if_unknown"]
    assert said.startswith("no stragglers, balanced experts: give the traces of several ranks")
    lines = run_text([path, "--html", tmp_path / "p.html"], capsys).splitlines()
    times = [float(line.split()[0]) for line in lines if " %) " in line]
    assert len(times) > 1 and times == sorted(times, reverse=True)
    assert (
        "no stragglers, balanced experts" in lines[-1] and "no stragglers, balanced experts" in (tmp_path / "p.html").read_text()
    )
    plain = write_trace(tmp_path / "u.json", [make_kernel("gemm", EPOCH, 5)])
    assert any(said.startswith("another schedule: ") for said in analyze([plain], capsys)["what_if_unknown"])


def test_a_rank_of_a_pipeline_alone_tells_no_other_schedule(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (path,) = sorted(PROFILE.glob("*00000*"))
    found = analyze([path], capsys)
    assert found["what_if"] == [] and any("all ranks of a pipeline" in said for said in found["what_if_unknown"])
