"""``counterflow doctor``: what is installed here, and whether the plugin fits it."""

import argparse
import json
import logging
import sys
import warnings
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Any

from counterflow.options import SCHEDULES
from counterflow.version import __version__

PACKAGES = ("torch", "megatron-core", "transformer-engine", "deepspeed", "pydantic", "numpy")


@dataclass(frozen=True)
class SeamReport:
    """Whether one upstream symbol is as expected; ``misfit`` says what is wrong, None where it fits."""

    symbol: str
    purpose: str
    present: bool
    misfit: str | None


@dataclass(frozen=True)
class Report:
    """What is installed here and what works with it."""

    counterflow: str
    python: str
    packages: dict[str, str | None]
    gpus: int
    platform: str
    schedules: tuple[str, ...]
    seams: tuple[SeamReport, ...]

    @property
    def fits(self) -> bool:
        """Tell whether every seam fits."""
        return all(seam.misfit is None for seam in self.seams)


def add_doctor_command(commands: Any) -> None:
    """Add ``doctor`` to a parser's commands."""
    doctor = commands.add_parser("doctor", help="list versions, the platform, and whether each seam into Megatron fits")
    doctor.add_argument("--json", action="store_true", help="print the report as JSON")
    doctor.set_defaults(run=run_doctor)


def examine() -> Report:
    """Look at this machine and at the installed Megatron; imports it, changes nothing."""
    import torch

    from counterflow.megatron.seams import SEAMS
    from counterflow.platform import needs_cpu

    # Megatron and torch warn about what they do not find here; the report says it once.
    logging.disable(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        seams = tuple(
            SeamReport(f"{seam.module}.{seam.symbol}", seam.purpose, seam.is_present(), seam.find_misfit()) for seam in SEAMS
        )
    return Report(
        counterflow=__version__,
        python=sys.version.split()[0],
        packages={name: find_package(name) for name in PACKAGES},
        gpus=torch.cuda.device_count(),
        platform="cpu" if needs_cpu("auto") else "cuda",
        schedules=SCHEDULES,
        seams=seams,
    )


def find_package(name: str) -> str | None:
    """Return the installed version of a distribution, None where there is none."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def print_report(report: Report) -> None:
    """Print the report for a reader at a terminal."""
    print(f"counterflow {report.counterflow}, Python {report.python}")
    for name, version in report.packages.items():
        print(f"  {name:<20} {version or 'not installed'}")
    found = f"{report.gpus} GPU{'s' if report.gpus != 1 else ''} found"
    print(f"platform: --cf-platform auto takes {report.platform} here ({found})")
    print(f"schedules: --cf-schedule {', '.join(report.schedules)}, or a table FILE.csv")
    print("seams:")
    for seam in report.seams:
        state = "does not fit" if seam.misfit else "fits" if seam.present else "absent, not needed"
        print(f"  {state:<18} {seam.symbol}: {seam.misfit or seam.purpose}")
    verdict = "every seam fits" if report.fits else "some seams do not fit: --cf flags will be refused at start"
    print(verdict)


def run_doctor(arguments: argparse.Namespace) -> int:
    """Print the report; status 1 where a seam does not fit."""
    report = examine()
    if arguments.json:
        print(json.dumps({**asdict(report), "fits": report.fits}, indent=2))
    else:
        print_report(report)
    return 0 if report.fits else 1
