"""Megatron's MoE layer with slots: its router stays logical, its dispatcher deals tokens to slots, its experts get clones.

The layer is upstream's own, told of more experts than there are where it deals with ranks: the dispatcher counts slots, and
behind the local experts stands a second module of the same class, the clones. That one is no child of the layer: neither the
optimizer, nor data parallelism, nor a checkpoint knows of it.
"""

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any
from weakref import ref

import numpy as np
import torch
from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionLayer

from counterflow.errors import SeamError
from counterflow.megatron.state import layer_slots
from counterflow.moe.clones import LayerExperts
from counterflow.moe.layer import LayerSlots


class MegatronSlots(LayerSlots):
    """The slots of one of Megatron's MoE layers."""

    def __init__(self, layer: Any, dispatcher: Any, clone_module: Any, clones_per_rank: int, *, is_exact: bool) -> None:
        # Not held: the table that has this by its layer would keep both alive.
        self._find_layer, self.clone_module = ref(layer), clone_module
        self.numbered_behind = 0
        sources = dispatcher.tp_ep_group
        rank_of_source = np.arange(sources.size()) // dispatcher.tp_size
        super().__init__(layer.num_local_experts, clones_per_rank, sources, rank_of_source, is_exact=is_exact)

    @property
    def layer(self) -> Any:
        """The MoE layer."""
        layer = self._find_layer()
        assert layer is not None
        return layer

    @property
    def is_training(self) -> bool:
        """Whether the layer is not being evaluated."""
        return bool(self.layer.training)

    def run_experts(self, run_homes: Callable[..., Any], tokens: Any, tokens_per_slot: Any, probs: Any, **kwargs: Any) -> Any:
        """Run the tokens of the home slots, which come first, by ``run_homes``, and the others by the clones."""
        at_home = int(tokens_per_slot[: self._own].sum())
        if at_home == len(tokens):
            return run_homes(tokens, tokens_per_slot[: self._own], probs, **kwargs)
        if self.finish_refresh():
            _forget_cached_weights(self.clone_module)
        sizes = [at_home, len(tokens) - at_home]
        (own_tokens, other_tokens), (own_probs, other_probs) = torch.split(tokens, sizes), torch.split(probs, sizes)
        own, bias = run_homes(own_tokens, tokens_per_slot[: self._own], own_probs, **kwargs)
        others, _ = self.clone_module(other_tokens, tokens_per_slot[self._own :], other_probs)
        return torch.cat((own, others)), bias

    @property
    def number(self) -> int:  # type: ignore[override]
        """The layer's number in the model, from 1; prediction layers come after all others."""
        layer = self.layer
        before = layer.config.num_layers if layer.is_mtp_layer else self.numbered_behind
        return int(layer.layer_number + before)

    def list_experts(self) -> LayerExperts:
        """Return the parameters of this rank's slots."""
        homes = list_weights(self.layer.experts, self._own)
        return LayerExperts(homes, list_weights(self.clone_module, self._per_rank) if self.clone_module is not None else [])


