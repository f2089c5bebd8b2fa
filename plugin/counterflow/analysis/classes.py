"""What a kernel is, by families of names in a table: ``families.toml``, and a user's own before it."""

import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from counterflow.analysis.names import Name, split_name
from counterflow.analysis.trace import KERNEL, NONE, Trace
from counterflow.arrays import Array
from counterflow.bounds import show
from counterflow.errors import TraceError

OWN = Path(__file__).with_name("families.toml")
MAX_BYTES = 2**20
COMMUNICATION = (
    "ep_dispatch", "ep_combine", "ep_notify", "ep_layout", "ep_other", "all_reduce", "all_gather", "reduce_scatter",
    "all_to_all", "send_recv", "broadcast", "reduce", "other_communication",
)  # fmt: skip
# Kernels that no family knows: computation, and listed one by one.
UNCLASSIFIED = "other"
COMPUTATION = (
    "gemm", "grouped_gemm", "attention", "conv", "norm", "softmax", "elementwise", "cast", "reduction", "indexing",
    "permutation", "routing", "optimizer", "action", UNCLASSIFIED,
)  # fmt: skip
KINDS = (*COMMUNICATION, *COMPUTATION)
# Kinds that wait for other ranks rather than move data.
WAITING = ("ep_notify",)
# A C++ namespace that dense products live in too, and a library's name that holds one: neither says what a kernel does.
PLAIN_NAMESPACES = re.compile(r"(12)?grouped_gemm(::|(?=4cuda))|(10)?fbgemm_gpu(::)?")
KEYS = {"name", "head", "whole", "but", "kind", "kinds", "argument", "source"}


@dataclass(frozen=True)
class Family:
    """A family of kernels; patterns are compiled, ``kinds`` are tried in order."""

    name: str
    head: re.Pattern[str] | None
    whole: re.Pattern[str] | None
    but: re.Pattern[str] | None
    kind: str
    kinds: tuple[tuple[str, re.Pattern[str]], ...]
    argument: bool
    source: str

    def find_kind(self, name: Name, collective: str | None) -> str | None:
        """Return the kind of a kernel of this family; None for one of another."""
        whole = PLAIN_NAMESPACES.sub("", name.whole)
        if self.head is not None and not self.head.search(name.head):
            return None
        if self.whole is not None and not self.whole.search(whole):
            return None
        if self.but is not None and self.but.search(whole):
            return None
        for text in (name.function, name.head, collective if self.argument else None):
            for kind, pattern in self.kinds if text else ():
                if pattern.search(str(text)):
                    return kind
        return self.kind


def read_families(path: Path) -> tuple[Family, ...]:
    """Read a table of families; raises `TraceError` that names the file and the family."""
    try:
        if not path.is_file() or path.stat().st_size > MAX_BYTES:
            raise TraceError(f"{path}: no file of at most {MAX_BYTES} bytes; give a table of kernel families in TOML")
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, TraceError):
            raise
        raise TraceError(f"{path}: cannot be read as a table of kernel families: {str(error).splitlines()[0]}") from None
    families = table.get("family")
    if not isinstance(families, list) or set(table) != {"family"}:
        raise TraceError(f"{path}: has {', '.join(map(show, table)) or 'nothing'}; allowed: [[family]] tables, one per family")
    return tuple(_read_family(family, f"{path}, family {number}") for number, family in enumerate(families, start=1))


@cache
def read_own_families() -> tuple[Family, ...]:
    """Return the families that the project ships."""
    return read_families(OWN)


def _read_family(given: Any, where: str) -> Family:
    if not isinstance(given, dict) or not set(given) <= KEYS:
        raise TraceError(f"{where}: {show(given)} given; allowed: a table of {', '.join(sorted(KEYS))}")
    texts = {key: given.get(key) for key in ("name", "head", "whole", "but", "kind", "source")}
    for key, text in texts.items():
        if text is not None and not isinstance(text, str):
            raise TraceError(f"{where}: {key} {show(text)} given; allowed: a text")
    if not texts["kind"] or not (texts["head"] or texts["whole"]):
        raise TraceError(f"{where}: no kind, or neither head nor whole; give kind and one of the patterns")
    kinds, argument = given.get("kinds", {}), given.get("argument", False)
    if not isinstance(kinds, dict) or not isinstance(argument, bool):
        raise TraceError(f"{where}: kinds is a table of patterns by kind, argument true or false")
    for kind in (texts["kind"], *kinds):
        if kind not in KINDS:
            raise TraceError(f"{where}: kind {show(kind)} given; allowed: {', '.join(KINDS)}")
    head, whole, but = (_compile(texts[key], f"{where}: {key}") for key in ("head", "whole", "but"))
    patterns = tuple((kind, _require(_compile(pattern, f"{where}: {kind}"))) for kind, pattern in kinds.items())
    return Family(texts["name"] or "", head, whole, but, texts["kind"], patterns, argument, texts["source"] or "")


def _require(pattern: re.Pattern[str] | None) -> re.Pattern[str]:
    assert pattern is not None
    return pattern


def _compile(pattern: Any, where: str) -> re.Pattern[str] | None:
    if pattern is None:
        return None
    try:
        return re.compile(pattern, re.IGNORECASE)
    except (re.error, TypeError, RecursionError, OverflowError) as error:
        raise TraceError(f"{where}: {show(pattern)} is no regular expression: {error}") from None


def classify_name(name: str, collective: str | None = None, families: Sequence[Family] = ()) -> str:
    """Return the kind of a kernel by its name and the collective that the profiler noted; own families first."""
    split = split_name(name)
    for family in (*families, *read_own_families()):
        if (kind := family.find_kind(split, collective)) is not None:
            return kind
    return UNCLASSIFIED


def classify(trace: Trace, families: Sequence[Family] = ()) -> Array:
    """Return the kind of each row of GPU work, as its number in `KINDS`; -1 for copies and fills."""
    work, kinds = trace.work, np.full(len(trace.work.name), NONE, np.int16)
    kernels = np.flatnonzero(work.what == KERNEL)
    pairs = work.name[kernels].astype(np.int64) * (len(trace.collectives) + 1) + work.collective[kernels] + 1
    unique, place = np.unique(pairs, return_inverse=True)
    names, collectives = np.divmod(unique, len(trace.collectives) + 1)
    found = [
        KINDS.index(classify_name(trace.names[name], trace.collectives[number - 1] if number else None, families))
        for name, number in zip(names.tolist(), collectives.tolist(), strict=True)
    ]
    kinds[kernels] = np.array(found, np.int16)[place]
    return kinds


IS_COMMUNICATION = np.array([*(kind in COMMUNICATION for kind in KINDS), False])
