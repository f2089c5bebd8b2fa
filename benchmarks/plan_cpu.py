"""Predict, then run: the planner is calibrated on one layout of CPU ranks whose stages sleep, and predicts five others.

An action takes what its layers sleep, and time of its own: waking up late, autograd, posting and sending messages. The time of
its own does not shrink with the chunk, so four chunks a rank pay it four times. It is found in the calibration's run, from stages
of several sizes and from the gaps between actions that had nothing to wait for.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.runtime import PIPED_WIDTH, Figure, print_figures
from counterflow.planner.config import parse_config
from counterflow.planner.layouts import Plan, complete_plan, place_layers
from counterflow.planner.step import run_table
from counterflow.schedule import Costs
from counterflow.schedule.actions import parse_action
from counterflow.schedule.dependencies import Result, find_input, find_result
from ranks import RankError, start_ranks

RANKS, MICROBATCHES, LAYERS, MILLISECONDS = 4, 8, 16, 10.0
# What the loss sleeps, in layers.
HEAD = 1.5
MOST_ERROR = 0.05
KINDS = ("F", "I", "W")
# Seconds after which a message has arrived.
ARRIVED = 0.001
# What each rank measured of one step.
Ran = list[dict[str, Any]]
MODEL = {"num_layers": LAYERS, "hidden_size": 64, "num_attention_heads": 4, "vocab_size": 512, "swiglu": True}
# Stages of several sizes tell an action's own time from that of its layers.
CALIBRATION = ("zb-h1", {"schedule": "zb-h1", "pipeline_model_parallel_layout": "Ett|tttttt|ttttt|tttL"})
OTHERS = (
    ("1f1b, even", {"schedule": "1f1b"}),
    ("1f1b, fewer layers at the end", {"schedule": "1f1b", "pipeline_model_parallel_layout": "Ettttt|tttt|ttttt|ttL"}),
    ("interleaved, vpp 2", {"schedule": "interleaved", "vpp": 2}),
    ("zbv, uneven", {"schedule": "zbv", "pipeline_model_parallel_layout": "Ettt|tt|tt|tt|tt|tt|tt|tL"}),
    ("interleaved, vpp 4, uneven", {
        "schedule": "interleaved", "vpp": 4, "pipeline_model_parallel_layout": "Ett|t|t|t|t|t|t|t|t|t|t|t|t|t|t|L",
    }),
)  # fmt: skip


@dataclass(frozen=True)
class Unit:
    """Seconds of one layer's F, I and W, of any action besides, of the loss's, and of moving a message: what one run tells.

    ``gap``: how long a rank is busy between an action of a kind and the one before.
    """

    layer: tuple[float, float, float]
    action: tuple[float, float, float]
    head: tuple[float, float, float]
    gap: tuple[float, float, float]
    p2p: float = 0.0

    def cost(self, plan: Plan) -> Costs:
        """Return what a plan's actions cost."""
        stages = place_layers(plan.model, plan.layout)
        f, i, w = (
            tuple(fixed + idle + len(stage.layers) * one + (more if stage.head else 0.0) for stage in stages)
            for one, fixed, more, idle in zip(self.layer, self.action, self.head, self.gap, strict=True)
        )
        return Costs(f, i, w, self.p2p)

    def predict(self, plan: Plan) -> float:
        """Return the seconds of a plan's step."""
        return run_table(plan.layout, plan.microbatches, self.cost(plan))[0]


def make_plan(layout: dict[str, Any]) -> Plan:
    """Return the plan of a case."""
    return complete_plan(
        parse_config({
            "model": MODEL, "cluster": {"gpu": "H100", "gpus": RANKS},
            "training": {"seq_length": 64, "global_batch_size": MICROBATCHES, "precision": "bf16"},
            "layout": {"pp": RANKS, **layout},
        })
    )  # fmt: skip


def describe_case(name: str, plan: Plan) -> dict[str, Any]:
    """Return a case as the ranks read it."""
    layers = [len(stage.layers) for stage in place_layers(plan.model, plan.layout)]
    layout = plan.layout
    return {
        "name": name, "schedule": layout.schedule, "vpp": layout.vpp, "microbatches": plan.microbatches, "layers": layers,
        "head": HEAD,
    }  # fmt: skip


