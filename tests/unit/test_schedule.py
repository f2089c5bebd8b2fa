"""Tables, families and validation."""

import gzip
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from counterflow.schedule import (
    FAMILIES,
    Action,
    Costs,
    ScheduleError,
    ScheduleTable,
    build,
    build_forward_only,
    from_csv,
    lay_bidirectional,
    lay_looped,
    lay_passes,
    lay_straight,
    lay_v,
    load_record,
    pair,
    read_csv,
    simulate,
    to_csv,
    validate,
)
from counterflow.schedule.transport import TRANSPORTS, count_receives_ahead
from tests.support.slow_schedule import any_table

DATA = Path(__file__).resolve().parents[1] / "data"


def read_recorded(row: list[Any]) -> Action:
    if row[0] == "P":
        return pair(read_recorded(row[1]), read_recorded(row[2]))
    return Action(*row)


@given(any_table)
def test_families_build_valid_tables_that_survive_a_file(table: ScheduleTable) -> None:
    validate(table)
    again = from_csv(to_csv(table))
    assert again == table and again.digest == table.digest


@given(st.integers(1, 6), st.integers(1, 12), st.integers(2, 3))
def test_forward_only_tables_are_valid_in_every_layout(ranks: int, microbatches: int, chunks: int) -> None:
    for layout in (lay_straight(ranks), lay_looped(ranks, chunks), lay_v(ranks)):
        validate(build_forward_only(layout, microbatches))
    table = build_forward_only(lay_bidirectional(2 * ranks), 2 * microbatches)
    validate(table)
    rows = [[(action.kind, action.stage) for action in row] for row in table.actions]
    assert rows == rows[::-1], "mirrored ranks whose experts exchange tokens would wait for each other for ever"


def can_run(table: ScheduleTable) -> bool:
    """The obvious reference: run whatever can run until nothing can, then look whether all has run."""
    queues = [list(table.singles(rank)) for rank in range(table.ranks)]
    done: set[tuple[str, int, int]] = set()
    while any(queues):
        for rank, queue in enumerate(queues):
            if not queue:
                continue
            action = queue[0]
            stage, m = action.stage, action.microbatch
            needs = {
                "F": [("F", stage - 1, m)] if stage else [],
                "B": [("F", stage, m)] + ([("B", stage + 1, m)] if stage < table.layout.last_stage else []),
                "W": [("I", stage, m)],
            }
            needs["I"] = needs["B"]
            here = stage <= table.layout.last_stage and table.rank_of(stage, m) == rank
            if here and all(need in done for need in needs[action.kind]) and (action.kind, stage, m) not in done:
                done.add((action.kind, stage, m))
                # An I gives the input gradient as a B does, and may be neither repeated nor doubled by one.
                if action.kind in "BI":
                    done |= {("B", stage, m), ("I", stage, m)}
                queue.pop(0)
                break
        else:
            return False
    forwards = {(s, m) for s in range(table.layout.last_stage + 1) for m in range(table.microbatches)}
    split = {
        (s, m) for row in range(table.ranks) for a in table.singles(row) if a.kind == "I" for s, m in [(a.stage, a.microbatch)]
    }
    whole = {(s, m) for kind, s, m in done if kind == "B"}
    weights = {(s, m) for kind, s, m in done if kind == "W"}
    return {(s, m) for kind, s, m in done if kind == "F"} == forwards == whole and weights == split


@settings(max_examples=2000)
@given(any_table, st.data())
@pytest.mark.slow
def test_a_mutated_table_is_accepted_and_simulates_just_when_it_can_run(table: ScheduleTable, data: st.DataObject) -> None:
    rank = data.draw(st.integers(0, table.ranks - 1))
    row = list(table.actions[rank])
    at = data.draw(st.integers(0, len(row) - 1))
    match data.draw(st.sampled_from(["swap", "drop", "double", "move"])):
        case "swap":
            other = data.draw(st.integers(0, len(row) - 1))
            row[at], row[other] = row[other], row[at]
        case "drop":
            del row[at]
        case "double":
            row.insert(data.draw(st.integers(0, len(row))), row[at])
        case "move":
            row.insert(data.draw(st.integers(0, len(row) - 1)), row.pop(at))
    rows = (*table.actions[:rank], tuple(row), *table.actions[rank + 1 :])
    mutated = replace(table, actions=rows)
    try:
        validate(mutated)
        accepted = True
    except ScheduleError as error:
        accepted = False
        assert "rank" in str(error)
    assert accepted == can_run(mutated)
    if accepted:
        assert len(simulate(mutated, Costs()).spans) == sum(map(len, mutated.actions))


