"""The key ``"counterflow"`` in a DeepSpeed config, which is a dictionary, a file or base64 of (H)JSON."""

import base64
import importlib.util
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from counterflow.errors import OptionError
from counterflow.sections import find_section


def load_config(config: Mapping[str, Any] | str | Path) -> Mapping[str, Any]:
    """Return a DeepSpeed config that is given as DeepSpeed takes it: a dictionary, or the path or base64 of (H)JSON."""
    if isinstance(config, Mapping):
        return config
    # DeepSpeed brings it; without DeepSpeed, plain JSON can be explained.
    reader = importlib.import_module("hjson") if importlib.util.find_spec("hjson") else json
    text = ""
    try:
        path = Path(config)
        is_file = path.suffix == ".json" or path.is_file()
        text = path.read_text() if is_file else base64.urlsafe_b64decode(str(config)).decode()
        loaded = reader.loads(text)
    except (OSError, ValueError, OverflowError) as error:
        found = re.search(r":\s*(-?(?:NaN|Infinity))\b", text)
        reason = f"{found[1]} is no number of a JSON" if found else error
        raise OptionError(f"DeepSpeed config {str(config)[:80]!r} cannot be read as JSON: {reason}") from None
    if not isinstance(loaded, Mapping):
        raise OptionError("a DeepSpeed config is an object of keys and values; another JSON value given")
    return loaded


def read_config(config: Mapping[str, Any] | str | Path) -> Mapping[str, Any] | None:
    """Return the section in a DeepSpeed config (`load_config`); None if there is none."""
    return find_section(load_config(config), "DeepSpeed config")
