"""Plans that state little, as tables of published runs do: each is answered with a range, and what is assumed is said."""

import random
from typing import Any

import pytest

from counterflow.planner.cluster import read_gpus
from counterflow.planner.config import DISPATCHERS, PRECISIONS, parse_config
from counterflow.planner.estimate import describe, estimate_config
from counterflow.planner.models import build_model

NAMED: dict[str, dict[str, Any]] = {
    "Kimi-K2": {"num_layers": 61, "hidden_size": 7168},
    "Somebody-MoE-40B": {"num_layers": 32, "hidden_size": 4096, "num_experts": 64},
    "Somebody-Latent": {"num_layers": 32, "hidden_size": 2048, "num_experts": 64, "kv_lora_rank": 512},
    "Somebody-8B": {"num_layers": 32, "hidden_size": 4096, "ffn_hidden_size": 14336, "num_query_groups": 8},
    "GPT-Some": {"num_layers": 32, "hidden_size": 2880},
}  # fmt: skip
WORDS = {
    "schedule": ["v-half", "v_min", "zero-bubble", "zb", "Interleaved VPP", "1F1B", "zbv", "dualpipev"],
    "recompute": ["full_uniform_1", "block 4", "selective:[layernorm mla]", "attn", "norm,act,shared_expert", "none"],
    "dispatcher": ["AlltoAll", "flex", "turbo_deepep", "UCCL-EP", "HybridEP"],
    "flags": ["mtp=1", "full CUDA graph", "fsdp", "something=new", "optimizer_offload=0.5;overlap_d2h_h2d", "paged stash"],
    "overlap": [True, False],
}
FORMATS = [*PRECISIONS, "FP8", "fp8_cs", "fp8_sc", "MXFP8", "fp8:tensorwise", "NVFP4"]


def draw(seed: int) -> dict[str, Any]:
    """Return a plan as one row of a table might state it."""
    rng = random.Random(seed)
    name = rng.choice(list(NAMED))
    gpu = rng.choice([*read_gpus(), "NVIDIA H100 80GB", "GB200 NVL72", "AMD Instinct MI355X"])
    layout: dict[str, Any] = {"pp": rng.choice([1, 2, 4, 8])}
    if "num_experts" in NAMED[name]:
        layout["ep"] = rng.choice([1, 4, 8])
    layout |= {key: rng.choice(words) for key, words in WORDS.items() if rng.random() < 0.5}
    training: dict[str, Any] = {"seq_length": rng.choice([4096, 32768]), "global_batch_size": 1024}
    if rng.random() < 0.8:
        training["precision"] = rng.choice(FORMATS)
    if rng.random() < 0.5:
        training["routing"] = rng.choice(["forced", "natural"])
    if training.get("precision") == "fp8-delayed":
        layout.pop("recompute", None)
    return {"model": {"name": name, **NAMED[name]}, "cluster": {"gpu": gpu, "gpus": 64}, "training": training, "layout": layout}


@pytest.mark.parametrize("seed", range(60))
def test_what_states_little_is_answered_with_a_range(seed: int) -> None:
    plan = draw(seed)
    found = describe(estimate_config(parse_config(plan)))
    low, high = found["range"]
    assert 0 < low < found["step_s"] < high, plan
    assert all(size > 0 for size in found["memory_gib"]) and len(found["memory_gib"]) == plan["layout"]["pp"], plan
    assert found["layout"]["dispatcher"] in DISPATCHERS
    assert any("is not stated" in note for note in found["why"]), plan


def test_a_named_model_without_heads_gets_the_usual_ones_and_a_note() -> None:
    config = parse_config({"model": {"name": "Somebody-8B", **NAMED["Somebody-8B"]}, "cluster": {"gpu": "H100"}})
    model = build_model(config.model)
    assert (model.layers[0].attention.heads, model.layers[0].attention.head_dim) == (32, 128)
    assert model.layers[0].ffn is not None and model.layers[0].ffn.gated and not model.tied
    assert [note.split(" is ")[0] for note in model.assumed[:2]] == ["num_attention_heads", "swiglu"]


def test_a_model_called_gpt_keeps_megatrons_defaults() -> None:
    config = parse_config({"model": {"name": "GPT-Some", **NAMED["GPT-Some"]}, "cluster": {"gpu": "H100"}})
    model = build_model(config.model)
    assert model.layers[0].ffn is not None and not model.layers[0].ffn.gated and model.tied
