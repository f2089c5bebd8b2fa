"""The plugin's options: one validated object, filled from flags, YAML or a mapping.

Each option is described once, by its field of `Options`. Its flag, help text, YAML key and row in docs/options.md are made
from that field. `read_flags` and `read_values` read one source and check each value by itself. `merge_options` merges the
sources, where later ones win, and checks the values together.
"""

import argparse
import difflib
import re
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from counterflow.bounds import show
from counterflow.errors import CounterflowError, OptionError, ScheduleError
from counterflow.schedule.costs import Costs
from counterflow.schedule.costs_file import read_costs
from counterflow.schedule.families import FAMILIES, Family, list_names
from counterflow.schedule.files import read_csv
from counterflow.schedule.table import ScheduleTable

AUTO = "auto"
SCHEDULES = (*FAMILIES, AUTO)
# How long the other ranks wait for rank 0 to print an error that every rank finds. Imports take seconds longer on some ranks.
SPEAKING_SECONDS = 20
# An upper limit for counts: no run has so many clones, or so many steps between plans.
MOST = 1_000_000
BALANCING = "eplb_"
NEVER = "never"
PREDICTED = "predicted"
# A step's trace takes megabytes, and the profiler holds all of them in memory.
MOST_PROFILED = 100

# What values of another type are told, by pydantic's name of the error.
EXPECTED = {
    "bool_type": "true or false",
    "int_type": "a whole number",
    "float_type": "a number",
    "finite_number": "a number that is finite",
    "string_type": "a text",
}

# The values of the options that one source sets, by name, each checked by itself.
Values = dict[str, Any]


def _describe(words: str, default: Any = None, metavar: str | None = None, **limits: Any) -> Any:
    return Field(default=default, description=words, json_schema_extra={"metavar": metavar}, **limits)


