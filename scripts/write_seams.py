"""Write docs/seams.md from the lists of seams in counterflow.megatron.seams and counterflow.deepspeed.seams."""

from pathlib import Path

from counterflow.deepspeed import seams as deepspeed
from counterflow.megatron.seams import REMEDIES, SEAMS
from counterflow.trainer.seam import Seam

PAGE = Path(__file__).resolve().parents[1] / "docs" / "seams.md"
HEAD = """# Seams
All places in which the plugin touches Megatron and DeepSpeed, by feature. What is "taken" is replaced while the feature is in
force, and put back by `.undo()`; what is "used" is called or read. The seams of a feature are checked before it is put in force:
where one does not fit, the feature is refused in one line, and all others work. `counterflow doctor` checks them all. The
versions are those of megatron-core or deepspeed that have the symbol; on each of them it was checked.

This page is written by `python scripts/write_seams.py` from `counterflow/megatron/seams.py` and
`counterflow/deepspeed/seams.py`.
"""


def write_page() -> str:
    """Return the page."""
    parts = [HEAD]
    for feature, remedy in (REMEDIES | deepspeed.REMEDIES).items():
        rows = [describe(seam) for seam in (*SEAMS, *deepspeed.SEAMS) if feature in seam.features]
        table = "| symbol | | what for | versions |\n| --- | --- | --- | --- |\n" + "\n".join(rows)
        parts.append(f"## {feature[0].upper()}{feature[1:]}\nWhere it cannot be in force: {remedy}.\n\n{table}\n")
    return "\n".join(parts)


def describe(seam: Seam) -> str:
    """Return a seam's row."""
    return f"| `{seam.path}` | {'taken' if seam.wrap else 'used'} | {seam.why} | {seam.versions[0]} to {seam.versions[-1]} |"


def main() -> None:
    """Write the page."""
    PAGE.write_text(write_page(), encoding="utf-8")


if __name__ == "__main__":
    main()
