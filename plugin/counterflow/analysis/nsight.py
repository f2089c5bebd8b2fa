"""Traces of Nsight Systems, exported to SQLite (``nsys export --type sqlite``): rows to columns.

Times are integer nanoseconds. Ids of processes and threads are global: a thread's without its last 24 bits is its process's.
"""

import sqlite3
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

from counterflow.analysis.trace import (
    COPY,
    FILL,
    KERNEL,
    LARGEST_TIME,
    LAUNCH_TYPES,
    NONE,
    RANGE_TYPES,
    WORK_TYPES,
    Index,
    Launches,
    Ranges,
    Table,
    Trace,
    Work,
)
from counterflow.errors import TraceError

KERNELS, RUNTIME, NVTX = "CUPTI_ACTIVITY_KIND_KERNEL", "CUPTI_ACTIVITY_KIND_RUNTIME", "NVTX_EVENTS"
COPIES = {"CUPTI_ACTIVITY_KIND_MEMCPY": COPY, "CUPTI_ACTIVITY_KIND_MEMSET": FILL}
DIRECTIONS = {1: " HtoD", 2: " DtoH", 8: " DtoD", 10: " PtoP"}
# Ranges of a thread and of a process, as pushed and popped or started and ended; and the event that names a domain.
RANGE_TYPES_OF_NVTX, DOMAIN = (59, 60, 70, 71, None), 75
# Its ranges repeat what the kernels' names say.
SKIPPED_DOMAIN = "NCCL"
PROCESS = ~0xFFFFFF
BATCH = 50_000
NO_TIME, NEGATIVE = "no ts or dur", "negative dur"


class _Export:
    """An export that is open, and the labels found in it."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        # No views: one may compute rows without end.
        self.tables = {row[0] for row in connection.execute("select name from sqlite_master where type = 'table'")}
        self.names, self.devices, self.streams, self.places, self.ids = (Index() for _ in range(5))
        self.left_out: Counter[tuple[Any, str]] = Counter()
        self.strings = dict(connection.execute("select id, value from StringIds")) if "StringIds" in self.tables else {}
        self.events = 0

    def read_rows(self, table: str, *columns: str) -> Iterator[list[tuple[Any, ...]]]:
        """Yield a table's rows in batches, None for columns that this version of the export has not."""
        if table not in self.tables:
            return
        have = {row[1] for row in self._connection.execute(f"pragma table_info({table})")}
        chosen = ", ".join(column if column in have else f"null as {column}" for column in columns)
        cursor = self._connection.execute(f"select {chosen} from {table}")
        while rows := cursor.fetchmany(BATCH):
            self.events += len(rows)
            yield rows

    def read_work(self) -> dict[str, Any]:
        """Return the columns of `Work`."""
        work = Table(**WORK_TYPES)
        shared = ("start", "end", "deviceId", "streamId", "correlationId", "globalPid")
        for rows in self.read_rows(KERNELS, *shared, "demangledName", "shortName"):
            self._add_work(work, KERNEL, [(*row[:6], self._name_kernel(*row[6:])) for row in rows])
        for table, what in COPIES.items():
            word = "Memcpy" if what == COPY else "Memset"
            for rows in self.read_rows(table, *shared, "copyKind"):
                self._add_work(work, what, [(*row[:6], word + DIRECTIONS.get(row[6], "")) for row in rows])
        return work.close()

    def _name_kernel(self, name: Any, short: Any) -> str:
        return str(self.strings.get(name, self.strings.get(short, name)))

    def _add_work(self, work: Table, what: int, rows: list[tuple[Any, ...]]) -> None:
        good = []
        for row in rows:
            start, end, device = row[:3]
            if _is_time(start) and _is_time(end) and end >= start:
                good.append(row)
            else:
                self.left_out[device, NEGATIVE if _is_time(start) and _is_time(end) else NO_TIME] += 1
        start, end, device, stream, correlation, process, name = zip(*good, strict=True) if good else ((),) * 7
        unknown = [NONE] * len(good)
        work.add(
            device=self.devices.number(device, unknown),
            stream=self.streams.number(stream, unknown),
            what=[what] * len(good),
            name=self.names.number(name),
            start=start,
            end=end,
            process=self.places.number(process),
            correlation=self.ids.number(correlation),
            collective=unknown,
            group=unknown,
        )

    def read_launches(self) -> dict[str, Any]:
        """Return the columns of `Launches`."""
        launches = Table(**LAUNCH_TYPES)
        for rows in self.read_rows(RUNTIME, "start", "globalTid", "correlationId"):
            good = [row for row in rows if _is_time(row[0]) and row[2] is not None]
            start, thread, correlation = zip(*good, strict=True) if good else ((),) * 3
            launches.add(
                process=self.places.number(map(_find_process, thread)),
                thread=self.places.number(thread),
                start=start,
                correlation=self.ids.number(correlation),
            )
        return launches.close()

    def read_ranges(self) -> dict[str, Any]:
        """Return the columns of `Ranges`."""
        ranges, skipped = Table(**RANGE_TYPES), set()
        for rows in self.read_rows(NVTX, "eventType", "domainId", "text", "textId"):
            skipped |= {row[1] for row in rows if row[0] == DOMAIN and self._read_text(*row[2:]) == SKIPPED_DOMAIN}
        for rows in self.read_rows(NVTX, "start", "end", "globalTid", "text", "textId", "eventType", "domainId"):
            good = [
                row for row in rows
                if _is_time(row[0]) and _is_time(row[1]) and row[5] in RANGE_TYPES_OF_NVTX and row[6] not in skipped
            ]  # fmt: skip
            start, end, thread, text, number, _, _ = zip(*good, strict=True) if good else ((),) * 7
            ranges.add(
                scope=self.places.number(map(_find_process, thread)),
                lane=self.places.number(thread),
                name=self.names.number(map(self._read_text, text, number)),
                start=start,
                end=end,
            )
        return ranges.close()

    def _read_text(self, text: Any, number: Any) -> str:
        return str(text or self.strings.get(number, "?"))


