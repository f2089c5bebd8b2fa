"""One process: dry runs of a PipelineModule as one rank of many, and the same model run for real; prints what was kept."""

import json
import os
import sys
from typing import Any

import torch

from tests.support import ROOT


def run(job: dict[str, Any]) -> None:
    import deepspeed

    from counterflow.deepspeed.dry_run import measure_module
    from counterflow.errors import PlanError
    from counterflow.trainer.fake_rank import Kept

    sys.path.insert(0, str(ROOT / "examples" / "pretrain_deepspeed"))
    import pretrain

    words = torch.zeros(2, pretrain.LENGTH, dtype=torch.long)
    found: dict[str, Any] = {}
    for stages, ranks in job["grids"]:
        holds = measure_module(lambda stages=stages: pretrain.build_model(stages, 0), ranks, words, words)
        found[f"{stages} of {ranks}"] = [[one.parameters, one.kept] for one in holds]
    halves = measure_module(lambda: pretrain.build_model(1, 0), 1, words, words, torch.bfloat16)
    found["bf16"] = [[one.parameters, one.kept] for one in halves]
    try:
        measure_module(lambda: pretrain.build_model(2, 4), 8, words, words)
    except PlanError as error:
        found["routed"] = str(error)
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    for seed in job["seeds"]:
        torch.manual_seed(seed)
        model = pretrain.build_model(1, 0)
        kept = Kept(model)
        drawn = torch.randint(pretrain.BYTES, words.shape)
        with kept.watch():
            loss = model.loss_fn(model(drawn), drawn)
        found[f"real {seed}"] = [sum(one.numel() for one in model.parameters()), kept.size]
        loss.backward()
    print(json.dumps(found))
