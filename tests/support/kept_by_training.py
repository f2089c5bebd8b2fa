"""Train a small model for real, one rank on the CPU, and print the bytes that autograd keeps between forward and backward.

Reads ``{"flags", "vocab"}`` from stdin. Nothing of it is fake: real tensors, real routing, a loss and a backward pass.
"""

import json
import os
import sys
import warnings


def main() -> None:
    warnings.simplefilter("ignore")
    job = json.load(sys.stdin)
    sys.argv = ["pretrain_gpt.py", *job["flags"]]
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
    from counterflow.platform import install_cpu

    install_cpu(engine=True)
    import torch
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
    from megatron.training.arguments import core_transformer_config_from_args, parse_args, validate_args

    from counterflow.megatron.dry_run.child import build_stage, leave_out_angles
    from counterflow.trainer.fake_rank import Kept

    args = parse_args()
    validate_args(args)
    args.padded_vocab_size = job["vocab"]
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel(create_gloo_process_groups=False)
    model_parallel_cuda_manual_seed(1)
    torch.manual_seed(job["seed"])
    model = build_stage(args, core_transformer_config_from_args(args), 0, fused_attention=False)
    kept = Kept(model)
    leave_out_angles(model, kept.own)
    words = torch.randint(args.vocab_size, (args.micro_batch_size, args.seq_length))
    places = torch.arange(args.seq_length)[None].expand_as(words)
    with kept.watch():
        loss = model(words, places, None, labels=words)
    size = kept.size
    loss.float().mean().backward()
    with_gradient = sum(one.grad is not None for one in model.parameters())
    print(json.dumps({"kept": size, "loss": loss.float().mean().item(), "gradients": with_gradient}))


if __name__ == "__main__":
    main()