class _Fields(BaseModel):
    """The options, each with the values that it allows by itself."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    schedule: str | None = _describe(
        f"pipeline schedule: {', '.join(SCHEDULES)}, or a table in CSV; without it the trainer's own runs",
        metavar="NAME|FILE.csv",
    )
    overlap: bool = _describe(
        "run the schedule's overlapped pairs F&B so that one side's expert all-to-all hides behind the other's compute", False
    )
    costs: Path | None = _describe(
        "with --cf-schedule auto: search by the costs of this file, as counterflow analyze --costs writes it, in place of "
        "measuring the first steps",
        metavar="FILE",
    )
    platform: Literal["auto", "cpu", "cuda"] = _describe(
        "where ranks run; cpu: on the CPU over gloo; auto: there where no GPU is found; cuda: never", "auto"
    )
    zero_bubble: bool | None = _describe(
        "split backward passes where the schedule has I and W; without it an I runs as a whole B "
        "(default: on where the model can split)"
    )
    stall_limit: float | None = _describe(
        "how long to wait for another pipeline rank before every rank says where it stood and ends "
        "(default: the trainer's, Megatron's --distributed-timeout-minutes)",
        metavar="SECONDS",
        gt=0,
        allow_inf_nan=False,
    )
    record: Path | None = _describe(
        "write every training step's timeline, and with --cf-eplb its expert loads, to DIR", metavar="DIR"
    )
    profile: str | None = _describe(
        "write a torch-profiler trace of these steps with actions as annotations, for counterflow analyze; into --cf-record's "
        "folder, else runs/profile",
        metavar="STEP[:STEP]",
    )
    eplb: bool = _describe(
        "clone hot experts on other expert-parallel ranks and split their tokens; losses and checkpoints stay as they are", False
    )
    eplb_clones_per_rank: int = _describe(
        "clone slots on every rank and MoE layer: the memory of N experts' weights and gradients", 1, "N", ge=0, le=MOST
    )
    eplb_interval: int = _describe("steps between plans of what is cloned", 1, "STEPS", ge=1, le=MOST)
    eplb_policy: Literal["auto", "global"] = _describe(
        "what a plan weighs; auto: keep tokens on their node where that costs no balance worth it; global: balance alone", "auto"
    )
    eplb_plan: Literal["predicted", "exact", "auto"] = _describe(
        "which clones there are; predicted: resident ones, planned from past loads; exact: just-in-time ones, for each layer and "
        "micro-batch from its own counts, in slots that all layers share; auto: both, just-in-time ones where they save more "
        "time than they cost",
        PREDICTED,
    )
    eplb_buffers: Literal["per-layer", "shared"] = _describe(
        "where resident clones are; per-layer: in slots of each layer, sent once a step; shared: in the slots that all layers "
        "of a rank share, where just-in-time clones always are, sent again for each micro-batch, forward and backward",
        "per-layer",
    )
    eplb_backward: Literal["resend", "keep"] = _describe(
        "where the backward's weights of clones in shared slots come from; resend: from their homes again; keep: from memory "
        "that holds them from forward to backward, N experts' weights for each layer and micro-batch under way",
        "resend",
    )
    eplb_costs: Path | None = _describe(
        "with --cf-eplb-plan auto: times and link speeds by which just-in-time clones are weighed, a JSON object in bytes and "
        "seconds (default: those of a DeepSeek-V3 expert on H100 nodes)",
        metavar="FILE",
    )
    eplb_split: Literal["exact", "even"] = _describe(
        "how the tokens of an expert are split over its slots; exact: by each micro-batch's counts, such that the slowest rank "
        "is as fast as can be; even: in equal parts, without waiting for the counts",
        "exact",
    )
    eplb_rehome_interval: int | Literal["auto", "never"] = _describe(
        "when the homes themselves move, weights and optimizer state together; auto: where the load has settled elsewhere for "
        "long enough to pay for it; STEPS: every so many steps, where it pays until the next time",
        AUTO,
        "auto|never|STEPS",
    )
    eplb_measure_forced: int = _describe(
        "every so many steps run the step's forward passes twice more, as tokens are routed and with as many on every rank, and "
        "say how near the first comes to the second; 0: never",
        0,
        "STEPS",
        ge=0,
        le=MOST,
    )

    @field_validator("schedule")
    @classmethod
    def _check_schedule(cls, value: str | None) -> str | None:
        if value is None or value in SCHEDULES:
            return value
        if value.lower().endswith(".csv"):
            try:
                is_file = Path(value).is_file()
            except OSError as error:
                raise ValueError(f"schedule file {value[:80]!r}… cannot be read: {error.strerror}") from None
            if not is_file:
                raise ValueError(f"schedule file {value!r} does not exist")
            return value
        allowed = f"{', '.join(SCHEDULES)} or a table FILE.csv"
        raise ValueError(f"schedule {value!r} is not known; allowed: {allowed}{suggest(value, SCHEDULES)}")

    @field_validator("profile", mode="before")
    @classmethod
    def _check_profile(cls, value: Any) -> str | None:
        # YAML has one step as a number.
        text = str(value) if type(value) is int else value
        if text is not None and (not isinstance(text, str) or _read_steps(text) is None):
            raise ValueError(f"steps {show(value)}; allowed: STEP or FIRST:LAST, from 1 up, {MOST_PROFILED} steps at most")
        return text

    @field_validator("eplb_rehome_interval", mode="before")
    @classmethod
    def _check_rehome_interval(cls, value: Any) -> int | str:
        if value in (AUTO, NEVER):
            return str(value)
        text = str(value) if type(value) is int else value
        if not isinstance(text, str) or not re.fullmatch("[1-9][0-9]{0,6}", text) or int(text) > MOST:
            raise ValueError(f"allowed: {AUTO}, {NEVER}, or steps from 1 to {MOST:,}{suggest(value, (AUTO, NEVER))}")
        return int(text)

    @field_validator("costs", "record", "eplb_costs", mode="before")
    @classmethod
    def _read_path(cls, value: Any) -> Path | None:
        # An empty path would be the folder in which the run starts.
        if value is None or (isinstance(value, str | Path) and str(value)):
            return None if value is None else Path(value)
        raise ValueError("a path is expected")


def _escape(text: str) -> str:
    """Write bytes of a path that are no text as escapes, since messages are UTF-8."""
    return text.encode("utf-8", "backslashreplace").decode()


class Options(_Fields):
    """All options of a run, checked together; each field has a flag ``--cf-<name>`` and a key of the same name."""

    @model_validator(mode="after")
    def _check_eplb(self) -> Self:
        balancing = [name for name in self.model_fields_set if name.startswith(BALANCING)]
        # With an explicit --no-cf-eplb, the options of balancing may stay, in a YAML file for example.
        if balancing and "eplb" not in self.model_fields_set:
            name = min(balancing, key=list(_Fields.model_fields).index)
            raise ValueError(f"{name_flag(name)} is for --cf-eplb, which is not given: add it")
        if self.eplb and not self.eplb_clones_per_rank and not self.moves_homes:
            raise ValueError(
                "--cf-eplb-clones-per-rank 0 leaves nothing to balance with under --cf-eplb-rehome-interval never: give 1 clone "
                "or more, or let homes move"
            )
        return self

    @model_validator(mode="after")
    def _check_plan(self) -> Self:
        if not self.eplb:
            return self
        given = f"--cf-eplb-plan {self.eplb_plan}" if self.eplb_plan != PREDICTED else f"--cf-eplb-buffers {self.eplb_buffers}"
        if self.shared_clones and self.eplb_split == "even":
            raise ValueError(f"{given} needs the counts that --cf-eplb-split even does without: give --cf-eplb-split exact")
        if not self.eplb_clones_per_rank and (self.eplb_plan, self.eplb_buffers) != (PREDICTED, "per-layer"):
            raise ValueError(f"{given} has no slots with --cf-eplb-clones-per-rank 0: give 1 or more")
        if self.eplb_plan == "exact" and self.eplb_buffers == "per-layer" and "eplb_buffers" in self.model_fields_set:
            raise ValueError(
                "--cf-eplb-plan exact has just-in-time clones alone, which are in shared slots, and --cf-eplb-buffers per-layer "
                "is given: drop it"
            )
        if self.eplb_backward != "resend" and not self.shared_clones:
            raise ValueError(
                f"--cf-eplb-backward {self.eplb_backward} is for clones in shared slots, and --cf-eplb-plan {self.eplb_plan} "
                f"with --cf-eplb-buffers {self.eplb_buffers} has none: drop it, or give --cf-eplb-plan exact or auto"
            )
        if self.eplb_costs is not None and self.eplb_plan != AUTO:
            raise ValueError(
                f"--cf-eplb-costs {_escape(str(self.eplb_costs))} is for --cf-eplb-plan auto and {self.eplb_plan} is in force: "
                "give that, or drop --cf-eplb-costs"
            )
        return self

    @property
    def predicted_clones(self) -> int:
        """Clones on a rank and layer that are planned from past loads."""
        return 0 if self.eplb_plan == "exact" else self.eplb_clones_per_rank

    @property
    def layer_clones(self) -> int:
        """Clone slots on a rank that each layer has for itself."""
        return self.predicted_clones if self.eplb_buffers == "per-layer" else 0

    @property
    def shared_clones(self) -> int:
        """Clone slots on a rank that its layers share: for just-in-time clones, and for resident ones by choice."""
        lent = 0 if self.eplb_plan == PREDICTED else self.eplb_clones_per_rank
        return lent + self.predicted_clones - self.layer_clones

    @model_validator(mode="after")
    def _check_without_schedule(self) -> Self:
        if self.schedule is not None:
            return self
        if self.overlap:
            raise ValueError(
                "--cf-overlap overlaps the pairs of a --cf-schedule and none is given: add --cf-schedule "
                f"{' or '.join(list_names(pairs=True))}"
            )
        for name in ("record", "profile", "zero_bubble", "stall_limit"):
            if (value := getattr(self, name)) is not None and not (name == "record" and self.eplb):
                other = " or the loads of --cf-eplb" if name == "record" else ""
                also = ", or --cf-eplb" if name == "record" else ""
                raise ValueError(
                    f"{name_flag(name)} ({value} given) is for the steps of a --cf-schedule{other} and none is given: "
                    f"add --cf-schedule {', '.join(SCHEDULES[:-1])} or {SCHEDULES[-1]}{also}"
                )
        return self

    @model_validator(mode="after")
    def _check_costs(self) -> Self:
        if self.costs is not None and self.schedule != AUTO:
            given, schedule = _escape(str(self.costs)), self.schedule or "none"
            raise ValueError(
                f"--cf-costs {given} is for the search of --cf-schedule {AUTO} and {schedule} is given: "
                f"give --cf-schedule {AUTO}, or drop --cf-costs"
            )
        if self.costs is not None:
            try:
                _ = self.file_costs
            except ScheduleError as error:
                raise ValueError(f"--cf-costs: {_escape(str(error))}") from None
        return self

    @property
    def moves_homes(self) -> bool:
        """Whether homes may move."""
        return self.eplb and self.eplb_rehome_interval != NEVER

    @property
    def needs_moves(self) -> bool:
        """Whether homes have to be able to move: that was asked for, or there is nothing else to balance with."""
        return self.moves_homes and ("eplb_rehome_interval" in self.model_fields_set or not self.eplb_clones_per_rank)

    def keep_homes(self) -> "Options":
        """Return these options for a run in which homes cannot move."""
        return self.model_copy(update={"eplb_rehome_interval": NEVER})

    @property
    def profile_steps(self) -> tuple[int, int] | None:
        """The first and the last step to profile."""
        return _read_steps(self.profile) if self.profile is not None else None

    @property
    def profile_folder(self) -> Path:
        """Where profiles go: beside the record where there is one."""
        return self.record or Path("runs/profile")

    @property
    def family(self) -> Family | None:
        """The family that the schedule names; None for a file, for ``auto`` and without a schedule."""
        return FAMILIES.get(self.schedule or "")

    @property
    def schedule_file(self) -> Path | None:
        """The path of the table if the schedule is a file, else None."""
        return Path(self.schedule) if self.schedule is not None and self.schedule not in SCHEDULES else None

    @cached_property
    def file_table(self) -> ScheduleTable:
        """The table in `schedule_file`, read once for these options.

        The model's layout, the table of every step and a checkpoint's stamp have to agree, even if the file changes during the
        run.
        """
        assert self.schedule_file is not None
        return read_csv(self.schedule_file)

    @cached_property
    def file_costs(self) -> Costs | None:
        """The costs in the file of ``costs``, read once for these options; None without one. Raises `ScheduleError`."""
        return read_costs(self.costs).costs if self.costs is not None else None


def _read_steps(text: str) -> tuple[int, int] | None:
    """Return the first and last step of STEP[:STEP]; None for what is no such thing."""
    match = re.fullmatch(r"([1-9][0-9]{0,14})(?::([1-9][0-9]{0,14}))?", text)
    if match is None:
        return None
    first, last = int(match[1]), int(match[2] or match[1])
    return (first, last) if first <= last < first + MOST_PROFILED else None


def name_flag(name: str) -> str:
    """Return the flag of an option."""
    return f"--cf-{name.replace('_', '-')}"


def add_flags(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add a flag for each option to a parser, under one heading; a flag that the user leaves out sets nothing."""
    group = parser.add_argument_group(
        "counterflow", "DualPipe schedules, expert balancing and the CPU platform (counterflow plugin)"
    )
    for name, field in Options.model_fields.items():
        words = f"{field.description}{write_default(field)}".replace("%", "%%")
        how: dict[str, Any] = {"action": argparse.BooleanOptionalAction}
        if not _is_switch(field):
            how = {"choices": _list_choices(field), "metavar": _find_metavar(field)}
        group.add_argument(name_flag(name), default=argparse.SUPPRESS, help=words, **how)
    return parser


