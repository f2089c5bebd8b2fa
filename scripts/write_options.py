"""Write what docs say of options and families: each option is described once, by its field in counterflow.options, each
family by its value in counterflow.schedule.families."""

from pathlib import Path

from counterflow.options import describe_options
from counterflow.schedule.families import describe_families
from counterflow.sections import describe_keys

DOCS = Path(__file__).resolve().parents[1] / "docs"
HEAD = """# Options
Every option can be given as a flag, as a key of the `counterflow:` section of a `--yaml-cfg` file, or to
`counterflow.enable({...})`. A flag wins over `enable()`, which wins over YAML, whatever the value:
`--cf-eplb-clones-per-rank 1` over a YAML's 3 is 1, and `--no-cf-eplb` switches off what YAML switches on. The set that results
is checked as a whole. Options are in force once for a process: a second `enable()`, or a second training, that asks for others
ends in an error that says which.

This page is written by `python scripts/write_options.py`.

"""


def main() -> None:
    """Write the page of options, DeepSpeed's table of keys, and the table of schedules up to the end of the pictures."""
    (DOCS / "options.md").write_text(HEAD + describe_options(), encoding="utf-8")
    page, table = DOCS / "deepspeed.md", describe_keys()
    before, _, rest = page.read_text(encoding="utf-8").partition(table.splitlines()[0])
    page.write_text(before + table + rest[rest.index("\n\n") + 1 :], encoding="utf-8")
    page, table = DOCS / "schedules.md", describe_families()
    before, _, rest = page.read_text(encoding="utf-8").partition(table.splitlines()[0])
    after = rest.partition("```text")[2].partition("```")[2]
    page.write_text(before + table.rstrip("\n") + after, encoding="utf-8")


if __name__ == "__main__":
    main()