def read_nsight(path: Path) -> Trace:
    """Read an export of Nsight Systems; raises `TraceError` without the file's name."""
    try:
        connection = sqlite3.connect(f"file:{quote(str(path.resolve()))}?mode=ro&immutable=1", uri=True)
        # Text that is no UTF-8 is to be shown, not to be refused.
        connection.text_factory = lambda text: text.decode("utf-8", "replace")
        export = _Export(connection)
        if KERNELS not in export.tables:
            found = ", ".join(sorted(map(str, export.tables))[:6]) or "no tables"
            raise TraceError(
                f"is SQLite without a table {KERNELS} ({found}); export a profile with CUDA kernels: "
                "nsys profile --trace cuda,nvtx, then nsys export --type sqlite"
            )
        work, launches, ranges = Work(**export.read_work()), Launches(**export.read_launches()), Ranges(**export.read_ranges())
        connection.close()
    except (sqlite3.Error, OverflowError) as error:
        raise TraceError(f"is no readable SQLite export of Nsight Systems: {error}") from None
    return Trace(
        path=str(path),
        form="nsys-sqlite",
        names=tuple(export.names),
        devices=tuple(export.devices),
        streams=tuple(export.streams),
        collectives=(),
        groups=(),
        work=work,
        launches=launches,
        ranges=ranges,
        gpu_ranges=Ranges(**Table(**RANGE_TYPES).close()),
        left_out=export.left_out,
        events=export.events,
    )


def _is_time(value: Any) -> bool:
    return type(value) is int and abs(value) < LARGEST_TIME


def _find_process(thread: Any) -> int | None:
    return thread & PROCESS if isinstance(thread, int) else None
