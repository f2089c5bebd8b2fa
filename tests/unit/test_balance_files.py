"""Loads and traces from files, good and hostile; placements as servers read them, parsed the way they do."""

import io
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from counterflow.arrays import Array
from counterflow.balance.cluster import Cluster, make_cluster
from counterflow.balance.files.arrays import MAX_ENTRIES
from counterflow.balance.files.loads import read_loads, read_trace
from counterflow.balance.files.serving import render_sglang, render_vllm
from counterflow.balance.loads import check_counts, check_loads
from counterflow.balance.placement import Placement
from counterflow.errors import BalanceError
from tests.support.running import refuses

LOADS = np.array([[4.0, 0.5, 0.0], [1.0, 2.0, 3.0]])
COUNTS = np.arange(12).reshape(2, 2, 3)


def refuse(said: str, function: Any, *given: Any) -> None:
    """The function raises one line that says so."""
    with refuses(said, BalanceError):
        function(*given)


@pytest.mark.parametrize("loads", [LOADS, LOADS.tolist(), LOADS.astype(np.float16), np.asfortranarray(LOADS)])
def test_loads_come_back_as_float64(loads: Any) -> None:
    checked = check_loads(loads)
    assert checked.dtype == np.float64
    np.testing.assert_array_equal(checked, LOADS)


def test_one_row_of_loads_is_one_layer() -> None:
    np.testing.assert_array_equal(check_loads([1, 2, 3]), [[1.0, 2.0, 3.0]])


@pytest.mark.parametrize(
    ("loads", "said"),
    [
        ([[1, 2], [-3, 4]], "loads: -3.0 at layer 1, expert 0; allowed: 0 to 1e+100"),
        ([[1, 2], [3, np.nan]], "loads: nan at layer 1, expert 1"),
        ([[np.inf, 2]], "loads: inf at layer 0, expert 0"),
        ([[1, 2], [3]], "rows of unequal length"),
        (5, "loads of shape ()"),
        (np.ones((2, 2, 2, 2)), "loads of shape (2, 2, 2, 2)"),
        (np.ones((0, 4)), "loads of shape (0, 4)"),
        (np.ones((4, 0)), "loads of shape (4, 0)"),
        ([["1", "2"]], "loads of type <U1"),
        ([[True, False]], "loads of type bool"),
        ([[1, None]], "loads of type object"),
        ([[1 + 2j]], "loads of type complex128"),
    ],
)
def test_bad_loads_are_refused(loads: Any, said: str) -> None:
    refuse(said, check_loads, loads)


@pytest.mark.parametrize("dtype", [np.int8, np.uint64, np.float16, np.float64])
def test_counts_come_back_as_int64(dtype: Any) -> None:
    checked = check_counts(COUNTS.astype(dtype))
    assert checked.dtype == np.int64
    np.testing.assert_array_equal(checked, COUNTS)


@pytest.mark.parametrize(
    ("counts", "said"),
    [
        (LOADS, "counts of shape (2, 3); allowed: [micro-batches, layers, experts]"),
        (np.ones((2, 0, 3)), "counts of shape (2, 0, 3)"),
        (COUNTS - 1, "counts: -1 at micro-batch 0, layer 0, expert 0; allowed: whole numbers from 0"),
        (COUNTS + [0, 0, 0.5], "counts: 2.5 at micro-batch 0, layer 0, expert 2"),
        (np.where(COUNTS == 7, np.nan, COUNTS), "counts: nan at micro-batch 1, layer 0, expert 1"),
        (np.where(COUNTS == 11, 2**41, COUNTS), "counts: 2199023255552 at micro-batch 1, layer 1, expert 2"),
    ],
)
def test_bad_counts_are_refused(counts: Any, said: str) -> None:
    refuse(said, check_counts, counts)


