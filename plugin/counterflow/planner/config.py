"""What a user writes about a run: the plan YAML, checked key by key.

Each section is a pydantic model whose fields are the keys. A field that is not given is None: `counterflow.planner.layouts`
completes it. Flags that published runs state in words (``layout.flags``) are read into the fields that they mean.
"""

import difflib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from counterflow.bounds import RepeatedKeyError, show, unite_pairs
from counterflow.errors import PlanError

# A plan is a page of text; more is another file.
MAX_BYTES = 4 * 2**20
MOST = 10**7
PRECISIONS = ("bf16", "fp16", "fp32", "fp8-delayed", "fp8-tensorwise", "fp8-blockwise", "mxfp8", "nvfp4")
DISPATCHERS = ("alltoall", "allgather", "deepep", "hybridep")
ROUTINGS = ("forced", "natural")
# What Megatron's precision-aware optimizer keeps in which formats.
DTYPES = {
    "main_grads_dtype": ("fp32", "bf16"),
    "main_params_dtype": ("fp32", "fp16"),
    "exp_avg_dtype": ("fp32", "fp16", "bf16", "fp8"),
    "exp_avg_sq_dtype": ("fp32", "fp16", "bf16", "fp8"),
}
RECOMPUTE_MODULES = ("core_attn", "layernorm", "mla_up_proj", "mlp", "moe", "moe_act", "shared_experts")
_MODULE_NAMES = {
    "norm": "layernorm", "rmsnorm": "layernorm", "act": "moe_act", "activation": "moe_act", "shared_expert": "shared_experts",
    "up_proj": "mla_up_proj", "mla": "mla_up_proj", "attn": "core_attn", "attention": "core_attn",
}  # fmt: skip
# Other names of a way to exchange tokens. Megatron's flex dispatcher runs DeepEP unless told otherwise; the last two take
# DeepEP's place with the same calls.
_DISPATCHER_NAMES = {
    "a2a": "alltoall", "nccl": "alltoall", "flex": "deepep", "turbodeepep": "deepep", "uccl": "deepep", "uccl-ep": "deepep",
    "mori": "deepep", "mori-ep": "deepep",
}  # fmt: skip


def _count(least: int = 1, most: int = MOST) -> Any:
    return Field(default=None, ge=least, le=most)


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, str_strip_whitespace=True)

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_truth_for_counts(cls, value: Any, info: Any) -> Any:
        wants = str(cls.model_fields[info.field_name].annotation)
        if isinstance(value, bool) and "bool" not in wants:
            raise ValueError("true or false given where a number or a name is expected")
        return value


class ModelSection(_Section):
    """The model by Megatron's argument names, by the name of a known model, or by a Hugging Face ``config.json``.

    Arguments that are given beside a name or a file replace what it says.
    """

    name: str | None = None
    hf: Path | None = None
    num_layers: int | None = _count()
    hidden_size: int | None = _count()
    ffn_hidden_size: int | None = _count()
    num_attention_heads: int | None = _count()
    num_query_groups: int | None = _count()
    kv_channels: int | None = _count()
    multi_latent_attention: bool | None = None
    q_lora_rank: int | None = _count(0)
    kv_lora_rank: int | None = _count()
    qk_head_dim: int | None = _count()
    qk_pos_emb_head_dim: int | None = _count()
    v_head_dim: int | None = _count()
    qk_layernorm: bool | None = None
    attention_output_gate: bool | None = None
    attention_sinks: bool | None = None
    add_qkv_bias: bool | None = None
    add_bias_linear: bool | None = None
    window_size: int | None = _count()
    window_attn_skip_freq: int | None = _count()
    linear_attention_freq: int | None = _count()
    linear_key_head_dim: int | None = _count()
    linear_value_head_dim: int | None = _count()
    linear_num_key_heads: int | None = _count()
    linear_num_value_heads: int | None = _count()
    linear_conv_kernel_dim: int | None = _count()
    num_experts: int | None = _count(0)
    moe_router_topk: int | None = _count()
    moe_ffn_hidden_size: int | None = _count()
    moe_shared_expert_intermediate_size: int | None = _count(0)
    moe_shared_expert_gate: bool | None = None
    moe_layer_freq: int | str | list[int] | None = None
    moe_router_num_groups: int | None = _count()
    moe_router_group_topk: int | None = _count()
    moe_router_bias: bool | None = None
    mtp_num_layers: int | None = _count(0, 100)
    swiglu: bool | None = None
    normalization: str | None = None
    vocab_size: int | None = _count()
    make_vocab_size_divisible_by: int | None = _count()
    untie_embeddings_and_output_weights: bool | None = None
    position_embedding_type: str | None = None
    max_position_embeddings: int | None = _count()


