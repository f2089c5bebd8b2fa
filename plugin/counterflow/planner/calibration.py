"""Fits the constants of the time model that given runs can identify, and says which, with residuals.

Constants have priors (``constants.toml``: a value, and how far it may be off). The fit is the most likely set: residuals of runs,
logarithms of predicted over measured step time, against deviations from the priors. A constant counts as identified where the
runs narrow it to less than 80 % of what the prior left open. One factor for all runs together, the anchor, is taken out of the
residuals of a group of runs where several were measured with the same software.
"""

import csv
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import least_squares

from counterflow.arrays import Array
from counterflow.bounds import unite_pairs
from counterflow.errors import PlanError
from counterflow.planner.assumptions import Assumed, assume_unstated
from counterflow.planner.cluster import Cluster, build_cluster
from counterflow.planner.config import MAX_BYTES, PlanConfig, parse_config
from counterflow.planner.constants import Constants, change_logs, read_constants
from counterflow.planner.estimate import make_setting
from counterflow.planner.layouts import complete_plan
from counterflow.planner.step import time_step

# How far a run is off for reasons that no constant explains: releases of the same software differ by more.
RUN_SIGMA = 0.12
# Runs of one's own are of one software: a measurement again differs by 1 to 3.6 %.
OWN_SIGMA = 0.03
SCALE = "general.scale"
IDENTIFIED = 0.8
STEPS = 6
LEAST_CHANGE = 1e-4


@dataclass(frozen=True)
class Run:
    """A run that was measured: its plan, its step in seconds, a name, and the group of runs that it is compared with."""

    name: str
    group: str
    config: PlanConfig
    seconds: float


@dataclass(frozen=True)
class Fit:
    """Constants after runs. ``identified``: by name, the value before and after; ``residuals``: of each run, predicted over
    measured less 1; ``sigma``: the standard deviation of their logarithms."""

    constants: Constants
    identified: dict[str, tuple[float, float]]
    residuals: dict[str, float]
    sigma: float


class Runs:
    """Runs with their plans completed once; predicts their steps under other constants."""

    def __init__(self, runs: Sequence[Run]) -> None:
        self.runs = runs
        self._plans = [_complete(run) for run in runs]
        self.measured = np.array([run.seconds for run in runs])
        groups = [run.group for run in runs]
        # A group of many runs of one layout counts as one run, and a little more.
        self.weights = np.array([1.0 / math.sqrt(groups.count(group)) for group in groups])

    def predict(self, constants: Constants) -> Array:
        """Return the seconds of each run's step."""
        return np.array([time_step(one.plan, make_setting(one, cluster, constants)).seconds for one, cluster in self._plans])


def _complete(run: Run) -> tuple[Assumed, Cluster]:
    try:
        cluster = build_cluster(run.config.cluster)
        return assume_unstated(run.config, complete_plan(run.config), cluster), cluster
    except PlanError as error:
        raise PlanError(f"calibrate: run {run.name}: {error}") from None


def fit_constants(runs: Sequence[Run], start: Constants | None = None, own: bool = True) -> Fit:
    """Fit constants to runs, from ``start`` on; raises `PlanError` where there is no run.

    Runs are one's ``own``, of one software, whose speed is a constant too; or of many releases, which differ for other reasons.
    """
    if not runs:
        raise PlanError("calibrate: no run states its plan and its step time; give some that do")
    start, known = start or Constants(), Runs(runs)
    base = known.predict(start)
    noise = OWN_SIGMA if own else RUN_SIGMA
    names, slopes = find_sensitive(known, start, base, () if own else (SCALE,))
    spreads = np.array([read_constants()[name].spread for name in names])

    def miss(logs: Array) -> Array:
        predicted = known.predict(start.multiply(change_logs(names, logs)))
        return np.concatenate([known.weights * np.log(predicted / known.measured) / noise, logs / spreads])

    logs = np.zeros(len(names))
    if names:
        logs = least_squares(miss, logs, loss="soft_l1", max_nfev=STEPS).x
    constants = start.multiply(change_logs(names, logs))
    predicted = known.predict(constants)
    residuals = np.log(predicted / known.measured)
    left = find_spreads(slopes * known.weights[:, None] / noise, spreads)
    identified = {
        name: (start[name], constants[name])
        for name, spread, prior in zip(names, left, spreads, strict=True)
        if spread < IDENTIFIED * prior
    }
    # A few runs tell little of how far others are off.
    sigma = float(np.sqrt(np.mean(residuals**2) + RUN_SIGMA**2 / len(runs)))
    return Fit(
        Constants(constants.factors, start.priors, sigma), identified,
        {run.name: float(math.expm1(one)) for run, one in zip(runs, residuals, strict=True)}, sigma,
    )  # fmt: skip


