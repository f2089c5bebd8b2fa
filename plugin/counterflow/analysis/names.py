"""The parts of a kernel's name that say what it is."""

import re
from functools import lru_cache
from typing import NamedTuple

ANONYMOUS = re.compile(r"\(anonymous namespace\)|<unnamed>|\(anonymous\)")
LENGTH = re.compile(r"L?(\d+)")
CLONE = re.compile(r"\s*\[clone [^\]]*\]|\.kd$")


class Name(NamedTuple):
    """``head``: the function with its namespaces, without return type, template and function arguments.

    ``function``: the head's last part. ``whole``: all but the function's arguments, so with its template arguments.
    """

    head: str
    function: str
    whole: str


@lru_cache(maxsize=2**16)
def split_name(name: str) -> Name:
    """Split a kernel's name; mangled names (Itanium) are decoded as far as they are nested names."""
    text = CLONE.sub("", ANONYMOUS.sub("anonymous", decode_name(name)))
    depth, plain, end = 0, [], len(text)
    for place, character in enumerate(text):
        if character == "<":
            depth += 1
        elif character == ">" and not text.startswith("->", place - 1):
            depth = max(0, depth - 1)
        elif character == "(" and not depth and place:
            end = place
            break
        elif not depth:
            plain.append(character)
    head = "".join(plain).strip().split(" ")[-1]
    return Name(head, head.split("::")[-1], text[:end])


def decode_name(name: str) -> str:
    """Return ``deep_ep::internode::dispatch<…`` of ``_ZN7deep_ep9internode8dispatchI…``; other names as they are."""
    if not name.startswith("_Z"):
        return name
    place = 2
    nested = name.startswith("N", place)
    if nested:
        place += 1
        while name[place : place + 1] in ("K", "V", "r"):
            place += 1
    if name.startswith("St", place):
        place += 2
    parts = []
    while match := LENGTH.match(name, place):
        place = match.end() + int(match[1][:6])
        parts.append(name[match.end() : place])
        if not nested:
            break
    rest = name[place:]
    return "::".join(parts) + (f"<{rest}" if rest else "") if parts else name
