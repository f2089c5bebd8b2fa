"""Figures of profiler traces as lines for a terminal."""

from collections.abc import Iterable, Sequence

from counterflow.analysis.chunks import PARTS, measure_overlap, sum_parts
from counterflow.analysis.classes import COMMUNICATION
from counterflow.analysis.cluster import Rank
from counterflow.analysis.comparison import Change, Comparison
from counterflow.analysis.gains import Gain
from counterflow.analysis.layers import Layer
from counterflow.analysis.names import split_name
from counterflow.analysis.overlap import Device, Phase
from counterflow.analysis.repetition import find_repetitions
from counterflow.analysis.summary import summarize, write_ms, write_percent

MOST_PHASES, MOST_KINDS, MOST_NAMES, MOST_CHANGES = 6, 24, 3, 8
MOST_CHARACTERS = 60
MOST_LAYERS = 32
LAYER_COLUMNS = (
    "layer", "F ms", "B ms", "W ms", "F communication ms", "F exposed ms", "B communication ms", "B exposed ms",
)  # fmt: skip
RANK_COLUMNS = (
    "rank", "window ms", "busy", "computation ms", "communication ms", "waiting ms", "exposed ms", "bubble", "experts ms",
)  # fmt: skip
# Of the window, from which on kernels that run past the next one's start are worth a word.
MANY_CLASHES = 0.01


def write_device(device: Device, costs_hint: str = "") -> list[str]:
    """Return a device's summary: the line of all figures, exposed phases, costs, kinds and what is worth a word."""
    costs = [line + costs_hint for line in write_costs(device)]
    layers, kinds = list_layers(device), list_kinds(device)
    return [
        f"{name_device(device)}  {summarize(device)}",
        *_write_phases(device.phases),
        *costs,
        *write_repetitions(device),
        *(align(layers[: MOST_LAYERS + 1]) if device.layers else ()),
        *([f"  … {len(layers) - 1 - MOST_LAYERS} more layers"] if len(layers) - 1 > MOST_LAYERS else ()),
        *align(kinds),
        *list_notes(device),
    ]


def _write_phases(phases: Sequence[Phase]) -> list[str]:
    exposed = [phase for phase in phases if phase.exposed]
    if not exposed:
        return []
    lines = ["exposed  " + "   ".join(f"{show_name(phase.name)} {write_ms(phase.exposed)} ms" for phase in exposed[:MOST_PHASES])]
    if len(exposed) > MOST_PHASES:
        lines[0] += f"   … {len(exposed) - MOST_PHASES} more"
    causes = {show_name(phase.name): list_causes(phase) for phase in exposed[:MOST_PHASES]}
    return [*lines, *(f"  {name}: {words}" for name, words in causes.items() if words)]


def list_causes(phase: Phase) -> str:
    """Return the kernels that a phase's exposed time waited for, the longest first."""
    causes = sorted(_sum_heads(phase).items(), key=lambda item: -item[1])[:MOST_NAMES]
    return ", ".join(f"{show_name(name)} {write_ms(time)} ms" for name, time in causes)


def _sum_heads(phase: Phase) -> dict[str, int]:
    """Return what was waited for by the kernels' functions: one function has many names, with other template arguments."""
    sums: dict[str, int] = {}
    for name, time in phase.causes.items():
        head = split_name(name).head or name
        sums[head] = sums.get(head, 0) + time
    return sums


def write_costs(device: Device) -> list[str]:
    """Return the line of a chunk's costs, none where no phases name its parts."""
    parts = sum_parts(device)
    # Of a timeline these are sums over all micro-batches.
    if not parts or device.trace.timeline is not None:
        return []
    words = []
    for part, times in parts.items():
        words.append(
            f"{part} {write_ms(times.compute)}" + (f" + {write_ms(times.communication)}" if times.communication else "") + " ms"
        )
    overlap, perfect = measure_overlap(device)
    return ["costs    " + "   ".join([*words, f"pair overlap {overlap:.2f} (perfect {perfect:.2f})"])]


def write_repetitions(device: Device) -> list[str]:
    """Return what repeats in a trace without annotations, a line each."""
    lines = []
    for unit in find_repetitions(device):
        exposed = f", {write_ms(unit.exposed)} ms exposed communication" if unit.exposed else ""
        lines.append(
            f"repeats  {unit.name}: {unit.kernels:,} kernels, {unit.repeats:,} times in a row, {len(unit.starts):,} such rows; "
            f"each {write_ms(unit.length)} ms, {write_ms(unit.compute)} ms computation{exposed}"
        )
    return lines


def list_layers(device: Device) -> list[list[str]]:
    """Return the annotated layers as a table, its headings first: computation, communication and what of it is exposed."""
    parts: dict[str, dict[str, Layer]] = {}
    for layer in device.layers:
        parts.setdefault(layer.name, {})[layer.part] = layer
    rows = [list(LAYER_COLUMNS)]
    for name, found in parts.items():
        times = [write_ms(found[part].compute) if part in found else "" for part in "FBW"]
        for part in "FB":
            one = found.get(part)
            times += [write_ms(one.communication), write_ms(one.exposed)] if one is not None else ["", ""]
        rows.append([show_name(name), *times])
    return rows


