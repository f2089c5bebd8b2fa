"""A Megatron training script: a GPT-MoE model on a byte-level data set.

It knows nothing of counterflow: run it alone, or with the plugin on by
``torchrun … -m counterflow.launch pretrain_moe.py …``. `train.py` beside it prepares the data and
starts it on this machine; `configs/deepseek-v3-small.args` holds the model's flags.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.enums import ModelType
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
from megatron.core.utils import get_attr_wrapped_model
from megatron.training import get_args, pretrain
from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
from megatron.training.arguments import parse_and_validate_args
from megatron.training.utils import get_blend_and_blend_per_split, is_first_or_last_pipeline_stage


def compute_loss(loss_mask: Any, output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    """Return the summed loss, the number of tokens and both for the log; output is [batch, seq]."""
    mask = loss_mask.reshape(-1).float()
    loss = torch.sum(output.reshape(-1).float() * mask)
    tokens = mask.sum().to(torch.int)
    return loss, tokens, {"lm loss": torch.stack([loss.detach(), tokens.to(loss.dtype)])}


def forward_step(
    data_iterator: Iterator[dict[str, torch.Tensor]], model: Any, return_schedule_plan: bool = False
) -> tuple[torch.Tensor, Any]:
    """Run one micro-batch through one model chunk, or return the plan to do so; only the first and the last stage read data."""
    batch: dict[str, torch.Tensor | None] = dict.fromkeys(("tokens", "labels", "loss_mask", "position_ids"))
    if is_first_or_last_pipeline_stage(get_attr_wrapped_model(model, "vp_stage")):
        read = next(data_iterator)
        batch = {name: read[name].cuda(non_blocking=True) for name in batch}
    run = model.build_schedule_plan if return_schedule_plan else model
    output = run(batch["tokens"], batch["position_ids"], None, labels=batch["labels"], loss_mask=batch["loss_mask"])
    return output, partial(compute_loss, batch["loss_mask"])


def build_datasets(samples: list[int], vp_stage: int | None = None) -> Any:
    """Return the training, validation and test sets of ``samples`` sequences each."""
    args = get_args()
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    config = GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        path_to_cache=args.data_cache_path,
        tokenizer=build_tokenizer(args),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    is_built_here = partial(is_first_or_last_pipeline_stage, vp_stage)
    return BlendedMegatronDatasetBuilder(GPTDataset, samples, is_built_here, config).build()


def main() -> None:
    """Train as the command line says."""
    build_datasets.is_distributed = True  # type: ignore[attr-defined]
    args = parse_and_validate_args()
    config = pretrain_cfg_container_from_args(args, gpt_config_from_args(args))
    pretrain(config, build_datasets, ModelType.encoder_or_decoder, forward_step)


if __name__ == "__main__":
    main()
