"""Hugging Face's ``config.json`` as Megatron's arguments. Only keys are read; no weights, no code."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from counterflow.bounds import show, take_whole
from counterflow.errors import PlanError

Config = dict[str, Any]


def read_hf(path: Path) -> dict[str, Any]:
    """Return Megatron's arguments of a ``config.json``, or of the folder that holds one; raises `PlanError`."""
    from counterflow.planner.config import read_mapping

    file = path / "config.json" if path.is_dir() else path
    return convert_hf(read_mapping(file), str(file))


def convert_hf(config: Config, where: str = "config.json") -> dict[str, Any]:
    """Return Megatron's arguments for a parsed ``config.json``; raises `PlanError` that names keys that are missing."""
    from counterflow.planner.config import suggest

    # Multimodal models keep the language model's keys in a section of their own.
    config = {**config, **config["text_config"]} if isinstance(config.get("text_config"), dict) else config
    kind = config.get("model_type")
    if not isinstance(kind, str):
        raise PlanError(f"{where} has no model_type; known: {', '.join(sorted(READERS))}")
    if kind not in READERS:
        raise PlanError(
            f"{where}: model_type {show(kind)} is not known; known: {', '.join(sorted(READERS))}{suggest(kind, READERS)}"
        )
    need, read = READERS[kind]
    missing = [key for key in (*_ALWAYS, *need) if config.get(key) is None]
    if missing:
        raise PlanError(
            f"{where}: model_type {kind} needs {', '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} missing"
        )
    for key in (*_ALWAYS, *need):
        take_whole(config[key], f"{where}: {key}", 0, error=PlanError)
    names = config.get("architectures") or [kind]
    return {"name": str(config.get("_name_or_path") or names[0]), **_read_common(config), **read(config)}


_ALWAYS = ("num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size")


def _read_common(config: Config) -> dict[str, Any]:
    heads = config["num_attention_heads"]
    args: dict[str, Any] = {
        "num_layers": config["num_hidden_layers"],
        "hidden_size": config["hidden_size"],
        "num_attention_heads": heads,
        "num_query_groups": config.get("num_key_value_heads") or heads,
        "vocab_size": config["vocab_size"],
        "untie_embeddings_and_output_weights": not config.get("tie_word_embeddings", False),
        "swiglu": True,
        "normalization": "RMSNorm",
        "position_embedding_type": "rope",
    }
    if config.get("head_dim"):
        args["kv_channels"] = config["head_dim"]
    if config.get("intermediate_size"):
        args["ffn_hidden_size"] = config["intermediate_size"]
    if config.get("num_nextn_predict_layers"):
        args["mtp_num_layers"] = config["num_nextn_predict_layers"]
    return args


def _read_dense(config: Config) -> dict[str, Any]:
    return {"add_qkv_bias": bool(config.get("attention_bias", False))}


def _read_qwen2(config: Config) -> dict[str, Any]:
    return {"add_qkv_bias": True}


def _read_qwen3(config: Config) -> dict[str, Any]:
    return {"qk_layernorm": True, "add_qkv_bias": bool(config.get("attention_bias", False))}


def _read_mixtral(config: Config) -> dict[str, Any]:
    return {
        "num_experts": config["num_local_experts"],
        "moe_router_topk": config["num_experts_per_tok"],
        "moe_ffn_hidden_size": config["intermediate_size"],
    }


def _read_qwen_moe(config: Config) -> dict[str, Any]:
    dense, every = set(config.get("mlp_only_layers") or ()), config.get("decoder_sparse_step") or 1
    layers = range(config["num_hidden_layers"])
    return {
        "num_experts": config["num_experts"],
        "moe_router_topk": config["num_experts_per_tok"],
        "moe_ffn_hidden_size": config["moe_intermediate_size"],
        "moe_layer_freq": [int(layer not in dense and (layer + 1) % every == 0) for layer in layers],
    }


def _read_qwen2_moe(config: Config) -> dict[str, Any]:
    shared = config["shared_expert_intermediate_size"]
    return _read_qwen_moe(config) | {
        "add_qkv_bias": True,
        "moe_shared_expert_intermediate_size": shared,
        "moe_shared_expert_gate": True,
    }


def _read_qwen3_moe(config: Config) -> dict[str, Any]:
    return _read_qwen_moe(config) | _read_qwen3(config)


