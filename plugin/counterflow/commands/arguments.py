"""What all commands share: numbers on a command line, errors of one line, and an end without a traceback."""

import argparse
import contextlib
import gc
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from counterflow.bounds import take_number, take_whole
from counterflow.errors import CounterflowError, OptionError
from counterflow.report.files import check_output, write_output

# What a shell gives a command that Ctrl-C, or a reader that has gone, has ended.
INTERRUPTED, NO_READER = 130, 141
MAX_LINE = 1000
# What files a command may write, by the names of the options that give their paths.
FILES = {
    "html": "an interactive page, one self-contained file",
    "svg": "a picture for papers",
    "trace": "a trace for Perfetto (ui.perfetto.dev)",
    "csv": "the table, in the notation of torch.distributed.pipelining",
    "costs": "a costs file, for schedule --costs",
    "out": "the placement; .npz writes arrays",
}


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, and where to read on, instead of all its usage."""

    def error(self, message: str) -> NoReturn:
        """Raise `OptionError`."""
        message = re.sub(r"^argument (\S+): (?=.* given; allowed)", r"\1 ", message).removeprefix("argument ")
        raise OptionError(f"{message}; see {self.prog} --help")


def whole(least: int = 0, most: int | None = None) -> Callable[[str], int]:
    """Return a reader of whole numbers within bounds, for argparse."""
    return _make_reader(int, take_whole, least, most)


def number(least: float = 0.0, most: float | None = None) -> Callable[[str], float]:
    """Return a reader of finite numbers within bounds, for argparse."""
    return _make_reader(float, take_number, least, most)


def numbers(least: float = 0.0, most: float | None = None) -> Callable[[str], float | tuple[float, ...]]:
    """Return a reader of one finite number, or of several between commas."""
    read_one = number(least, most)

    def read(text: str) -> float | tuple[float, ...]:
        found = tuple(map(read_one, text.split(",")))
        return found if len(found) > 1 else found[0]

    return read


def _make_reader(parse: Callable[[str], Any], take: Callable[..., Any], least: Any, most: Any) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        try:
            number: Any = parse(text)
        except ValueError:
            number = text
        try:
            return take(number, "", least, most)
        except OptionError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return read


def add_outputs(parser: argparse.ArgumentParser, *names: str) -> Any:
    """Add the options of some of `FILES`, and ``--json``; return their group."""
    group = parser.add_argument_group("output")
    parser.set_defaults(outputs=names)
    for name in names:
        group.add_argument(f"--{name}", type=Path, metavar="FILE", help=f"write {FILES[name]}")
    group.add_argument("--json", action="store_true", help="print figures as JSON instead of tables and drawings")
    return group


def check_outputs(args: argparse.Namespace) -> None:
    """Before any work: raise `OptionError` where one of the files cannot be written."""
    for name in args.outputs:
        if getattr(args, name) is not None:
            check_output(f"--{name}", getattr(args, name))


def write_outputs(args: argparse.Namespace, forms: dict[str, Callable[[], str | bytes]]) -> None:
    """Write the files that were asked for, none before all are made."""
    made = {name: make() for name, make in forms.items() if getattr(args, name) is not None}
    for name, content in made.items():
        write_output(f"--{name}", getattr(args, name), content)


def print_table(headings: list[str], rows: list[list[str]], left: int = 1) -> None:
    """Print rows below headings; but for the first ``left`` columns, numbers stand at the right."""
    from rich.console import Console
    from rich.table import Table

    grid = Table(*headings[:left], box=None, pad_edge=False)
    for heading in headings[left:]:
        grid.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        grid.add_row(*row)
    Console().print(grid)


def run_command(run: Callable[[], int]) -> int:
    """Run a command and return its status; what ends it early is said in one line.

    2: bad input. 130: interrupted. 141: who read its output has gone.
    """
    _prepare_streams()
    # A command makes millions of small objects that live until it ends; to look for garbage takes as long as its own work.
    collecting = gc.isenabled()
    gc.disable()
    try:
        try:
            return run()
        finally:
            sys.stdout.flush()
    except CounterflowError as error:
        return _give_up(str(error), 2)
    except KeyboardInterrupt:
        return _give_up("interrupted", INTERRUPTED)
    except BrokenPipeError:
        return _give_up("", NO_READER)
    except OSError as error:
        return _give_up(f"the output cannot be written: {error.strerror or error}", 2)
    finally:
        if collecting:
            gc.enable()


def _prepare_streams() -> None:
    """Make output that cannot fail by its characters, nor where there is none."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115, PTH123
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace" if name == "stdout" else "backslashreplace")


def _give_up(reason: str, status: int) -> int:
    """Say the reason on one line of printable characters; what is still to be written goes nowhere."""
    with contextlib.suppress(OSError):
        if reason:
            line = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in reason)
            if len(line) > MAX_LINE:
                line = f"{line[: MAX_LINE // 2]} … {line[-MAX_LINE // 2 :]}"
            print(f"counterflow: {line}", file=sys.stderr, flush=True)
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return status
