"""Train the example on this machine: prepare the text, start the ranks, show how the model learns.

Run by ``make train``; all flags that are not named below go to Megatron as they are.
"""

import argparse
import logging
import os
import re
import shutil
import sys
import time
import warnings
from importlib.util import find_spec
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
STEP = re.compile(
    r"iteration\s+(?P<step>\d+)/\s*(?P<total>\d+) .*elapsed time per iteration \(ms\): (?P<ms>[\d.]+)"
    r".*learning rate: (?P<lr>[\dE.+-]+).*global batch size:\s*(?P<batch>\d+)"
    r".*lm loss: (?P<loss>[\dE.+-]+).*grad norm: (?P<norm>[\d.einf+-]+)"
)
BALANCE = re.compile(r"balancedness: (?P<before>[\d.]+) -> (?P<after>[\d.]+)")
VALIDATION = re.compile(
    r"validation loss at iteration (?P<step>\d+)(?P<final> on (?:validation|test) set)? \| lm loss value: (?P<loss>[\dE.+-]+)"
)
WIDTH = 130
TRACKER = "latest_checkpointed_iteration.txt"
RECIPES = ("delayed", "tensorwise", "blockwise", "mxfp8")


def parse_arguments() -> tuple[argparse.Namespace, list[str]]:
    """Return the example's own options and the flags for Megatron."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--schedule", default="dualpipev", help="as --cf-schedule (default: dualpipev)")
    parser.add_argument("--eplb", action="store_true", help="as --cf-eplb: clone hot experts, one per rank and MoE layer")
    parser.add_argument("--iters", type=int, default=120, help="steps per run (default: 120)")
    parser.add_argument("--ranks", type=int, help="ranks to start (default: 4 on the CPU, else 2 or 4 GPUs)")
    parser.add_argument("--platform", choices=("auto", "cpu", "cuda"), default="auto", help="as --cf-platform (default: auto)")
    parser.add_argument("--te", action="store_true", help="train Transformer Engine's layers in BF16")
    parser.add_argument("--fp8", metavar="RECIPE", help=f"with --te: train in FP8 by a recipe: {', '.join(RECIPES)}")
    parser.add_argument(
        "--dir", type=Path, help="checkpoints, logs and data go here (default: runs/pretrain_moe, with --te a folder of its own)"
    )
    parser.add_argument("--fresh", action="store_true", help="forget earlier checkpoints and start anew")
    options, extra = parser.parse_known_args()
    check_options(options)
    # Checkpoints of other layers and other numbers are other runs.
    kind = "-te" * options.te + (f"-{options.fp8}" if options.fp8 else "")
    options.dir = options.dir or ROOT / "runs" / f"pretrain_moe{kind}"
    return options, extra


def check_options(options: argparse.Namespace) -> None:
    """End with one line where the example's own options cannot be."""
    if options.iters < 1:
        raise SystemExit(f"train: --iters {options.iters} given; it must be at least 1")
    if options.fp8 is not None and options.fp8 not in RECIPES:
        raise SystemExit(f"train: FP8={options.fp8} given; {', '.join(RECIPES)} are allowed")
    if options.fp8 is not None and not options.te:
        raise SystemExit(f"train: FP8={options.fp8} needs Transformer Engine's layers: give TE=1 too")


def read_flags(name: str) -> list[str]:
    """Return the flags of a file in ``configs/``; a line that starts with # is a comment."""
    lines = (ROOT / "configs" / name).read_text().splitlines()
    return [flag for line in lines if not line.startswith("#") for flag in line.split()]


def choose_ranks(options: argparse.Namespace) -> tuple[int, bool]:
    """Return how many ranks to start and whether they run on the CPU (a rank needs a GPU of its own)."""
    import torch

    gpus = 0 if options.platform == "cpu" else torch.cuda.device_count()
    if gpus < 2:
        if options.platform == "cuda":
            raise SystemExit(f"train: --platform cuda needs 2 or more GPUs, one per rank; torch finds {gpus}: use --platform cpu")
        return options.ranks or 4, True
    return options.ranks or (4 if gpus >= 4 else 2), False


