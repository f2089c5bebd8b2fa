"""The events of a trace in Chrome's JSON format, in batches, from a stream of bytes.

The stream is cut between two events, and msgspec decodes what lies before the cut. What it cannot decode, like NaN, a byte that
is no UTF-8 or an event of an unusual shape, goes event by event through Python's own decoder, which is slower and takes more.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain
from math import isfinite
from typing import Any, NamedTuple

import msgspec

from counterflow.analysis.blocks import CutShortError
from counterflow.errors import TraceError

# What one event, or all that stands before the first, may take; a trace's largest events hold a few kilobytes.
MAX_EVENT = 64 * 2**20
# How far back from the end of a block the last gap between two events is looked for.
MAX_GAP = 2**16
GAP = re.compile(rb"\}\s*,\s*\{")
LIST = re.compile(rb'"traceEvents"\s*:\s*\[')
SPACES = re.compile(r"\s*")
# Values among the events that are no objects, in a block; a list of other things is no trace.
MAX_ODD = 1000
TOO_DEEP = "its JSON is nested too deeply for a trace"

Scalar = str | int | float | bool | None


class Arguments(msgspec.Struct, gc=False):
    """What is of use of an event's arguments."""

    device: Scalar = None
    stream: Scalar = None
    correlation: Scalar = None
    collective: Scalar = msgspec.field(default=None, name="Collective name")
    group: Scalar = msgspec.field(default=None, name="Process Group Name")
    described: Scalar = msgspec.field(default=None, name="Process Group Description")
    action: Scalar = None


class Event(msgspec.Struct, gc=False):
    """One event; ``ts`` and ``dur`` stay text, since a float of 1.7e15 microseconds is a quarter of a microsecond off."""

    ph: Scalar = None
    cat: Scalar = None
    name: Scalar = None
    pid: Scalar = None
    tid: Scalar = None
    ts: msgspec.Raw = msgspec.Raw(b"")
    dur: msgspec.Raw = msgspec.Raw(b"")
    args: Arguments | None = None


class _Exact(float):
    """A float that remembers its text."""

    text: str


def _keep_text(text: str) -> _Exact:
    number = _Exact(text)
    number.text = text
    return number


FAST = msgspec.json.Decoder(list[Event])
SLOW = json.JSONDecoder(parse_float=_keep_text, parse_constant=_keep_text, strict=False)
FIELDS = {"device": "device", "stream": "stream", "correlation": "correlation", "collective": "Collective name"}
FIELDS |= {"group": "Process Group Name", "described": "Process Group Description", "action": "action"}


@dataclass
class Document:
    """What stands beside the events; ``cut`` says why reading ended before the document did."""

    head: dict[str, Any] = field(default_factory=dict)
    events: int = 0
    cut: str | None = None


class _Taken(NamedTuple):
    """Events that were whole in a buffer, what is left of it, and whether the list has closed or is no JSON from there on."""

    events: list[Event]
    rest: bytes
    closed: bool = False
    broken: bool = False


def read_events(blocks: Iterator[bytes], document: Document) -> Iterator[list[Event]]:
    """Yield the events of a document in batches, and fill in ``document``; raises `TraceError` for what is no trace at all."""
    blocks = _end_where_cut(blocks, document)
    taken = _Taken([], _find_list(blocks, document))
    for block in chain(blocks, [b""]):
        taken = _take(taken.rest + block) if block else _take_slowly(taken.rest, is_end=True)
        document.events += len(taken.events)
        yield taken.events
        if taken.closed or taken.broken or len(taken.rest) > MAX_EVENT:
            break
    if taken.closed:
        _read_tail(taken.rest, blocks, document)
    elif taken.broken or len(taken.rest) > MAX_EVENT:
        document.cut = f"it is no JSON after event {document.events:,}"
    elif document.cut is None and ("traceEvents" in document.head or taken.rest.strip()):
        document.cut = f"it ends too early, after event {document.events:,}"


def _end_where_cut(blocks: Iterator[bytes], document: Document) -> Iterator[bytes]:
    try:
        yield from blocks
    except CutShortError as reason:
        document.cut = str(reason)


