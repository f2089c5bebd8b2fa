"""Pack traces of --cf-profile of a CPU run for examples/: annotations, and operators that call no other, without their arguments.

`counterflow analyze` says the same of what is left. Takes the traces and a folder.
"""

import gzip
import json
import sys
from pathlib import Path
from typing import Any

Event = dict[str, Any]
HEAD = ("schemaVersion", "distributedInfo", "displayTimeUnit", "baseTimeNanoseconds")


def main() -> None:
    """Write each packed trace into the folder, under its name."""
    *paths, folder = map(Path, sys.argv[1:])
    for path in paths:
        document = json.loads(gzip.decompress(path.read_bytes()))
        packed = {name: document[name] for name in HEAD if name in document}
        info = packed.get("distributedInfo", {})
        packed["distributedInfo"] = {name: info[name] for name in ("backend", "rank", "world_size") if name in info}
        packed["traceEvents"] = pack_events(document["traceEvents"])
        text = json.dumps(packed, separators=(",", ":")).encode()
        (folder / path.name).write_bytes(gzip.compress(text, 9, mtime=0))


def pack_events(events: list[Event]) -> list[Event]:
    """Return annotations, leaf operators and what threads are called, in order of time."""
    kept = [event for event in events if event["ph"] == "M" and event["name"] in ("process_name", "thread_name")]
    threads: dict[Any, list[Event]] = {}
    for event in events:
        if event.get("cat") in ("cpu_op", "user_annotation"):
            bare = {name: value for name, value in event.items() if name != "args"}
            if event["cat"] == "user_annotation":
                kept.append(bare)
            else:
                threads.setdefault(event["tid"], []).append(bare)
    for operators in threads.values():
        operators.sort(key=lambda event: (event["ts"], -event["dur"]))
        ends = [*(event["ts"] for event in operators[1:]), float("inf")]
        kept += [event for event, following in zip(operators, ends, strict=True) if event["ts"] + event["dur"] <= following]
    return sorted(kept, key=lambda event: event.get("ts", 0))


if __name__ == "__main__":
    main()
