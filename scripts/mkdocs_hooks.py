"""Hooks of mkdocs.yml."""

import re
from typing import Any


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Show links to files outside docs/ as their paths: they are in the repository and not on the site."""
    return re.sub(r"\[[^\]]*\]\((?:\.\./)+([^)#]+)[^)]*\)", r"`\1`", markdown)
