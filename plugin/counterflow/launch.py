"""``python -m counterflow.launch SCRIPT ARGS…``: run a Megatron script with the plugin on.

Also under ``torchrun -m counterflow.launch SCRIPT ARGS…``. The script is not changed: the plugin is
installed, then the script runs as ``__main__`` with its own arguments and its own folder on the path.
"""

import os
import runpy
import sys
from pathlib import Path

from counterflow.config import fail
from counterflow.errors import CounterflowError, OptionError

USAGE = """usage: python -m counterflow.launch SCRIPT [ARGS...]
       torchrun --nproc-per-node N -m counterflow.launch SCRIPT [ARGS...]

Runs a Megatron training script with counterflow's flags:
  --cf-schedule NAME|FILE.csv   1f1b, interleaved, dualpipev, or a table in CSV
  --cf-overlap                  hide expert all-to-all behind compute in the schedule's overlapped pairs
  --cf-eplb                     clone hot experts and split their tokens, with the same losses and checkpoints
  --cf-platform auto|cpu|cuda   cpu runs on CPU ranks over gloo; auto does so where no GPU is found
  --cf-record DIR               write every training step's timeline, and its expert loads, to DIR
All other arguments are the script's own; SCRIPT --help lists them together."""


def main(argv: list[str]) -> None:
    """Install the plugin and run ``argv[0]`` as the main script with the rest as its arguments."""
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        raise SystemExit(0 if argv else 2)
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