class ClusterSection(_Section):
    """The GPUs and what joins them. Figures that are not given come from the data of the GPU's type.

    Rates are in GB/s (1e9) for each GPU and direction, ``memory_gib`` in GiB (2^30).
    """

    gpu: str = Field(min_length=1)
    gpus: int | None = _count()
    nodes: int | None = _count()
    gpus_per_node: int | None = _count()
    nvlink_domain: int | None = _count()
    nvlink_gbps: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    network_gbps: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    oversubscription: float | None = Field(default=None, ge=1, allow_inf_nan=False)
    memory_gib: float | None = Field(default=None, gt=0, allow_inf_nan=False)


class TrainingSection(_Section):
    """What is trained on: sequence length, batch and number formats."""

    seq_length: int | None = _count()
    global_batch_size: int | None = _count()
    precision: str | None = None
    routing: str | None = None
    tokens: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    main_grads_dtype: str | None = None
    main_params_dtype: str | None = None
    exp_avg_dtype: str | None = None
    exp_avg_sq_dtype: str | None = None
    fp8_param_gather: bool | None = None

    @field_validator("precision")
    @classmethod
    def _name_precision(cls, value: str | None) -> str | None:
        return None if value is None else name_precision(value)

    @field_validator(*DTYPES)
    @classmethod
    def _check_type(cls, value: str | None, info: ValidationInfo) -> str | None:
        allowed = DTYPES[info.field_name or ""]
        if value is not None and value not in allowed:
            raise ValueError(f"allowed: {', '.join(allowed)}")
        return value


class LayoutSection(_Section):
    """How the model lies on the GPUs, and what the run is told. What is None is searched, or completed."""

    tp: int | None = _count()
    pp: int | None = _count()
    vpp: int | None = _count()
    cp: int | None = _count()
    ep: int | None = _count()
    etp: int | None = _count()
    dp: int | None = _count()
    micro_batch_size: int | None = _count()
    schedule: str | None = None
    overlap: bool | None = None
    zero_bubble: bool | None = None
    recompute: str | list[str] | None = None
    dispatcher: str | None = None
    sequence_parallel: bool | None = None
    distributed_optimizer: bool | None = None
    fsdp: bool | int | None = None
    overlap_grad_reduce: bool | None = None
    overlap_param_gather: bool | None = None
    optimizer_offload: float | None = Field(default=None, ge=0, le=1, allow_inf_nan=False)
    activation_offload_layers: int | None = _count(0)
    clones_per_rank: int | None = _count(0)
    cuda_graph: str | list[str] | None = None
    fused_attention: bool | None = None
    cross_entropy_fusion: bool | None = None
    expandable_segments: bool | None = None
    paged_stash: bool | None = None
    max_connections: int | None = _count()
    pipeline_model_parallel_layout: str | None = None
    num_layers_in_first_pipeline_stage: int | None = _count()
    num_layers_in_last_pipeline_stage: int | None = _count()
    account_for_embedding_in_pipeline_split: bool | None = None
    account_for_loss_in_pipeline_split: bool | None = None
    flags: str | list[str] | None = None

    @field_validator("dispatcher")
    @classmethod
    def _check_dispatcher(cls, value: str | None) -> str | None:
        if value is None:
            return None
        names = {fold(name): name for name in DISPATCHERS} | {fold(other): name for other, name in _DISPATCHER_NAMES.items()}
        if fold(value) not in names:
            raise ValueError(f"allowed: {', '.join(DISPATCHERS)}{suggest(value, DISPATCHERS)}")
        return names[fold(value)]

    @field_validator("recompute")
    @classmethod
    def _check_recompute(cls, value: str | list[str] | None) -> str | list[str] | None:
        read_recompute(value)
        return value

    @property
    def words(self) -> tuple[str, ...]:
        """The flags, each by itself."""
        given = self.flags or ()
        return tuple(filter(None, (word.strip() for word in (given.split(";") if isinstance(given, str) else given))))


