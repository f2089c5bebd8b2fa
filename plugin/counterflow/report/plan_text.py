"""Plans as text for a terminal."""

import shlex
from collections import Counter
from collections.abc import Sequence
from typing import Any

from counterflow.planner.against import Comparison
from counterflow.planner.estimate import Estimate, list_open
from counterflow.planner.explain import Bar, Change
from counterflow.planner.search import Found

HEADINGS = ["", "layout", "schedule", "step", "tokens/s/GPU", "bubble", "memory", "exposed", "GPU hours/1e12"]
EXPOSED = ("tensor parallel", "context parallel", "experts' exchange", "gradient reduction", "weight gather")
BAR_WIDTH = 40


def name_layout(estimate: Estimate) -> str:
    """Return the sizes of a layout in a few words, those of 1 left out."""
    layout = estimate.plan.layout
    words = [f"{name} {getattr(layout, name)}" for name in ("tp", "pp", "cp", "ep", "etp") if getattr(layout, name) > 1]
    words += [f"mbs {layout.micro_batch_size}"]
    if str(layout.recompute) != "none":
        words.append(f"recompute {layout.recompute}")
    if layout.clones_per_rank:
        words.append(f"clones {layout.clones_per_rank}")
    words += ["fsdp"] * layout.fsdp
    words += ["no distributed optimizer"] * (not layout.distributed_optimizer and layout.dp * layout.cp > 1)
    return " ".join(words)


def name_schedule(estimate: Estimate, searched: bool = False) -> str:
    """Return the schedule of a plan in a few words."""
    layout = estimate.plan.layout
    words = [f"searched, on {layout.schedule}'s stages" if searched else layout.schedule]
    words += [f"vpp {layout.vpp}"] if layout.vpp > 1 else []
    return " ".join([*words, *["overlap"] * layout.overlap])


def find_exposed(estimate: Estimate) -> float:
    """Return the seconds of a step in which ranks wait for communication."""
    return sum(estimate.step.causes.get(name, 0.0) for name in EXPOSED)


def write_change(ratio: float) -> str:
    """Return by how much a ratio is above or below 1, in per cent with a sign; nothing has none."""
    text = f"{100 * (ratio - 1):+.1f}"
    return f"{text if float(text) else '0.0'} %"


def write_count(count: int, one: str, several: str = "") -> str:
    """Return a number and what is counted, in the singular or plural."""
    return f"{count:,} {one if count == 1 else several or one + 's'}"


def list_row(estimate: Estimate, number: int, searched: bool = False) -> list[str]:
    """Return a row below `HEADINGS`."""
    worst, card = estimate.memory.worst, estimate.setting.cluster.memory_gib
    mark = {True: "", False: ", does not fit", None: ", may not fit"}[estimate.fits]
    return [
        str(number), name_layout(estimate), name_schedule(estimate, searched), f"{estimate.step_s:.3g} s",
        f"{estimate.tokens_per_s_per_gpu:,.0f}", f"{100 * estimate.step.bubble:.1f} %",
        f"{worst.peak / 2**30:.1f} of {card:.0f} GiB (rank {worst.rank}){mark}", f"{find_exposed(estimate):.2g} s",
        f"{estimate.gpu_hours:,.0f}",
    ]  # fmt: skip


def write_estimate(estimate: Estimate, price: float | None) -> list[str]:
    """Return the lines of one estimate."""
    plan, layout = estimate.plan, estimate.plan.layout
    lines = [
        f"{plan.model.name} on {layout.gpus} {estimate.setting.cluster.gpu.name}: {name_layout(estimate)} dp {layout.dp}, "
        f"{name_schedule(estimate)}, {write_count(plan.microbatches, 'micro-batch', 'micro-batches')}",
        f"step {estimate.step_s:.3g} s ({estimate.low:.3g} to {estimate.high:.3g})   {estimate.tokens_per_s_per_gpu:,.0f} "
        f"tokens/s/GPU   bubble {100 * estimate.step.bubble:.1f} %   exposed {find_exposed(estimate):.2g} s",
        *write_price(estimate, price),
        *write_memory(estimate),
    ]
    return lines + [f"note: {note}" for note in plan.notes]


def write_price(estimate: Estimate, price: float | None) -> list[str]:
    """Return what a trillion tokens take, and cost."""
    cost = f", {estimate.gpu_hours * price:,.0f} at {price:g} a GPU hour" if price is not None else ""
    return [f"a trillion tokens: {estimate.gpu_hours:,.0f} GPU hours{cost}"]


