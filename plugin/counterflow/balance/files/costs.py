"""What clones cost on a user's machines, as a file."""

import json
from dataclasses import fields
from pathlib import Path

from counterflow.balance.costs import Costs
from counterflow.balance.files.arrays import name_file
from counterflow.bounds import show, unite_pairs
from counterflow.errors import BalanceError

MAX_BYTES = 2**16
KEYS = tuple(one.name for one in fields(Costs))


def read_costs(path: Path) -> Costs:
    """Read a JSON object with some of the fields of `Costs`, in bytes and seconds; the others have their defaults.

    Raises `BalanceError` that names the file.
    """
    with name_file(path):
        if path.stat().st_size > MAX_BYTES:
            raise BalanceError(f"{path}: {path.stat().st_size} bytes; allowed: {MAX_BYTES}, an object of {', '.join(KEYS)}")
        given = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=unite_pairs)
    strange = [key for key in given if key not in KEYS] if isinstance(given, dict) else [given]
    if strange or not isinstance(given, dict):
        raise BalanceError(f"{path}: {show(strange[0])} given; allowed: an object of {', '.join(KEYS)}")
    try:
        return Costs(**given)
    except BalanceError as error:
        raise BalanceError(f"{path}: {error}") from None
