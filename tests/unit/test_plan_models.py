"""Model shapes: parameters against published totals, and the three ways to describe a model agree."""

import json
from pathlib import Path

import pytest

from counterflow.errors import PlanError
from counterflow.planner.config import ModelSection, parse_config
from counterflow.planner.hf import READERS, convert_hf
from counterflow.planner.models import build_model, list_models, read_layer_freq, read_published, shape_model

# The keys that count in the config.json beside each model's weights.
DEEPSEEK = {
    "model_type": "deepseek_v3",
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "vocab_size": 129280,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 2048,
    "first_k_dense_replace": 3,
    "n_group": 8,
    "topk_group": 4,
    "num_nextn_predict_layers": 1,
    "tie_word_embeddings": False,
}
QWEN = {
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "vocab_size": 151936,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "tie_word_embeddings": False,
}
MIXTRAL = {
    "model_type": "mixtral",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
}
LLAMA = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
GLM = {
    "model_type": "glm4_moe",
    "hidden_size": 4096,
    "intermediate_size": 10944,
    "num_hidden_layers": 46,
    "num_attention_heads": 96,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151552,
    "n_routed_experts": 128,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 1408,
    "first_k_dense_replace": 1,
    "attention_bias": True,
    "num_nextn_predict_layers": 1,
}
GPT_OSS = {
    "model_type": "gpt_oss",
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "num_hidden_layers": 36,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 201088,
    "num_local_experts": 128,
    "num_experts_per_tok": 4,
    "sliding_window": 128,
}
KIMI = DEEPSEEK | {"model_type": "kimi_k2", "num_attention_heads": 64, "n_routed_experts": 384, "first_k_dense_replace": 1}
KIMI |= {"vocab_size": 163840, "n_group": 1, "topk_group": 1, "num_nextn_predict_layers": 0}
CONFIGS = {
    "DeepSeek-V3": DEEPSEEK,
    "Qwen3-30B-A3B": QWEN,
    "Mixtral-8x7B": MIXTRAL,
    "Llama-3-8B": LLAMA,
    "GLM-4.5-Air": GLM,
    "GPT-OSS-120B": GPT_OSS,
    "Kimi-K2": KIMI,
}
# What is published is not what the published config.json adds up to.
DIFFERS = {"Kimi-K2": 0.015, "GLM-4.5": 0.01, "GLM-4.5-Air": 0.01, "Llama-3.1-405B": 0.003}


@pytest.mark.parametrize("name", [name for name in list_models() if read_published(name)])
def test_parameters_are_those_published(name: str) -> None:
    published = read_published(name)
    assert published is not None
    # Half of the last digit that is published, or 0.2 %.
    digits = 0 if isinstance(published, int) else len(str(published).partition(".")[2])
    tolerance = max(0.002, 0.5 * 10**-digits / published, DIFFERS.get(name, 0.0))
    assert build_model(ModelSection(name=name)).count_parameters() / 1e9 == pytest.approx(published, rel=tolerance)


@pytest.mark.parametrize(("name", "billions"), [
    ("DeepSeek-V3", 671.026), ("Qwen3-235B-A22B", 235.094), ("Qwen3-30B-A3B", 30.532), ("Mixtral-8x7B", 46.703),
])  # fmt: skip
def test_parameters_add_up_tensor_by_tensor(name: str, billions: float) -> None:
    assert build_model(ModelSection(name=name)).count_parameters() / 1e9 == pytest.approx(billions, abs=1e-3)


def test_mtp_of_deepseek_v3_is_14_billion_with_its_embedding_and_head() -> None:
    model = build_model(ModelSection(name="DeepSeek-V3"))
    extra = model.count_parameters(mtp=True) - model.count_parameters()
    assert extra / 1e9 == pytest.approx(11.5, rel=0.02)
    assert (extra + 2 * model.vocab * model.hidden) / 1e9 == pytest.approx(14, abs=0.6)


@pytest.mark.parametrize(("name", "billions"), [("DeepSeek-V3", 37), ("Qwen3-235B-A22B", 22), ("Kimi-K2", 32)])
def test_active_parameters_are_those_published(name: str, billions: float) -> None:
    assert build_model(ModelSection(name=name)).count_active() / 1e9 == pytest.approx(billions, rel=0.03)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_json_is_the_model_of_that_name(name: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(CONFIGS[name]))
    read, known = build_model(ModelSection(hf=path)), build_model(ModelSection(name=name))
    assert read.layers == known.layers
    assert read.count_parameters(mtp=True) == known.count_parameters(mtp=True)
    assert (read.vocab, read.tied, read.mtp_layers) == (known.vocab, known.tied, known.mtp_layers)
    assert build_model(ModelSection(hf=tmp_path)) == read


