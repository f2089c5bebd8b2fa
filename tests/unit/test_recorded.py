"""The record of expert balancing: what was written comes back, whenever the writer was killed, and hostile files are refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from counterflow.balance.files import recorded, recorded_steps
from counterflow.balance.files.loads import read_trace
from counterflow.balance.files.recorded import append_loads, append_step, describe_change, read_record, record_step
from counterflow.balance.placement import Placement, count_copies, make_home_placement
from counterflow.errors import BalanceError
from tests.support.made_record import make_record

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


# ---- reading

PARTS = {0: [1, 6], 3: [2, 5, 4]}


def change_line(directory: Path, line: int, **changes: Any) -> None:
    """Change keys of a line of rank 0's steps, a None leaves its key out."""
    path = directory / "eplb-rank00000.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    changed = json.loads(lines[line]) | changes
    lines[line] = json.dumps({key: value for key, value in changed.items() if value is not None}) + "\n"
    path.write_text("".join(lines))


def refuse(directory: Path, said: str) -> None:
    with pytest.raises(BalanceError) as caught:
        read_record(directory)
    message = str(caught.value)
    assert said in message and "\n" not in message and len(message) < 600 and message.isprintable()


def test_pipeline_ranks_are_merged_in_the_order_of_layers(tmp_path: Path) -> None:
    counts = make_record(tmp_path, PARTS, range(1, 9))
    record = read_record(tmp_path)
    assert (record.layers.tolist(), record.steps.tolist()) == ([1, 2, 4, 5, 6], list(range(1, 9)))
    assert record.microbatches.tolist() == [2] * 8
    both = np.concatenate([counts[0], counts[3]], 1)[:, [0, 2, 4, 3, 1]]
    np.testing.assert_array_equal(record.counts, both)
    np.testing.assert_array_equal(read_trace(tmp_path), both)
    homes = both.reshape(8, 2, 5, 4, 4).sum(-1)
    assert record.before == pytest.approx((homes.mean(-1) / homes.max(-1)).mean(1))
    lines = [json.loads(line) for line in (tmp_path / "eplb-rank00003.jsonl").read_text().splitlines()]
    assert record.after[:, [1, 3, 2]].tolist() == [line["balancedness_after"] for line in lines]


def test_figures_are_summed_and_times_are_the_longest(tmp_path: Path) -> None:
    make_record(tmp_path, PARTS, range(3))
    change_line(tmp_path, 1, clones=5, moved=2, homes_moved=1, bytes=100, weights_ms=99.5, gradients_ms=0, waited_ms=98)
    figures = read_record(tmp_path).figures
    other = json.loads((tmp_path / "eplb-rank00003.jsonl").read_text().splitlines()[1])
    assert [figures[name][1] for name in ("clones", "moved", "homes_moved", "bytes")] == [
        5 + other["clones"], 2 + other["moved"], 1, 100 + other["bytes"]
    ]  # fmt: skip
    assert [figures[name][1] for name in ("weights_ms", "gradients_ms", "waited_ms")] == [99.5, other["gradients_ms"], 98]


def test_the_placement_of_a_step_is_that_of_all_layers(tmp_path: Path) -> None:
    make_record(tmp_path, PARTS, range(4))
    record = read_record(tmp_path)
    for index in (0, -1):
        lines = [json.loads((tmp_path / f"eplb-rank0000{rank}.jsonl").read_text().splitlines()[index]) for rank in (0, 3)]
        placement = record.find_placement(index)
        held = [*lines[0]["experts"], *lines[1]["experts"]]
        assert placement.experts.tolist() == [held[n] for n in (0, 2, 4, 3, 1)]
        assert placement.homes is not None and placement.homes.shape == (5, 16)
        assert placement.cluster.slots_per_rank == (5,) * 4


@settings(max_examples=25)
@given(starts=st.sets(st.integers(1, 9), max_size=9))
def test_loads_are_summed_by_groups_of_steps(tmp_path_factory: Any, starts: set[int]) -> None:
    directory = tmp_path_factory.mktemp("record")
    make_record(directory, {0: [0], 1: [1]}, range(10), experts=4, ranks=2, microbatches=3)
    record = read_record(directory)
    begins = [0, *sorted(starts)]
    wanted = [part.sum(0) for part in np.split(record.counts, [3 * start for start in begins[1:]])]
    np.testing.assert_array_equal(record.sum_loads(np.array(begins)), wanted)


def test_clones_are_the_copies_beside_homes(tmp_path: Path) -> None:
    make_record(tmp_path, PARTS, range(7))
    record = read_record(tmp_path)
    clones = np.stack([count_copies(record.find_placement(index), 16) - 1 for index in range(7)])
    assert clones.sum() == 7 * 5 * 2, "two clones in each layer"
    wanted = [part.mean(0) for part in np.split(clones, [2, 6])]
    np.testing.assert_allclose(record.count_clones(np.array([0, 2, 6])), wanted)


