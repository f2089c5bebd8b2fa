"""Hostile command lines and option sets, drawn at random: what a user, a script or a damaged file may hand to a command.

Commands and options are found in the parser, so that a new one is drawn without a word here. Half of the lines are good but for
one or two values; the others are hostile throughout. A line runs in a child of this process, which a hang cannot outlive.
"""

import argparse
import os
import re
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from counterflow.schedule import FAMILIES, Costs, build, dump_record, simulate, to_csv
from tests.support.made_record import make_record
from tests.support.made_trace import make_events, write_trace

# Seconds of the processor that a command may take, and the most that one gets; a command that sleeps gets the last, of the wall.
LIMIT_SECONDS, HANG_SECONDS, SLEEP_SECONDS = 30, 120, 600
LIMIT_BYTES = 8 * 2**30
NUMBERS = (
    "0", "-1", "-0.0", "1e-320", "1e-30", "0.5", "1.5", "2.5", "3", "7", "1000", "65536", "100000", "1e5", "1e18", "1e300",
    "-1e300", "1e400", "nan", "-nan", "inf", "-inf", str(2**31), str(2**63), str(10**18), str(10**30), "9" * 5000, "1_000",
    "0x10", "\u0661\u0662",
)  # fmt: skip
# What a number may be, and what hardly anyone gives.
EDGES = (
    "0", "1", "2", "3", "5", "8", "12", "16", "63", "64", "100", "512", "1000", "8192", "1e-30", "1e-6", "1e-3", "1.999",
    "1e29", "1e30",
)  # fmt: skip
LISTS = (
    "", ",", "1,", ",1", "1,,2", "0,0", "1,2,3", "nan,1", "1,inf", "1e300,1", "1,-1", "1;2", "1 2",
    "0,1,0,1", "1e30,1e-30,1,0", "0,0,0,0,0,0,0,1", "1e30,1e-30,1,0,1e29,1e-29,1,1", ",".join(["0.5"] * 5000),
)  # fmt: skip
TEXTS = ("", " ", "-", "--", "x", "½", "ü" * 300, "a\nb", "\x1b[31m", "\udcff", "%s", "{}", "None", "true", "1f1b ", "DUALPIPEV")
# What good lines are made of, by an option's name; any other is a small number.
GOOD: dict[str, tuple[str, ...]] = {
    "ranks": ("2", "4"),
    "microbatches": ("8", "16"),
    "slots": ("16", "24"),
    "seconds": ("0", "0.01"),
    "overlap": ("0.8", "1"),
    "policy": ("auto", "global", "deepseek"),
    "first_layer": ("0", "3"),
    "key": ("counts",),
    "warmup": ("2", "4"),
    "step": ("0",),
    "pipeline": ("0",),
    "max_activations": ("4", "9.5"),
}


@dataclass(frozen=True)
class Ended:
    """How a command line ended, and what it said; ``code`` is -9 where it had to be killed."""

    code: int
    out: str
    err: str
    seconds: float


@dataclass(frozen=True)
class Files:
    """A folder of good and of hostile files, by what a command wants of them."""

    folder: Path
    good: dict[str, tuple[str, ...]]
    hostile: tuple[str, ...]


def make_files(folder: Path) -> Files:
    """Make the files that lines are drawn with."""
    random = np.random.default_rng(0)
    write_trace(folder / "kernels.json.gz", make_events(0))
    write_trace(folder / "ranks.json", make_events(1), distributedInfo={"rank": 1})
    table = to_csv(build("zbv", 2, 8))
    texts = {
        "table.csv": table, "bom.csv": "\ufeff" + table, "größe 表.csv": table, "bad.csv": "0F0,1X0\n",
        "line.csv": "0F0," * 10_000,
        "late.csv": "0F999999999,0B999999999\n", "far.csv": "999999F0,999999B0\n", "empty.csv": "", "unicode.csv": "٠F٠,٠B٠\n",
        "zeros.json": "[[0, 0, 0, 0, 0, 0, 0, 0], [1, 2, 3, 4, 5, 6, 7, 8]]", "deep.json": "[" * 100_000,
        "text.json": '[["1", null]]', "loads.csv": "1,2,3,4,5,6,7,8\n", "nan.csv": "1,nan\n", "long.json": f"[{'9' * 400}]",
        "quoted.csv": '"0F0',
    }  # fmt: skip
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    for name in ("noise.csv", "noise.npy", "noise.npz", "noise.json"):
        (folder / name).write_bytes(random.bytes(1000))
    np.save(folder / "loads.npy", random.lognormal(0, 1, (2, 8)))
    np.savez(folder / "trace.npz", counts=random.integers(0, 100, (12, 2, 8)) * [[[1]], [[0]]][0])
    np.save(folder / "short.npy", np.ones((1, 1, 8), np.int64))
    np.save(folder / "nothing.npy", np.zeros((1, 8)))
    for name in ("huge.csv", "huge.npy", "huge.json"):
        with (folder / name).open("wb") as file:
            file.truncate(2**40)
    for name in ("folder.csv", "folder.npy", "folder", "locked"):
        (folder / name).mkdir()
    (folder / "locked").chmod(0)
    for name in ("pipe.csv", "pipe.npy"):
        os.mkfifo(folder / name)
    (folder / "zero.csv").symlink_to("/dev/zero")
    (folder / "loop.csv").symlink_to("loop.csv")
    make_record(folder / "balanced", {0: [2, 9], 4: [5]}, range(1, 6))
    _make_timelines(folder)
    record = ("timeline", *(f"timeline-{number}" for number in range(len(BROKEN_LINES))))
    tables = ("table.csv", "bom.csv", "größe 表.csv")
    good = {
        "schedule": (*FAMILIES, *tables), "schedules": (*FAMILIES, *tables), "loads": ("loads.npy", "loads.csv", "zeros.json"),
        "traces": ("kernels.json.gz", "ranks.json"), "trace": ("trace.npz", "balanced"), "record": ("timeline", "balanced"),
    }  # fmt: skip
    there = tuple(sorted(path.name for path in folder.iterdir()))
    nowhere = ("missing.csv", "nowhere/x.json", "/proc/x.json", "/dev/full", "/dev/null", "x\0y")
    return Files(folder, good, (*there, *record, *nowhere))


