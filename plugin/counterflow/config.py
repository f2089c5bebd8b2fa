"""The plugin's options: one validated object, filled from flags, YAML or a mapping alike."""

import argparse
import difflib
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from counterflow.errors import CounterflowError, OptionError

AUTO = "auto"
SCHEDULES = ("gpipe", "1f1b", "interleaved", "zb-h1", "zbv", "dualpipev", "dualpipe", AUTO)
# Their tables have no I: nothing to split.
UNSPLIT_SCHEDULES = ("gpipe", "1f1b", "interleaved")
# How long the other ranks wait for rank 0 to say what is wrong; imports differ by seconds between ranks.
SPEAKING_SECONDS = 20
PLATFORMS = ("auto", "cpu", "cuda")
EPLB_OPTIONS = ("eplb_clones_per_rank", "eplb_interval", "eplb_policy", "eplb_split", "eplb_rehome_interval")


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
    """Directory for the recorded timeline of every training step, and for the loads of its experts."""
    eplb: bool = False
    """Whether hot experts are cloned, and their tokens split, while the model trains."""
    eplb_clones_per_rank: int = Field(default=1, ge=0)
    """Clone slots on every expert-parallel rank, in every MoE layer."""
    eplb_interval: int = Field(default=1, ge=1)
    """Training steps between plans of what the clone slots hold."""
    eplb_policy: Literal["auto", "global"] = "auto"
    """What a plan weighs: ``auto``, off-node tokens too; ``global``, balance alone."""
    eplb_split: Literal["exact", "even"] = "exact"
    """How the tokens of an expert are split over its slots: by each micro-batch's counts, or in equal parts."""
    eplb_rehome_interval: int | None = Field(default=None, ge=1)
    """Training steps between swaps of the homes themselves; None: homes stay where Megatron puts them."""

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

    @model_validator(mode="after")
    def _check_eplb(self) -> Self:
        given = [name for name in EPLB_OPTIONS if getattr(self, name) != type(self).model_fields[name].default]
        if given and not self.eplb:
            raise ValueError(f"--cf-{given[0].replace('_', '-')} is for --cf-eplb, which is not given: add it")
        if self.eplb and not self.eplb_clones_per_rank and self.eplb_rehome_interval is None:
            raise ValueError(
                "--cf-eplb-clones-per-rank 0 leaves nothing to balance with: give 1 or more, or --cf-eplb-rehome-interval"
            )
        return self

    @property
    def schedule_file(self) -> Path | None:
        """The table's path where the schedule is a file."""
        return Path(self.schedule) if self.schedule is not None and self.schedule not in SCHEDULES else None


def add_flags(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the ``--cf-*`` flags to a parser, under one heading."""
    group = parser.add_argument_group(
        "counterflow", "DualPipe schedules, expert balancing and the CPU platform (counterflow plugin)"
    )
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
    group.add_argument(
        "--cf-record", metavar="DIR", help="write every training step's timeline, and with --cf-eplb its expert loads, to DIR"
    )
    _add_eplb_flags(group)
    return parser


def _add_eplb_flags(group: Any) -> None:
    group.add_argument(
        "--cf-eplb",
        action="store_true",
        help="clone hot experts on other expert-parallel ranks and split their tokens; losses and checkpoints stay as they are",
    )
    group.add_argument(
        "--cf-eplb-clones-per-rank",
        type=int,
        default=1,
        metavar="N",
        help="clone slots on every rank and MoE layer: the memory of N experts' weights and gradients (default: 1)",
    )
    group.add_argument(
        "--cf-eplb-interval", type=int, default=1, metavar="STEPS", help="steps between plans of what is cloned (default: 1)"
    )
    group.add_argument(
        "--cf-eplb-policy",
        choices=("auto", "global"),
        default="auto",
        help="auto: keep tokens on their node where that costs no balance worth it; global: balance alone (default: auto)",
    )
    group.add_argument(
        "--cf-eplb-split",
        choices=("exact", "even"),
        default="exact",
        help="exact: by each micro-batch's counts, such that the slowest rank is as fast as can be; even: in equal parts, "
        "without waiting for the counts (default: exact)",
    )
    group.add_argument(
        "--cf-eplb-rehome-interval",
        type=int,
        metavar="STEPS",
        help="steps between swaps of the homes themselves, weights and optimizer state together (default: never)",
    )


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
        if not name:
            raise OptionError(message) from None
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