def test_what_a_resumed_run_does_again_replaces_what_it_did_before(tmp_path: Path) -> None:
    first = make_record(tmp_path, {0: [0]}, range(1, 11))[0]
    second = make_record(tmp_path, {0: [0]}, range(8, 14))[0]
    record = read_record(tmp_path)
    assert record.steps.tolist() == list(range(1, 14))
    np.testing.assert_array_equal(record.counts, np.concatenate([first[:14], second]))


def test_lines_find_their_loads_after_a_kill_between_the_two(tmp_path: Path) -> None:
    first = make_record(tmp_path, {0: [0, 1]}, range(5))[0]
    append_loads(tmp_path / "loads-rank00000.npy", make_counts(2, 2, 16))
    with (tmp_path / "eplb-rank00000.jsonl").open("a") as file:
        file.write('{"step": 5, "lay')
    np.testing.assert_array_equal(read_record(tmp_path).counts, first)
    second = make_record(tmp_path, {0: [0, 1]}, range(5, 7))[0]
    record = read_record(tmp_path)
    assert record.steps.tolist() == list(range(7))
    np.testing.assert_array_equal(record.counts, np.concatenate([first, second]))


def test_lines_without_an_end_follow_each_other(tmp_path: Path) -> None:
    counts = make_record(tmp_path, {0: [0]}, range(3))[0]
    for line in range(3):
        change_line(tmp_path, line, end=None)
    np.testing.assert_array_equal(read_record(tmp_path).counts, counts)


def test_steps_are_those_that_all_pipeline_ranks_have_whole(tmp_path: Path) -> None:
    make_record(tmp_path, {0: [0], 1: [1]}, range(6))
    make_record(tmp_path, {0: [0]}, range(6, 9))
    loads = tmp_path / "loads-rank00001.npy"
    loads.write_bytes(loads.read_bytes()[:-1])
    record = read_record(tmp_path)
    assert record.steps.tolist() == list(range(5)) and record.counts.shape == (10, 2, 16)


