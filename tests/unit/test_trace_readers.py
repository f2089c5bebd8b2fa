"""Readers of traces: what is tolerated, what is left out, and what is refused in one line."""

import gzip
import json
import os
import sqlite3
import tracemalloc
from decimal import Decimal
from pathlib import Path
from random import Random

import numpy as np
import pytest

from counterflow.analysis import analyze_trace, blocks, events, read_trace, times
from counterflow.analysis.figures import describe_device
from counterflow.analysis.intervals import claim, unite
from counterflow.analysis.times import read_times
from counterflow.errors import TraceError
from tests.support.made_trace import EPOCH, make_events, make_kernel, write_trace
from tests.support.running import refuses


def read_text(path: Path, text: str | bytes) -> tuple[int, int, str | None]:
    """Return kernels, window in ns, and why reading ended early."""
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    trace = read_trace(path)
    (device,) = analyze_trace(trace)
    return device.kernels, device.window, trace.cut


@pytest.mark.parametrize("length", [1, 3, 1000])
def test_times_are_exact(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    random = Random(length)
    texts = []
    for _ in range(length):
        number = random.randrange(4 * 10**15)
        texts.append(
            random.choice((f"{number}", f"{number}.{random.randrange(1000):03}", f"{number // 10**5}.5", "0.0005", "0.0015"))
        )
    with monkeypatch.context() as patch:
        patch.setattr(times, "_read_any", None)
        found, good = read_times([text.encode() for text in texts])
    assert good.all()
    assert found.tolist() == [int((Decimal(text) * 1000).to_integral_value()) for text in texts]


def test_what_is_no_time_is_told_and_harms_no_other() -> None:
    texts = [b"1.5", b"", b"NaN", b"-Infinity", b'"7"', b"null", b"[1,\n2]", b"1e2", b"9e99", b"-3", b"1.2.3", b".5", b"4."]
    found, good = read_times(texts)
    assert found[good].tolist() == [1500, 7000, 100_000, -3000, 500, 4000]
    assert good.tolist() == [text in (b"1.5", b'"7"', b"1e2", b"-3", b".5", b"4.") for text in texts]
    assert read_times([])[0].shape == (0,)


def test_unions_and_claims_agree_with_counting() -> None:
    random = np.random.default_rng(0)
    for _ in range(50):
        starts = random.integers(0, 60, 12)
        ends = starts + random.integers(0, 15, 12)
        marks = np.zeros(80, bool)
        for start, end in zip(starts, ends, strict=True):
            marks[start:end] = True
        union = unite(starts, ends)
        assert union.length == marks.sum()
        assert (union.starts[1:] > union.ends[:-1]).all()
        assert union.overlap(np.array([7]), np.array([41]))[0] == marks[7:41].sum()
        first, last = claim(starts, ends)
        owners = np.zeros(80, int)
        for start, end in zip(first, last, strict=True):
            owners[start:end] += 1
        assert (owners == marks).all()


@pytest.mark.parametrize("size", [64, 1000, 10_000])
def test_a_stream_is_cut_anywhere(size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_trace(tmp_path / "made.json.gz", make_events(2), distributedInfo={"rank": 3, "world_size": 8})
    whole = read_trace(path)
    monkeypatch.setattr(blocks, "BLOCK", size)
    cut = read_trace(path)
    assert (cut.rank, cut.events, cut.cut) == (3, whole.events, None)
    assert (cut.work.start == whole.work.start).all() and sorted(cut.names) == sorted(whole.names)


def test_json_as_people_write_it(tmp_path: Path) -> None:
    kernels = [json.dumps(make_kernel("gemm", EPOCH + 10 * number, 10)) for number in range(3)]
    odd = '{"ph": "X", "name": "}, {", "cat": "cpu_op", "args": {"list": [{"a": 1}, {"b": [2]}]}}'
    path = tmp_path / "t.json"
    expected = (3, 30_000, None)
    assert read_text(path, f"[{odd}, {', '.join(kernels)}]") == expected
    # Chrome's own format may lack the last bracket.
    assert read_text(path, f"[{', '.join(kernels)}") == expected
    assert read_text(path, f'\ufeff\n {{"traceEvents":[{",".join(kernels)}]}}\n') == expected
    behind = '"deviceProperties": [{"id": 0}, {"id": 1}], "distributedInfo": {"rank": 5}'
    assert (
        read_text(path, f'{{"a": "\\"traceEvents\\": [", "traceEvents": [null, {odd}, {",".join(kernels)}], {behind}}}')
        == expected
    )
    assert read_trace(path).rank == 5
    assert read_text(path, f'{{"traceEvents": [{",".join(kernels)}]}}'.encode().replace(b"gemm", b"gemm\xff\x01")) == expected


def test_fields_may_be_missing_or_strange(tmp_path: Path) -> None:
    events = make_events(4)
    kernel = make_kernel("gemm", EPOCH, 5)
    strange = [
        {"ph": "X", "cat": "kernel"}, {"ph": "X", "cat": ["kernel"], "ts": 1, "dur": 1}, {"ph": "X", "cat": "kernel", "args": []},
        {**kernel, "args": None}, {**kernel, "name": None}, {**kernel, "args": {"device": {"a": 1}, "correlation": "x"}},
        {"ph": "X", "cat": "cuda_runtime", "ts": EPOCH, "dur": 1, "args": {"correlation": "x"}, "pid": [1]}, {}, 7, None,
    ]  # fmt: skip
    trace = read_trace(write_trace(tmp_path / "t.json", [*strange, *events]))
    assert (trace.work.what == 0).sum() == 60 + 3
    assert sum(trace.left_out.values()) == 2


def test_bad_durations_are_left_out_and_counted(tmp_path: Path) -> None:
    good = make_kernel("gemm", EPOCH, 50)
    bad = [{**good, "dur": -1}, {**good, "dur": float("nan")}, {**good, "ts": None}, {**good, "ts": None, "dur": -4}]
    huge = [{**good, "dur": 1e300}, {**good, "ts": float("inf")}]
    trace = read_trace(write_trace(tmp_path / "t.json", [good, *bad, *huge]))
    assert trace.left_out == {(0, "negative dur"): 1, (0, "no ts or dur"): 5}
    (device,) = analyze_trace(trace)
    assert (device.kernels, device.window) == (1, 50_000)


@pytest.mark.parametrize("keep", [0.3, 0.7, 0.999])
def test_of_a_cut_file_what_is_there_is_used(keep: float, tmp_path: Path) -> None:
    whole = write_trace(tmp_path / "whole.json", make_events(5, 2000))
    raw = whole.read_bytes()
    for name, data in (("cut.json", raw), ("cut.json.gz", gzip.compress(raw))):
        path = tmp_path / name
        kernels, _, cut = read_text(path, data[: int(keep * len(data))])
        assert 0.5 * keep * 2000 < kernels <= 2000
        assert cut is not None and str(path) in cut and "in part" in cut and "\n" not in cut


def test_reading_ends_at_what_is_no_json(tmp_path: Path) -> None:
    kernel = json.dumps(make_kernel("gemm", EPOCH, 10))
    kernels, _, cut = read_text(tmp_path / "t.json", f'{{"traceEvents": [{kernel}, {kernel} {kernel}]}}')
    assert kernels == 2 and cut is not None and "no JSON after event 2" in cut


BAD = {
    "nothing.json": (b"", "is empty"),
    "spaces.json": (b" \n" * 1000, "is empty"),
    "noise.json": (bytes(range(256)), "no profiler trace"),
    "text.json": (b"hello", "no profiler trace"),
    "keys.json": (b'{"a": 1, "b": [2]}', "it has a, b"),
    "number.json": (b'{"traceEvents": 7}', "traceEvents"),
    "deep.json": (b'{"traceEvents": [{"a":' + b"[" * 300_000, "nested too deeply"),
    "deeper.json": (b"[" * 300_000, "nested too deeply"),
    "head.json": (b'{"a":' + b"[" * 300_000, "nested too deeply"),
    "none.json": (b'{"traceEvents": []}', "no GPU kernels"),
    "numbers.json": (b"[" + b"1," * 100_000, "no GPU kernels"),
    "broken.json.gz": (b"\x1f\x8b\x08" + b"\0" * 100, "gzip stream"),
    "zeros.json.gz": (gzip.compress(b"\0" * 10**7), "no profiler trace"),
    "digits.json.gz": (gzip.compress(b'{"traceEvents": [' + b"0" * 10**7), "no GPU kernels"),
    "folder/x.json": (b"", "no such file"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_refused_in_one_line(name: str, tmp_path: Path) -> None:
    data, said = BAD[name]
    path = tmp_path / name
    if path.parent.is_dir():
        path.write_bytes(data)
    with refuses(said, TraceError):
        read_trace(path)


def test_a_trace_without_kernels_says_what_it_holds(tmp_path: Path) -> None:
    events = [{"ph": "X", "cat": "cpu_op", "name": "aten::mm", "ts": 1, "dur": 2}] * 3
    with refuses("3 of cpu_op", TraceError):
        read_trace(write_trace(tmp_path / "cpu.json", events))


def test_sqlite_of_another_program_is_refused(tmp_path: Path) -> None:
    connection = sqlite3.connect(tmp_path / "other.sqlite")
    connection.execute("create table bookmarks (a int)")
    connection.commit()
    connection.close()
    with refuses("bookmarks", TraceError):
        read_trace(tmp_path / "other.sqlite")
    data = (tmp_path / "other.sqlite").read_bytes()
    (tmp_path / "cut.sqlite").write_bytes(data[:50] + b"\xff" * 100)
    with refuses("SQLite", TraceError):
        read_trace(tmp_path / "cut.sqlite")


def test_much_of_little_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "MAX_EVENT", 2**20)
    monkeypatch.setattr(blocks, "BLOCK", 2**16)
    path = tmp_path / "long.json.gz"
    path.write_bytes(gzip.compress(b'{"traceEvents": [{"a": "' + b"x" * 2**24))
    with refuses("no GPU kernels", TraceError):
        read_trace(path)
    path.write_bytes(gzip.compress(b'{"a": "' + b"x" * 2**24))
    with refuses("no profiler trace", TraceError):
        read_trace(path)


def test_what_is_no_file_is_refused_before_it_is_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.json")
    for path in (tmp_path / "fifo.json", Path("/dev/zero")):
        with refuses("no regular file", TraceError):
            read_trace(path)


def test_a_gzip_stream_of_another_checksum_is_used_and_told(tmp_path: Path) -> None:
    raw = write_trace(tmp_path / "t.json", make_events(5, 3000)).read_bytes()
    packed = gzip.compress(raw)
    kernels, _, cut = read_text(tmp_path / "t.json.gz", packed[:-8] + bytes(4) + packed[-4:])
    assert kernels == 3000 and cut is not None and "gzip stream is broken" in cut and "incorrect data check" in cut
    kernels, _, cut = read_text(tmp_path / "t.json.gz", packed[: len(packed) // 2] + bytes(1000))
    assert 1000 < kernels < 2000 and cut is not None and "gzip stream" in cut


def test_a_hundred_megabytes_of_zeros_take_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "zeros.json.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        for _ in range(100):
            file.write(bytes(10**6))
    tracemalloc.start()
    with refuses("no profiler trace", TraceError):
        read_trace(path)
    assert tracemalloc.get_traced_memory()[1] < 30e6
    tracemalloc.stop()


def test_numbers_that_are_none_are_labels_and_one_device(tmp_path: Path) -> None:
    place = {"device": float("nan"), "stream": float("inf"), "correlation": float("nan")}
    events = [make_kernel("gemm", EPOCH + 10 * number, 5) | {"args": place} for number in range(3)]
    trace = read_trace(write_trace(tmp_path / "t.json", events))
    assert (trace.devices, trace.streams) == (("NaN",), ("Infinity",))
    (device,) = analyze_trace(trace)
    assert device.kernels == 3 and json.dumps(describe_device(device), allow_nan=False)


def test_a_view_that_never_ends_is_no_table(tmp_path: Path) -> None:
    connection = sqlite3.connect(tmp_path / "view.sqlite")
    rows = "with recursive n(start) as (select 1 union all select start + 1 from n) select start, start + 1 as end from n"
    connection.execute(f"create view CUPTI_ACTIVITY_KIND_KERNEL as {rows}")
    connection.commit()
    connection.close()
    with refuses("without a table", TraceError):
        read_trace(tmp_path / "view.sqlite")