def _is_switch(field: Any) -> bool:
    return bool in (field.annotation, *get_args(field.annotation))


def _list_choices(field: Any) -> tuple[str, ...] | None:
    return get_args(field.annotation) if get_origin(field.annotation) is Literal else None


def _find_metavar(field: Any) -> str | None:
    metavar: str | None = field.json_schema_extra["metavar"]
    return metavar


def write_default(field: Any) -> str:
    """Return an option's default in words, for the end of its description; nothing where that is plain."""
    # A switch that is off by default needs no mention. If the default is None, the description says what happens.
    return f" (default: {field.default})" if field.default is not None and field.default is not False else ""


def describe_options() -> str:
    """Return a table of all options in Markdown: flag, key, what is allowed, what it does."""
    lines = ["| flag | key in YAML and `enable()` | allowed | what it does |", "| --- | --- | --- | --- |"]
    for name, field in Options.model_fields.items():
        flag = name_flag(name)
        shown = f"`{flag}`, `{flag.replace('--', '--no-', 1)}`" if _is_switch(field) else f"`{flag}`"
        cells = (shown, f"`{name}`", write_allowed(field), f"{field.description}{write_default(field)}")
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def write_allowed(field: Any) -> str:
    """Return the values that an option allows, in Markdown."""
    if _is_switch(field):
        return "true, false"
    if choices := _list_choices(field):
        return ", ".join(choices)
    limits = {type(limit).__name__: limit for limit in field.metadata}
    if "Gt" in limits:
        return f"a number above {limits['Gt'].gt}"
    if "Ge" in limits:
        return f"{limits['Ge'].ge} to {limits['Le'].le:,}"
    return f"`{_find_metavar(field)}`"


