"""``--cf-costs``: the file is read before a run, refused where it cannot serve, and searched by as the run computes."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from counterflow.errors import OptionError
from counterflow.options import Options, merge_options, read_flags
from counterflow.schedule import Costs
from counterflow.trainer.auto import AutoTable
from counterflow.trainer.tables import choose_layout


def write_costs(path: Path, **costs: object) -> Path:
    path.write_text(json.dumps({"unit": "ms", "f": 1.0, "i": 2.0, "w": 3.0, **costs}))
    return path


def read(*flags: object) -> Options:
    return merge_options(read_flags(list(map(str, flags))))


def test_the_file_is_read_once_with_the_options(tmp_path: Path) -> None:
    path = write_costs(tmp_path / "costs.json", f=[1.0, 2.0, 3.0, 4.0], overlap=0.7)
    options = read("--cf-schedule", "auto", "--cf-costs", path)
    path.unlink()
    assert options.file_costs == Costs([1.0, 2.0, 3.0, 4.0], 2.0, 3.0, overlap=0.7)
    assert choose_layout(options, 2, 1).last_stage == 3
    with pytest.raises(OptionError, match=r"--cf-costs .*costs.json: cost f has 4 numbers; the layout has 8 stages.*4 pipeline"):
        choose_layout(options, 4, 1)


def test_what_cannot_serve_is_refused(tmp_path: Path) -> None:
    path = write_costs(tmp_path / "costs.json")
    for given, said in (
        (("--cf-costs", path), "is for the search of --cf-schedule auto and none is given"),
        (("--cf-schedule", "zbv", "--cf-costs", path), "is for the search of --cf-schedule auto and zbv is given"),
        (("--cf-schedule", "auto", "--cf-costs", tmp_path / "none.json"), "--cf-costs: .*none.json: no file"),
        (("--cf-schedule", "auto", "--cf-costs", write_costs(tmp_path / "bad.json", f=-1)), "cost f -1 given"),
    ):
        with pytest.raises(OptionError, match=said) as caught:
            read(*given)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("has_pairs", "splits"), [(False, True), (True, True), (False, False)])
def test_given_costs_become_those_of_the_run(has_pairs: bool, splits: bool) -> None:
    group, given = SimpleNamespace(size=lambda: 2), Costs(1.0, 2.0, 3.0, p2p=0.25, overlap=0.7)
    table = AutoTable(group, None, has_pairs=has_pairs, splits=splits, costs=given)  # type: ignore[arg-type]
    found = table._find_costs([], 4).spread(4)
    assert (found.f, found.p2p, found.overlap) == ((1.0,) * 4, 0.25, 0.7 if has_pairs else 1.0)
    assert (found.i, found.w) == (((2.0,) * 4, (3.0,) * 4) if splits else ((5.0,) * 4, (0.0,) * 4))