def calibrate(plan: Plan, ran: Ran) -> Unit:
    """Return the unit that explains a run: layers from the stages without the loss, then the message from the step."""
    taken: dict[tuple[int, str], list[float]] = {}
    for rank in ran:
        for text, start, end in rank["actions"]:
            action = parse_action(text)
            taken.setdefault((action.stage, action.kind), []).append(end - start)
    # Means and not medians: that one in ten actions wakes up late is part of a step too.
    means = {key: statistics.fmean(times) for key, times in taken.items()}
    stages = place_layers(plan.model, plan.layout)
    inner = [index for index, stage in enumerate(stages) if not stage.head]
    last, counts = len(stages) - 1, [len(stages[index].layers) for index in inner]
    lines = [np.polyfit(counts, [means[index, kind] for index in inner], 1) for kind in KINDS]
    layer, fixed = (tuple(float(line[place]) for line in lines) for place in (0, 1))
    alone = [np.polyval(line, len(stages[last].layers)) for line in lines]
    head = tuple(max(means[last, kind] - float(one), 0.0) for kind, one in zip(KINDS, alone, strict=True))
    gaps = find_gaps(ran, last)
    unit = Unit(
        _take_three(layer), _take_three([max(one, 0.0) for one in fixed]), _take_three(head),
        _take_three([gaps[kind] for kind in KINDS]),
    )  # fmt: skip
    step, low, high = find_step(ran), 0.0, 0.01
    for _ in range(30):
        middle = (low + high) / 2
        slower = replace(unit, p2p=middle).predict(plan)
        low, high = (middle, high) if slower < step else (low, middle)
    return replace(unit, p2p=low)


def find_gaps(ran: Ran, last: int) -> dict[str, float]:
    """Return by kind the mean seconds between an action and the one before on its rank, where its input was there already."""
    ends: dict[Result | None, float] = {}
    for rank in ran:
        ends |= {find_result(parse_action(text)): end for text, _, end in rank["actions"]}
    found: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for rank in ran:
        actions = rank["actions"]
        for (_, _, before), (text, start, _) in pairwise(actions):
            action = parse_action(text)
            needed = find_input(action, last)
            if needed is None or ends[needed] + ARRIVED < before:
                found[action.kind].append(start - before)
    return {kind: statistics.fmean(gaps) if gaps else 0.0 for kind, gaps in found.items()}


def _take_three(values: Sequence[float]) -> tuple[float, float, float]:
    first, second, third = values
    return first, second, third


def find_step(ran: Ran) -> float:
    """Return the seconds of a step, from the first rank's begin to the last one's end."""
    return float(max(rank["end"] for rank in ran) - min(rank["begin"] for rank in ran))


def run_cpu(given: argparse.Namespace) -> int:
    """Run all cases, print predicted and measured; return 1 where one is off by more than 5 %."""
    plans = [make_plan(layout) for _, layout in (CALIBRATION, *OTHERS)]
    names = [name for name, _ in (CALIBRATION, *OTHERS)]
    given.out.mkdir(parents=True, exist_ok=True)
    cases: Path = given.out / "cases.json"
    cases.write_text(json.dumps([describe_case(name, plan) for name, plan in zip(names, plans, strict=True)]))
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.plan_rank", "--cases", str(cases), "--out", str(given.out)]
    try:
        with Console(stderr=True).status("starting") as status:
            start_ranks(
                RANKS, [*command, "--milliseconds", str(MILLISECONDS)], given.out / "logs", lambda line: status.update(line)
            )  # fmt: skip
    except RankError as error:
        sys.exit(f"bench-plan: {error}")
    # The step that was disturbed least, of those after the first.
    measured = [min(rounds[1:], key=find_step) for rounds in json.loads((given.out / "measured.json").read_text())]
    unit = calibrate(plans[0], measured[0])
    console = Console(width=None if sys.stdout.isatty() else PIPED_WIDTH)
    grid = Table("layout", "predicted ms", "measured ms", "off", box=None, pad_edge=False)
    figures = []
    for name, plan, ran in zip(names, plans, measured, strict=True):
        predicted, step = unit.predict(plan), find_step(ran)
        off = predicted / step - 1
        grid.add_row(name, f"{1000 * predicted:.1f}", f"{1000 * step:.1f}", f"{100 * off:+.1f} %")
        if name != CALIBRATION[0]:
            words = f"step of {name}"
            figures.append(Figure(words, f"<= {100 * MOST_ERROR:.0f} %", f"{100 * abs(off):.1f} %", abs(off) <= MOST_ERROR))
    console.print(grid, "")
    print_figures(figures, console)
    return 0 if all(figure.reached for figure in figures) else 1
