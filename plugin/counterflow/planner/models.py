"""Model shapes: what each layer of a model holds, and how many parameters that is.

A shape comes from Megatron's argument names (`build_model`); the names of known models (``models.toml``) and Hugging Face's
``config.json`` (`counterflow.planner.hf`) are turned into these arguments first, so there is one way to count.
"""

import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from counterflow.bounds import show
from counterflow.errors import PlanError
from counterflow.planner.config import ModelSection, fold, suggest
from counterflow.planner.hf import read_hf

MHA, GQA, MLA, LINEAR = "mha", "gqa", "mla", "linear"
# Megatron's own default of --make-vocab-size-divisible-by.
VOCAB_MULTIPLE = 128
MOST_LAYERS = 10_000
# Dimensions of an attention head in most models.
HEAD_SIZE = 128


@dataclass(frozen=True)
class AttentionShape:
    """An attention of ``heads`` query heads; dimensions are per head.

    ``kind``: ``mha`` and ``gqa`` (``kv_heads`` shared keys and values), ``mla`` (queries and keys of ``head_dim`` = ``qk_nope`` +
    ``rope_dim``; down-projected to ``q_lora``, 0 for none, and ``kv_lora``), ``linear`` (gated delta rule: ``kv_heads`` heads of
    keys, ``heads`` of values, a convolution of ``conv`` steps). ``window`` tokens are seen, None for all.
    """

    kind: str
    heads: int
    kv_heads: int
    head_dim: int
    v_head_dim: int
    q_lora: int = 0
    kv_lora: int = 0
    rope_dim: int = 0
    window: int | None = None
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: bool = False
    output_gate: bool = False
    sinks: bool = False
    conv: int = 0

    @property
    def qk_nope(self) -> int:
        """Dimensions of a query or key head without the position's part."""
        return self.head_dim - self.rope_dim


@dataclass(frozen=True)
class FFNShape:
    """A feed-forward of inner size ``size``; ``gated`` (SwiGLU) has a third matrix."""

    size: int
    gated: bool
    bias: bool = False

    def count_parameters(self, hidden: int) -> int:
        """Return the number of its parameters."""
        first = (2 if self.gated else 1) * self.size
        return hidden * (first + self.size) + (first + hidden if self.bias else 0)


@dataclass(frozen=True)
class MoEShape:
    """``experts`` routed experts of shape ``expert``, ``topk`` of them a token; all tokens pass the feed-forward ``shared``."""

    experts: int
    topk: int
    expert: FFNShape
    shared: FFNShape | None = None
    shared_gate: bool = False
    router_bias: bool = False
    groups: int | None = None
    group_topk: int | None = None


@dataclass(frozen=True)
class LayerShape:
    """One transformer layer: attention, and a dense feed-forward (``ffn``) or experts (``moe``)."""

    hidden: int
    attention: AttentionShape
    ffn: FFNShape | None
    moe: MoEShape | None
    norm_bias: bool = False

    @cached_property
    def parameters(self) -> dict[str, int]:
        """Parameters by part: ``attention``, ``norms``, ``dense``, ``router``, ``shared``, ``experts`` (all of them)."""
        h, moe = self.hidden, self.moe
        norm = 2 * h if self.norm_bias else h
        parts = {
            "attention": _count_attention(self.attention, h),
            "norms": 2 * norm,
            "dense": 0,
            "router": 0,
            "shared": 0,
            "experts": 0,
        }
        if self.ffn is not None:
            parts["dense"] = self.ffn.count_parameters(h)
        if moe is not None:
            parts["router"] = moe.experts * (h + moe.router_bias)
            parts["experts"] = moe.experts * moe.expert.count_parameters(h)
            if moe.shared is not None:
                parts["shared"] = moe.shared.count_parameters(h) + (h if moe.shared_gate else 0)
        return parts

    def count_parameters(self) -> int:
        """Return the number of parameters of the whole layer."""
        return sum(self.parameters.values())

    def count_active(self) -> int:
        """Return the number of parameters that one token passes."""
        parts = self.parameters
        inactive = 0 if self.moe is None else parts["experts"] * (self.moe.experts - self.moe.topk) // self.moe.experts
        return sum(parts.values()) - inactive