def _read_qwen3_next(config: Config) -> dict[str, Any]:
    return _read_qwen_moe(config) | {
        "qk_layernorm": True,
        "attention_output_gate": True,
        "moe_shared_expert_intermediate_size": config["shared_expert_intermediate_size"],
        "moe_shared_expert_gate": True,
        "linear_attention_freq": config.get("full_attention_interval") or 4,
        "linear_conv_kernel_dim": config["linear_conv_kernel_dim"],
        "linear_key_head_dim": config["linear_key_head_dim"],
        "linear_value_head_dim": config["linear_value_head_dim"],
        "linear_num_key_heads": config["linear_num_key_heads"],
        "linear_num_value_heads": config["linear_num_value_heads"],
    }


def _read_experts(config: Config) -> dict[str, Any]:
    """Return DeepSeek's way to name experts, which GLM and Kimi took over."""
    layers, dense = config["num_hidden_layers"], config.get("first_k_dense_replace") or 0
    shared = (config.get("n_shared_experts") or 0) * config["moe_intermediate_size"]
    args = {
        "num_experts": config["n_routed_experts"],
        "moe_router_topk": config["num_experts_per_tok"],
        "moe_ffn_hidden_size": config["moe_intermediate_size"],
        "moe_shared_expert_intermediate_size": shared,
        "moe_layer_freq": [int(layer >= dense) for layer in range(layers)],
    }
    if config.get("n_group"):
        args |= {"moe_router_num_groups": config["n_group"], "moe_router_group_topk": config.get("topk_group") or 1}
    return args


def _read_deepseek(config: Config) -> dict[str, Any]:
    return _read_experts(config) | {
        "multi_latent_attention": True,
        "qk_layernorm": True,
        "q_lora_rank": config.get("q_lora_rank") or 0,
        "kv_lora_rank": config["kv_lora_rank"],
        "qk_head_dim": config["qk_nope_head_dim"],
        "qk_pos_emb_head_dim": config["qk_rope_head_dim"],
        "v_head_dim": config["v_head_dim"],
    }


def _read_glm_moe(config: Config) -> dict[str, Any]:
    return _read_experts(config) | {
        "add_qkv_bias": bool(config.get("attention_bias", True)),
        "qk_layernorm": bool(config.get("use_qk_norm", False)),
    }


def _read_gpt_oss(config: Config) -> dict[str, Any]:
    args = {
        "num_experts": config["num_local_experts"],
        "moe_router_topk": config.get("num_experts_per_tok") or config.get("experts_per_token") or 4,
        "moe_ffn_hidden_size": config["intermediate_size"],
        "moe_router_bias": True,
        "add_bias_linear": True,
        "attention_sinks": True,
        "position_embedding_type": "yarn",
    }
    if config.get("sliding_window"):
        args |= {"window_size": config["sliding_window"], "window_attn_skip_freq": 2}
    return args


_DENSE = ("intermediate_size",)
_LATENT = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
_ROUTED = ("n_routed_experts", "num_experts_per_tok", "moe_intermediate_size")
_QWEN = ("num_experts", "num_experts_per_tok", "moe_intermediate_size")
_LINEAR = (
    "linear_conv_kernel_dim",
    "linear_key_head_dim",
    "linear_value_head_dim",
    "linear_num_key_heads",
    "linear_num_value_heads",
)
# By model_type: the keys that a config.json of it needs, and what reads them.
READERS: dict[str, tuple[tuple[str, ...], Callable[[Config], dict[str, Any]]]] = {
    "llama": (_DENSE, _read_dense),
    "mistral": (_DENSE, _read_dense),
    "qwen2": (_DENSE, _read_qwen2),
    "qwen3": (_DENSE, _read_qwen3),
    "glm4": (_DENSE, _read_dense),
    "mixtral": (("num_local_experts", "num_experts_per_tok", *_DENSE), _read_mixtral),
    "qwen2_moe": ((*_QWEN, "shared_expert_intermediate_size"), _read_qwen2_moe),
    "qwen3_moe": (_QWEN, _read_qwen3_moe),
    "qwen3_next": ((*_QWEN, "shared_expert_intermediate_size", *_LINEAR), _read_qwen3_next),
    "deepseek_v2": ((*_LATENT, *_ROUTED), _read_deepseek),
    "deepseek_v3": ((*_LATENT, *_ROUTED), _read_deepseek),
    "kimi_k2": ((*_LATENT, *_ROUTED), _read_deepseek),
    "glm4_moe": (_ROUTED, _read_glm_moe),
    "gpt_oss": (("num_local_experts", *_DENSE), _read_gpt_oss),
}