def find_sensitive(known: Runs, start: Constants, base: Array, fixed: Sequence[str] = ()) -> tuple[list[str], Array]:
    """Return the constants that some run depends on, but for ``fixed``, and how its logarithm changes with theirs."""
    names, columns = [], []
    for name in (one for one in read_constants() if one not in fixed):
        change = np.log(known.predict(start.multiply({name: math.exp(0.05)})) / base) / 0.05
        if np.abs(change).max() > LEAST_CHANGE:
            names.append(name)
            columns.append(change)
    return names, np.array(columns).T.reshape(len(base), len(names))


def find_spreads(slopes: Array, spreads: Array) -> Array:
    """Return how far each constant may still be off (of its logarithm) after runs with these slopes, in units of their noise."""
    precision = slopes.T @ slopes + np.diag(1.0 / spreads**2)
    return np.asarray(np.sqrt(np.diag(np.linalg.inv(precision))))


def read_runs(path: Path) -> list[Run]:
    """Read runs: JSON, a list of ``{"plan": {…}, "step_s": …, "name", "group"}``, or CSV of rows with columns by the plan's keys.

    In a CSV a column ``model.num_layers`` is that key of the plan; ``step_s`` or ``tokens_per_s_per_gpu`` is the measurement.
    Raises `PlanError` that names the file and the run.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise PlanError(f"--calibrate {path} has more than {MAX_BYTES} bytes")
        text = path.read_text()
        rows: Any = (
            json.loads(text, object_pairs_hook=unite_pairs) if path.suffix == ".json" else list(csv.DictReader(text.splitlines()))
        )
    except (OSError, ValueError, csv.Error) as error:
        raise PlanError(f"--calibrate {path} cannot be read: {error}") from None
    rows = rows if isinstance(rows, list) else [rows]
    return [_read_run(row, f"{path}, run {number}") for number, row in enumerate(rows, 1)]


def _read_run(row: Any, where: str) -> Run:
    if not isinstance(row, Mapping):
        raise PlanError(f"{where}: a mapping with plan and step_s is expected")
    plan = row["plan"] if "plan" in row else _gather_columns(row)
    config = parse_config(plan, where)
    try:
        seconds = float(row["step_s"]) if row.get("step_s") else _find_seconds(config, float(row["tokens_per_s_per_gpu"]))
    except (KeyError, TypeError, ValueError):
        raise PlanError(f"{where}: neither step_s nor tokens_per_s_per_gpu is a number") from None
    if not 0 < seconds < math.inf:
        raise PlanError(f"{where}: step_s {seconds} given; allowed: a number above 0")
    return Run(str(row.get("name") or where), str(row.get("group") or where), config, seconds)


def _find_seconds(config: PlanConfig, rate: float) -> float:
    plan = complete_plan(config)
    return plan.training.global_batch_size * plan.training.seq_length / plan.layout.gpus / rate


def _gather_columns(row: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    plan: dict[str, dict[str, Any]] = {}
    for column, value in row.items():
        section, _, key = str(column).partition(".")
        if key and value not in (None, ""):
            plan.setdefault(section, {})[key] = _read_cell(value)
    return plan


def _read_cell(value: str) -> Any:
    for read in (int, float):
        try:
            return read(value)
        except ValueError:
            continue
    return {"true": True, "false": False}.get(value.lower(), value)


def tell_apart(first: float, second: float, sigma: float, shared: float = 0.75) -> bool:
    """Tell whether two estimates of one cluster differ by more than the model's error.

    Plans of one model on one cluster share ``shared`` of the error: what is off for one is off for its neighbour.
    """
    return abs(math.log(first / second)) > sigma * math.sqrt(2.0 * (1.0 - shared))
