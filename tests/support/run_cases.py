"""Cases that train: each is run on ranks of its own when its results are asked for, after the one whose checkpoint it loads."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tests.support.forked_ranks import run_ranks

RANKS = 4
Case = dict[str, Any]
Run = dict[str, Any]


class Runs(Mapping[str, Run]):
    """What each case logged, by its name; a case runs when it is first asked for."""

    def __init__(self, worker: str, cases: list[Case], directory: Path, ranks: int = RANKS) -> None:
        self._worker, self._directory, self._ranks = worker, directory, ranks
        self._cases = {case["name"]: case for case in cases}
        self._saved_by = {folder: case["name"] for case in cases if (folder := _read_flag(case, "--save")) is not None}
        self._runs: dict[str, Run] = {}

    def __getitem__(self, name: str) -> Run:
        if name not in self._runs:
            case = self._cases[name]
            source = self._saved_by.get(_read_flag(case, "--load") or "")
            if source not in (None, name):
                self[str(source)]
            self._runs[name] = self.run(case)
        return self._runs[name]

    def run(self, case: Case) -> Run:
        """Run one case, whose checkpoint is there."""
        return run_case(self._worker, case, self._directory, self._ranks)

    def __iter__(self) -> Iterator[str]:
        return iter(self._cases)

    def __len__(self) -> int:
        return len(self._cases)


def _read_flag(case: Case, flag: str) -> str | None:
    flags = case["flags"]
    return flags[flags.index(flag) + 1] if flag in flags else None


def run_case(worker: str, case: Case, directory: Path, ranks: int = RANKS) -> Run:
    """Run one case by a worker module of ``tests/distributed``; return what it logged, and where its files and logs are."""
    name = case["name"]
    results, logs = directory / f"{name}.json", directory / "logs" / name
    argument = {"case": case, "results": str(results)}
    trainer = "gpus" if case.get("platform") == "cuda" else "megatron"
    run_ranks(worker, argument, ranks, logs, capability=case.get("capability"), trainer=trainer)
    run: Run = json.loads(results.read_text())
    return {**run, "directory": directory, "logs": logs}
