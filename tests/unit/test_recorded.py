"""The record of expert balancing: what was written comes back, whenever the writer was killed, and hostile files are refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from counterflow.balance.recorded import append_loads, append_step, record_step
from counterflow.errors import BalanceError

Counts = np.ndarray[Any, Any]


def make_counts(microbatches: int, layers: int = 2, experts: int = 4, seed: int = 0) -> Counts:
    return np.random.default_rng(seed).integers(0, 2**31, (microbatches, layers, experts))


# ---- writing


@pytest.mark.parametrize("dtype", [np.int64, np.uint32, ">i8"])
def test_appended_loads_are_one_array_that_numpy_reads(tmp_path: Path, dtype: Any) -> None:
    counts = make_counts(9)
    path = tmp_path / "loads.npy"
    ends = [append_loads(path, part.astype(dtype)) for part in np.split(counts, [1, 1, 4])]
    assert ends == [1, 1, 4, 9]
    np.testing.assert_array_equal(np.load(path, allow_pickle=False), counts)
    assert [each.name for each in tmp_path.iterdir()] == ["loads.npy"], "a file is left over"


def test_a_header_grows_in_place(tmp_path: Path) -> None:
    path = tmp_path / "loads.npy"
    append_loads(path, np.ones((9, 1, 1), np.int64))
    before = path.stat().st_size
    append_loads(path, np.ones((1000, 1, 1), np.int64))
    assert path.stat().st_size == before + 4000
    assert np.load(path).shape == (1009, 1, 1)


@given(cut=st.integers(0, 200), seed=st.integers(0, 9))
def test_a_kill_while_loads_are_written_leaves_them_as_they_were(tmp_path_factory: Any, cut: int, seed: int) -> None:
    path = tmp_path_factory.mktemp("kill") / "loads.npy"
    first, second, third = make_counts(3, seed=seed), make_counts(5, seed=seed + 1), make_counts(2, seed=seed + 2)
    append_loads(path, first)
    before = path.read_bytes()
    append_loads(path, second)
    # All data lie behind the old ones, the header is changed last: a kill leaves the old header and part of the new data.
    path.write_bytes(before + path.read_bytes()[len(before) :][:cut])
    np.testing.assert_array_equal(np.load(path), first)
    assert append_loads(path, third) == 5
    np.testing.assert_array_equal(np.load(path), np.concatenate([first, third]))


def test_rows_that_a_lost_disk_cache_took_are_written_over(tmp_path: Path) -> None:
    path = tmp_path / "loads.npy"
    counts = make_counts(6)
    append_loads(path, counts[:4])
    path.write_bytes(path.read_bytes()[:-40])  # a micro-batch has 32 bytes
    assert append_loads(path, counts[2:]) == 6
    np.testing.assert_array_equal(np.load(path), counts)


@pytest.mark.parametrize(
    ("counts", "said"),
    [
        (np.ones((2, 3, 4), np.int64), "holds loads of 2 layers and 4 experts, given are 3 and 4"),
        (np.ones((2, 2, 5), np.int64), "holds loads of 2 layers and 4 experts, given are 2 and 5"),
        (np.ones((2, 4), np.int64), "of type int64 and shape (2, 4)"),
        (np.ones((2, 2, 4)), "of type float64"),
        (np.full((1, 2, 4), -1), "loads from -1 to 0"),
        (np.full((1, 2, 4), 2**31), "loads from 0 to 2147483648"),
    ],
)
def test_loads_that_do_not_fit_change_nothing(tmp_path: Path, counts: Counts, said: str) -> None:
    path = tmp_path / "loads.npy"
    append_loads(path, make_counts(1))
    before = path.read_bytes()
    with pytest.raises(BalanceError) as caught:
        append_loads(path, counts)
    assert said in str(caught.value) and "allowed: " in str(caught.value) and "\n" not in str(caught.value)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "values", [np.ones((2, 2, 4)), np.ones((2, 8), np.int32), np.asfortranarray(np.ones((2, 3, 4), np.int32))]
)
def test_loads_are_appended_to_no_other_file(tmp_path: Path, values: Counts) -> None:
    np.save(tmp_path / "loads.npy", values)
    with pytest.raises(BalanceError, match="allowed: loads of a recorded run"):
        append_loads(tmp_path / "loads.npy", make_counts(1))
    (tmp_path / "loads.npy").write_bytes(b"")
    with pytest.raises(BalanceError, match="cannot be read"):
        append_loads(tmp_path / "loads.npy", make_counts(1))


@pytest.mark.parametrize("left", [b"", b"{", b'{"step":1,"x":"' + b"a" * 200_000])
def test_what_a_kill_left_of_a_line_is_dropped(tmp_path: Path, left: bytes) -> None:
    path = tmp_path / "eplb.jsonl"
    for step in range(3):
        append_step(path, {"step": step, "experts": np.array([[0, -1]]), "bytes": np.int64(7)})
        with path.open("ab") as file:
            file.write(left)
    append_step(path, {"step": 3})
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    assert lines[0] == {"step": 0, "experts": [[0, -1]], "bytes": 7}


def test_a_line_says_where_its_loads_end(tmp_path: Path) -> None:
    for step in range(3):
        record_step(tmp_path / "a" / "b", 7, make_counts(2, seed=step), {"step": step, "microbatches": 2})
    lines = [json.loads(line) for line in (tmp_path / "a" / "b" / "eplb-rank00007.jsonl").read_text().splitlines()]
    assert [line["end"] for line in lines] == [2, 4, 6]
    assert np.load(tmp_path / "a" / "b" / "loads-rank00007.npy").shape == (6, 2, 4)
