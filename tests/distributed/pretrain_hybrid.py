"""The example's training script with Megatron's HybridModel in place of its GPTModel."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples" / "pretrain_moe"))

from megatron.training.argument_utils import hybrid_config_from_args

import pretrain_moe as example


def main() -> None:
    example.build_datasets.is_distributed = True
    args = example.parse_and_validate_args()
    config = example.pretrain_cfg_container_from_args(args, hybrid_config_from_args(args))
    example.pretrain(config, example.build_datasets, example.ModelType.encoder_or_decoder, example.forward_step)


if __name__ == "__main__":
    main()