def read_checkpoint(directory: Path) -> int:
    """Return the step of the last whole checkpoint, 0 where there is none."""
    tracker = directory / "checkpoints" / TRACKER
    text = tracker.read_text().strip() if tracker.exists() else ""
    return int(text) if text.isdigit() else 0


def list_layer_flags(options: argparse.Namespace, on_cpu: bool) -> list[str]:
    """Return the flags that choose the layers: what runs on this machine."""
    if options.te:
        return [*(read_flags("cpu-te.args") if on_cpu else ["--moe-grouped-gemm"]), *list_number_flags(options.fp8)]
    if on_cpu:
        return read_flags("cpu.args")
    return [] if find_spec("transformer_engine") else read_flags("no-te.args")


def list_number_flags(recipe: str | None) -> list[str]:
    """Return the flags of Transformer Engine's layers in FP8 by a recipe, or else in BF16."""
    return [*read_flags("fp8.args"), "--fp8-recipe", recipe] if recipe else ["--bf16"]


def describe_engine(options: argparse.Namespace, on_cpu: bool) -> str:
    """Return what computes Transformer Engine's layers, in one line; on the CPU, choose the GPU that MXFP8 needs."""
    from counterflow.errors import OptionError
    from counterflow.platform import engine

    if not on_cpu:
        return f"Transformer Engine {engine.find_version()}, {options.fp8 or 'BF16'}"
    if options.fp8 == "mxfp8":
        os.environ.setdefault(engine.VARIABLE, "10.0")
    try:
        return engine.describe()
    except OptionError as error:
        raise SystemExit(f"train: {error}") from None


