"""Predict, then run: the planner is calibrated on one layout of CPU ranks whose stages sleep, and predicts five others."""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
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
from ranks import RankError, start_ranks

RANKS, MICROBATCHES, LAYERS, MILLISECONDS = 4, 8, 16, 10.0
# What the loss sleeps, in layers.
HEAD = 1.5
MOST_ERROR = 0.05
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
    """Seconds of one layer's F, I and W, of any action besides, of the loss's, and of moving a message: what one run tells."""

    layer: tuple[float, float, float]
    action: tuple[float, float, float]
    head: tuple[float, float, float]
    p2p: float = 0.0

    def cost(self, plan: Plan) -> Costs:
        """Return what a plan's actions cost."""
        stages = place_layers(plan.model, plan.layout)
        f, i, w = (
            tuple(fixed + len(stage.layers) * one + (more if stage.head else 0.0) for stage in stages)
            for one, fixed, more in zip(self.layer, self.action, self.head, strict=True)
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


def calibrate(plan: Plan, measured: list[dict[str, Any]]) -> Unit:
    """Return the unit that explains a run: layers from the stages without the loss, then the message from the step."""
    medians: dict[str, float] = {key: value for rank in measured for key, value in rank["medians"].items()}
    stages = place_layers(plan.model, plan.layout)
    inner = [index for index, stage in enumerate(stages) if not stage.head]
    last, counts = len(stages) - 1, [len(stages[index].layers) for index in inner]
    lines = [np.polyfit(counts, [medians[f"{index}{kind}"] for index in inner], 1) for kind in "FIW"]
    layer, action = (tuple(float(line[place]) for line in lines) for place in (0, 1))
    alone = [np.polyval(line, len(stages[last].layers)) for line in lines]
    head = tuple(max(medians[f"{last}{kind}"] - float(one), 0.0) for kind, one in zip("FIW", alone, strict=True))
    unit = Unit(_take_three(layer), _take_three([max(one, 0.0) for one in action]), _take_three(head))
    step, low, high = find_step(measured), 0.0, 0.01
    for _ in range(30):
        middle = (low + high) / 2
        slower = replace(unit, p2p=middle).predict(plan)
        low, high = (middle, high) if slower < step else (low, middle)
    return replace(unit, p2p=low)


def _take_three(values: Sequence[float]) -> tuple[float, float, float]:
    first, second, third = values
    return first, second, third


def find_step(measured: list[dict[str, Any]]) -> float:
    """Return the seconds of the fastest step after the first, from the first rank's begin to the last one's end."""
    steps = list(zip(*(rank["steps"] for rank in measured), strict=True))[1:]
    return float(min(max(end for _, end in step) - min(begin for begin, _ in step) for step in steps))


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
    measured = json.loads((given.out / "measured.json").read_text())
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