@pytest.mark.parametrize(("ranks", "microbatches"), [(2, 4), (4, 10)])
def test_dualpipev_is_deepseeks_order(ranks: int, microbatches: int) -> None:
    published = from_csv((DATA / f"dualpipev-{ranks}-{microbatches}.csv").read_text())
    assert build("dualpipev", ranks, microbatches).actions == published.actions


def test_dualpipe_and_dualpipev_are_the_recorded_orders(shared_data: Path) -> None:
    with gzip.open(shared_data / "dualpipe_order.json.gz") as file:
        tables = json.load(file)["tables"]
    assert {key.split()[0] for key in tables} == {"dualpipe", "dualpipev"}
    for key, rows in tables.items():
        name, ranks, microbatches = key.split()
        recorded = tuple(tuple(read_recorded(row) for row in rank) for rank in rows)
        assert build(name, int(ranks), int(microbatches)).actions == recorded, key


def test_dualpipe_is_deepseeks_order() -> None:
    published = from_csv((DATA / "dualpipe-4-8.csv").read_text())
    assert build("dualpipe", 4, 8) == published


def test_1f1b_by_hand() -> None:
    table = build("1f1b", 2, 3)
    assert to_csv(table).splitlines() == ["0F0,0F1,0B0,0F2,0B1,0B2", "1F0,1B0,1F1,1B1,1F2,1B2"]


def test_zero_bubble_by_hand() -> None:
    assert to_csv(build("zb-h1", 2, 3)).splitlines() == [
        "0F0,0F1,0I0,0W0,0F2,0I1,0W1,0I2,0W2",
        "1F0,1I0,1F1,1I1,1W0,1F2,1I2,1W1,1W2",
    ]
    assert to_csv(build("gpipe", 2, 2)).splitlines() == ["0F0,0F1,0B0,0B1", "1F0,1F1,1B0,1B1"]


def test_interleaved_by_hand() -> None:
    table = build("interleaved", 2, 2, vpp=2)
    assert to_csv(table).splitlines() == ["0F0,0F1,2F0,2F1,2B0,2B1,0B0,0B1", "1F0,1F1,3F0,3B0,3F1,3B1,1B0,1B1"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("hello", "line 1, cell 1: 'hello' is not an action"),
        ("0F0,0B0\n1F0,1X0", "line 2, cell 2: '1X0' is not an action"),
        ("(0F0;0F1)OVERLAP_F_B", "an overlapped pair is an F and a B"),
        ("", "no action found"),
        ("0F0,0B0\n5F0,5B0", "are no layout of 2 ranks"),
        ("9999999999F0", "is not an action"),
    ],
)
def test_what_is_no_table_is_named(text: str, said: str) -> None:
    with pytest.raises(ScheduleError, match=said.replace("(", r"\(").replace(")", r"\)")):
        from_csv(text)


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"0F0," * 10 + b"\x00"])
def test_a_file_that_is_no_table_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "table.csv"
    path.write_bytes(content)
    with pytest.raises(ScheduleError):
        read_csv(path)


@pytest.mark.parametrize("name", ["interleaved", "zbv", "dualpipev"])
def test_torch_reads_our_files_and_we_read_torchs(name: str, tmp_path: Path) -> None:
    schedules = pytest.importorskip("torch.distributed.pipelining.schedules")
    table = build(name, 4, 8)
    ours, theirs = tmp_path / "ours.csv", tmp_path / "theirs.csv"
    ours.write_text(to_csv(table))
    # A schedule of theirs without a process group or stages: only what reads and writes files.
    schedule = object.__new__(schedules.PipelineScheduleMulti)
    schedule.pipeline_order = {}
    schedule._validate_and_set_stage_mapping = lambda order: None
    schedule._load_csv(str(ours))
    schedule._dump_csv(str(theirs))
    assert read_csv(theirs) == table