def list_training_flags(options: argparse.Namespace, ranks: int, on_cpu: bool, text: Path, target: int) -> list[str]:
    """Return the script's whole command line."""
    directory = options.dir
    return [
        *read_flags("deepseek-v3-small.args"),
        *list_layer_flags(options, on_cpu),
        *("--cf-platform", "cpu" if on_cpu else "cuda", "--cf-schedule", options.schedule),
        *(["--num-virtual-stages-per-pipeline-rank", "2"] if options.schedule == "interleaved" else []),
        *(["--cf-eplb"] if options.eplb else []),
        *("--pipeline-model-parallel-size", "2", "--expert-model-parallel-size", str(min(4, max(1, ranks // 2)))),
        *("--data-path", str(text), "--data-cache-path", str(directory / "data" / "cache")),
        *("--train-iters", str(target), "--eval-interval", "25", "--eval-iters", "2"),
        *("--save", str(directory / "checkpoints"), "--load", str(directory / "checkpoints"), "--save-interval", "50"),
        *("--tensorboard-dir", str(directory / "tensorboard"), "--distributed-timeout-minutes", "2"),
    ]


class Display:
    """Turns Megatron's log lines into a progress line; keeps what the closing words need."""

    def __init__(self, sequence_length: int) -> None:
        self._sequence_length = sequence_length
        self._live = sys.stdout.isatty()
        self.validation: list[float] = []
        self.balancedness: list[tuple[float, float]] = []
        self.step = 0

    def show(self, line: str) -> None:
        """Print what a line of the log says, if it is a step or a validation."""
        if match := STEP.search(line):
            self._show_step(match, BALANCE.search(line))
        elif line.startswith("counterflow: "):
            self.say(line.removeprefix("counterflow: "))
        elif (match := VALIDATION.search(line)) and not (match["final"] or "").endswith("test set"):
            self.validation.append(float(match["loss"]))
            if not match["final"]:
                self.say(f"step {match['step']:>4}: validation loss {float(match['loss']):.4f}")

    def _show_step(self, match: re.Match[str], balance: re.Match[str] | None) -> None:
        self.step, total, seconds = int(match["step"]), int(match["total"]), float(match["ms"]) / 1000
        rate = int(match["batch"]) * self._sequence_length / seconds
        left = time.strftime("%M:%S", time.gmtime((total - self.step) * seconds))
        text = (
            f"step {self.step:>4}/{total}  loss {float(match['loss']):.4f}  lr {float(match['lr']):.2e}  "
            f"grad norm {float(match['norm']):.3f}  {rate:,.0f} tokens/s  {seconds:.2f} s  {left} left"
        )
        if balance is not None:
            self.balancedness.append((float(balance["before"]), float(balance["after"])))
            text += f"  balance {balance['before']} -> {balance['after']}"
        print(f"\r{text:<{WIDTH}}" if self._live else text, end="" if self._live else "\n", flush=True)

    def say(self, text: str) -> None:
        """Print a line that stays."""
        print(f"\r{text:<{WIDTH}}" if self._live else text, flush=True)


def main() -> None:
    """Train for ``--iters`` steps beyond the last multiple of it that a checkpoint has reached."""
    options, extra = parse_arguments()
    if options.fresh:
        for name in ("checkpoints", "tensorboard", "logs"):
            shutil.rmtree(options.dir / name, ignore_errors=True)
    # What Megatron's imports say of this machine (no TE, no Apex, no CUDA) is in `counterflow doctor`.
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    from data import prepare_text
    from ranks import RankError, start_ranks

    ranks, on_cpu = choose_ranks(options)
    text = prepare_text(options.dir / "data")
    done = read_checkpoint(options.dir)
    target = (done // options.iters + 1) * options.iters
    flags = [*list_training_flags(options, ranks, on_cpu, text, target), *extra]
    command = [sys.executable, "-W", "ignore", "-m", "counterflow.launch", str(HERE / "pretrain_moe.py"), *flags]
    length = int(flags[flags.index("--seq-length") + 1])
    display = Display(length)

    megabytes = text.with_suffix(".bin").stat().st_size / 2 / 1e6
    display.say(f"schedule {options.schedule}, {ranks} ranks on {'the CPU' if on_cpu else 'GPUs'}, 2 pipeline ranks")
    if options.te:
        display.say(describe_engine(options, on_cpu))
    display.say(f"text: Python's standard library, {megabytes:.0f} million bytes, one token each")
    try:
        if done:
            display.say(f"resuming from the checkpoint of step {done}, on to step {target}")
        else:
            start_ranks(ranks, [*command, "--skip-train"], options.dir / "logs", display.show)
            display.say(f"before training: validation loss {display.validation[-1]:.4f}" if display.validation else "")
        logs = start_ranks(ranks, command, options.dir / "logs", display.show)
    except RankError as error:
        display.say("")
        kept = read_checkpoint(options.dir)
        resume = f"; the checkpoint of step {kept} is whole, run again to resume from it" if kept else ""
        print(f"train: {error}{f' after step {display.step}' if display.step else ''}{resume}", file=sys.stderr)
        raise SystemExit(1) from None
    if display.validation:
        display.say(f"validation loss: {display.validation[0]:.4f} at first, {display.validation[-1]:.4f} after step {target}")
    if display.balancedness:
        before, after = (sum(values) / len(values) for values in zip(*display.balancedness, strict=True))
        slower = f"the slowest rank had {1 / before - 1:.0%} more tokens than the mean, now {1 / after - 1:.0%}"
        display.say(f"experts: balancedness {before:.4f} with homes alone, {after:.4f} with clones: {slower}")
    display.say(f"checkpoint of step {read_checkpoint(options.dir)}: {options.dir / 'checkpoints'}; run again to train on")
    display.say(f"logs: {logs}; curves: tensorboard --logdir {options.dir / 'tensorboard'}")


if __name__ == "__main__":
    main()
