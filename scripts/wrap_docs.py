"""Wrap the paragraphs and list items of Markdown pages at 130 columns; tables, code and headings stay as they are.

Usage: python scripts/wrap_docs.py [PAGE.md …], by default every page of the repository that has longer lines.
"""

import re
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COLUMNS = 130
# What must not be broken: code spans and links that are short enough.
WHOLE = re.compile(r"`[^`]{1,60}`|\[[^\]]{1,60}\]\([^)]*\)")
FIXED = re.compile(r"[|#!]|::: |    (options|  members)")


def main(pages: list[str]) -> None:
    """Rewrite each page that has long lines."""
    for page in map(
        Path, pages or sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.md")])
    ):
        text = page.read_text(encoding="utf-8")
        if any(len(line) > COLUMNS and not line.startswith("|") for line in text.splitlines()):
            page.write_text(wrap(text), encoding="utf-8")


def wrap(text: str) -> str:
    """Return a page with its paragraphs and list items wrapped."""
    done: list[str] = []
    words: list[str] = []
    first = rest = ""
    in_code = False

    def end_paragraph() -> None:
        if words:
            joined = WHOLE.sub(lambda span: span[0].replace(" ", "\0"), " ".join(words))
            lines = textwrap.wrap(
                joined, COLUMNS, initial_indent=first, subsequent_indent=rest, break_long_words=False, break_on_hyphens=False
            )
            done.extend(line.replace("\0", " ") for line in lines)
            words.clear()

    for line in text.split("\n"):
        is_fence = line.lstrip().startswith("```")
        if is_fence or in_code or not line.strip() or FIXED.match(line):
            end_paragraph()
            done.append(line)
            in_code ^= is_fence
            continue
        item = re.match(r"( *)([-*]|\d+\.) +", line)
        if item:
            end_paragraph()
            first, rest = f"{item[1]}{item[2]} ", " " * (len(item[1]) + len(item[2]) + 1)
            line = line[item.end() :]
        elif not words:
            first = rest = re.match(" *", line)[0]  # type: ignore[index]
        words.append(line.strip())
    end_paragraph()
    return "\n".join(done)


if __name__ == "__main__":
    main(sys.argv[1:])