@given(st.integers(2, 6), st.text("ud", min_size=1, max_size=5), st.integers(1, 3))
def test_every_layout_of_passes_is_found_in_a_table(ranks: int, passes: str, microbatches: int) -> None:
    table = build_forward_only(lay_passes(ranks, passes), microbatches)
    validate(table)
    assert from_csv(to_csv(table)).layout == table.layout


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("0F0,,(0F0;0B0)OVERLAP_F_B", "csv: line 1, cell 3, rank 0, position 1, .*: 0F0 is computed twice"),
        ("0F0,0B0\n1F0", "csv: line 2, rank 1: 1B0 is missing"),
        ("(0F0;0B0)OVERLAP_F_B", "0B0 needs 0F0: the two cannot overlap"),
        ("0F0,0F1,1F0,1F1,1B0,1B1,0B0\n1F2,0F2,1B2,0B2,0B1", "needs an even number"),
        ("0F0,0F1,1F2,1F3\n1F0,1F1,0F3,1F3", "rank 1, position 3, action 1F3: 1F3 belongs to rank 0"),
    ],
)
def test_what_cannot_run_is_named(text: str, said: str) -> None:
    with pytest.raises(ScheduleError, match=said):
        validate(from_csv(text))


WITHOUT: dict[str, tuple[Callable[[Action], bool], str]] = {
    "all backwards": (lambda a: a.kind != "F", "rank 0: 0B0 is missing"),
    "backwards of a stage": (lambda a: a.kind != "F" and a.stage == 1, r"rank \d: 1B0 is missing"),
    "backwards of a micro-batch": (lambda a: a.kind != "F" and a.microbatch == 2, "rank 0: 0B2 is missing"),
    "one backward": (lambda a: a.kind in "BI" and (a.stage, a.microbatch) == (1, 1), "1B1 is missing|1W1 comes before 1I1"),
    "one forward": (lambda a: a.kind == "F" and (a.stage, a.microbatch) == (1, 1), "comes before 1F1"),
    "all forwards": (lambda a: a.kind == "F", "comes before"),
    "a micro-batch on one stage": (lambda a: (a.stage, a.microbatch) == (1, 0), r"rank \d: 1F0 is missing"),
}


@pytest.mark.parametrize("name", ["1f1b", "zb-h1", "interleaved", "zbv", "dualpipev", "dualpipe"])
@pytest.mark.parametrize("what", WITHOUT)
def test_a_table_to_train_with_has_every_forward_and_backward(name: str, what: str) -> None:
    table = build(name, 2, 8) if name != "dualpipe" else build(name, 4, 16)
    validate(table, training=True)
    leaves_out, said = WITHOUT[what]
    rows = (tuple(one for one in table.singles(rank) if not leaves_out(one)) for rank in range(table.ranks))
    with pytest.raises(ScheduleError, match=said):
        validate(replace(table, actions=tuple(rows)), training=True)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("0F0,1F0,1I0,0B0", "rank 0: 1I0 has no 1W0; a table to train with has an F and either a B or an I with its W"),
        ("0F0,1F0,1W0,0B0", "1W0 comes before 1I0"),
        ("0F0,1F0,1B0,1W0,0B0", "1W0 comes before 1I0"),
        ("0F0,1F0,1I0,1W0,1B0,0B0", "1B0 is computed twice"),
        ("0F0,1F0,1B0,1I0,1W0,0B0", "1I0 is computed twice"),
        ("0F0,1F0,1B0", "rank 0: 0B0 is missing; a table to train with"),
        ("0F0,1F0,1B0,0F1,(1F1;0B0)OVERLAP_F_B,1B1", "0B1 is missing"),
    ],
)
def test_parts_of_a_backward_that_do_not_belong_together_are_named(text: str, said: str) -> None:
    with pytest.raises(ScheduleError, match=said):
        validate(from_csv(text), training=True)