class PlanConfig(_Section):
    """A plan: model, cluster, training, layout, and a file of measured costs."""

    model: ModelSection
    cluster: ClusterSection
    training: TrainingSection = TrainingSection()
    layout: LayoutSection = LayoutSection()
    costs: Path | None = None
    # Words of ``layout.flags`` that the planner does not model.
    unread_flags: tuple[str, ...] = Field(default=(), exclude=True)

    def replace_layout(self, **fields: Any) -> Self:
        """Return the plan with other values in its layout, unchecked."""
        return self.model_copy(update={"layout": self.layout.model_copy(update=fields)})


def read_config(path: Path) -> PlanConfig:
    """Read a plan from YAML or JSON; paths in it count from its folder. Raises `PlanError`."""
    given = read_mapping(path)
    for section, key in ((given.get("model"), "hf"), (given, "costs"), (given.get("training"), "routing")):
        if isinstance(section, dict) and isinstance(section.get(key), str) and section[key] not in ROUTINGS:
            section[key] = str(path.parent / section[key])
    return parse_config(given, str(path))


def read_mapping(path: Path) -> dict[str, Any]:
    """Read a file that holds one mapping, YAML or JSON; raises `PlanError`."""
    import yaml  # slow to import, and only read here

    try:
        if path.stat().st_size > MAX_BYTES:
            raise PlanError(f"{path} has more than {MAX_BYTES} bytes: no plan and no model's config.json")
        text = path.read_text()
        given = json.loads(text, object_pairs_hook=unite_pairs) if path.suffix == ".json" else _load_yaml(text)
    except RepeatedKeyError as error:
        raise PlanError(f"{path}: {error}") from None
    except PlanError:
        raise
    except OSError as error:
        raise PlanError(f"{show(str(path))} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise PlanError(f"{path} is neither YAML nor JSON: {reason[:200]}") from None
    if given is None:
        raise PlanError(f"{path} is empty; expected: keys and values, as docs/plan.md shows them")
    if not isinstance(given, dict):
        raise PlanError(f"{path} holds {show(given)}; expected: keys and values, as docs/plan.md shows them")
    return given


def _load_yaml(text: str) -> Any:
    """Return what YAML says; raises `RepeatedKeyError`, since YAML takes the last of several values."""
    import yaml

    root = yaml.compose(text, Loader=yaml.SafeLoader)
    nodes = [root]
    # Nodes that stand in several places, and in themselves, are looked at once.
    seen: set[int] = set()
    while nodes:
        node = nodes.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, yaml.MappingNode):
            unite_pairs([(key.value, None) for key, _ in node.value if isinstance(key, yaml.ScalarNode)])
            nodes += [one for pair in node.value for one in pair]
        elif isinstance(node, yaml.SequenceNode):
            nodes += node.value
    return yaml.safe_load(text)


def parse_config(given: Mapping[str, Any], where: str = "plan") -> PlanConfig:
    """Return a plan from a mapping of the YAML's shape; raises `PlanError` with the key, and the nearest one that exists."""
    try:
        config = PlanConfig.model_validate(given)
        updates, unread = _read_flags(config)
        for name, fields in updates.items():
            section = getattr(config, name)
            fresh = {key: value for key, value in fields.items() if getattr(section, key) is None}
            full = type(section).model_validate(section.model_dump(exclude_none=True) | fresh)
            config = config.model_copy(update={name: full})
    except ValidationError as error:
        raise PlanError(f"{where}: {_explain(error)}") from None
    return config.model_copy(update={"unread_flags": unread})


