"""A script over Hugging Face's Accelerate that knows nothing of Counterflow: it trains the MoE model of another worker.

``accelerate_worker.py CONFIG.json OUT.json STEPS``: the config is DeepSpeed's; rank 0 writes losses.
"""

import json
import os
import sys
from pathlib import Path

import torch
from accelerate import Accelerator, DeepSpeedPlugin
from accelerate.utils import DummyOptim


def train(config: str, steps: int) -> list[float]:
    """Return the loss of each step, a mean over ranks."""
    from deepspeed_experts_worker import Plain, build, compute_loss, draw_batches, list_layers

    accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config))
    made = Plain(*(build(layer, 11 + index) for index, layer in enumerate(list_layers(0))))
    model, optimizer = accelerator.prepare(made, DummyOptim(list(made.parameters())))
    batches = draw_batches(model, accelerator.process_index, accelerator.num_processes)
    done = []
    for _ in range(steps):
        losses = []
        for _ in range(accelerator.gradient_accumulation_steps):
            with accelerator.accumulate(model):
                tokens, labels = next(batches)
                loss = compute_loss(model(tokens), labels)
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.detach())
        done.append(float(accelerator.reduce(torch.stack(losses).mean(), "mean")))
    return done


def run(argument: list[str]) -> None:
    """Run this file as a script, under the launcher; ``argument`` are its own arguments."""
    from counterflow.launch import main

    os.environ |= {"ACCELERATE_USE_DEEPSPEED": "true"}
    main([__file__, *argument])


if __name__ == "__main__":
    losses = train(sys.argv[1], int(sys.argv[3]))
    if torch.distributed.get_rank() == 0:
        Path(sys.argv[2]).write_text(json.dumps(losses))
