"""``counterflow doctor``: what is installed here, and whether the plugin fits it."""

import argparse
import json
import logging
import sys
import warnings
from dataclasses import asdict, dataclass
from typing import Any

from counterflow.options import SCHEDULES
from counterflow.version import __version__, find_package

PACKAGES = ("torch", "megatron-core", "transformer-engine", "deepspeed", "pydantic", "numpy")


@dataclass(frozen=True)
class SeamReport:
    """Whether one upstream symbol is as expected; ``misfit`` says what is wrong, None where it fits.

    ``due``: whether the version in use should have it; ``taken``: whether it is replaced, or only called or read.
    """

    symbol: str
    why: str
    features: tuple[str, ...]
    versions: tuple[str, ...]
    taken: bool
    due: bool
    misfit: str | None


@dataclass(frozen=True)
class Report:
    """What is installed here and what works with it."""

    counterflow: str
    python: str
    packages: dict[str, str | None]
    engine: str
    """What Transformer Engine is here: a real one, one that the CPU platform stands in for, or none."""
    gpus: int
    platform: str
    schedules: tuple[str, ...]
    seams: tuple[SeamReport, ...]
    remedies: dict[str, str]
    """Of each feature, what to do where one of its seams does not fit."""

    @property
    def fits(self) -> bool:
        """Tell whether every seam fits."""
        return all(seam.misfit is None for seam in self.seams)


def add_doctor_command(commands: Any) -> None:
    """Add ``doctor`` to a parser's commands."""
    doctor = commands.add_parser(
        "doctor", help="list versions, the platform, and whether each seam into Megatron and DeepSpeed fits"
    )
    doctor.add_argument("--deepspeed-config", metavar="FILE", help="say what its key counterflow asks for, and what is refused")
    doctor.add_argument("--json", action="store_true", help="print the report as JSON")
    doctor.set_defaults(run=run_doctor)


def examine() -> Report:
    """Look at this machine and at the installed Megatron and DeepSpeed; imports them, changes nothing."""
    import torch

    from counterflow.deepspeed import seams as deepspeed
    from counterflow.megatron.engine_checks import describe_fault, find_fault
    from counterflow.megatron.seams import REMEDIES, SEAMS, list_seams
    from counterflow.platform import engine, needs_cpu

    # Megatron and torch warn about what they do not find here; the report says it once.
    logging.disable(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        has_deepspeed = find_package("deepspeed") is not None
        due, known = [*list_seams(), *deepspeed.list_seams()], (*SEAMS, *(deepspeed.SEAMS if has_deepspeed else ()))
        seams = tuple(describe_seam(seam, is_due=seam in due) for seam in known)
    return Report(
        counterflow=__version__,
        python=sys.version.split()[0],
        packages={name: find_package(name) for name in PACKAGES} | {engine.PACKAGE: engine.find_version()},
        engine=describe_fault(fault) if (fault := find_fault()) is not None else engine.describe(),
        gpus=torch.cuda.device_count(),
        platform="cpu" if needs_cpu("auto") else "cuda",
        schedules=SCHEDULES,
        seams=seams,
        remedies=REMEDIES | (deepspeed.REMEDIES if has_deepspeed else {}),
    )


def describe_seam(seam: Any, *, is_due: bool) -> SeamReport:
    """Look at one seam."""
    misfit = seam.find_misfit() if is_due else None
    return SeamReport(seam.path, seam.why, seam.features, seam.versions, seam.wrap is not None, is_due, misfit)


def print_report(report: Report) -> None:
    """Print the report for a reader at a terminal."""
    print(f"counterflow {report.counterflow}, Python {report.python}")
    for name, version in report.packages.items():
        print(f"  {name:<20} {version or 'not installed'}")
    print(report.engine)
    found = f"{report.gpus} GPU{'s' if report.gpus != 1 else ''} found"
    print(f"platform: --cf-platform auto takes {report.platform} here ({found})")
    print(f"schedules: --cf-schedule {', '.join(report.schedules)}, or a table FILE.csv")
    for feature, remedy in report.remedies.items():
        seams = [seam for seam in report.seams if feature in seam.features]
        wrong = [seam for seam in seams if seam.misfit]
        print(f"{feature}: {f'cannot be in force here: {remedy}' if wrong else 'fits'}")
        for seam in seams:
            state = (
                "does not fit" if seam.misfit else "not of this version" if not seam.due else "taken" if seam.taken else "used"
            )
            versions = f"{seam.versions[0]} to {seam.versions[-1]}"
            print(f"  {state:<20}{seam.symbol} ({versions}): {seam.misfit or seam.why}")
    verdict = "every seam fits" if report.fits else "some seams do not fit: what needs them will be refused at start, by its flag"
    print(verdict)


def run_doctor(arguments: argparse.Namespace) -> int:
    """Print the report; status 1 where a seam does not fit."""
    if arguments.deepspeed_config is not None:
        from counterflow.deepspeed.checks import explain

        print("\n".join(explain(arguments.deepspeed_config)))
        return 0
    report = examine()
    if arguments.json:
        print(json.dumps({**asdict(report), "fits": report.fits}, indent=2))
    else:
        print_report(report)
    return 0 if report.fits else 1