def save(path: Path, **arrays: Any) -> Path:
    """Save arrays in an .npz, or the only one in an .npy."""
    if path.suffix == ".npz":
        np.savez_compressed(path, **arrays)
    else:
        np.save(path, next(iter(arrays.values())))
    return path


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_every_form_gives_the_same_loads(tmp_path: Path) -> None:
    lists = LOADS.tolist()
    files = [
        save(tmp_path / "a.npy", loads=LOADS),
        save(tmp_path / "b.NPY", loads=np.asfortranarray(LOADS)),
        save(tmp_path / "c.npz", loads=LOADS, counts=COUNTS, other=[1]),
        save(tmp_path / "d.npz", counts=LOADS, other=[1]),
        save(tmp_path / "e.npz", measured=LOADS),
        write(tmp_path / "f.csv", "4,0.5,0\n1,2,3\n"),
        write(tmp_path / "g.csv", "\ufefffirst, second, third\r\n4, 5e-1, 0\r\n\r\n1,2,3"),
        write(tmp_path / "k.csv", "\ufeff4,0.5,0\n1,2,3\n"),
        write(tmp_path / "h.json", json.dumps(lists)),
        write(tmp_path / "i.json", json.dumps({"loads": lists, "counts": [[7]]})),
        write(tmp_path / "j.json", json.dumps({"counts": lists})),
    ]
    (tmp_path / "b.NPY.npy").rename(tmp_path / "b.NPY")
    for file in files:
        np.testing.assert_array_equal(read_loads(file), LOADS, err_msg=str(file))


def test_a_trace_is_read_or_summed(tmp_path: Path) -> None:
    npz = save(tmp_path / "a.npz", counts=COUNTS.astype(np.int32), topk=6, tokens=COUNTS + 1)
    npy = save(tmp_path / "b.npy", counts=COUNTS)
    text = write(tmp_path / "c.json", json.dumps({"counts": COUNTS.tolist()}))
    for file in (npz, npy, text):
        np.testing.assert_array_equal(read_loads(file), COUNTS.sum(0))
    for file in (npz, npy):
        np.testing.assert_array_equal(read_trace(file), COUNTS)
    np.testing.assert_array_equal(read_trace(npz, "tokens"), COUNTS + 1)


def make_header(shape: tuple[int, ...], dtype: str = "<f8", version: tuple[int, int] = (1, 0)) -> bytes:
    """The start of an .npy that claims this shape."""
    file = io.BytesIO()
    header = {"descr": dtype, "fortran_order": False, "shape": shape}
    (np.lib.format.write_array_header_1_0 if version == (1, 0) else np.lib.format.write_array_header_2_0)(file, header)
    return file.getvalue()


def make_npz(**members: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)
    return file.getvalue()