def _explain(error: ValidationError) -> str:
    first = error.errors()[0]
    place = [str(part) for part in first["loc"]]
    section: Any = PlanConfig
    for part in place[:1]:
        inner = PlanConfig.model_fields.get(part)
        section = inner.annotation if inner is not None and len(place) > 1 else section
    key, value = ".".join(place[:2]), show(first["input"])
    if first["type"] == "extra_forbidden":
        names = [name for name in section.model_fields if name != "unread_flags"]
        return f"key {show(key)} is not known; {suggest(place[-1], names).lstrip('; ') or 'allowed: ' + ', '.join(names)}"
    if first["type"] == "missing":
        return f"key {key} is missing"
    if first["type"] in ("model_type", "dict_type", "model_attributes_type"):
        names = [name for name in getattr(_find_section(place), "model_fields", {}) if name != "unread_flags"]
        return f"{key} {value} given; expected: keys and values, like {key}: {{{names[0] if names else 'key'}: …}}"
    return f"{key} {value} given; {_name_allowed(first, place)}"


def _find_section(place: list[str]) -> Any:
    field = PlanConfig.model_fields.get(place[0]) if place else None
    return PlanConfig if field is None else field.annotation


# What pydantic calls values that are no number, and the words for it.
_KINDS = {
    "int": "a whole number", "float": "a finite number", "finite": "a finite number", "bool": "true or false", "string": "a text",
    "path": "a path", "list": "a list",
}  # fmt: skip


def _name_allowed(error: Any, place: list[str]) -> str:
    """Return what a key allows, in words; what this module's own checks say stays as it is."""
    kind, context = error["type"], error.get("ctx", {})
    for name, words in (("ge", "{} or more"), ("gt", "a number above {}"), ("le", "{} or less"), ("lt", "a number below {}")):
        if name in context:
            return f"allowed: {words.format(context[name])}"
    if kind.partition("_")[0] in _KINDS:
        section = _find_section(place)
        annotation = str(section.model_fields[place[1]].annotation) if len(place) > 1 and place[1] in section.model_fields else ""
        kinds = [name for name in ("bool", "int", "float", "str") if name in annotation]
        allowed = [_KINDS["string" if name == "str" else name] for name in kinds] + ["a list"] * ("list" in annotation)
        return f"allowed: {' or '.join(allowed) or _KINDS[kind.partition('_')[0]]}"
    return str(error["msg"].removeprefix("Value error, "))


# Names are like one that is given from here on, and as much as the nearest one to within so much.
LIKE, AS_MUCH = 0.6, 0.1


def suggest(given: str, names: Any) -> str:
    """Return ``; nearest: …`` with the names that begin with the one given or are most like it; nothing where none is like it."""
    key = fold(given)
    scores = {name: 1.0 if len(key) > 2 and fold(name).startswith(key) else _compare(key, fold(name)) for name in names}
    least = max([LIKE, *(score - AS_MUCH for score in scores.values())])
    found = sorted((name for name, score in scores.items() if score >= least), key=lambda name: -scores[name])[:3]
    return f"; nearest: {', '.join(found)}" if found else ""


def _compare(one: str, other: str) -> float:
    return difflib.SequenceMatcher(None, one, other).ratio()


