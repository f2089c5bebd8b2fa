"""Options as a nested section of a JSON: by their names, checked like those of any source.

Two things differ from the flags. The options of balancing stand in an object, without their prefix: ``"eplb": {"interval": 2}``.
And ``vpp`` gives the model chunks per rank of the family ``interleaved``, which Megatron has a flag of its own for.
"""

import difflib
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

from counterflow.bounds import take_whole
from counterflow.errors import CounterflowError, OptionError
from counterflow.options import (
    BALANCING,
    Options,
    Values,
    merge_options,
    read_values,
    suggest,
    write_allowed,
    write_default,
)
from counterflow.schedule.layouts import LOOPED

KEY = "counterflow"
BALANCE, CHUNKS = "eplb", "vpp"
MOST_CHUNKS = 1000
# Where ranks run is the trainer's own choice; the other is measured under Megatron alone.
LEFT_OUT = {"platform", "eplb_measure_forced"}
INNER = tuple(
    name.removeprefix(BALANCING) for name in Options.model_fields if name.startswith(BALANCING) and name not in LEFT_OUT
)
NAMES = (
    *(name for name in Options.model_fields if not name.startswith(BALANCING) and name not in LEFT_OUT),
    CHUNKS,
)


class Chosen(NamedTuple):
    """What a run asks for: the options, and the model chunks per rank if they are given."""

    options: Options
    vpp: int | None = None


def find_section(config: Mapping[str, Any], what: str) -> Mapping[str, Any] | None:
    """Return the section of a trainer's config; None if there is none. Raises `OptionError` for a key that looks like its own."""
    if KEY not in config:
        # Trainers ignore keys that they do not know.
        if near := difflib.get_close_matches(KEY, [str(key) for key in config], n=1, cutoff=0.8):
            raise OptionError(f"{what}: key {near[0]!r} is not known; did you mean {KEY!r}?")
        return None
    section = config[KEY]
    if not isinstance(section, Mapping):
        raise OptionError(f'"{KEY}" is an object of options, {type(section).__name__} given; names: {", ".join(NAMES)}')
    return section


def read_section(section: Mapping[str, Any] | None, *others: Values) -> Chosen:
    """Return what a section asks for; options of ``others`` (`enable()`, flags) are added to it and win.

    Raises `OptionError` in the words of the JSON.
    """
    try:
        values, vpp = flatten(section or {})
        options = merge_options(read_values(values), *others)
        if vpp is not None:
            take_whole(vpp, CHUNKS, 2, MOST_CHUNKS, error=OptionError)
            if options.family is None or options.family.layout != LOOPED:
                other = f"schedule {options.schedule} has its own number of chunks" if options.schedule else "no schedule"
                raise OptionError(f"{CHUNKS} {vpp} given, and {other}: drop {CHUNKS}, or choose interleaved")
        return Chosen(options, vpp)
    except CounterflowError as error:
        raise speak_json(error) from None


def flatten(section: Mapping[str, Any]) -> tuple[Values, int | None]:
    """Return a section's options by their flat names, and ``vpp``."""
    _require_known(section, NAMES, KEY)
    values = {name: value for name, value in section.items() if name not in (BALANCE, CHUNKS)}
    balance = section.get(BALANCE)
    if isinstance(balance, Mapping):
        _require_known(balance, INNER, f"{KEY}.{BALANCE}")
        values |= {BALANCE: True} | {f"{BALANCING}{name}": value for name, value in balance.items()}
    elif isinstance(balance, bool):
        values[BALANCE] = balance
    elif BALANCE in section:
        raise OptionError(f'"{BALANCE}" is true, false or an object of {", ".join(INNER)}; {balance!r} given')
    return values, section.get(CHUNKS)


def _require_known(section: Mapping[str, Any], names: tuple[str, ...], where: str) -> None:
    for given in section:
        if given in names:
            continue
        # As one would write a flag.
        name = re.sub(r"^(--)?(cf-)?", "", str(given)).replace("-", "_")
        inner = name.removeprefix(BALANCING)
        if names is NAMES and inner != name and inner in INNER:
            hint = f'; it stands in "{BALANCE}": {{"{inner}": …}}'
        else:
            hint = suggest(name, names)
        raise OptionError(f"{where} has no key {given!r}; allowed: {', '.join(names)}{hint}")


def describe_keys() -> str:
    """Return a table of the section's keys in Markdown: key, what is allowed, what it does."""
    lines = ["| key | allowed | what it does |", "| --- | --- | --- |"]
    for name in (*NAMES, *(f"{BALANCE}.{name}" for name in INNER)):
        if name == CHUNKS:
            lines.append(f"| `{CHUNKS}` | 2 to {MOST_CHUNKS:,} | model chunks per rank of `interleaved` (default: 2) |")
            continue
        field = Options.model_fields[name.replace(f"{BALANCE}.", BALANCING)]
        allowed = f"true, false, an object of `{BALANCE}.…`" if name == BALANCE else write_allowed(field)
        words = str(speak_json(OptionError(f"{field.description}{write_default(field)}")))
        lines.append(f"| `{name}` | " + " | ".join(cell.replace("|", "\\|") for cell in (allowed, words)) + " |")
    return "\n".join(lines) + "\n"


def speak_json[E: CounterflowError](error: E) -> E:
    """Return the error with flags in its message (``--cf-eplb-interval``) named as in the JSON (``eplb.interval``).

    What stands in quotes was given so, and stays.
    """

    def name(match: re.Match[str]) -> str:
        option = match[2].replace("-", "_")
        inner = option.removeprefix(BALANCING)
        spoken = f"{BALANCE}.{inner}" if option != inner else option
        return f"{spoken} false" if match[1] else spoken

    error.args = (re.sub(r"(?<!')--(no-)?cf-([a-z]+(?:-[a-z]+)*)", name, str(error)), *error.args[1:])
    return error


@contextmanager
def speaking_json() -> Iterator[None]:
    """Let errors that leave the block, or a function that this decorates, speak of the JSON's names (`speak_json`)."""
    try:
        yield
    except CounterflowError as error:
        raise speak_json(error) from error.__cause__
