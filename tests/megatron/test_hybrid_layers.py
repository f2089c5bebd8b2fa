"""The platform's local layers of HybridModel."""

import pytest
from megatron.core.models.hybrid.hybrid_layer_allocation import Symbols
from megatron.core.transformer.spec_utils import build_module

from counterflow.errors import OptionError
from counterflow.platform.hybrid_layers import stack

NEEDS_ENGINE = {"M": "mamba_layer", "G": "gdn_layer", "+": "mla_layer", "D": "dsa_layer"}


def test_each_symbol_has_a_layer_or_a_refusal() -> None:
    assert {*NEEDS_ENGINE, "*", "-", "E"} == Symbols.VALID_LAYERS


@pytest.mark.parametrize("symbol", NEEDS_ENGINE)
def test_a_layer_without_a_local_form_is_refused_and_not_left_out(symbol: str) -> None:
    with pytest.raises(OptionError, match=r"asks for [MG+D]: give Megatron's own spec") as caught:
        build_module(getattr(stack.submodules, NEEDS_ENGINE[symbol]), config=None, layer_number=1)
    assert f"asks for {symbol}:" in str(caught.value)