def _write_line(spans: str, step: str = "0", rank: str = "0") -> str:
    return f'{{"step": {step}, "pipeline": 0, "rank": {rank}, "spans": {spans}}}'


BROKEN_LINES = (
    "[]", "{}", "null", "[" * 100_000, _write_line('[["0F0", 0, 1]]', rank="-1"),
    _write_line('[["0F0", 0, 1]]', rank=str(10**12)),
    _write_line('[["0F0", NaN, 1]]'), _write_line('[["0F0", 0, 1e308], ["0B0", 1e308, -1e308]]'), _write_line('[["0F0", 1, 0]]'),
    _write_line("7", step="1e999"), _write_line(f'[["0F0", 0, {"9" * 400}]]'), _write_line("{}", step="true"),
)  # fmt: skip


def _make_timelines(folder: Path) -> None:
    """Write a good record of ``1f1b`` on two ranks, and some that no run wrote."""
    table = build("1f1b", 2, 8)
    spans = simulate(table, Costs()).spans
    (folder / "timeline").mkdir()
    for rank in range(2):
        line = dump_record(0, "1f1b", 0, rank, [span for span in spans if span.rank == rank])
        (folder / "timeline" / f"timeline-rank{rank:05d}.jsonl").write_text(line + "\n")
    for number, line in enumerate(BROKEN_LINES):
        (folder / f"timeline-{number}").mkdir()
        (folder / f"timeline-{number}" / "timeline-rank00000.jsonl").write_text(line + "\n")
    (folder / "folder" / "timeline-rank00000.jsonl").mkdir()
    (folder / "folder" / "eplb-rank00000.jsonl").mkdir()


def draw_line(random: Random, parser: argparse.ArgumentParser, files: Files) -> list[str]:
    """Draw one command line of the parser."""
    words: list[str] = []
    while (kinds := _find_commands(parser)) is not None:
        if random.random() < 0.02:
            return [*words, *random.choices((*TEXTS, "--help"), k=random.randrange(3))]
        # What imports a trainer takes seconds: seldom.
        names = sorted(kinds)
        words.append(random.choices(names, [1 if name == "doctor" else 60 for name in names])[0])
        parser = kinds[words[-1]]
    hostile = random.choice((0.0, 0.1, 0.1, 0.3, 1.0))
    given = [action for action in parser._actions if _is_drawn(random, action, hostile)]
    random.shuffle(given)
    for action in given:
        words += _draw_argument(random, action, hostile, files)
    if random.random() < 0.03:
        words.insert(random.randrange(len(words) + 1), random.choice((*TEXTS, *NUMBERS, "--frobnicate", "-9")))
    return words


def _find_commands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser] | None:
    return next((dict(action.choices) for action in parser._actions if isinstance(action, argparse._SubParsersAction)), None)


def _is_drawn(random: Random, action: argparse.Action, hostile: float) -> bool:
    if action.dest in ("help", "version"):
        return random.random() < 0.01
    if not action.option_strings or action.required or action.dest in ("ranks", "microbatches", "seconds"):
        return random.random() >= 0.1 * hostile
    return random.random() < 0.2


def _draw_argument(random: Random, action: argparse.Action, hostile: float, files: Files) -> list[str]:
    if action.nargs == 0:
        return [random.choice(action.option_strings)]
    count = random.randrange(3) if action.nargs in ("*", "?", "+") else 1
    values = [_draw_value(random, action, hostile, files) for _ in range(count)]
    if not action.option_strings:
        return values
    name = random.choice(action.option_strings)
    # As one word, so that what begins with a dash arrives, or as two.
    return [f"{name}={values[0]}"] if values and random.random() < 0.7 else [name, *values]


