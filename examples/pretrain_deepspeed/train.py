"""Train the DeepSpeed example on this machine: prepare the text, start the ranks, show how the model learns.

Run by ``make train TRAINER=deepspeed``. The config is that of `configs/deepspeed-dense.json`, with ``--eplb`` of
`deepspeed-moe.json`, and the schedule that is asked for.
"""

import argparse
import json
import os
import re
import shutil
import sys
import sysconfig
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path.insert(0, str(HERE.parent / "pretrain_moe"))

from data import MAX_BYTES, list_sources  # noqa: E402
from ranks import RankError, start_ranks  # noqa: E402

PLAIN, EXPERTS = "plain", 16
SHOWN = re.compile(r"step +(?P<step>\d+)[/:]")
# DeepSpeed's own log, in which balancedness stands.
BALANCED = re.compile(r".*(step=\d+, balancedness: .*)")


def parse_arguments() -> argparse.Namespace:
    """Return the example's options."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--schedule", help=f'a schedule, or "{PLAIN}" for DeepSpeed alone (default: that of --config)')
    parser.add_argument("--eplb", action="store_true", help=f"train a model of {EXPERTS} experts a layer, hot ones cloned")
    parser.add_argument("--config", type=Path, help="DeepSpeed's JSON (default: that in configs/)")
    parser.add_argument("--iters", type=int, default=120, help="steps per run (default: 120)")
    parser.add_argument("--ranks", type=int, default=4, help="ranks to start, two pipeline stages (default: 4)")
    parser.add_argument("--platform", choices=("auto", "cpu", "cuda"), default="auto", help="auto: GPUs if each rank has one")
    parser.add_argument(
        "--dir", type=Path, default=ROOT / "runs" / "pretrain_deepspeed", help="checkpoints, logs and data go here"
    )
    parser.add_argument("--fresh", action="store_true", help="forget earlier checkpoints and start anew")
    parser.add_argument("--save-interval", type=int, default=50, help="steps between checkpoints (default: 50)")
    options = parser.parse_args()
    if options.config is not None and not options.config.is_file():
        parser.error(f"--config {options.config} is no file: give DeepSpeed's JSON, or leave it out for that in configs/")
    if options.ranks < 2 or options.ranks % 2:
        parser.error(f"--ranks {options.ranks} given; allowed: an even number, for two pipeline stages")
    return options


def prepare_text(directory: Path) -> Path:
    """Write Python's standard library into one file, once, whole files up to the size of the other example's; return its path."""
    path = directory / "python-stdlib.bytes"
    if not path.exists():
        directory.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".part")
        with unfinished.open("wb") as file:
            for source in list_sources(Path(sysconfig.get_paths()["stdlib"])):
                if file.tell() < MAX_BYTES:
                    file.write(source.read_bytes())
        unfinished.replace(path)
    return path


def write_config(options: argparse.Namespace) -> Path:
    """Write the config of this run; return its path."""
    given = options.config or ROOT / "configs" / ("deepspeed-moe.json" if options.eplb else "deepspeed-dense.json")
    config = json.loads(given.read_text())
    if options.schedule == PLAIN:
        config.pop("counterflow", None)
    elif options.schedule is not None:
        config["counterflow"] = config.get("counterflow", {}) | {"schedule": options.schedule}
    path: Path = options.dir / "deepspeed.json"
    path.write_text(json.dumps(config, indent=2) + "\n")
    return path


def choose_platform(options: argparse.Namespace) -> str:
    """Let DeepSpeed run where it is asked to; return where that is."""
    import torch

    on_cpu = options.platform == "cpu" or (options.platform == "auto" and torch.cuda.device_count() < options.ranks)
    if on_cpu:
        os.environ |= {"DS_ACCELERATOR": "cpu", "TORCHDYNAMO_DISABLE": "1"}
    return "the CPU" if on_cpu else "GPUs"


def read_checkpoint(directory: Path) -> int:
    """Return the step of the last whole checkpoint, 0 where there is none."""
    latest = directory / "checkpoints" / "latest"
    return int(latest.read_text().strip().removeprefix("global_step")) if latest.exists() else 0


def main() -> None:
    """Train for ``--iters`` steps beyond the last multiple of it that a checkpoint has reached."""
    options = parse_arguments()
    if options.iters < 1:
        raise SystemExit(f"train: --iters {options.iters} given; it must be at least 1")
    if options.fresh:
        for name in ("checkpoints", "logs"):
            shutil.rmtree(options.dir / name, ignore_errors=True)
    text, platform = prepare_text(options.dir / "data"), choose_platform(options)
    config = write_config(options)
    schedule = json.loads(config.read_text()).get("counterflow", {}).get("schedule", "DeepSpeed's own")
    done = read_checkpoint(options.dir)
    target = (done // options.iters + 1) * options.iters
    print(f"schedule {schedule}, {options.ranks} ranks on {platform}, 2 pipeline ranks", flush=True)
    print(f"text: Python's standard library, {text.stat().st_size / 1e6:.0f} million bytes, one token each", flush=True)
    if done:
        print(f"resuming from the checkpoint of step {done}, on to step {target}", flush=True)
    experts = ["--experts", EXPERTS] if "expert_parallel" in json.loads(config.read_text()) else []
    flags = [
        *experts,
        "--text",
        text,
        "--save",
        options.dir / "checkpoints",
        "--steps",
        target,
        "--save-interval",
        options.save_interval,
    ]
    launcher = [sys.executable, "-W", "ignore", "-m", "counterflow.launch", str(HERE / "pretrain.py")]
    reached = [done]

    def show(line: str) -> None:
        if match := SHOWN.match(line):
            reached[0] = int(match["step"])
            print(line, flush=True)
        elif match := BALANCED.match(line):
            print(match[1], flush=True)
        elif line.startswith("counterflow: "):
            print(line.removeprefix("counterflow: "), flush=True)

    try:
        command = [*launcher, "--deepspeed_config", str(config), *map(str, flags)]
        # DeepSpeed logs on the first rank.
        logs = start_ranks(options.ranks, command, options.dir / "logs", show, speaker=0)
    except RankError as error:
        kept = read_checkpoint(options.dir)
        resume = f"; the checkpoint of step {kept} is whole, run again to resume from it" if kept else ""
        print(f"train: {error} after step {reached[0]}{resume}", file=sys.stderr)
        raise SystemExit(1) from None
    print(
        f"checkpoint of step {read_checkpoint(options.dir)}: {options.dir / 'checkpoints'}; run again to train on; logs: {logs}"
    )


if __name__ == "__main__":
    main()