def test_steps_whose_loads_were_written_over_are_left_out(tmp_path: Path) -> None:
    make_record(tmp_path, {0: [0]}, range(4))
    change_line(tmp_path, 3, end=7)
    assert read_record(tmp_path).steps.tolist() == [0, 1, 3]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"step": -1}, "step is -1; allowed: a whole number from 0 to"),
        ({"step": True}, "step is True"),
        ({"step": None}, "has no step; allowed: a whole number"),
        ({"layers": [1]}, "layers is [1]; allowed: [1, 6], as in the lines before"),
        ({"layers": [6, 1]}, "layers is [6, 1]"),
        ({"microbatches": 0}, "microbatches is 0"),
        ({"microbatches": 3, "end": 2}, "end is 2; allowed: a whole number from 3"),
        ({"ranks": 3}, "20 slots on 3 ranks"),
        ({"ranks": 10**15}, "20 slots on 1000000000000000 ranks"),
        ({"balancedness_before": [0.5]}, "balancedness_before is [0.5]; allowed: 2 numbers from 0 to 1"),
        ({"balancedness_after": [0.5, 1.5]}, "balancedness_after is [0.5, 1.5]"),
        ({"balancedness_after": [0.5, float("nan")]}, "balancedness_after is [0.5, nan]"),
        ({"experts": [[0, 1], [0]]}, "experts is [[0, 1], [0]]; allowed: 2 rows"),
        ({"experts": "\x1b[31m" * 99}, r"experts is '\x1b[31m"),
        ({"experts": [[], []]}, "experts is [[], []]"),
        ({"experts": [[16] * 20] * 2}, "allowed: 2 rows, one per layer, all as long, of whole numbers from -1 to 15"),
        ({"experts": [[10**30] * 20] * 2}, "experts is [["),
        ({"experts": [["a" * 99] * 20] * 2}, "experts is [['aaa"),
        ({"experts": [[-1] * 20] * 2}, "layer 0: slot 0, the home of expert 0, holds -1"),
        ({"homes": [[0, 1], [0, 1]]}, "homes of 2 experts; allowed: 16"),
        ({"homes": [[20] * 16] * 2}, "from 0 to 19"),
        ({"bytes": 1.5}, "bytes is 1.5"),
        ({"clones": -1}, "clones is -1"),
        ({"waited_ms": float("inf")}, "waited_ms is inf"),
        ({"weights_ms": "1"}, "weights_ms is '1'"),
    ],
)
def test_a_line_that_does_not_fit_is_named(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    make_record(tmp_path, PARTS, range(4))
    change_line(tmp_path, 2, **changes)
    refuse(tmp_path, said)
    refuse(tmp_path, f"{tmp_path / 'eplb-rank00000.jsonl'}, line 3")


@pytest.mark.parametrize("line", ["{", "[1]", "", "\x00", "[" * 100_000, '{"step": ' + "9" * 5000 + "}", "\udc80"])
def test_a_line_that_is_no_object_is_named(tmp_path: Path, line: str) -> None:
    make_record(tmp_path, PARTS, range(2))
    with (tmp_path / "eplb-rank00000.jsonl").open("ab") as file:
        file.write(line.encode(errors="surrogateescape") + b"\n")
    refuse(tmp_path, "eplb-rank00000.jsonl, line 3")
    refuse(tmp_path, "allowed: one object per step")


def test_folders_that_are_no_record_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse(tmp_path / "nowhere", "has 0 files eplb-rank*.jsonl; allowed: 1 to 4096, as a run with --cf-eplb --cf-record")
    (tmp_path / "eplb-rank0\n.jsonl").touch()
    refuse(tmp_path, "has 0 files")
    (tmp_path / "eplb-rank00000.jsonl").touch()
    refuse(tmp_path, "loads-rank00000.npy is no file")
    append_loads(tmp_path / "loads-rank00000.npy", make_counts(1, 1, 16))
    refuse(tmp_path, "no step that all 1 pipeline ranks finished")
    make_record(tmp_path, {0: [0]}, range(3))
    make_record(tmp_path, {1: [0]}, range(3))
    refuse(tmp_path, "layer 0 twice")
    (tmp_path / "eplb-rank00001.jsonl").unlink()
    make_record(tmp_path, {2: [1]}, range(3), experts=8)
    refuse(tmp_path, "loads of [8, 16] experts")
    (tmp_path / "eplb-rank00002.jsonl").unlink()
    make_record(tmp_path, {3: [1]}, range(3), ranks=2)
    refuse(tmp_path, "step 0 has ranks, slots and micro-batches [(2, 18, 2), (4, 20, 2)]")
    monkeypatch.setattr(recorded_steps, "MAX_LINE_BYTES", 100)
    refuse(tmp_path, "line 1 is longer than 100 bytes")
    monkeypatch.setattr(recorded, "MAX_FILE_BYTES", 1000)
    refuse(tmp_path, "allowed: 1000; record a long run in several folders")


def test_more_counts_than_fit_are_refused_but_summed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_record(tmp_path, {0: [0]}, range(3))
    monkeypatch.setattr(recorded, "MAX_ENTRIES", 95)
    record = read_record(tmp_path)
    with pytest.raises(BalanceError, match="record of 6 micro-batches, .*; allowed: 95 counts at once, 5 such"):
        _ = record.counts
    assert record.sum_loads(np.array([0])).shape == (1, 1, 16)


def test_loads_that_are_none_are_refused(tmp_path: Path) -> None:
    make_record(tmp_path, {0: [0]}, range(3))
    path = tmp_path / "loads-rank00000.npy"
    whole = path.read_bytes()
    path.write_bytes(whole[:-4] + b"\xff" * 4)
    with pytest.raises(BalanceError, match="has -1 tokens in step 2; allowed: 0 to"):
        _ = read_record(tmp_path).counts
    np.save(path, np.array([{}] * 3, object), allow_pickle=True)
    refuse(tmp_path, "a pickle")
    path.write_bytes(whole[:60])
    refuse(tmp_path, "cannot be read as .npy")
    header = whole[:128].replace(b"(6, 1, 16)", b"(6, 9" + b"9" * 12 + b", 16)").replace(b" " * 12, b"", 1)
    path.write_bytes(header[:128] + whole[128:])
    refuse(tmp_path, "line 1")


# ---- placements that a line has only as far as they change


def draw_placements(steps: int, layers: int = 3, experts: int = 8, ranks: int = 4, seed: int = 0) -> list[Placement]:
    """Placements of which some layers change from step to step, their homes too now and then."""
    random, placement = np.random.default_rng(seed), make_home_placement(layers, experts, ranks, 1)
    assert placement.homes is not None
    drawn = [placement]
    while len(drawn) < steps:
        held, homes = placement.experts.copy(), placement.homes.copy()
        for layer in np.flatnonzero(random.random(layers) < 0.5):
            if random.random() < 0.3:
                first, second = np.flatnonzero(homes[layer] % 3 == 0)[:2]
                homes[layer, [first, second]] = homes[layer, [second, first]]
            held[layer] = -1
            held[layer, homes[layer]] = np.arange(experts)
            rank = random.integers(ranks)
            held[layer, 3 * rank + 2] = random.choice(np.setdiff1d(np.arange(experts), held[layer, 3 * rank : 3 * rank + 2]))
        placement = Placement(placement.cluster, held, homes)
        drawn.append(placement)
    return drawn


def write_placements(directory: Path, placements: list[Placement], first: int = 1, **more: Any) -> None:
    """Append a step for each placement, as one process writes them."""
    last, figures = None, dict.fromkeys(("clones", "moved", "homes_moved", "bytes", "weights_ms", "gradients_ms", "waited_ms"), 0)
    for number, placement in enumerate(placements, first):
        layers = placement.layers
        line = {"step": number, "layers": list(range(layers)), "ranks": placement.cluster.ranks, "microbatches": 1, **figures}
        line |= {"balancedness_before": [0.5] * layers, "balancedness_after": [0.8] * layers, **more}
        assert placement.homes is not None
        counts = np.ones((1, layers, placement.homes.shape[1]), np.int64)
        record_step(directory, 0, counts, line | describe_change(last, placement))
        last = placement


@pytest.mark.parametrize("seed", range(3))
def test_placements_are_read_from_what_changed(tmp_path: Path, seed: int) -> None:
    placements = draw_placements(20, seed=seed)
    write_placements(tmp_path, placements)
    # A resumed run does steps 11 to 15 again, with placements of its own.
    again = draw_placements(5, seed=seed + 100)
    write_placements(tmp_path, again, first=11)
    record = read_record(tmp_path)
    assert record.steps.tolist() == list(range(1, 16))
    for index, placement in enumerate([*placements[:10], *again]):
        found = record.find_placement(index)
        assert found.homes is not None and placement.homes is not None
        assert np.array_equal(found.experts, placement.experts) and np.array_equal(found.homes, placement.homes)
    lines = [json.loads(line) for line in (tmp_path / "eplb-rank00000.jsonl").read_text().splitlines()]
    assert ["changed" in line for line in lines] == [False] + [True] * 19 + [False] + [True] * 4


def test_a_line_whose_placement_stays_is_short(tmp_path: Path) -> None:
    # DeepSeek-V3's size: 58 layers, 256 experts, 320 slots.
    write_placements(tmp_path, [make_home_placement(58, 256, 64, 1)] * 3)
    sizes = [len(line) for line in (tmp_path / "eplb-rank00000.jsonl").read_text().splitlines()]
    assert sizes[0] > 100_000 and max(sizes[1:]) < 2000


def test_a_record_without_added_figures_has_them_all_the_same(tmp_path: Path) -> None:
    make_record(tmp_path, PARTS, range(1, 9))
    record = read_record(tmp_path)
    assert np.array_equal(record.low, record.after) and np.allclose(record.ratio, 1 / record.after)
    assert not record.figures["home_bytes"].any() and not record.figures["tokens_resident"].any()


def test_added_figures_are_read(tmp_path: Path) -> None:
    more = {"balancedness_p5": [0.6, 0.7, 0.5], "max_over_mean": [1.5, 1.0, 2.0], "home_bytes": 7, "tokens_resident": 5}
    write_placements(tmp_path, draw_placements(2), homes_ms=1.5, **more)
    record = read_record(tmp_path)
    assert record.low.tolist() == [[0.6, 0.7, 0.5]] * 2 and record.ratio.tolist() == [[1.5, 1.0, 2.0]] * 2
    assert [record.figures[name].tolist() for name in ("home_bytes", "tokens_resident", "homes_ms")] == [
        [7] * 2,
        [5] * 2,
        [1.5] * 2,
    ]


@pytest.mark.parametrize(
    ("line", "changes", "said"),
    [
        (0, {"changed": []}, "line 1 has what has changed of a placement, and no line before it; allowed: a whole placement"),
        (1, {"changed": [1, 0]}, "changed is [1, 0]; allowed: places of layers, from 0 to 2, ascending"),
        (1, {"changed": [3]}, "changed is [3]; allowed: places of layers"),
        (1, {"changed": [0, 1, 2], "experts": [[0] * 12]}, "experts is [[0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]]; allowed: 3 rows"),
        (1, {"changed": [0], "experts": [[0] * 11]}, "experts has rows of 11; allowed: 12, as in the lines before"),
        (1, {"changed": [0], "experts": [[0] * 12], "homes": [[0] * 7]}, "homes has rows of 7; allowed: 8, as in the lines"),
        (1, {"max_over_mean": [0.5, 1, 1]}, "max_over_mean is [0.5, 1, 1]; allowed: 3 numbers from 1"),
        (1, {"tokens_homes": -1}, "tokens_homes is -1; allowed: a whole number"),
    ],
)
def test_what_changed_is_not_trusted(tmp_path: Path, line: int, changes: dict[str, Any], said: str) -> None:
    write_placements(tmp_path, draw_placements(3))
    change_line(tmp_path, line, **changes)
    refuse(tmp_path, said)