@pytest.mark.parametrize("name", CONFIGS)
def test_each_key_that_a_config_json_lacks_is_named(name: str) -> None:
    config = CONFIGS[name]
    needed, _ = READERS[config["model_type"]]
    for key in ("hidden_size", *needed):
        with pytest.raises(PlanError, match=rf"needs .*{key}.* missing"):
            convert_hf({one: value for one, value in config.items() if one != key})


def test_an_unknown_model_type_or_name_gets_the_nearest() -> None:
    with pytest.raises(PlanError, match="nearest: .*qwen3_moe"):
        convert_hf(QWEN | {"model_type": "qwen3moe"})
    with pytest.raises(PlanError, match="nearest: .*DeepSeek-V3"):
        build_model(ModelSection(name="DeepSeek-V33"))


def test_arguments_replace_what_a_name_says() -> None:
    plain, other = (
        build_model(ModelSection(name="Mixtral-8x7B")),
        build_model(ModelSection(name="mixtral8x7b", vocab_size=256000)),
    )
    assert other.count_parameters() - plain.count_parameters() == 2 * (256000 - 32000) * 4096


def test_windows_alternate_in_gpt_oss_and_linear_attention_in_qwen_next() -> None:
    oss = build_model(ModelSection(name="GPT-OSS-120B"))
    assert [layer.attention.window for layer in oss.layers[:4]] == [128, None, 128, None]
    following = build_model(ModelSection(name="Qwen3-Next-80B-A3B"))
    assert [layer.attention.kind for layer in following.layers[:8]] == ["linear"] * 3 + ["gqa"] + ["linear"] * 3 + ["gqa"]


@pytest.mark.parametrize(
    ("given", "layers", "expected"),
    [
        (1, 4, [1, 1, 1, 1]),
        (2, 4, [1, 0, 1, 0]),
        ("([0]*1+[1]*3)", 4, [0, 1, 1, 1]),
        ("[0, 1]*2", 4, [0, 1, 0, 1]),
        ("([0]*3+[1]*58)", 5, [0, 0, 0, 1, 1]),
        ([0, 1], 4, [0, 1, 1, 1]),
    ],
)
def test_layer_frequency_is_read_as_megatron_reads_it(given: object, layers: int, expected: list[int]) -> None:
    assert read_layer_freq(given, layers) == [bool(one) for one in expected]  # type: ignore[arg-type]


@pytest.mark.parametrize("given", [0, "__import__('os')", "[2]*3", "([0]*3", ""])
def test_a_layer_frequency_that_is_none_is_refused(given: object) -> None:
    with pytest.raises(PlanError, match="moe_layer_freq"):
        read_layer_freq(given, 4)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"num_layers": 4, "hidden_size": 64}, "num_attention_heads is missing"),
        (
            {"num_layers": 4, "hidden_size": 64, "num_attention_heads": 8, "num_query_groups": 3},
            "does not divide num_attention_heads",
        ),
        ({"num_layers": 4, "hidden_size": 65, "num_attention_heads": 8}, "does not divide hidden_size"),
        (
            {"num_layers": 4, "hidden_size": 64, "num_attention_heads": 8, "num_experts": 2, "moe_router_topk": 3},
            "more than num_experts",
        ),
    ],
)
def test_arguments_that_make_no_model_are_refused(args: dict[str, int], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        shape_model("model", args)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"model": {"hiden_size": 64}, "cluster": {"gpu": "H100"}},
            "key 'hiden_size'.*nearest: hidden_size|hiden_size.*hidden_size",
        ),
        ({"modle": {}, "model": {}, "cluster": {"gpu": "H100"}}, "modle.*model"),
        ({"model": {}, "cluster": {}}, "cluster.gpu is missing"),
        ({"model": {"num_layers": 0}, "cluster": {"gpu": "H100"}}, "num_layers 0 given"),
        ({"model": {"num_layers": True}, "cluster": {"gpu": "H100"}}, "num_layers True given"),
        ({"model": {}, "cluster": {"gpu": "H100"}, "training": {"precision": "fp7"}}, "training.precision fp7 given.*bf16"),
        ({"model": {}, "cluster": {"gpu": "H100"}, "layout": {"dispatcher": "deepp"}}, "nearest: deepep"),
        ({"model": {}, "cluster": {"gpu": "H100"}, "layout": {"recompute": "layernrm"}}, "nearest: layernorm"),
    ],
)
def test_a_wrong_key_or_value_is_named_in_one_line(given: dict[str, object], message: str) -> None:
    with pytest.raises(PlanError, match=message) as caught:
        parse_config(given)
    assert "\n" not in str(caught.value)
