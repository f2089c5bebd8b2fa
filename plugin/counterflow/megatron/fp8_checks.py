"""Refuse what FP8 products cannot take, before any process group is made: sizes that do not divide, a GPU without the recipe."""

import importlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from counterflow.errors import OptionError
from counterflow.megatron.batches import get_argument as _get

# A GPU's products take sizes in multiples of this; MXFP8 has a scale for each 32 values.
MULTIPLES = {"mxfp8": 32}
MULTIPLE = 16
# And of what one rank has of a sequence that is shared by a tensor-parallel group, which is gathered before the product.
SHARD_MULTIPLE = 8
# How Transformer Engine is asked whether it has a recipe here, and which recipes need less.
QUESTIONS = {"mxfp8": "is_mxfp8_available", "blockwise": "is_fp8_block_scaling_available"}
OTHERS = {"mxfp8": "delayed, tensorwise or blockwise", "blockwise": "delayed or tensorwise"}


class Size(NamedTuple):
    """A size that FP8 has to take: what it is, and of which flag or flags."""

    value: int
    name: str


def check_fp8(args: Any) -> None:
    """Check flat ``args`` of a run in FP8 on Transformer Engine's layers. Raises `OptionError`."""
    given, recipe = f"--fp8-format {args.fp8}", _get(args, "fp8_recipe", "delayed")
    _check_support(recipe)
    if getattr(args, "fp8_param_gather", None) and getattr(args, "use_cpu_initialization", None):
        raise OptionError(
            "--fp8-param-gather with --use-cpu-initialization: weights are quantized before they are filled, so the first step "
            "is NaN: drop --use-cpu-initialization"
        )
    multiple = MULTIPLES.get(recipe, MULTIPLE)
    of_recipe = f"{given} --fp8-recipe {recipe}" if recipe in MULTIPLES else given
    for size in [*_list_sizes(args), *_list_tokens(args)]:
        if size.value % multiple:
            raise OptionError(f"{of_recipe} takes sizes in multiples of {multiple}, {size.name} is {_suggest(size, multiple)}")
    _check_shards(args, given)


def _suggest(size: Size, multiple: int) -> str:
    if " " in size.name:
        return f"{size.value}: change one of these"
    low = size.value // multiple * multiple
    return f"{size.value}: set it to {f'{low} or {low + multiple}' if low else multiple}"


def _check_support(recipe: str) -> None:
    """Ask Transformer Engine, where it can be imported, whether this GPU and CUDA have the recipe."""
    try:
        manager = importlib.import_module("transformer_engine.pytorch.fp8").FP8GlobalStateManager
    except ImportError:
        return
    ask = getattr(manager, QUESTIONS.get(recipe, "is_fp8_available"), None)
    is_there, reason = ask() if ask is not None else (False, "This version of Transformer Engine does not have it.")
    if not is_there:
        capability = ".".join(map(str, torch.cuda.get_device_capability()))
        remedy = f"give --fp8-recipe {OTHERS[recipe]}" if recipe in OTHERS else "drop --fp8-format"
        raise OptionError(
            f"--fp8-recipe {recipe} cannot run here, on compute capability {capability} and CUDA {torch.version.cuda}: "
            f"{reason.rstrip('.')}: {remedy}"
        )


def _list_sizes(args: Any) -> Iterator[Size]:
    """Yield what a rank has of each size of a product's weight."""
    tensor = _get(args, "tensor_model_parallel_size", 1)
    of_experts = _get(args, "expert_tensor_parallel_size", tensor)
    for flag, ranks in (
        ("--hidden-size", 1),
        ("--ffn-hidden-size", tensor),
        ("--moe-ffn-hidden-size", of_experts),
        ("--moe-shared-expert-intermediate-size", tensor),
        ("--moe-latent-size", 1),
    ):
        if size := getattr(args, flag[2:].replace("-", "_"), None):
            yield Size(size // ranks, flag if ranks == 1 else f"{flag} {size}{_over(ranks)}")
    yield from (_list_latent if getattr(args, "multi_latent_attention", None) else _list_attention)(args, tensor)
    if (words := getattr(args, "vocab_size", None)) and getattr(args, "fp8_output_proj", None):
        step = _get(args, "make_vocab_size_divisible_by", 128) * tensor
        padded = -(-words // step) * step
        yield Size(padded // tensor, f"--vocab-size {words} padded to {padded} (--make-vocab-size-divisible-by){_over(tensor)}")


def _over(ranks: int, kind: str = "TP") -> str:
    return f" / {kind} {ranks}" if ranks > 1 else ""


def _list_attention(args: Any, tensor: int) -> Iterator[Size]:
    heads, hidden = getattr(args, "num_attention_heads", None), getattr(args, "hidden_size", None)
    if not heads or not hidden:
        return
    channels = _get(args, "kv_channels", hidden // heads)
    is_grouped = getattr(args, "group_query_attention", None)
    groups = max(_get(args, "num_query_groups", heads), tensor) if is_grouped else heads
    of_heads = f"--num-attention-heads {heads} x --kv-channels {channels}{_over(tensor)}"
    yield Size(heads * channels // tensor, of_heads)
    yield Size(
        2 * groups * channels // tensor, f"keys and values, 2 x {groups} groups x --kv-channels {channels}{_over(tensor)},"
    )


def _list_latent(args: Any, tensor: int) -> Iterator[Size]:
    """Yield the sizes of multi-latent attention, as far as they are given."""
    heads = _get(args, "num_attention_heads", tensor)
    for flag in ("--q-lora-rank", "--kv-lora-rank", "--qk-pos-emb-head-dim"):
        if size := getattr(args, flag[2:].replace("-", "_"), None):
            yield Size(size, flag)
    if values := getattr(args, "v_head_dim", None):
        yield Size(heads * values // tensor, f"--num-attention-heads {heads} x --v-head-dim {values}{_over(tensor)}")
    plain, turned = getattr(args, "qk_head_dim", None), getattr(args, "qk_pos_emb_head_dim", None)
    if plain and turned:
        name = f"--num-attention-heads {heads} x (--qk-head-dim {plain} + --qk-pos-emb-head-dim {turned}){_over(tensor)}"
        yield Size(heads * (plain + turned) // tensor, name)


def _count_tokens(args: Any) -> tuple[int, str]:
    sequence, samples = getattr(args, "seq_length", None), getattr(args, "micro_batch_size", None)
    parts = _get(args, "context_parallel_size", 1)
    if not sequence or not samples:
        return 0, ""
    return sequence * samples // parts, f"--micro-batch-size {samples} x --seq-length {sequence}{_over(parts, 'CP')}"


def _list_tokens(args: Any) -> Iterator[Size]:
    """Yield the tokens of a micro-batch; those of experts are padded by Megatron."""
    tokens, name = _count_tokens(args)
    if tokens:
        yield Size(tokens, name)


def _check_shards(args: Any, given: str) -> None:
    tokens, name = _count_tokens(args)
    tensor = _get(args, "tensor_model_parallel_size", 1)
    if getattr(args, "sequence_parallel", None) and tokens // tensor % SHARD_MULTIPLE:
        raise OptionError(
            f"{given} takes a rank's part of a sequence in multiples of {SHARD_MULTIPLE}, {name}{_over(tensor)} is "
            f"{tokens // tensor}: change one of these, or drop --sequence-parallel"
        )