def test_forwards_alone_are_a_table_but_none_to_train_with() -> None:
    for layout in (lay_straight(2), lay_looped(2, 2), lay_v(2), lay_bidirectional(4)):
        table = from_csv(to_csv(build_forward_only(layout, 8)))
        assert table.is_forward_only and not build("1f1b", 2, 8).is_forward_only
        with pytest.raises(ScheduleError, match="rank 0: 0B0 is missing; a table to train with has an F and"):
            validate(table, training=True)


def test_memory_is_bounded_when_asked() -> None:
    table = build("zb-h1", 4, 8)
    validate(table, max_activations=4, max_queued=4)
    with pytest.raises(ScheduleError, match="rank 0, position 3, action 0F3: 4 micro-batches of live activations; at most 3"):
        validate(table, max_activations=3)
    with pytest.raises(ScheduleError, match="rank 3, position 7, action 3I3: 4 micro-batches of queued weight gradients"):
        validate(table, max_queued=3)


def test_families_need_few_receives_ahead() -> None:
    """1F1B and ZB-H1 run under Megatron's fused send and receive as they are; nothing needs more than two posted ahead."""
    for name in FAMILIES:
        table = build(name, 4, 8)
        for transport in TRANSPORTS:
            ahead = count_receives_ahead(table, transport)
            assert ahead <= 2, f"{name} under {transport}"
            validate(table, transport=transport, receives_ahead=ahead)
            if ahead:
                with pytest.raises(
                    ScheduleError, match=f"held up for ever under {transport} P2P with 0 receives ahead; it needs"
                ):
                    validate(table, transport=transport)
        assert (count_receives_ahead(table, "batched") == 0) == (name in ("gpipe", "1f1b", "zb-h1"))


@settings(max_examples=200)
@given(any_table, st.sampled_from(TRANSPORTS))
@pytest.mark.slow
def test_more_receives_ahead_never_hurt(table: ScheduleTable, transport: str) -> None:
    ahead = count_receives_ahead(table, transport)
    for more in range(3):
        validate(table, transport=transport, receives_ahead=ahead + more)


def test_sizes_a_schedule_does_not_allow_are_named() -> None:
    with pytest.raises(ScheduleError, match="dualpipev: 7 micro-batches on 4 ranks given; it needs at least 8 micro-batches"):
        build("dualpipev", 4, 7)
    with pytest.raises(ScheduleError, match="interleaved: 5 micro-batches on 2 ranks given; it needs .* multiple of 2"):
        build("interleaved", 2, 5)
    with pytest.raises(ScheduleError, match="'zigzag' is not known; allowed: gpipe, 1f1b, interleaved, zb-h1, zbv"):
        build("zigzag", 2, 4)
    with pytest.raises(ScheduleError, match="dualpipe: 12 micro-batches on 3 ranks given; it needs an even number of ranks"):
        build("dualpipe", 3, 12)
    with pytest.raises(ScheduleError, match="dualpipe: 9 micro-batches on 4 ranks given"):
        build("dualpipe", 4, 9)
    with pytest.raises(ScheduleError, match="zb-h1: 3 micro-batches on 4 ranks given; it needs at least 4"):
        build("zb-h1", 4, 3)
    with pytest.raises(ScheduleError, match="gpipe: option 'vpp' given; it has none"):
        build("gpipe", 4, 8, vpp=2)
    with pytest.raises(ScheduleError, match="interleaved: option 'chunks' given; allowed: vpp, group, ep_overlap"):
        build("interleaved", 4, 8, chunks=2)


def test_a_record_that_is_none_is_named(tmp_path: Path) -> None:
    with pytest.raises(ScheduleError, match="no recorded spans of step 0"):
        load_record(tmp_path, 0)
    (tmp_path / "timeline-rank00000.jsonl").write_text('{"step": 0}\n')
    with pytest.raises(ScheduleError, match="line 1: not a recorded timeline"):
        load_record(tmp_path, 0)