def _draw_value(random: Random, action: argparse.Action, hostile: float, files: Files) -> str:
    good = files.good.get(action.dest, ()) if not action.option_strings or action.dest == "record" else ()
    is_path = bool(good) or action.type is Path
    if random.random() >= hostile:
        if action.choices is not None:
            return str(random.choice(list(action.choices)))
        if good:
            return random.choice(good)
        return random.choice((f"out-{action.dest}", "out.json", "out.npz") if is_path else GOOD.get(action.dest, ("1", "2")))
    pools = {files.hostile: (1, 9), NUMBERS: (5, 1), EDGES: (9, 1), LISTS: (4, 1), TEXTS: (1, 2)}
    pool = random.choices(list(pools), [weights[is_path] for weights in pools.values()])[0]
    value = random.choice(pool)
    # A search takes the time that it is given.
    return "0" if action.dest == "seconds" and re.fullmatch("[0-9.]{1,4}", value) else value


def run_line(main: Callable[[list[str]], Any], argv: Sequence[str], folder: Path) -> Ended:
    """Run a command line in a child of this process, in a folder, with its own output."""
    paths = (folder / "stdout.txt", folder / "stderr.txt")
    child = os.fork()
    if child == 0:
        _run_child(main, list(argv), folder, paths)
    code, seconds = _wait(child)
    out, err = (path.read_text(encoding="utf-8", errors="replace") for path in paths)
    return Ended(code, out, err, seconds)


def _run_child(main: Callable[[list[str]], Any], argv: list[str], folder: Path, paths: tuple[Path, Path]) -> None:
    code = 1
    try:
        os.chdir(folder)
        for number, path in zip((1, 2), paths, strict=True):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        sys.stdout, sys.stderr = (
            open(number, "w", encoding="utf-8", errors=errors, closefd=False)  # noqa: SIM115
            for number, errors in ((1, "strict"), (2, "backslashreplace"))
        )
        resource.setrlimit(resource.RLIMIT_AS, (LIMIT_BYTES, LIMIT_BYTES))
        resource.setrlimit(resource.RLIMIT_CPU, (HANG_SECONDS, HANG_SECONDS))
        main(argv)
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1 if ended.code else 0
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code)


def _wait(child: int) -> tuple[int, float]:
    """Return a child's status and the seconds it computed; one that hangs is killed. A busy machine is not a slow command."""
    begun = time.monotonic()
    while True:
        ended, status, usage = os.wait4(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime
        if time.monotonic() - begun > SLEEP_SECONDS:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return -signal.SIGKILL, SLEEP_SECONDS
        time.sleep(0.002)


def find_fault(argv: Sequence[str], ended: Ended) -> str | None:
    """Return what is wrong with how a line ended; None where all is well."""
    if ended.code < 0:
        return f"killed after {ended.seconds:.0f} s"
    if "Traceback" in ended.err or "Traceback" in ended.out or ended.code not in (0, 2):
        return f"status {ended.code}: {ended.err.strip()[-600:]}"
    if ended.code == 0:
        return f"status 0 and {ended.err[:300]!r}" if ended.err else _find_bad_figures(argv, ended.out)
    if ended.err.count("\n") != 1 or not ended.err.startswith("counterflow: ") or len(ended.err) < 20 or ended.out:
        return f"status 2, not one line: {ended.err[:600]!r}, {ended.out[:100]!r}"
    return None


def _find_bad_figures(argv: Sequence[str], out: str) -> str | None:
    if not any("--json".startswith(word) and len(word) > 2 for word in argv) or "usage: " in out:
        return None
    import json

    def refuse(constant: str) -> Any:
        raise ValueError(constant)

    try:
        json.loads(out, parse_constant=refuse)
    except ValueError as error:
        return f"no JSON ({error}): {out[:200]!r}"
    return None


# ---- option sets

VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, 2, -1, 10**30, -(10**30), 0.0, 0.5, -0.5, 1e300, float("nan"), float("inf"), "", " ", "x", "1",
    "auto",
    "none.csv", "a\nb", "\0", "ü", b"x", [], [1], {}, {"a": 1}, (1, 2), {1}, object(), Path("/proc/x"), Path("\0"), 1j, int,
    "9" * 5000,
    "dualpipev", "global", "exact", "even", "cpu", "cuda", "never", ".", "/dev/full", "\udcff",
)  # fmt: skip


def draw_mapping(random: Random, names: Sequence[str]) -> dict[Any, Any]:
    """Draw a mapping of option names, a few of them wrong, to values that may be anything."""
    keys = random.sample(list(names), random.randrange(min(4, len(names)) + 1))
    if random.random() < 0.2:
        keys.append(random.choice(("", "eplib", "a\nb", 7, None, ("x",), "ü" * 300)))
    return {key: random.choice(VALUES) for key in keys}


def draw_flags(random: Random, parser: argparse.ArgumentParser, files: Files) -> list[str]:
    """Draw flags of the plugin among a script's own."""
    hostile = random.choice((0.0, 0.1, 0.3, 1.0))
    words = ["--lr", "1e-3"]
    for action in random.sample(parser._actions, random.randrange(min(6, len(parser._actions)))):
        if action.dest != "help":
            words += _draw_argument(random, action, hostile, files)
    return words