def write_memory(estimate: Estimate) -> list[str]:
    """Return the memory of the rank that needs most, by part, and whether it fits."""
    worst, card = estimate.memory.worst, estimate.setting.cluster.memory_gib
    parts = "   ".join(f"{name} {size / 2**30:.1f}" for name, size in worst.parts.items() if size > 2**26)
    names = list_open(estimate.plan) if estimate.fits is None else []
    verdict = {True: "fits", False: "does not fit", None: "may or may not fit"}[estimate.fits]
    return [
        f"memory of rank {worst.rank}: {worst.peak / 2**30:.1f} GiB ({worst.low / 2**30:.1f} to {worst.high / 2**30:.1f}) of "
        f"{card:.1f}: {verdict}",
        f"  {parts}",
        *(
            [f"  stating {', '.join(names)} would narrow it"]
            if estimate.fits is None and (names := list_open(estimate.plan))
            else []
        ),
    ]


def write_waterfall(bars: Sequence[Bar], seconds: float) -> list[str]:
    """Return a bar for each cause; a cause that saves time stands with a minus."""
    lines = [f"step {seconds:.3g} s, as a mean over pipeline ranks"]
    for bar in bars:
        width = round(BAR_WIDTH * abs(bar.seconds) / seconds)
        lines.append(f"  {bar.cause:<20}{bar.seconds:9.3f} s {100 * bar.seconds / seconds:6.1f} %  {'█' * width}".rstrip())
    return lines


def write_changes(changes: Sequence[Change], seconds: float) -> list[str]:
    """Return what would change the step."""
    lines = ["what if"]
    for change in changes:
        told = "" if change.seconds is None else f": {change.seconds:.3g} s ({write_change(change.seconds / seconds)})"
        lines.append(f"  {change.words}{told}")
    return lines


def list_compared(comparison: Comparison) -> list[list[str]]:
    """Return rows of what was predicted and measured: cause, both, and how far the prediction is off."""
    rows = []
    for one in (*comparison.causes, *comparison.chunks):
        unit = "" if "over its parts" in one.cause else " s"
        off = ""
        if one.predicted is not None and one.measured:
            off = f"{100 * (one.predicted / one.measured - 1):+.0f} %"
        rows.append([one.cause, _write(one.predicted, unit), _write(one.measured, unit), off])
    return rows


def write_compared(comparison: Comparison) -> list[str]:
    """Return predicted and measured side by side."""
    lines = [f"warning: {comparison.warning}"] if comparison.warning else []
    lines.append(f"{'':<24}{'predicted':>12}{'measured':>12}{'off':>10}")
    lines += [
        f"{cause:<24}{predicted:>12}{measured:>12}{off:>10}" for cause, predicted, measured, off in list_compared(comparison)
    ]
    return lines + [f"  {note}" for note in comparison.notes]


def _write(value: float | None, unit: str) -> str:
    return "–" if value is None else f"{value:.4g}{unit}"


def write_rows(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return rows below `HEADINGS`, in columns as wide as what they hold."""
    lines = [HEADINGS, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(HEADINGS))]
    return ["   ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]


def write_unfinished(found: Found) -> list[str]:
    """Return that a search was not finished, where its time ended first."""
    if not found.untried:
        return []
    return [
        f"the search is not finished: {write_count(found.untried, 'combination')} of sizes left untried, and a better layout may "
        f"be among them; give more --seconds, or fix some sizes in layout:"
    ]


def write_rejected(found: Found, most: int = 3) -> list[str]:
    """Return how many layouts were tried and rejected, and why: the first that need too much memory, then other reasons."""
    slower = sum(one.reason.startswith("at least") for one in found.rejected)
    lines = [f"{write_count(found.tried, 'layout')} tried in {found.seconds:.0f} s, {len(found.rejected) - slower:,} rejected"]
    if slower:
        lines[0] += f"; {write_count(slower, 'combination')} of sizes cannot be faster than those shown"
    too_large = [one for one in found.rejected if one.reason.startswith("rank ")]
    others = [one for one in found.rejected if not one.reason.startswith(("rank ", "at least"))]
    lines += [f"  why not: {one.layout}: {one.reason}" for one in too_large[:most]]
    lines += [f"  … and {len(too_large) - most} more that need too much memory"] if len(too_large) > most else []
    for reason, count in Counter(one.reason for one in others).most_common(most):
        example = next(one.layout for one in others if one.reason == reason)
        lines.append(f"  why not: {example}: {reason}" + (f" (and {count - 1} more)" if count > 1 else ""))
    return lines


def write_flags(flags: Sequence[str], config: dict[str, Any]) -> list[str]:
    """Return the flags of the trainer, ready for a script, or DeepSpeed's JSON where there are none."""
    if not flags:
        return [str(config)]
    groups: list[list[str]] = []
    for word in flags:
        if word.startswith("--") or not groups:
            groups.append([])
        groups[-1].append(shlex.quote(word))
    return ["Megatron:", "  " + " \\\n  ".join(" ".join(group) for group in groups)]
