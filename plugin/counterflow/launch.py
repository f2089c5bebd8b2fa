"""``python -m counterflow.launch SCRIPT ARGS…``: run a Megatron script with the plugin on.

Also under ``torchrun -m counterflow.launch SCRIPT ARGS…``. The script is not changed: the plugin is
installed, then the script runs as ``__main__`` with its own arguments and its own folder on the path.
"""

import argparse
import os
import runpy
import sys
from pathlib import Path

from counterflow.errors import CounterflowError, OptionError
from counterflow.options import add_flags, fail

USAGE = """usage: python -m counterflow.launch SCRIPT [ARGS...]
       torchrun --nproc-per-node N -m counterflow.launch SCRIPT [ARGS...]

Runs a Megatron training script with counterflow's flags; all other arguments are the script's own, and SCRIPT --help lists
them together.
"""


def main(argv: list[str]) -> None:
    """Install the plugin and run ``argv[0]`` as the main script with the rest as its arguments."""
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE + add_flags(argparse.ArgumentParser(add_help=False, usage=argparse.SUPPRESS)).format_help().rstrip())
        raise SystemExit(0 if argv else 2)
    # DeepSpeed's launcher puts the script's first argument before the script.
    if argv[0].startswith("--local_rank=") and len(argv) > 1:
        argv = [argv[1], argv[0], *argv[2:]]
    script = Path(argv[0])
    try:
        if not script.is_file():
            raise OptionError(f"script {argv[0]!r} does not exist; usage: python -m counterflow.launch SCRIPT [ARGS...]")
        # As `python SCRIPT` does it: a Megatron checkout beside the script comes before an installed one.
        sys.path.insert(0, str(script.resolve().parent))
        sys.argv = argv
        import counterflow

        counterflow.enable()
        runpy.run_path(str(script), run_name="__main__")
    except CounterflowError as error:
        fail(error, int(os.environ.get("RANK", "0")))


if __name__ == "__main__":
    main(sys.argv[1:])
