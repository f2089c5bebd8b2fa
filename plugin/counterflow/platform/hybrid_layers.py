"""A stack of Megatron's local layers for HybridModel: ``--spec counterflow.platform.hybrid_layers stack``.

Upstream's own stack needs Transformer Engine. This one has attention (``*``), dense (``-``) and expert (``E``) layers and a block
for prediction layers (``/``), and runs on the CPU. Mamba (``M``), GDN (``G``), MLA (``+``) and DSA (``D``) layers need kernels of
a GPU.
"""

from dataclasses import fields
from functools import partial
from typing import Any, NoReturn

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.multi_token_prediction import (
    MultiTokenPredictionBlock,
    MultiTokenPredictionBlockSubmodules,
    MultiTokenPredictionLayer,
    MultiTokenPredictionLayerSubmodules,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_layer import MoETransformerLayer, TransformerLayer, TransformerLayerSubmodules

from counterflow.errors import OptionError


class LocalHybridStack(HybridStack):  # type: ignore[misc]
    """Upstream's stack with torch's norm at its end, where upstream takes Transformer Engine's."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs, post_layer_norm=False)
        self.post_layer_norm = True
        if self.post_process:
            self.final_norm = WrappedTorchNorm(config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon)


class NeedsEngine:
    """Stands for a layer that has no local form."""

    def __init__(self, *, symbol: str, **_: Any) -> None:
        _refuse_symbol(symbol)


def _refuse_symbol(symbol: str) -> NoReturn:
    raise OptionError(
        f"--spec counterflow.platform.hybrid_layers stack has attention (*), dense (-) and expert (E) layers, "
        f"--hybrid-layer-pattern asks for {symbol}: give Megatron's own spec, which needs Transformer Engine, or another pattern"
    )


def _need_engine(symbol: str) -> ModuleSpec:
    return ModuleSpec(module=NeedsEngine, params={"symbol": symbol})


_attention = ModuleSpec(
    module=SelfAttention,
    params={"attn_mask_type": AttnMaskType.causal},
    submodules=SelfAttentionSubmodules(
        linear_qkv=ColumnParallelLinear,
        core_attention=DotProductAttention,
        linear_proj=RowParallelLinear,
    ),
)
# Names in checkpoints, as the local layers of GPTModel have them: so a checkpoint of one goes on in a HybridModel.
_NAMES = {"input_layernorm.": "self_attention.linear_qkv.layer_norm_", "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"}
_dense = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
# Megatron-Core 0.18 has no place for some of them.
_places = {field.name for field in fields(HybridStackSubmodules)}
_symbols = {"mamba_layer": "M", "gdn_layer": "G", "mla_layer": "+", "dsa_layer": "D"}
_missing: Any = {place: _need_engine(symbol) for place, symbol in _symbols.items() if place in _places}
_prediction_layer = ModuleSpec(
    module=MultiTokenPredictionLayer,
    submodules=MultiTokenPredictionLayerSubmodules(
        enorm=WrappedTorchNorm,
        hnorm=WrappedTorchNorm,
        eh_proj=ColumnParallelLinear,
        mtp_model_layer=None,
        layer_norm=WrappedTorchNorm,
    ),
)

stack = ModuleSpec(
    module=LocalHybridStack,
    submodules=HybridStackSubmodules(
        attention_layer=ModuleSpec(
            module=TransformerLayer,
            submodules=TransformerLayerSubmodules(
                input_layernorm=WrappedTorchNorm,
                self_attention=_attention,
                self_attn_bda=get_bias_dropout_add,
                sharded_state_dict_keys_map=_NAMES,
            ),
        ),
        mlp_layer=ModuleSpec(
            module=MLPLayer,
            submodules=TransformerLayerSubmodules(
                pre_mlp_layernorm=WrappedTorchNorm,
                mlp=partial(MLP.as_mlp_submodule, submodules=_dense),
                mlp_bda=get_bias_dropout_add,
                sharded_state_dict_keys_map=_NAMES,
            ),
        ),
        moe_layer=ModuleSpec(
            module=MoETransformerLayer,
            submodules=TransformerLayerSubmodules(
                pre_mlp_layernorm=WrappedTorchNorm,
                # Any number: upstream asks here only whether there are experts.
                mlp=get_moe_module_spec(use_te=False, num_experts=1, moe_grouped_gemm=False),
                mlp_bda=get_bias_dropout_add,
                sharded_state_dict_keys_map=_NAMES,
            ),
        ),
        **_missing,
        mtp_block_spec=ModuleSpec(
            module=MultiTokenPredictionBlock,
            submodules=MultiTokenPredictionBlockSubmodules(layer_specs=[_prediction_layer]),
        ),
    ),
)