def read_flags(argv: Sequence[str]) -> Values:
    """Return the options that the ``--cf-*`` flags of a command line set, each value checked by itself.

    Raises `OptionError` for an unknown ``--cf-*`` flag and for a value that is not allowed.
    """
    parser = _QuietParser(add_help=False, allow_abbrev=False)
    add_flags(parser)
    for action in parser._actions:
        # Values are checked as those of any source.
        action.choices = None
    found, rest = parser.parse_known_args(argv)
    known = [option for action in parser._actions for option in action.option_strings]
    for token in rest:
        flag = token.split("=", 1)[0]
        if flag.startswith(("--cf-", "--no-cf-")):
            allowed = f"{', '.join(known)}{suggest(flag, known)}"
            raise OptionError(f"{flag} is not a flag of this version of counterflow; allowed: {allowed}")
    given = {name.removeprefix("cf_"): value for name, value in vars(found).items()}
    return _validate(_Fields, given, are_texts=True).model_dump(exclude_unset=True)


def read_values(options: Options | Mapping[str, Any]) -> Values:
    """Return the values that a mapping, or an `Options`, sets, each checked by itself. Raises `OptionError` with one line."""
    if isinstance(options, Options):
        return options.model_dump(exclude_unset=True)
    if not isinstance(options, Mapping):
        raise OptionError(f"options are a mapping of names to values, {type(options).__name__} given; names: {_list_names()}")
    return _validate(_Fields, options).model_dump(exclude_unset=True)