def _find_list(blocks: Iterator[bytes], document: Document) -> bytes:
    """Read up to the list of events and return what follows its bracket; ``document.head`` gets what stood before."""
    read = b""
    for block in blocks:
        read = (read + block).removeprefix(b"\xef\xbb\xbf").lstrip()
        if read.startswith(b"["):
            return read[1:]
        if read and not read.startswith(b"{"):
            raise TraceError(f"is no profiler trace: it begins with {read[:12]!r}; traces are JSON (also gzipped) or SQLite")
        for match in LIST.finditer(read):
            head = _decode(read[: match.end()] + b"]}")
            if isinstance(head, dict) and head.get("traceEvents") == []:
                document.head = head
                return read[match.end() :]
        if len(read) > MAX_EVENT:
            break
    if not read:
        raise TraceError("is empty" if document.cut is None else document.cut)
    found = _decode(read)
    if isinstance(found, dict):
        keys = ", ".join(map(str, list(found)[:8])) or "nothing"
        raise TraceError(f"is no profiler trace: its JSON has no list traceEvents; it has {keys}")
    raise TraceError(document.cut or "is no profiler trace: no JSON with a list traceEvents was found in it")


def _take(buffer: bytes) -> _Taken:
    gaps = list(GAP.finditer(buffer, max(0, len(buffer) - MAX_GAP))) or list(GAP.finditer(buffer))
    if gaps:
        try:
            events = FAST.decode(b"".join((b"[", buffer[: gaps[-1].start() + 1], b"]")))
            return _Taken(events, buffer[gaps[-1].end() - 1 :])
        except (ValueError, RecursionError):
            pass
    return _take_slowly(buffer)


def _take_slowly(buffer: bytes, is_end: bool = False) -> _Taken:
    """Decode value by value; until the end a value counts when a comma or the list's end is there behind it."""
    text, events, odd = buffer.decode("utf-8", "surrogateescape"), [], 0
    place = _skip_spaces(text, 0)
    closed = text.startswith("]", place)
    broken = False
    try:
        while not closed and not broken:
            found, after = SLOW.raw_decode(text, place)
            after = _skip_spaces(text, after)
            if after == len(text) and not is_end:
                break
            behind = text[after : after + 1]
            closed, broken = behind == "]", behind not in ",]"
            if isinstance(found, dict):
                events.append(_make_event(found))
            else:
                odd += 1
                broken |= odd > MAX_ODD
            place = after if closed else _skip_spaces(text, after + 1)
    except RecursionError:
        raise TraceError(TOO_DEEP) from None
    # No whole value is left, or what is no JSON: the end tells.
    except ValueError:
        pass
    return _Taken(events, text[place + closed :].encode("utf-8", "surrogateescape"), closed, broken)


def _skip_spaces(text: str, place: int) -> int:
    match = SPACES.match(text, place)
    return match.end() if match else place


def _make_event(found: dict[str, Any]) -> Event:
    args = found.get("args")
    known = {name: _take_scalar(args.get(key)) for name, key in FIELDS.items()} if isinstance(args, dict) else {}
    ph, cat, name, pid, tid = (_take_scalar(found.get(key)) for key in ("ph", "cat", "name", "pid", "tid"))
    ts, dur = (msgspec.Raw(_write_number(found.get(key))) for key in ("ts", "dur"))
    return Event(ph, cat, name, pid, tid, ts, dur, Arguments(**known))


def _take_scalar(value: Any) -> Scalar:
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    # A label of no number would equal none, not even itself.
    is_number = isinstance(value, int) or (isinstance(value, float) and isfinite(value))
    return value if value is None or is_number else str(getattr(value, "text", value))


def _write_number(value: Any) -> bytes:
    if value is None or isinstance(value, bool | dict | list):
        return b"null"
    return str(getattr(value, "text", value)).encode("utf-8", "replace")


def _read_tail(rest: bytes, blocks: Iterator[bytes], document: Document) -> None:
    """Read what stands behind the list of events into ``document.head``."""
    if "traceEvents" not in document.head:
        return
    for block in blocks:
        rest += block
        if len(rest) > MAX_EVENT:
            document.cut = "more than 64 MiB stand behind its events"
            return
    tail = _decode(b'{"":0' + rest)
    if isinstance(tail, dict):
        document.head |= tail
    elif document.cut is None:
        document.cut = "it ends too early, behind its events"


def _decode(text: bytes) -> Any:
    try:
        return msgspec.json.decode(text)
    except (ValueError, RecursionError):
        pass
    try:
        return json.loads(text.decode("utf-8", "replace"), strict=False)
    except RecursionError:
        raise TraceError(TOO_DEEP) from None
    except ValueError:
        return None