def list_kinds(device: Device) -> list[list[str]]:
    """Return the kinds of kernels as a table, its headings first."""
    rows = [["kind", "kernels", "ms", "exposed ms"]]
    for kind, share in list(device.kinds.items())[:MOST_KINDS]:
        rows.append([kind, f"{share.kernels:,}", write_ms(share.time), write_ms(share.exposed) if kind in COMMUNICATION else ""])
    if device.copies[0]:
        rows.append(["copies and fills", f"{device.copies[0]:,}", write_ms(device.copies[1]), ""])
    return rows


def list_notes(device: Device) -> list[str]:
    """Return what is worth a word: kernels that no family knows, broken durations, what was left out."""
    notes = []
    if device.unclassified:
        names = ", ".join(f"{show_name(name)} {write_ms(time)} ms" for name, _, time in device.unclassified[:MOST_NAMES])
        more = len(device.unclassified) - MOST_NAMES
        notes.append(f"not classified: {names}" + (f", {more} more" if more > 0 else "") + "; --classes FILE adds families")
    count, time = device.clashes
    if device.trace.timeline is None and time > MANY_CLASHES * device.window:
        notes.append(
            f"{count:,} kernels run past the start of the next of their stream, {write_ms(time)} ms in all: broken durations "
            "(seen on ROCm), or programmatic dependent launches"
        )
    if device.left_out:
        notes.append("left out: " + ", ".join(f"{count:,} with {reason}" for reason, count in device.left_out.items()))
    return notes


def write_gains(gains: Iterable[Gain]) -> list[str]:
    """Return the what-if list, a line each; gains overlap."""
    lines = []
    for gain in gains:
        flags = f"   → {gain.hint}" if gain.hint else ""
        lines.append(
            f"  {write_ms(gain.time)} ms ({write_percent(gain.time, gain.window)}) {gain.change}: {gain.assumption}{flags}"
        )
    return ["what if (each alone; gains overlap)", *lines] if lines else []


def write_ranks(ranks: Sequence[Rank]) -> list[str]:
    """Return ranks side by side, with the slowest in each respect."""
    slowest = max(ranks, key=lambda rank: rank.device.compute.length)
    mean = sum(rank.device.compute.length for rank in ranks) / len(ranks)
    lines = align(list_ranks(ranks))
    if mean:
        ratio = slowest.device.compute.length / mean
        lines.append(f"most computation: {name_rank(slowest.device)}, {ratio:.3f} of the mean")
    experts = [rank.experts for rank in ranks]
    if sum(experts):
        lines.append(f"grouped products: slowest rank {max(experts) * len(experts) / sum(experts):.3f} of the mean")
    return lines


def list_ranks(ranks: Sequence[Rank]) -> list[Sequence[str]]:
    """Return ranks side by side as a table, its headings first."""
    rows: list[Sequence[str]] = [RANK_COLUMNS]
    for rank in ranks:
        device = rank.device
        waiting = "unknown" if rank.waiting is None else write_ms(rank.waiting)
        times = (device.compute.length, device.communication.length)
        rows.append([
            name_rank(device), write_ms(device.window), write_percent(device.busy, device.window), *map(write_ms, times),
            waiting, write_ms(device.exposed), f"{100 * rank.bubble:.1f} %", write_ms(rank.experts),
        ])  # fmt: skip
    return rows


def name_rank(device: Device) -> str:
    """Return what a device is called among others."""
    label = show_name(f"GPU {device.label}")
    if device.trace.timeline is not None:
        return str(device.trace.rank)
    return label if device.trace.rank is None else f"{device.trace.rank} {label}"


def name_device(device: Device) -> str:
    """Return what a device is called in a heading."""
    return name_rank(device) if device.trace.rank is None else f"rank {name_rank(device)}"


def write_comparison(comparison: Comparison) -> list[str]:
    """Return what changed between two windows, the largest changes first."""
    tables = tabulate(comparison)
    return [tables[0][0], *(line for _, rows in tables for line in align(rows))]


def tabulate(comparison: Comparison) -> list[tuple[str, list[list[str]]]]:
    """Return what changed between two windows as tables by kind, by phase and by part of a chunk, the first with a summary."""
    step = comparison.step
    summary = (
        f"{name_rank(comparison.after)}: step {write_ms(step.after)} ms, against {write_ms(step.before)} ms: {_signed(step)} ms; "
        f"the kinds below explain {100 * comparison.explained:.1f} % of it"
    )
    tables = [("kind", comparison.kinds), ("phase", comparison.phases)]
    if any(change.name in PARTS.values() for change in comparison.parts):
        tables.append(("part of a chunk", comparison.parts))
    made: list[tuple[str, list[list[str]]]] = []
    for title, changes in tables:
        rows = [[title, "before ms", "after ms", "difference ms"]]
        rows += [[show_name(c.name), write_ms(c.before), write_ms(c.after), _signed(c)] for c in changes[:MOST_CHANGES]]
        made.append(("" if made else summary, rows))
    return made


def align(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return rows as lines with columns of one width, the first at the left."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for first, *others in rows:
        cells = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))]
        lines.append("  " + "  ".join(cells).rstrip())
    return lines


def show_name(name: str) -> str:
    """Return a name from a file on one line of printable characters, shortened."""
    text = "".join(character if character.isprintable() else " " for character in name)
    return text if len(text) <= MOST_CHARACTERS else f"{text[: MOST_CHARACTERS - 1]}…"


def _signed(change: Change) -> str:
    return f"{change.difference / 1e6:+.2f}"