def require_in_force(asked: Values, in_force: Values) -> None:
    """Raise `OptionError` if an option in ``asked`` is not among those in force, or has another value there."""
    for name, value in asked.items():
        if name not in in_force or in_force[name] != value:
            now = f"with {in_force[name]}" if name in in_force else "without it"
            raise OptionError(
                f"{name_flag(name)} {value} is asked for and counterflow is on already {now} (by the launcher, an earlier "
                "enable() or an earlier run of this process): give all options in one place, or take the first back with "
                ".undo() on what its enable() returned"
            )


def merge_options(*sources: Values) -> Options:
    """Merge sources into options: a later source wins, whatever its value.

    Raises `OptionError` if the merged values do not fit together.
    """
    merged: Values = {}
    for source in sources:
        merged |= source
    return _validate(Options, merged)


def read_mapping(mapping: Mapping[str, Any]) -> Options:
    """Return the options of one mapping from names to values. Raises `OptionError` with one line."""
    return merge_options(read_values(mapping))


def _list_names() -> str:
    return ", ".join(Options.model_fields)


def _validate[Model: BaseModel](model: type[Model], values: Mapping[str, Any], *, are_texts: bool = False) -> Model:
    """Check values; of flags all ``are_texts``, and numbers are read from them."""
    for name in values:
        if name not in model.model_fields:
            hint = suggest(str(name), model.model_fields)
            raise OptionError(f"counterflow has no option {name!r}; allowed: {_list_names()}{hint}")
    try:
        return model.model_validate(dict(values), strict=not are_texts)
    except ValidationError as error:
        first = error.errors()[0]
    message = first["msg"].removeprefix("Value error, ")
    if not first["loc"]:
        raise OptionError(message)
    name, given = str(first["loc"][0]), first["input"]
    if first["type"] in EXPECTED:
        message = f"{EXPECTED[first['type']]} is expected"
    elif first["type"] == "literal_error":
        choices = _list_choices(model.model_fields[name]) or ()
        message = f"allowed: {', '.join(choices)}{suggest(given, choices)}"
    raise OptionError(f"{name_flag(name)}: {message} (given: {_shorten(given)})")


def suggest(given: Any, known: Iterable[str]) -> str:
    """Return the known name that begins with what is given, or is nearest to it, as the end of a message; nothing if none is."""
    text, names = str(given), list(known)
    close = [name for name in names if text and name.startswith(text)][:1] or difflib.get_close_matches(text, names, n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}…"


class _QuietParser(argparse.ArgumentParser):
    """Raises `OptionError`; argparse itself would print Megatron's two thousand lines of usage."""

    def error(self, message: str) -> Any:
        raise OptionError(f"{message.removeprefix('argument ')}")


def fail(error: CounterflowError, rank: int) -> None:
    """Print the error in one line and end this process with status 2.

    Every rank finds the same `OptionError`, so rank 0 alone prints it; any other error is printed with its rank.
    """
    found_by_all = isinstance(error, OptionError)
    if rank != 0 and found_by_all:
        # The launcher ends all ranks when the first one ends, and that has to be rank 0, which prints. A rank that still runs
        # after this wait was the only one with the error (a folder that its machine cannot write to, for example).
        time.sleep(SPEAKING_SECONDS)
    where = "" if rank == 0 and found_by_all else f"rank {rank}: "
    print(f"counterflow: {where}{error}", file=sys.stderr, flush=True)
    raise SystemExit(2)
