"""The bytes of a trace, plain or gzipped, a block at a time."""

import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from counterflow.errors import TraceError

BLOCK = 4 * 2**20
GZIP, SQLITE = b"\x1f\x8b", b"SQLite format 3\0"


class CutShortError(Exception):
    """The bytes end before they should; says how, after all blocks that could be read."""


def read_start(path: Path, size: int = 16) -> bytes:
    """Return a file's first bytes; raises `TraceError` where there is no file to read."""
    try:
        if path.is_dir():
            raise TraceError(f"{path} is a folder; give a trace file, or a folder that --cf-record wrote")
        if path.exists() and not path.is_file():
            raise TraceError(f"{path} is no regular file but a pipe or a device; write the trace to a file and give that")
        if not path.is_file():
            raise TraceError(f"{path}: no such file; give the path of a profiler trace")
        with path.open("rb") as file:
            return file.read(size)
    # A name that no file can have is a ValueError.
    except (OSError, ValueError) as error:
        if isinstance(error, TraceError):
            raise
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise TraceError(f"{path}: cannot be read: {reason}") from None


def read_blocks(path: Path) -> Iterator[bytes]:
    """Yield a file's bytes, unpacked where gzipped, in blocks of 4 MiB at most; raises `CutShortError` at a broken end."""
    packed = read_start(path).startswith(GZIP)
    with path.open("rb") as file:
        blocks = iter(lambda: file.read(BLOCK // 8 if packed else BLOCK), b"")
        yield from _unpack(blocks) if packed else blocks


def _unpack(blocks: Iterator[bytes]) -> Iterator[bytes]:
    """Unpack gzip members one after the other; a few bytes may stand for gigabytes, so each result is bounded too."""
    member, begun = zlib.decompressobj(wbits=31), False
    for block in blocks:
        rest, piece = block if begun else block.lstrip(b"\0"), b""
        # A full piece may have left more to come that needs no more bytes.
        while rest or len(piece) == BLOCK:
            before = member.copy()
            try:
                piece, begun = member.decompress(rest, BLOCK), True
            except zlib.error as error:
                yield from _salvage(before, rest)
                raise CutShortError(f"its gzip stream is broken ({error})") from None
            if piece:
                yield piece
            rest = member.unconsumed_tail
            if member.eof:
                rest, piece = member.unused_data.lstrip(b"\0"), b""
                member, begun = zlib.decompressobj(wbits=31), False
    if begun:
        raise CutShortError("its gzip stream ends too early")


def _salvage(member: Any, rest: bytes) -> Iterator[bytes]:
    """Yield what can be unpacked of bytes that break somewhere: a piece in which they do gives nothing, so pieces get smaller."""
    for size in (2**12, 1):
        while rest:
            before = member.copy()
            try:
                yield member.decompress(rest[:size])
            except zlib.error:
                member = before
                break
            rest = rest[size:]
