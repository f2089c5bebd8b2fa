"""The example's training script with micro-batches of several lengths, which have no flag in Megatron."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples" / "pretrain_moe"))

import pretrain_moe as example


def cut(batches: Iterator[dict[str, torch.Tensor]]) -> Iterator[dict[str, torch.Tensor]]:
    """Yield the batches at 16, 24 or 32 tokens: the first and the last stage see the same tokens, and so agree."""
    while True:
        batch = next(batches)
        length = 16 + 8 * (int(batch["tokens"].sum()) % 3)
        yield {name: tensor[:, :length] for name, tensor in batch.items() if name != "attention_mask"}


def forward_step(data_iterator: Any, model: Any) -> tuple[torch.Tensor, Any]:
    return example.forward_step(cut(data_iterator) if data_iterator is not None else None, model)


def main() -> None:
    example.build_datasets.is_distributed = True
    args = example.parse_and_validate_args()
    args.variable_seq_lengths = True
    config = example.pretrain_cfg_container_from_args(args, example.gpt_config_from_args(args))
    example.pretrain(config, example.build_datasets, example.ModelType.encoder_or_decoder, forward_step)


if __name__ == "__main__":
    main()