@dataclass(frozen=True)
class ModelShape:
    """A language model: embedding, ``layers``, norm, head, and ``mtp_layers`` multi-token-prediction layers of shape ``mtp``.

    ``positions`` learned position embeddings, 0 with rotary ones. ``assumed`` lists in words what was not stated.
    """

    name: str
    hidden: int
    vocab: int
    layers: tuple[LayerShape, ...]
    mtp: LayerShape | None = None
    mtp_layers: int = 0
    tied: bool = False
    positions: int = 0
    vocab_multiple: int = VOCAB_MULTIPLE
    assumed: tuple[str, ...] = ()

    @cached_property
    def counts(self) -> tuple[tuple[LayerShape, int], ...]:
        """Each different layer, and how often the model has it."""
        return count_equal(self.layers)

    def pad_vocab(self, tp: int) -> int:
        """Return the rows of the embedding that ``tp`` tensor-parallel ranks share, as Megatron pads them."""
        multiple = self.vocab_multiple * tp
        return -(-self.vocab // multiple) * multiple

    @property
    def norm_size(self) -> int:
        """Parameters of one norm."""
        return self.hidden * (2 if self.layers[0].norm_bias else 1)

    @property
    def mtp_size(self) -> int:
        """Parameters of one MTP layer: its layer, two norms before and one behind, and the projection of both halves."""
        return 0 if self.mtp is None else self.mtp.count_parameters() + 3 * self.norm_size + 2 * self.hidden**2

    def count_parameters(self, mtp: bool = False) -> int:
        """Return the number of parameters, unpadded; with ``mtp`` those of the MTP layers too (embedding and head are shared)."""
        embedding = self.vocab * self.hidden
        ends = embedding * (1 if self.tied else 2) + self.positions * self.hidden + self.norm_size
        return ends + sum(layer.count_parameters() for layer in self.layers) + (self.mtp_layers * self.mtp_size if mtp else 0)

    def count_active(self) -> int:
        """Return the number of parameters that one token passes, head included and the embedding not."""
        return self.vocab * self.hidden + self.norm_size + sum(layer.count_active() for layer in self.layers)


def count_equal(layers: Iterable[LayerShape]) -> tuple[tuple[LayerShape, int], ...]:
    """Return each different layer, by identity, and how often it is there."""
    found: dict[int, tuple[LayerShape, int]] = {}
    for layer in layers:
        found[id(layer)] = (layer, found.get(id(layer), (layer, 0))[1] + 1)
    return tuple(found.values())


def _count_attention(a: AttentionShape, h: int) -> int:
    if a.kind == LINEAR:
        keys, values = a.kv_heads * a.head_dim, a.heads * a.v_head_dim
        # Queries, keys, values and the gate; two scalars a value head; a convolution; decay and time step; a norm.
        return (
            h * (2 * keys + 2 * values) + 2 * h * a.heads + a.conv * (2 * keys + values) + 2 * a.heads + a.v_head_dim + values * h
        )
    if a.kind == MLA:
        queries = a.heads * a.head_dim
        down = h * (a.kv_lora + a.rope_dim) + (h * a.q_lora if a.q_lora else 0)
        up = (a.q_lora or h) * queries + a.kv_lora * a.heads * (a.qk_nope + a.v_head_dim)
        norms = (a.kv_lora + a.q_lora) if a.qk_norm else 0
        return down + up + norms + a.heads * a.v_head_dim * h + (h if a.out_bias else 0)
    queries, keys = a.heads * a.head_dim, a.kv_heads * a.head_dim
    first = queries * (2 if a.output_gate else 1) + 2 * keys
    bias = (first if a.qkv_bias else 0) + (h if a.out_bias else 0)
    return h * first + queries * h + bias + (2 * a.head_dim if a.qk_norm else 0) + (a.heads if a.sinks else 0)


@cache
def _read_catalogue() -> dict[str, dict[str, Any]]:
    with (Path(__file__).parent / "models.toml").open("rb") as file:
        return tomllib.load(file)


def list_models() -> tuple[str, ...]:
    """Return the names of the known models."""
    return tuple(_read_catalogue())


def find_known(name: str) -> dict[str, Any] | None:
    """Return Megatron's arguments of a known model, by name or alias; None where there is none."""
    wanted = fold(name)
    for known, entry in _read_catalogue().items():
        if wanted in map(fold, (known, *entry.get("aliases", ()))):
            base = find_known(entry["like"]) if "like" in entry else {}
            own = {key: value for key, value in entry.items() if key not in ("aliases", "source", "billions", "total", "like")}
            return {**(base or {}), **own}
    return None


def read_published(name: str) -> float | None:
    """Return the published number of parameters of a known model, in billions, with as many digits as are published."""
    return _read_catalogue()[name].get("billions")


def build_model(section: ModelSection) -> ModelShape:
    """Return the shape that a plan's ``model`` describes; raises `PlanError` for one that cannot be."""
    given = section.model_dump(exclude_none=True, exclude={"name", "hf"})
    known: dict[str, Any] = {}
    if section.hf is not None:
        known = read_hf(section.hf)
    elif section.name is not None:
        known = find_known(section.name) or {}
        if not known and not {"num_layers", "hidden_size"} <= given.keys():
            raise PlanError(
                f"model.name {show(section.name)} is not known and num_layers and hidden_size are not given: give them, or hf: "
                f"config.json{suggest(section.name, list_models())}"
            )
    own = str(known.pop("name", None) or "model")
    args = {**known, **given}
    if section.hf is not None:
        return shape_model(own if section.name is None else _name_read(section.name, section.hf, known, own), args)
    name = section.name or own
    if section.name is None or known:
        return shape_model(name, args)
    args, notes = _complete_named(name, args)
    model = shape_model(name, args)
    return replace(model, assumed=(*notes, *model.assumed))


def _name_read(name: str, path: Path, read: Mapping[str, Any], own: str) -> str:
    """Return the title of a model that a file describes; raises `PlanError` where the name is that of another known one."""
    known = find_known(name)
    if known is None:
        return f"{name} ({own} of {path})"
    keys = ("num_layers", "hidden_size", "num_attention_heads", "num_experts", "vocab_size")
    if differ := [f"{key} {read.get(key)} and {known.get(key)}" for key in keys if read.get(key) != known.get(key)]:
        raise PlanError(
            f"model.hf {path} and model.name {show(name)} are different models ({', '.join(differ)}): drop name, or hf"
        )
    return name


def _complete_named(name: str, args: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return the arguments of a model that is not known, as tables of runs state them, with what most models have.

    Models called GPT keep Megatron's defaults, which are GPT's.
    """
    found, notes = dict(args), []
    if "num_attention_heads" not in args:
        size = found.setdefault("kv_channels", HEAD_SIZE)
        found["num_attention_heads"] = max(args["hidden_size"] // size, 1)
        notes.append(f"num_attention_heads is not stated: {found['num_attention_heads']}, of {size} each")
    if not args.keys() & {"swiglu", "normalization", "add_bias_linear"} and not fold(name).startswith("gpt"):
        found |= {"swiglu": True, "normalization": "RMSNorm"}
        found.setdefault("untie_embeddings_and_output_weights", True)
        notes.append(f"swiglu is not stated: {name} is taken to have it, and RMSNorm, like most models")
    return found, notes


def shape_model(name: str, args: Mapping[str, Any]) -> ModelShape:
    """Return the shape of Megatron's arguments ``args``; raises `PlanError` that names the argument that is missing or wrong."""
    for key in ("num_layers", "hidden_size", "num_attention_heads"):
        if key not in args:
            raise PlanError(f"model.{key} is missing: give it, a known name, or hf: config.json")
    if args["num_layers"] > MOST_LAYERS:
        raise PlanError(f"model.num_layers {args['num_layers']} given; allowed: 1 to {MOST_LAYERS}")
    assumed = [words for key, words in _DEFAULTS.items() if key not in args and _is_wanted(key, args)]
    attention = _shape_attention(args)
    ffn, moe = _shape_ffn(args), _shape_moe(args)
    bias = args.get("normalization", "LayerNorm" if not args.get("swiglu") else "RMSNorm") == "LayerNorm"
    layers: list[LayerShape] = []
    # Equal layers are one object, so that what is counted for one is found again by identity.
    shapes: dict[tuple[AttentionShape, bool], LayerShape] = {}
    for index, is_moe in enumerate(read_layer_freq(args.get("moe_layer_freq", 1), args["num_layers"])):
        has_experts = is_moe and moe is not None
        own = _vary_attention(attention, args, index)
        one = LayerShape(args["hidden_size"], own, None if has_experts else ffn, moe if has_experts else None, bias)
        layers.append(shapes.setdefault((own, has_experts), one))
    count = args.get("mtp_num_layers", 0)
    positions = args.get("max_position_embeddings", 0) if args.get("position_embedding_type", "rope") == "learned_absolute" else 0
    return ModelShape(
        name, args["hidden_size"], args.get("vocab_size", 50257), tuple(layers), layers[-1] if count else None, count,
        not args.get("untie_embeddings_and_output_weights", False), positions,
        args.get("make_vocab_size_divisible_by", VOCAB_MULTIPLE), tuple(assumed),
    )  # fmt: skip


_DEFAULTS = {
    "vocab_size": "vocab_size is not stated: 50257",
    "ffn_hidden_size": "ffn_hidden_size is not stated: Megatron's 4 x hidden, or 8/3 of it where gated",
    "q_lora_rank": "q_lora_rank is not stated: 1536, or the hidden size where that is less",
    "moe_ffn_hidden_size": "moe_ffn_hidden_size is not stated: that of the dense feed-forward",
    "moe_router_topk": "moe_router_topk is not stated: 2, Megatron's",
}


def _is_wanted(key: str, args: Mapping[str, Any]) -> bool:
    if key == "q_lora_rank":
        return _is_mla(args)
    if key in ("moe_ffn_hidden_size", "moe_router_topk"):
        return bool(args.get("num_experts"))
    return True


def _is_mla(args: Mapping[str, Any]) -> bool:
    return bool(args.get("multi_latent_attention", "kv_lora_rank" in args))


def _shape_attention(args: Mapping[str, Any]) -> AttentionShape:
    heads, bias = args["num_attention_heads"], bool(args.get("add_bias_linear", False))
    qkv_bias = bias or bool(args.get("add_qkv_bias", False))
    if _is_mla(args):
        rope = args.get("qk_pos_emb_head_dim", 64)
        q_lora = args.get("q_lora_rank", min(1536, args["hidden_size"]))
        return AttentionShape(
            MLA, heads, heads, args.get("qk_head_dim", 128) + rope, args.get("v_head_dim", 128), q_lora,
            args.get("kv_lora_rank", 512), rope, qkv_bias=qkv_bias, out_bias=bias, qk_norm=args.get("qk_layernorm", True),
        )  # fmt: skip
    groups = args.get("num_query_groups", heads)
    if heads % groups:
        raise PlanError(f"model.num_query_groups {groups} does not divide num_attention_heads {heads}: give a divisor")
    if "kv_channels" not in args and args["hidden_size"] % heads:
        raise PlanError(f"model.num_attention_heads {heads} does not divide hidden_size {args['hidden_size']}: give kv_channels")
    size = args.get("kv_channels", args["hidden_size"] // heads)
    return AttentionShape(
        MHA if groups == heads else GQA, heads, groups, size, size, qkv_bias=qkv_bias, out_bias=bias,
        qk_norm=bool(args.get("qk_layernorm", False)), output_gate=bool(args.get("attention_output_gate", False)),
        sinks=bool(args.get("attention_sinks", False)),
    )  # fmt: skip


def _vary_attention(attention: AttentionShape, args: Mapping[str, Any], index: int) -> AttentionShape:
    """Return the attention of layer ``index``: some models alternate windows, or linear with full attention."""
    every = args.get("linear_attention_freq")
    if every and (index + 1) % every:
        return AttentionShape(
            LINEAR, args.get("linear_num_value_heads", 32), args.get("linear_num_key_heads", 16),
            args.get("linear_key_head_dim", 128), args.get("linear_value_head_dim", 128),
            conv=args.get("linear_conv_kernel_dim", 4),
        )  # fmt: skip
    window, skip = args.get("window_size"), args.get("window_attn_skip_freq")
    if window is None or (skip and (index + 1) % skip == 0):
        return attention
    return replace(attention, window=window)


def _shape_ffn(args: Mapping[str, Any]) -> FFNShape:
    hidden, gated = args["hidden_size"], bool(args.get("swiglu", False))
    size = args.get("ffn_hidden_size", int((4 * hidden * 2 / 3) / 64) * 64 if gated else 4 * hidden)
    return FFNShape(size, gated, bool(args.get("add_bias_linear", False)))


def _shape_moe(args: Mapping[str, Any]) -> MoEShape | None:
    if not args.get("num_experts"):
        return None
    dense = _shape_ffn(args)
    topk, experts = args.get("moe_router_topk", 2), args["num_experts"]
    if topk > experts:
        raise PlanError(f"model.moe_router_topk {topk} is more than num_experts {experts}: give at most {experts}")
    shared = args.get("moe_shared_expert_intermediate_size", 0)
    return MoEShape(
        experts, topk, replace(dense, size=args.get("moe_ffn_hidden_size", dense.size)),
        replace(dense, size=shared) if shared else None,
        bool(args.get("moe_shared_expert_gate", False)), bool(args.get("moe_router_bias", False)),
        args.get("moe_router_num_groups"), args.get("moe_router_group_topk"),
    )  # fmt: skip


def read_layer_freq(given: int | str | list[int], layers: int) -> list[bool]:
    """Return which layers have experts, by Megatron's ``--moe-layer-freq``: every Nth, or a pattern like ``([0]*3+[1]*58)``.

    A pattern of another length, as of a model that was cut, keeps its beginning; the last value goes on.
    """
    if isinstance(given, str) and given.strip().isdecimal():
        given = int(given)
    if isinstance(given, int):
        if given < 1:
            raise PlanError(
                f"model.moe_layer_freq {given} given; allowed: a whole number from 1 up, or a pattern like ([0]*3+[1]*58)"
            )
        return [index % given == 0 for index in range(layers)]
    pattern = given if isinstance(given, list) else _parse_pattern(given)
    if not pattern or set(pattern) - {0, 1}:
        raise PlanError(f"model.moe_layer_freq {show(given)} given; allowed: 0 (dense) and 1 (experts), like ([0]*3+[1]*58)")
    return [bool(pattern[min(index, len(pattern) - 1)]) for index in range(layers)]


def _parse_pattern(text: str) -> list[int]:
    """Return the list of an expression of lists, ``+`` and ``*``; nothing of it is evaluated."""
    found: list[int] = []
    inner = text.replace(" ", "")
    while inner.startswith("(") and inner.endswith(")"):
        inner = inner[1:-1]
    for term in inner.split("+"):
        match = re.fullmatch(r"\[([01](?:,[01])*)\](?:\*(\d{1,6}))?", term)
        if match is None:
            return []
        found += [int(one) for one in match[1].split(",")] * min(int(match[2] or 1), MOST_LAYERS)
    return found