def make_npy(array: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


GOOD = make_npz(loads=make_npy(LOADS))
BAD_FILES = [
    ("a.npy", b"", "cannot be read as .npy"),
    ("a.npy", b"\x93NUMPY\x01\x00", "cannot be read as .npy"),
    ("a.npy", make_npy(LOADS)[:-1], "is truncated: 47 of 48 bytes"),
    ("a.npy", make_npy(np.array([[1, None]], object)), "holds Python objects, a pickle"),
    ("a.npy", make_npy(np.array([["1"]])), "of type <U1"),
    ("a.npy", make_header((MAX_ENTRIES + 1,), "|i1"), f"of shape ({MAX_ENTRIES + 1},)"),
    ("a.npy", make_header((2**62, 0)), "array is too big"),
    ("a.npy", make_header((-1, 2)), "of shape (-1, 2)"),
    ("a.npy", make_header((2, 3), version=(2, 0)) + bytes(48), "numpy's format (2, 0)"),
    ("a.npz", b"PK", "cannot be read as .npz"),
    ("a.npz", GOOD[: len(GOOD) // 2], "cannot be read as .npz"),
    ("a.npz", make_npz(loads=b""), "cannot be read as .npz"),
    ("a.npz", make_npz(loads=make_npy(LOADS)[:-8]), "array loads is truncated: 40 of 48 bytes"),
    ("a.npz", make_npz(loads=make_npy(np.array([{}], object))), "array loads holds Python objects"),
    ("a.npz", make_npz(loads=make_header((2**20, 2**12)) + bytes(2**20)), "of shape (1048576, 4096)"),
    ("a.npz", make_npz(one=make_npy(LOADS), two=make_npy(LOADS)), "has no array loads or counts; it has one, two"),
    ("a.npz", make_npz(), "it has nothing"),
    ("a.npz", make_npz(**{"a\nb\x1b": b"", "c": b""}), "it has 'a\\nb\\x1b', c"),
    ("a.npz", make_npz(counts=make_npy(COUNTS - 1)), "a.npz: -1 at micro-batch 0"),
    ("a.csv", "", "a.csv of shape (0, 1)"),
    ("a.csv", "first,second\n", "a.csv of shape (0, 1)"),
    ("a.csv", "1,2\n3\n", "line 2 has 1 cells; the first layer has 2"),
    ("a.csv", "1,2\n3,x\n", "line 2, cell 2: 'x' is no number"),
    ("a.csv", "layer,0,1\n0,1,2\n", "line 1, cell 1: 'layer' is no number"),
    ("a.csv", "1,,2\n", "line 1, cell 2: '' is no number"),
    ("a.csv", "1,nan\n", "a.csv: nan at layer 0, expert 1"),
    ("a.csv", b"\xff\xfe1,2", "cannot be read as .csv"),
    ("a.csv", '"' + "1" * 200_000, "cannot be read as .csv"),
    ("a.json", "", "cannot be read as .json"),
    ("a.json", "[[1, 2], [3", "cannot be read as .json"),
    ("a.json", "[" * 100_000, "cannot be read as .json"),
    ("a.json", '{"weights": [[1]]}', "has no key loads or counts; it has weights"),
    ("a.json", "[[1, 2], [3]]", "rows of unequal length"),
    ("a.json", "[[1, 2], 3]", "rows of unequal length"),
    ("a.json", '[[1, "2"]]', "'2' is no number"),
    ("a.json", "[[1, true]]", "'True' is no number"),
    ("a.json", "[[1, null]]", "'None' is no number"),
    ("a.json", "[[1, NaN]]", "nan at layer 0, expert 1"),
    ("a.json", f"[[1, {'9' * 400}]]", "cannot be read as .json"),
    ("a.json", "[[[[1]]]]", "of shape (1, 1, 1, 1)"),
    ("a.json", "[]", "of shape (0,)"),
    ("a.json", "7", "of shape ()"),
    ("a.pt", b"", "a.pt is a pickle"),
    ("a.txt", "1,2", ".txt is not known; allowed: .npy, .npz, .csv, .json"),
    ("a", "1,2", "no suffix is not known"),
]


@pytest.mark.parametrize(("name", "content", "said"), BAD_FILES, ids=[f"{name}-{said}" for name, _, said in BAD_FILES])
def test_bad_files_are_refused(name: str, content: str | bytes, said: str, tmp_path: Path) -> None:
    path = write(tmp_path / name, content)
    refuse(said, read_loads, path)
    refuse(str(path), read_loads, path)


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "folder.npz").mkdir()
    refuse("folder.npz is no file", read_loads, tmp_path / "folder.npz")
    refuse("there is no such file", read_loads, tmp_path / "none.npz")
    refuse("cannot be read as .npz", read_loads, tmp_path / f"{'n' * 300}.npz")


def test_large_files_are_refused_before_they_are_read(tmp_path: Path) -> None:
    for name, size, limit in (("a.csv", 2**26 + 1, 2**26), ("a.json", 2**26 + 1, 2**26), ("a.npz", 2**31 + 1, 2**31)):
        with (tmp_path / name).open("wb") as file:
            file.truncate(size)
        refuse(f"has {size} bytes; allowed: {limit}", read_loads, tmp_path / name)


def test_a_trace_names_the_keys_that_are_there(tmp_path: Path) -> None:
    npz = save(tmp_path / "a.npz", loads=LOADS, topk=6)
    refuse("has no array counts; it has loads, topk", read_trace, npz)
    refuse("a.npz of shape (2, 3)", read_trace, npz, "loads")
    refuse(".csv is not known; allowed: .npz, .npy", read_trace, write(tmp_path / "a.csv", "1,2"))
    whole = save(tmp_path / "b.npz", counts=COUNTS).read_bytes()
    refuse("cannot be read as .npz", read_trace, write(tmp_path / "c.npz", whole[:-40]))


# Two ranks of four slots, six experts, two layers.
PLACEMENT = Placement(make_cluster(2, 8), np.array([[0, 1, 2, 3, 4, 5, 0, 1], [5, 0, 3, 1, 2, 4, 0, 5]]))


def test_sglang_finds_every_slot() -> None:
    given = json.loads(render_sglang(PLACEMENT, first_layer=3))
    assert list(given) == ["physical_to_logical_map"], "other keys are arguments that the server does not have"
    rows = given["physical_to_logical_map"]
    assert rows[3:] == PLACEMENT.experts.tolist()
    for row in rows:
        slots: dict[int, list[int]] = {expert: [] for expert in range(6)}
        for slot, expert in enumerate(row):
            slots[expert].append(slot)
        # Each rank sends an expert's tokens to one slot out of those that hold it, so none may be without.
        assert all(slots.values()) and sum(map(len, slots.values())) == 8
    assert len(json.loads(render_sglang(PLACEMENT))["physical_to_logical_map"]) == 2


def read_as_vllm(text: str, layer: int, experts: int) -> tuple[Array, int]:
    """Return ``[ranks, experts]``, the local slot of each expert or -1, and the number of redundant slots."""
    given = json.loads(text)
    assert layer < given["moe_layer_count"] == len(given["layer_list"])
    devices = [device["device_expert"] for device in given["layer_list"][layer]["device_list"]]
    held = np.array(devices, np.int32)
    local = np.full((len(devices), experts), -1)
    for rank, row in enumerate(held):
        local[rank, row] = np.arange(len(row))
    return local, held.size - experts


def test_vllm_finds_every_slot() -> None:
    text = render_vllm(PLACEMENT)
    for layer, held in enumerate(PLACEMENT.experts):
        local, redundant = read_as_vllm(text, layer, 6)
        assert redundant == 2
        for slot, expert in enumerate(held):
            assert local[slot // 4, expert] == slot % 4
        assert (local >= 0).sum() == 8


@pytest.mark.parametrize(
    ("placement", "said"),
    [
        (Placement(Cluster((1, 2), (0, 0)), np.array([[0, 1, 2]])), "1 to 2 slots per rank"),
        (Placement(make_cluster(2, 4), np.array([[0, 1, 2, 0], [0, 1, -1, 2]])), "layer 1: slot 2 is empty"),
        (Placement(make_cluster(2, 4), np.array([[0, 1, 2, 0], [0, 1, 1, 0]])), "layer 1: expert 2 has no slot"),
    ],
)
def test_what_a_form_cannot_say_is_refused(placement: Placement, said: str) -> None:
    refuse(said, render_sglang, placement)
    refuse(said, render_vllm, placement)


def test_vllm_cannot_say_an_expert_twice_on_a_rank() -> None:
    twice = Placement(make_cluster(2, 6), np.array([[0, 1, 2, 0, 1, 2], [0, 1, 2, 2, 1, 2]]))
    refuse("layer 1: expert 2 is on rank 1 twice", render_vllm, twice)
    assert json.loads(render_sglang(twice))["physical_to_logical_map"] == twice.experts.tolist()


@pytest.mark.parametrize("first", [-1, 10**9])
def test_sglang_has_no_such_first_layer(first: int) -> None:
    refuse(f"first layer {first}; allowed: 0 to 1000", render_sglang, PLACEMENT, first)
