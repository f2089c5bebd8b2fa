"""The dry run's own process: Megatron's model as one rank of many, without its data, without the other ranks.

Reads a job as JSON from stdin, prints what each stage holds as JSON on the last line of stdout. A fake process group answers
every collective at once; fake tensors have shapes and no storage. Three things are supplied: how many tokens come to a rank's
experts, attention's kernel, of which is counted what it keeps, and the order of tokens behind the exchange.
"""

import json
import os
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from counterflow.planner.activations import DELTA_CHUNK

# What the formula calls a stage's parts.
EXPERT, DENSE = "experts", "dense"


def main() -> None:
    """Run the job of stdin."""
    print(json.dumps(run_job(json.load(sys.stdin))))


def run_job(job: dict[str, Any]) -> list[dict[str, Any]]:
    """Be Megatron with a job's flags; return what each of its stages holds. The process is good for nothing else afterwards."""
    warnings.simplefilter("ignore")
    sys.argv = ["pretrain_gpt.py", *job["flags"]]
    os.environ |= {"RANK": "0", "WORLD_SIZE": str(job["world"]), "CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    from counterflow.platform import install_cpu

    install_cpu(engine=job["engine"])
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker
    from megatron.training.arguments import core_transformer_config_from_args, parse_args, validate_args

    args = parse_args()
    validate_args(args)
    args.padded_vocab_size = job["vocab"]
    # Nothing is drawn, and the states of generators are no numbers here.
    CudaRNGStatesTracker.fork = lambda self, name="": nullcontext()
    found = []
    for stage, rank in job["stages"]:
        start = time.monotonic()
        with as_rank(rank, args):
            config = core_transformer_config_from_args(args)
            supply_tokens(job["imbalance"])
            if job["fused_rotation"]:
                supply_rotation()
            supply_linear_attention()
            model = build_stage(args, config, stage // args.pipeline_model_parallel_size, job["fused_attention"])
            found.append({"stage": stage, **count_parameters(model), **run_stage(model, args, config), "seconds": 0.0})
            found[-1]["seconds"] = time.monotonic() - start
    return found


@contextmanager
def as_rank(rank: int, args: Any) -> Iterator[None]:
    """Be one global rank of many, with all of Megatron's process groups, under fake tensors."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.testing._internal.distributed.fake_pg import FakeStore

    new_group = torch.distributed.new_group
    torch.distributed.new_group = lambda *given, **named: new_group(*given, **{**named, "backend": "fake"})
    torch.distributed.init_process_group("fake", world_size=args.world_size, rank=rank, store=FakeStore())
    try:
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=args.tensor_model_parallel_size,
            pipeline_model_parallel_size=args.pipeline_model_parallel_size,
            virtual_pipeline_model_parallel_size=args.virtual_pipeline_model_parallel_size,
            context_parallel_size=args.context_parallel_size,
            expert_model_parallel_size=args.expert_model_parallel_size,
            expert_tensor_parallel_size=args.expert_tensor_parallel_size,
            create_gloo_process_groups=False,
        )
        model_parallel_cuda_manual_seed(1)
        with FakeTensorMode(allow_non_fake_inputs=True):
            yield
    finally:
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()
        torch.distributed.new_group = new_group


def supply_tokens(imbalance: float) -> None:
    """Let dispatchers and experts take counts of tokens that are supplied: ``imbalance`` times an even share for this rank."""
    from megatron.core.transformer.moe import token_dispatcher
    from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    def preprocess(self: Any, routing_map: torch.Tensor) -> Any:
        sent = routing_map.size(0) * self.config.moe_router_topk
        received = round(sent * imbalance)
        self.num_out_tokens = sent
        self.input_splits = share_out(sent, self.ep_size)
        self.output_splits = share_out(received, self.ep_size)
        self.output_splits_tp = Counts([received] * self.tp_size) if self.tp_size > 1 else None
        counts = Counts(share_out(received * self.tp_size, self.num_local_experts))
        self.num_global_tokens_per_local_expert = torch.zeros(self.ep_size * self.tp_size, self.num_local_experts)
        return counts

    def keep_numbers(multiply: Any) -> Any:
        def multiply_by_counts(self: Any, tokens: torch.Tensor, counts: Any, **named: Any) -> Any:
            # Real numbers among fake tensors, since they are read.
            with unset_fake_temporarily():
                counts = torch.tensor(list(counts))
            return multiply(self, tokens, counts, **named)

        return multiply_by_counts

    def sort(tokens: torch.Tensor, *order: Any, probs: torch.Tensor | None = None, **ways: Any) -> tuple[Any, Any]:
        # What sorting leaves behind: a copy.
        return torch.cat([tokens[:0], tokens]), None if probs is None else torch.cat([probs[:0], probs])

    MoEAlltoAllTokenDispatcher.preprocess = preprocess
    MoEAlltoAllTokenDispatcher._maybe_dtoh_and_synchronize = lambda self, point, counts=None: counts
    token_dispatcher.sort_chunks_by_idxs = sort
    if (engine := sys.modules.get("transformer_engine.pytorch")) is not None:
        engine.GroupedLinear.forward = keep_numbers(engine.GroupedLinear.forward)


def supply_rotation() -> None:
    """Let rotary embeddings keep what their fused kernel keeps."""
    from megatron.core.models.common.embeddings import rope_utils

    rope_utils._apply_rotary_pos_emb_bshd = lambda tokens, angles, *more, **named: _Rotation.apply(tokens, angles)


def supply_linear_attention() -> None:
    """Let the gated delta rule keep what its kernels keep: flash-linear-attention's, and a compiled norm with its gate."""
    from megatron.core.ssm.gated_delta_net import common, gdn

    def gate_norm(self: Any, out: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        gated: torch.Tensor = _Keep.apply(self.out_norm(out.reshape(-1, out.shape[-1])), gate.reshape(-1, gate.shape[-1]))
        return gated

    def find_decay(self: Any, log: torch.Tensor, bias: torch.Tensor, alpha: torch.Tensor, beta: torch.Tensor) -> Any:
        return _Keep.apply(alpha, beta).float(), torch.sigmoid(beta)

    common.HAVE_FLA = True
    common.l2norm = _Unit.apply
    gdn.causal_conv1d = lambda x, weight, **named: (_Keep.apply(x, weight), None)
    gdn.chunk_gated_delta_rule = lambda q, k, v, g, beta, **named: (_Delta.apply(q, k, v, g, beta), None)
    common._GDNBase._apply_gated_norm = gate_norm
    common._GDNBase._compute_g_and_beta = find_decay


class Counts(list[int]):
    """Counts that answer like a tensor on the host."""

    def tolist(self) -> list[int]:
        """Return them."""
        return list(self)


def share_out(total: int, parts: int) -> list[int]:
    """Return ``total`` in ``parts`` parts as equal as can be."""
    small, more = divmod(total, parts)
    return [small + (part < more) for part in range(parts)]


class _Attention(torch.autograd.Function):
    """What a fused attention keeps: queries, keys, values, its output, and a number for each token and head."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Take ``[tokens, batch, heads, size]``; return ``[tokens, batch, heads x size of a value]``."""
        query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
        tokens, batch, heads, _ = query.shape
        out = query.new_empty(tokens, batch, heads * value.shape[-1])
        ctx.save_for_backward(query, key, value, out, query.new_empty(batch, heads, tokens, dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """Never run: only what is kept for it is counted."""
        raise NotImplementedError


class _Counted(torch.autograd.Function):
    """A kernel that is not run."""

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """Never run: only what is kept for it is counted."""
        raise NotImplementedError


class _Keep(_Counted):
    """A kernel that keeps its inputs and returns something like the first."""

    @staticmethod
    def forward(ctx: Any, first: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        """Return a new tensor of the first one's shape."""
        ctx.save_for_backward(first, *others)
        return torch.empty_like(first, memory_format=torch.contiguous_format)


class _Unit(_Counted):
    """A norm of heads' vectors to length 1: it keeps its output and a number for each vector."""

    @staticmethod
    def forward(ctx: Any, vectors: torch.Tensor) -> torch.Tensor:
        """Return a new tensor of the same shape."""
        out = torch.empty_like(vectors)
        ctx.save_for_backward(out, vectors.new_empty(vectors.shape[:-1], dtype=torch.float32))
        return out


class _Delta(_Counted):
    """The gated delta rule in chunks: it keeps its inputs and, for each token and head, a row of a chunk's matrix.

    The states of chunks are computed again in its backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, decay: torch.Tensor, beta: torch.Tensor
    ) -> torch.Tensor:
        """Take ``[batch, tokens, heads, size]``; return an output like ``value``."""
        rows = key.new_empty(*key.shape[:-1], DELTA_CHUNK)
        ctx.save_for_backward(query, key, value, torch.empty_like(decay), beta, rows)
        return torch.empty_like(value)


class _Rotation(torch.autograd.Function):
    """A rotary embedding as one kernel: it keeps the angles alone, which all layers share."""

    @staticmethod
    def forward(ctx: Any, tokens: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
        """Return a new tensor of the same shape."""
        ctx.save_for_backward(angles)
        return torch.empty_like(tokens, memory_format=torch.contiguous_format)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """Never run."""
        raise NotImplementedError


def build_stage(args: Any, config: Any, vp_stage: int, fused_attention: bool) -> torch.nn.Module:
    """Build a stage as Megatron builds it for this rank."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_mtp_block_spec

    is_engine = args.transformer_impl == "transformer_engine"
    vp = vp_stage if args.virtual_pipeline_model_parallel_size is not None else None
    rank, size = parallel_state.get_pipeline_model_parallel_rank(), args.pipeline_model_parallel_size
    chunks = args.virtual_pipeline_model_parallel_size or 1
    spec, last = _get_specs(args, config, is_engine, vp)
    mtp = None
    if args.mtp_num_layers:
        mtp = get_gpt_mtp_block_spec(config, last, use_transformer_engine=is_engine, vp_stage=vp)
    if fused_attention:
        for layer in spec.layer_specs:
            replace_attention(layer)
        for layer in mtp.layer_specs if mtp is not None else ():
            replace_attention(layer.submodules.mtp_model_layer)
    # As Megatron's wrapper turns into this format what a module makes in another.
    torch.set_default_dtype(config.params_dtype)
    model: torch.nn.Module = GPTModel(
        config=config,
        transformer_layer_spec=spec,
        vocab_size=args.padded_vocab_size,
        max_sequence_length=args.max_position_embeddings,
        pre_process=rank == 0 and vp_stage == 0,
        post_process=rank == size - 1 and vp_stage == chunks - 1,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type=args.position_embedding_type,
        mtp_block_spec=mtp,
        vp_stage=vp,
        parallel_output=True,
    )
    torch.set_default_dtype(torch.float32)
    return model


def _get_specs(args: Any, config: Any, is_engine: bool, vp_stage: int | None) -> tuple[Any, Any]:
    """Return the specs of a stage's block and of the model's last layer: the stage may hold none of its own."""
    if config.experimental_attention_variant is not None:
        from megatron.core.models.gpt import experimental_attention_variant_module_specs as specs

        block = specs.get_transformer_block_with_experimental_attention_variant_spec(config, vp_stage=vp_stage)
        return block, specs.get_transformer_layer_with_experimental_attention_variant_spec(config)[-1]
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec, get_gpt_decoder_layer_specs

    block = get_gpt_decoder_block_spec(config, use_transformer_engine=is_engine, vp_stage=vp_stage)
    return block, get_gpt_decoder_layer_specs(config, is_engine, args.normalization)[-1]


class CoreAttention(torch.nn.Module):
    """A core attention whose kernel is not run."""

    def __init__(self, config: Any, *given: Any, **named: Any) -> None:
        super().__init__()
        if config.softmax_type == "learnable":
            self.softmax_offset = torch.nn.Parameter(torch.zeros(config.num_attention_heads // config.tensor_model_parallel_size))

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *more: Any, **named: Any) -> torch.Tensor:
        """Return an output of the right shape that keeps what a fused kernel keeps."""
        out: torch.Tensor = _Attention.apply(query, key, value)
        return out


def replace_attention(layer: Any) -> None:
    """Put `CoreAttention` into the spec of a layer."""
    inner: Any = getattr(layer.submodules.self_attention, "submodules", None)
    if hasattr(inner, "core_attention"):
        inner.core_attention = CoreAttention


def count_parameters(model: torch.nn.Module) -> dict[str, int]:
    """Return the numbers of dense and of expert parameters; a weight that two modules share counts once."""
    found = {EXPERT: 0, DENSE: 0}
    for parameter in model.parameters():
        # Megatron marks what is reduced over other ranks than the rest.
        found[DENSE if getattr(parameter, "allreduce", True) else EXPERT] += parameter.numel()
    return found


def leave_out_angles(model: torch.nn.Module, own: set[int]) -> None:
    """Add rotary embeddings' angles to the storages ``own`` when they are made: one of each serves all micro-batches."""

    def note(module: torch.nn.Module, given: Any, out: Any) -> None:
        for one in out if isinstance(out, tuple) else (out,):
            if isinstance(one, torch.Tensor):
                own.add(one.untyped_storage()._cdata)

    for name, module in model.named_modules():
        if name.split(".")[-1] == "rotary_pos_emb":
            module.register_forward_hook(note)


def run_stage(model: Any, args: Any, config: Any) -> dict[str, int]:
    """Run a micro-batch forward through the stage; return the bytes that autograd keeps for its backward pass."""
    model.train()
    tokens, batch = args.seq_length // args.context_parallel_size, args.micro_batch_size
    part = tokens // (args.tensor_model_parallel_size if args.sequence_parallel else 1)
    own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    leave_out_angles(model, own)
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage
        return tensor

    words = torch.zeros(batch, tokens, dtype=torch.long)
    places = torch.arange(tokens)[None].expand(batch, tokens)
    dtype = config.params_dtype
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        if not model.pre_process:
            model.set_input_tensor(torch.empty(part, batch, args.hidden_size, dtype=dtype, requires_grad=True))
        out = model(words, places, None, labels=words if model.post_process or getattr(model, "mtp_process", False) else None)
    sizes = [storage.nbytes() for storage in kept.values()]
    del out
    return {"kept": sum(sizes)}


if __name__ == "__main__":
    main()
