"""The ``counterflow`` command."""

import argparse
import sys
from typing import Any

from counterflow.commands.analyze import add_analyze_command
from counterflow.commands.arguments import Parser, run_command
from counterflow.commands.balance import add_balance_commands
from counterflow.commands.doctor import add_doctor_command
from counterflow.commands.plan import add_plan_commands
from counterflow.commands.schedule import add_schedule_commands
from counterflow.version import __version__


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command."""
    parser = Parser(prog="counterflow", description="DualPipe schedules and expert load balancing for Megatron-Core, by flags.")
    parser.add_argument("--version", action="version", version=f"counterflow {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    add_doctor_command(commands)
    add_schedule_commands(commands)
    add_balance_commands(commands)
    add_analyze_command(commands)
    add_plan_commands(commands)
    return parser


def main(argv: list[str] | None = None) -> Any:
    """Run the command; ends with status 2 and one line on bad input."""

    def run() -> int:
        arguments = build_parser().parse_args(argv)
        return int(arguments.run(arguments))

    sys.exit(run_command(run))


if __name__ == "__main__":
    main()