def fold(name: str) -> str:
    """Return a name without what people write differently: case, dashes, blanks."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


def name_precision(given: str) -> str:
    """Return one of `PRECISIONS` for a name of a number format as trainers and their reports write it; raises ValueError."""
    word = fold(given)
    if word in ("bf16", "fp16", "fp32"):
        return word
    if "nvfp4" in word or word == "fp4":
        return "nvfp4"
    for part, name in (("mx", "mxfp8"), ("block", "fp8-blockwise"), ("sub", "fp8-blockwise"), ("fp8sc", "fp8-blockwise")):
        if part in word and "8" in word:
            return name
    for part, name in (("delay", "fp8-delayed"), ("ds", "fp8-delayed"), ("fp8", "fp8-tensorwise")):
        if part in word and "fp8" in word:
            return name
    raise ValueError(f"allowed: {', '.join(PRECISIONS)}{suggest(given, PRECISIONS)}")


def read_recompute(given: str | list[str] | None) -> tuple[str | None, frozenset[str], str | None, int | None]:
    """Return granularity (None, ``selective``, ``full``), modules, method and number of layers; raises ValueError.

    Takes what Megatron's flags and reports of runs say: ``full,uniform,1``, ``selective``, ``moe_act,layernorm``.
    """
    text = given if isinstance(given, str) else ",".join(given or ())
    text = re.sub(r"full[_-](uniform|block)", r"full,\1", text.lower())
    text = re.sub(r"(uniform|block)[_-](\d)", r"\1,\2", text)
    words = [word for word in re.split(r"[^\w-]+", text) if word and word not in ("none", "no", "off")]
    modules, granularity, method, layers = set(), None, None, None
    for word in words:
        name = _MODULE_NAMES.get(word, word)
        if word in ("full", "selective"):
            granularity = word
        elif word in ("uniform", "block"):
            granularity, method = "full", word
        elif word.isdecimal():
            layers = int(word)
        elif name in RECOMPUTE_MODULES:
            modules.add(name)
        else:
            allowed = ("full", "selective", *RECOMPUTE_MODULES)
            raise ValueError(f"allowed: none, or of {', '.join(allowed)}{suggest(word, allowed)}")
    if granularity == "full":
        return "full", frozenset(), method or "uniform", 1 if layers is None else layers
    if granularity == "selective" and not modules:
        modules = {"core_attn"}
    return ("selective" if modules else None), frozenset(modules), None, None


def _read_flags(config: PlanConfig) -> tuple[dict[str, dict[str, Any]], tuple[str, ...]]:
    """Return the fields that the words of ``layout.flags`` mean, by section, and the words that mean none."""
    found: dict[str, dict[str, Any]] = {"model": {}, "training": {}, "layout": {}}
    unread = []
    for word in config.layout.words:
        meanings = list(_read_flag(word))
        for section, key, value in meanings:
            found[section][key] = value
        if not meanings:
            unread.append(word)
    return found, tuple(unread)


def _read_flag(word: str) -> Iterator[tuple[str, str, Any]]:
    name, _, value = (part.strip() for part in word.partition("="))
    key = name.lower().replace("-", "_")
    if not value and key in _WORDS:
        yield _WORDS[key]
    elif key == "attention" and value in ("fused", "unfused"):
        yield "layout", "fused_attention", value == "fused"
    elif key in _VALUES and re.fullmatch(r"\d+( layers)?", value):
        yield *_VALUES[key], int(value.split()[0])
    elif key in ("layout", "pipeline_model_parallel_layout") and value:
        yield "layout", "pipeline_model_parallel_layout", value
    elif key == "moe_layer_freq" and value:
        yield "model", "moe_layer_freq", int(value) if value.isdecimal() else value
    elif key == "optimizer_offload" and re.fullmatch(r"\d*\.?\d+", value):
        yield "layout", "optimizer_offload", float(value)
    elif key == "cuda_graph" and value:
        yield "layout", "cuda_graph", value
    elif key.startswith("fp8:"):
        yield "training", "precision", key.replace(":", "-")


_WORDS: dict[str, tuple[str, str, Any]] = {
    "sp": ("layout", "sequence_parallel", True),
    "dist_optimizer": ("layout", "distributed_optimizer", True),
    "fsdp": ("layout", "fsdp", True),
    "paged stash": ("layout", "paged_stash", True),
    "expandable_segments": ("layout", "expandable_segments", True),
    "ce_fusion": ("layout", "cross_entropy_fusion", True),
    "full cuda graph": ("layout", "cuda_graph", "full_iteration"),
    "full cg": ("layout", "cuda_graph", "full_iteration"),
    "partial cg": ("layout", "cuda_graph", "attn,moe_router,moe_preprocess"),
    "ep overlap": ("layout", "overlap", True),
    "hybridep": ("layout", "dispatcher", "hybridep"),
    "deepep": ("layout", "dispatcher", "deepep"),
    "swiglu": ("model", "swiglu", True),
    "untied": ("model", "untie_embeddings_and_output_weights", True),
    "tied": ("model", "untie_embeddings_and_output_weights", False),
}
_VALUES = {
    "mtp": ("model", "mtp_num_layers"),
    "q_lora": ("model", "q_lora_rank"),
    "fsdp": ("layout", "fsdp"),
    "max_connections": ("layout", "max_connections"),
    "activation_offload": ("layout", "activation_offload_layers"),
}
