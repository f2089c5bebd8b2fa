"""Families as values: what each says of itself is what it builds, and nobody else asks for one by its name."""

import ast
import re
from itertools import product
from pathlib import Path

import pytest

from counterflow.schedule import FAMILIES, Family, ScheduleError, ScheduleTable, build
from counterflow.schedule.families import describe_families, list_names

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "plugin" / "counterflow"
SIZES = list(product(range(1, 7), range(1, 17)))


def list_tables(family: Family) -> list[ScheduleTable]:
    tables = []
    for (ranks, microbatches), overlap in product(SIZES, (False, True)):
        if not overlap or "ep_overlap" in family.options:
            try:
                tables.append(build(family.name, ranks, microbatches, **({"ep_overlap": True} if overlap else {})))
            except ScheduleError:
                continue
    return tables


@pytest.mark.parametrize("family", FAMILIES.values(), ids=list(FAMILIES))
def test_a_family_builds_what_it_says(family: Family) -> None:
    tables = list_tables(family)
    kinds = {single.kind for table in tables for rank in range(table.ranks) for single in table.singles(rank)}
    assert {table.layout.name for table in tables if table.ranks > 1} == {family.layout}
    assert ("I" in kinds) == ("W" in kinds) == family.splits
    assert any(action.parts for table in tables for row in table.actions for action in row) == family.pairs
    if family.sizes == "any":
        assert {(table.ranks, table.microbatches) for table in tables} == set(SIZES)


@pytest.mark.parametrize("family", FAMILIES.values(), ids=list(FAMILIES))
def test_its_picture_is_its_table(family: Family) -> None:
    drawn = [line.partition(":")[2].split() for line in family.picture.strip().splitlines()]

    def shows(table: ScheduleTable) -> bool:
        for rank, (words, row) in enumerate(zip(drawn, table.actions, strict=True)):
            cut = words[-1] == "..."
            texts = [str(action).removesuffix("OVERLAP_F_B") for action in row]
            texts = texts if words[0][0].isdigit() else [text.removeprefix(str(rank)) for text in texts]
            if (words[:-1] if cut else words) != (texts[: len(words) - 1] if cut else texts):
                return False
        return True

    tables = [table for table in list_tables(family) if table.ranks == len(drawn)]
    assert any(map(shows, tables)), f"no table of {family.name} is the one in its picture"


def test_the_docs_hold_the_families() -> None:
    page = (ROOT / "docs" / "schedules.md").read_text()
    assert describe_families() in page, "run: python scripts/write_options.py"


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nobody_asks_for_a_family_by_its_name(path: Path) -> None:
    if path.parent.name == "families":
        return
    texts = {node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)}
    assert not texts & set(FAMILIES), f"{path.name}: ask for what a Family says, not for its name"


def test_names_are_found_by_what_families_are() -> None:
    assert list_names() == list(FAMILIES)
    assert list_names("v", pairs=True) == ["dualpipev"]
    assert list_names(option="vpp") == ["interleaved"]
    assert all(re.fullmatch(r"[a-z0-9-]+", name) and name == family.name for name, family in FAMILIES.items())
