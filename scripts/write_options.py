"""Write docs/options.md from the options: each is described once, by its field in counterflow.options."""

from pathlib import Path

from counterflow.options import describe_options

PAGE = Path(__file__).resolve().parents[1] / "docs" / "options.md"
HEAD = """# Options
Every option can be given as a flag, as a key of the `counterflow:` section of a `--yaml-cfg` file, or to
`counterflow.enable({...})`. A flag wins over `enable()`, which wins over YAML, whatever the value:
`--cf-eplb-clones-per-rank 1` over a YAML's 3 is 1, and `--no-cf-eplb` switches off what YAML switches on. The set that results
is checked as a whole. Options are in force once for a process: a second `enable()`, or a second training, that asks for others
ends in an error that says which.

This page is written by `python scripts/write_options.py`.

"""


def main() -> None:
    """Write the page."""
    PAGE.write_text(HEAD + describe_options(), encoding="utf-8")


if __name__ == "__main__":
    main()
