"""Tables, families and validation."""

import gzip
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from counterflow.schedule import (
    FAMILIES,
    Action,
    ScheduleError,
    ScheduleTable,
    build,
    build_forward_only,
    from_csv,
    lay_looped,
    lay_straight,
    lay_v,
    load_record,
    pair,
    parse_action,
    read_csv,
    to_csv,
    validate,
)

DATA = Path(__file__).resolve().parents[1] / "data"


def read_recorded(row: list[Any]) -> Action:
    if row[0] == "P":
        return pair(read_recorded(row[1]), read_recorded(row[2]))
    return Action(*row)


def any_table() -> st.SearchStrategy[ScheduleTable]:
    def make(name: str, ranks: int, extra: int, vpp: int) -> ScheduleTable:
        if name == "interleaved":
            return build(name, ranks, ranks * (1 + extra % 4), vpp=vpp)
        return build(name, ranks, 2 * ranks + extra)

    return st.builds(make, st.sampled_from(sorted(FAMILIES)), st.integers(2, 6), st.integers(0, 9), st.integers(2, 4))


@given(any_table())
def test_families_build_valid_tables_that_survive_a_file(table: ScheduleTable) -> None:
    validate(table)
    again = from_csv(to_csv(table))
    assert (again.actions, again.layout, again.microbatches) == (table.actions, table.layout, table.microbatches)
    assert again.digest == table.digest


@given(st.integers(1, 6), st.integers(1, 12), st.integers(2, 3))
def test_forward_only_tables_are_valid_in_every_layout(ranks: int, microbatches: int, chunks: int) -> None:
    for layout in (lay_straight(ranks), lay_looped(ranks, chunks), lay_v(ranks)):
        validate(build_forward_only(layout, microbatches))


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
            here = stage in table.layout.stages[rank]
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


@settings(max_examples=1000)
@given(any_table(), st.data())
def test_a_mutated_table_is_accepted_just_when_it_can_run(table: ScheduleTable, data: st.DataObject) -> None:
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


@pytest.mark.parametrize(("ranks", "microbatches"), [(2, 4), (4, 10)])
def test_dualpipev_is_deepseeks_order(ranks: int, microbatches: int) -> None:
    published = from_csv((DATA / f"dualpipev-{ranks}-{microbatches}.csv").read_text())
    assert build("dualpipev", ranks, microbatches).actions == published.actions


def test_dualpipev_is_the_recorded_order(shared_data: Path) -> None:
    with gzip.open(shared_data / "dualpipe_order.json.gz") as file:
        tables = json.load(file)["tables"]
    for key, rows in tables.items():
        name, ranks, microbatches = key.split()
        if name == "dualpipev":
            recorded = tuple(tuple(read_recorded(row) for row in rank) for rank in rows)
            assert build(name, int(ranks), int(microbatches)).actions == recorded, key


def test_1f1b_by_hand() -> None:
    table = build("1f1b", 2, 3)
    assert to_csv(table).splitlines() == ["0F0,0F1,0B0,0F2,0B1,0B2", "1F0,1B0,1F1,1B1,1F2,1B2"]


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
        ("0F0,0B0\n5F0,5B0", "no straight, looped or V layout"),
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


def test_torch_reads_what_we_write_and_we_read_what_torch_writes() -> None:
    schedules = pytest.importorskip("torch.distributed.pipelining.schedules")
    for action in build("dualpipev", 4, 10).actions[1]:
        theirs = schedules._Action.from_str(str(action))
        assert parse_action(str(theirs)) == action


def test_sizes_a_schedule_does_not_allow_are_named() -> None:
    with pytest.raises(ScheduleError, match="dualpipev: 7 micro-batches on 4 ranks given; it needs at least 8 micro-batches"):
        build("dualpipev", 4, 7)
    with pytest.raises(ScheduleError, match="interleaved: 5 micro-batches on 2 ranks given; it needs .* multiple of 2"):
        build("interleaved", 2, 5)
    with pytest.raises(ScheduleError, match="'zigzag' is not known; allowed: 1f1b, interleaved, dualpipev"):
        build("zigzag", 2, 4)


def test_a_record_that_is_none_is_named(tmp_path: Path) -> None:
    with pytest.raises(ScheduleError, match="no recorded spans of step 0"):
        load_record(tmp_path, 0)
    (tmp_path / "timeline-rank00000.jsonl").write_text('{"step": 0}\n')
    with pytest.raises(ScheduleError, match="line 1: not a recorded timeline"):
        load_record(tmp_path, 0)
