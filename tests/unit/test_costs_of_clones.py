"""A file of what clones cost is read, or refused in one line."""

from pathlib import Path

import pytest

from counterflow.balance.costs import Costs
from counterflow.balance.files.costs import read_costs
from counterflow.errors import BalanceError


def test_what_a_file_does_not_give_has_its_default(tmp_path: Path) -> None:
    path = tmp_path / "costs.json"
    path.write_text('{"node_speed": 2e11, "clone_time": 0}')
    assert read_costs(path) == Costs(node_speed=2e11, clone_time=0)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"network_speed": 0}', "network speed in bytes a second 0 given; allowed: a finite number from 1 to 1e+18"),
        ('{"token_time": "fast"}', "token time in seconds fast given; allowed: a finite number from 1e-12 to 1000"),
        ('{"speed": 1}', "speed given; allowed: an object of expert_bytes, token_time, node_speed, network_speed"),
        ("[1]", "[1] given; allowed: an object of expert_bytes"),
        ('{"exposed": 0, "exposed": 1}', "key exposed is given twice: drop one"),
        ("{", "cannot be read as .json"),
        (" " * 70_000, "70000 bytes; allowed: 65536"),
    ],
)
def test_what_is_no_costs_file_is_refused_in_one_line(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "costs.json"
    path.write_text(text)
    with pytest.raises(BalanceError) as refused:
        read_costs(path)
    assert str(refused.value).startswith(f"{path}: ") and said in str(refused.value) and "\n" not in str(refused.value)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(BalanceError, match=r"none.json: cannot be read as .json: No such file or directory"):
        read_costs(tmp_path / "none.json")
