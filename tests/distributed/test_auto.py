"""``--cf-schedule auto`` searches beside the training, and all ranks change tables at the same step."""

import json
import re

import pytest

from auto_worker import grow
from tests.support.forked_ranks import run_ranks

Chosen = list[tuple[int, str]]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Chosen]], str]:
    """What each rank chose at each step, by scenario, and what rank 0 printed."""
    directory = tmp_path_factory.mktemp("auto")
    said = run_ranks("auto_worker", str(directory), 2, directory / "logs")
    chosen = [json.loads((directory / f"chosen-{rank}.json").read_text()) for rank in range(2)]
    scenarios = [{name: [(m, table) for m, table in steps] for name, steps in of.items()} for of in chosen]
    return scenarios, said[0]


Run = tuple[list[dict[str, Chosen]], str]


def test_all_ranks_change_tables_at_the_same_step(run: Run) -> None:
    (first, second), _ = run
    assert first == second


def test_each_number_of_microbatches_has_a_search_and_trains_on_meanwhile(run: Run) -> None:
    (chosen, _), said = run
    steps = chosen["grows"]
    assert [microbatches for microbatches, _ in steps] == [grow(number) for number in range(1, len(steps) + 1)]
    changes = re.findall(r"from step (\d+) on, (\d+) micro-batches run a table that was found: by measured", said)
    begins = {int(count): int(step) for step, count in changes}
    assert set(begins) == {6, 8}
    assert min(begins.values()) > 5, "three steps measure, the fourth begins the search, the fifth knows nothing yet"
    for number, (microbatches, table) in enumerate(steps, start=1):
        assert table == ("auto" if number >= begins[microbatches] else "zbv"), f"step {number}"


def test_what_was_found_and_gained_is_said(run: Run) -> None:
    assert re.search(r"by measured costs a bubble of \d+\.\d% \(zbv \d+\.\d%\), a step [1-9]\d*\.\d% shorter, at most", run[1])


@pytest.mark.parametrize(
    ("scenario", "line"),
    [
        ("nothing better", r"no table found for 6 micro-batches that takes less time than zbv .*: zbv stays in use"),
        ("killed", r"the search for 6 micro-batches failed \(exit status -9 after \d+ s, no word\): zbv stays in use"),
        ("no process", r"the search for 6 micro-batches failed \(.*/nowhere/python.*\): zbv stays in use"),
    ],
)
def test_a_search_without_a_result_leaves_the_family_in_use(run: Run, scenario: str, line: str) -> None:
    (chosen, _), said = run
    assert {table for _, table in chosen[scenario]} == {"zbv"}
    assert len(re.findall(line, said)) == 1


def test_a_run_may_end_while_it_searches(run: Run) -> None:
    # The worker makes sure that the process has ended.
    (chosen, _), _ = run
    assert chosen["ends while searching"] == [(6, "zbv")] * 6


def test_given_costs_are_searched_by_from_the_first_step_on(run: Run) -> None:
    (chosen, _), said = run
    steps = chosen["costs given"]
    (begin,) = map(int, re.findall(r"from step (\d+) on, 6 micro-batches run a table that was found: by the given costs", said))
    assert [table for _, table in steps] == ["zbv"] * (begin - 1) + ["auto"] * (len(steps) - begin + 1)
    assert begin >= 2 and len(steps) > begin