class KnownCounts:
    """Token counts that a layer knows before its dispatcher would gather them."""

    def __init__(self) -> None:
        self._known: torch.Tensor | None = None

    @contextmanager
    def hold(self, counts: torch.Tensor | None) -> Iterator[None]:
        """Let the dispatcher's gather of counts inside the block return ``counts``, ``[sources, slots]``, without a collective.

        Raises `SeamError` where it does not gather.
        """
        if counts is None:
            yield
            return
        self._known = counts
        try:
            yield
            if self._known is not None:
                raise SeamError(
                    "the all-to-all dispatcher of this megatron-core gathers no counts in its preprocess: drop --cf-eplb"
                )
        finally:
            self._known = None

    def answer_gather(self, gather: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap the gather that token dispatchers import: inside `hold` the first call is answered."""

        @wraps(gather)
        def gather_or_answer(input_: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if self._known is None:
                return gather(input_, *args, **kwargs)
            known, self._known = self._known, None
            if input_.dim() != 1 or len(input_) != known.shape[1]:
                raise SeamError(
                    f"the all-to-all dispatcher of this megatron-core gathers {tuple(input_.shape)} first where "
                    f"({known.shape[1]},) counts are expected: drop --cf-eplb"
                )
            return known.view(-1)

        return gather_or_answer


class SlotWrappers:
    """Wraps the methods by which Megatron builds and runs MoE layers: in a run with slots."""

    def __init__(self, clones_per_rank: int, *, is_exact: bool) -> None:
        self._clones_per_rank, self._is_exact = clones_per_rank, is_exact
        self.counts = KnownCounts()

    def give_slots(self, build: Callable[..., None]) -> Callable[..., None]:
        """Wrap ``MoELayer.__init__``: the layer gets `MegatronSlots`, a dispatcher that deals to them, and its clones."""

        @wraps(build)
        def build_with_slots(layer: Any, *args: Any, **kwargs: Any) -> None:
            build(layer, *args, **kwargs)
            if layer.ep_group.size() == 1:
                return  # every rank computes all experts: there is nothing to balance
            given = inspect.signature(build).bind(layer, *args, **kwargs).arguments
            groups = given.get("pg_collection") or _get_default_groups()
            layer.token_dispatcher = _make_slot_dispatcher(layer, self._clones_per_rank, groups)
            clones = _build_clones(layer, self._clones_per_rank, groups, given.get("name"))
            slots = MegatronSlots(layer, layer.token_dispatcher, clones, self._clones_per_rank, is_exact=self._is_exact)
            layer_slots[layer] = slots
            if clones is not None:
                _add_clones(layer.experts, slots)

        return build_with_slots

    def deal_to_slots(self, preprocess: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap ``MoELayer.preprocess``, which hands routed tokens to the dispatcher: it gets a map over slots."""

        @wraps(preprocess)
        def preprocess_slots(layer: Any, hidden_states: Any, probs: Any, routing_map: Any) -> Any:
            slots = layer_slots.get(layer)
            if slots is None:
                return preprocess(layer, hidden_states, probs, routing_map)
            slot_probs, slot_map, shares = slots.deal(probs, routing_map)
            # Only this dispatcher gathers counts before it sends; padding, for quantization, changes them.
            config = layer.config
            is_known = config.moe_token_dispatcher_type == "alltoall" and not config.moe_router_padding_for_quantization
            with self.counts.hold(shares if is_known and layer.token_dispatcher.tp_ep_group.size() > 1 else None):
                return preprocess(layer, hidden_states, slot_probs, slot_map)

        return preprocess_slots


def number_prediction_layers(chunk: Any) -> None:
    """Number the MoE layers inside HybridModel's prediction layers behind all others; upstream counts from 1 in each of them."""
    for module in chunk.modules():
        pattern = module.mtp_layer_pattern if isinstance(module, MultiTokenPredictionLayer) else None
        if pattern:
            before = module.config.num_layers + (module.layer_number - 1) * len(pattern)
            for part in module.modules():
                if part in layer_slots:
                    layer_slots[part].numbered_behind = before


def _get_default_groups() -> Any:
    from megatron.core.transformer.moe.moe_utils import get_default_pg_collection

    return get_default_pg_collection()


def _make_slot_dispatcher(layer: Any, clones_per_rank: int, groups: Any) -> Any:
    """Return a dispatcher of the layer's own class that deals to slots."""
    width = layer.num_local_experts + clones_per_rank
    config = copy.copy(layer.config)
    config.num_moe_experts = width * layer.ep_group.size()
    first = width * layer.ep_group.rank()
    dispatcher = type(layer.token_dispatcher)(width, list(range(first, first + width)), config=config, pg_collection=groups)
    if layer.use_shared_expert and layer.shared_expert_overlap:
        dispatcher.set_shared_experts(layer.shared_experts)
    return dispatcher


def _build_clones(layer: Any, count: int, groups: Any, name: str | None) -> Any:
    """Return a module of the experts' own class for ``count`` clones; None for none. Draws no random number."""
    if not count:
        return None
    config = copy.copy(layer.config)
    config.perform_initialization = False
    named = {"name": f"{name}.experts.clones"} if name is not None else {}
    return layer.submodules.experts(count, config, pg_collection=groups, **named)


def _add_clones(experts: Any, slots: MegatronSlots) -> None:
    """Let upstream's experts hand the clones' tokens, their delayed weight gradients, and their mode, to the clones."""
    run_homes, finish_homes, set_homes_training = experts.forward, experts.backward_dw, experts.train

    @wraps(run_homes)
    def forward(tokens: Any, tokens_per_slot: Any, probs: Any, **kwargs: Any) -> Any:
        return slots.run_experts(run_homes, tokens, tokens_per_slot, probs, **kwargs)

    @wraps(finish_homes)
    def backward_dw() -> None:
        finish_homes()
        # A clone that no token of this micro-batch came to has nothing queued.
        if all(not module.wgrad_store.context.empty() for module in list_delayed(slots.clone_module)):
            slots.clone_module.backward_dw()

    @wraps(set_homes_training)
    def train(mode: bool = True) -> Any:
        slots.clone_module.train(mode)
        return set_homes_training(mode)

    experts.forward, experts.backward_dw, experts.train = forward, backward_dw, train


def _forget_cached_weights(module: Any) -> None:
    """Let Transformer Engine's modules quantize their weights anew (untested on GPU); upstream does so for the model's own."""
    for part in module.modules():
        if hasattr(part, "is_first_microbatch"):
            part.is_first_microbatch = True


def list_delayed(module: Any) -> list[Any]:
    """Return Transformer Engine's modules in ``module`` that queue weight gradients."""
    found = [part for part in module.modules() if getattr(part, "wgrad_store", None) is not None]
    return [part for part in found if part.wgrad_store.delay_wgrad_compute()]


def list_weights(experts: Any, count: int) -> list[list[torch.nn.Parameter]]:
    """Return the parameters of each of ``count`` experts in upstream's module of them.

    ``SequentialMLP`` has a module for each, Transformer Engine's grouped linears a numbered weight (and bias). Raises `SeamError`
    for another shape.
    """
    if hasattr(experts, "local_experts"):
        return [list(expert.parameters()) for expert in experts.local_experts]
    linears = [linear for linear in (getattr(experts, f"linear_fc{n}", None) for n in (1, 2)) if linear is not None]
    names = [f"{kind}{{}}" for kind in ("weight", "bias") if hasattr(linears[0], f"{kind}0")] if linears else []
    if not names:
        raise SeamError(
            f"{type(experts).__module__}.{type(experts).__name__} keeps its weights neither as local_experts nor as "
            "linear_fc1.weight0, …: --cf-eplb does not know how to clone one of its experts, drop the flag"
        )
    return [
        [weight for linear in linears for name in names if (weight := getattr(linear, name.format(index), None)) is not None]
        for index in range(count)
    ]
