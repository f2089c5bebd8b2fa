"""The plugin's options: one validated object, filled from flags, YAML or a mapping alike."""

import argparse
import difflib
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from counterflow.errors import CounterflowError, OptionError

AUTO = "auto"
SCHEDULES = ("gpipe", "1f1b", "interleaved", "zb-h1", "zbv", "dualpipev", "dualpipe", AUTO)
# Their tables have no I: nothing to split.
UNSPLIT_SCHEDULES = ("gpipe", "1f1b", "interleaved")
# How long the other ranks wait for rank 0 to say what is wrong; imports differ by seconds between ranks.
SPEAKING_SECONDS = 20
PLATFORMS = ("auto", "cpu", "cuda")


class Options(BaseModel):
    """What the user asked for; every field has a flag ``--cf-<name>`` and a key of the same name."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schedule: str | None = None
    """Pipeline schedule: a name of `SCHEDULES` or the path of a table in CSV; None leaves Megatron's."""
    overlap: bool = False
    """Whether overlapped pairs F&B hide expert communication behind compute, on Megatron's layer schedule plans."""
    platform: Literal["auto", "cpu", "cuda"] = "auto"
    """Where ranks run: ``auto`` takes the CPU where no GPU is found."""
    zero_bubble: bool | None = None
    """Whether an I leaves its weight gradients to the W; None: where the model can split. Off, an I runs as a whole B."""
    stall_limit: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Seconds to wait for another pipeline rank before giving up; None: as long as the trainer's process groups wait."""
    record: Path | None = None
    """Directory for the recorded timeline of every training step."""

    @field_validator("schedule")
    @classmethod
    def _check_schedule(cls, value: str | None) -> str | None:
        if value is None or value in SCHEDULES:
            return value
        if value.lower().endswith(".csv"):
            if not Path(value).is_file():
                raise ValueError(f"schedule file {value!r} does not exist")
            return value
        raise ValueError(f"schedule {value!r} is not known; allowed: {', '.join(SCHEDULES)} or a table FILE.csv")

    @property
    def schedule_file(self) -> Path | None:
        """The table's path where the schedule is a file."""
        return Path(self.schedule) if self.schedule is not None and self.schedule not in SCHEDULES else None


def add_flags(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the ``--cf-*`` flags to a parser, under one heading."""
    group = parser.add_argument_group("counterflow", "DualPipe schedules and the CPU platform (counterflow plugin)")
    group.add_argument(
        "--cf-schedule",
        metavar="NAME|FILE.csv",
        help=f"pipeline schedule: {', '.join(SCHEDULES)}, or a table in CSV; without it Megatron's own runs",
    )
    group.add_argument(
        "--cf-overlap",
        action="store_true",
        help="run the schedule's overlapped pairs F&B so that one side's expert all-to-all hides behind the other's compute",
    )
    group.add_argument(
        "--cf-platform",
        choices=PLATFORMS,
        default="auto",
        help="cpu: run Megatron on CPU ranks over gloo; auto: cpu where no GPU is found; cuda: never (default: auto)",
    )
    group.add_argument(
        "--cf-zero-bubble",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="split backward passes where the schedule has I and W; without it an I runs as a whole B "
        "(default: on where the model can split)",
    )
    group.add_argument(
        "--cf-stall-limit",
        type=float,
        metavar="SECONDS",
        help="how long to wait for another pipeline rank before every rank says where it stood and ends "
        "(default: --distributed-timeout-minutes)",
    )
    group.add_argument("--cf-record", metavar="DIR", help="write every training step's timeline to DIR")
    return parser


def read_flags(argv: Sequence[str]) -> Options:
    """Take the ``--cf-*`` flags out of a command line and validate them.

    Raises `OptionError` for a flag that does not exist (or not yet) and for a wrong value.
    """
    parser = _QuietParser(add_help=False, allow_abbrev=False)
    add_flags(parser)
    found, rest = parser.parse_known_args(argv)
    known = [option for action in parser._actions for option in action.option_strings]
    for token in rest:
        flag = token.split("=", 1)[0]
        if flag.startswith(("--cf-", "--no-cf-")):
            close = difflib.get_close_matches(flag, known, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise OptionError(f"{flag} is not a flag of this version of counterflow; allowed: {', '.join(known)}{hint}")
    return read_mapping({name.removeprefix("cf_"): value for name, value in vars(found).items()})


def read_mapping(given: Mapping[str, Any]) -> Options:
    """Validate a mapping of option names to values; raises `OptionError` with one line."""
    try:
        return Options.model_validate(dict(given))
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        if first["type"] == "extra_forbidden":
            allowed = ", ".join(Options.model_fields)
            raise OptionError(f"counterflow has no option {name!r}; allowed: {allowed}") from None
        message = first["msg"].removeprefix("Value error, ")
        raise OptionError(f"--cf-{name.replace('_', '-')}: {message} (given: {first['input']!r})") from None


def merge_options(base: Options, over: Options) -> Options:
    """Return ``base`` with what ``over`` sets away from its default."""
    return base.model_copy(update=over.model_dump(exclude_defaults=True))


class _QuietParser(argparse.ArgumentParser):
    """Raises instead of printing Megatron's two thousand lines of usage."""

    def error(self, message: str) -> Any:
        raise OptionError(f"{message.removeprefix('argument ')}")


def fail(error: CounterflowError, rank: int) -> None:
    """End this process with status 2 and one line; what all ranks find alike, rank 0 says for all."""
    found_by_all = isinstance(error, OptionError)
    if rank == 0 or not found_by_all:
        where = "" if found_by_all else f"rank {rank}: "
        print(f"counterflow: {where}{error}", file=sys.stderr, flush=True)
    else:
        # A launcher ends all ranks when the first one ends: that is to be rank 0, which has more to say.
        time.sleep(SPEAKING_SECONDS)
    raise SystemExit(2)
