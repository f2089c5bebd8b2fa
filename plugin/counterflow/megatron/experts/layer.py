"""Megatron's MoE layer with slots: the router chooses experts, the dispatcher sends tokens to slots, and experts have clones.

The layer is upstream's own. Its dispatcher is built for the number of slots, not of experts. The clones are a second module of
the experts' class. It is not a child of the layer, so the optimizer, data parallelism and checkpoints do not see it.
"""

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial, wraps
from typing import Any

import numpy as np
import torch
from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionLayer

from counterflow.errors import SeamError
from counterflow.megatron.experts.packing import list_tensors, make_packing, make_shared_packing
from counterflow.megatron.gradients import add_behind_delayed, defer_queued, is_delayed
from counterflow.megatron.state import layer_slots
from counterflow.moe.clones import LayerExperts
from counterflow.moe.layer import LayerSlots
from counterflow.runtime.weight_grads import defer_weight_grad


class MegatronSlots(LayerSlots):
    """The slots of one of Megatron's MoE layers."""

    def __init__(
        self,
        layer: Any,
        dispatcher: Any,
        clone_module: Any,
        clones_per_rank: int,
        *,
        is_exact: bool,
        shared_module: Any = None,
        shared: int = 0,
    ) -> None:
        self.refer_to(layer)
        self.clone_module, self.shared_module = clone_module, shared_module
        self._packing = make_packing(layer.experts, clone_module)
        self._shared_packing = make_shared_packing(layer, shared_module, shared)
        self.numbered_behind = 0
        sources = dispatcher.tp_ep_group
        rank_of_source = np.arange(sources.size()) // dispatcher.tp_size
        super().__init__(layer.num_local_experts, clones_per_rank, sources, rank_of_source, is_exact=is_exact, shared=shared)

    @property
    def is_training(self) -> bool:
        """Whether the layer is in training mode."""
        return bool(self.layer.training)

    def run_experts(self, run_homes: Callable[..., Any], tokens: Any, tokens_per_slot: Any, probs: Any, **kwargs: Any) -> Any:
        """Run the tokens of home slots, which come first, by ``run_homes``, and those of clone slots by the clones.

        A backward goes the other way round. So on every rank just-in-time clones send their gradients first, then resident ones,
        and homes compute beside both.
        """
        loan, at_home = self.dealt.loan, int(tokens_per_slot[: self._own].sum())
        tokens = self.pass_on(loan, tokens)
        if at_home == len(tokens):
            output, bias = run_homes(tokens, tokens_per_slot[: self._own], probs, **kwargs)
            return *self.give_back(loan, *self.send_home(output)), bias
        lent = int(tokens_per_slot[self._own + self._per_rank :].sum())
        sizes = [at_home, len(tokens) - at_home - lent, lent]
        (own, resident, shared), (own_probs, resident_probs, shared_probs) = torch.split(tokens, sizes), torch.split(probs, sizes)
        output, bias = run_homes(own, tokens_per_slot[: self._own], own_probs, **kwargs)
        outputs = [output]
        if sizes[1]:
            if self.finish_refresh() and self._packing is None:
                _forget_cached_weights(self.clone_module)
            counts = tokens_per_slot[self._own : self._own + self._per_rank]
            resident, resident_probs = self.send_home(resident, resident_probs)
            outputs.append(self.clone_module(resident, counts, resident_probs)[0])
        else:
            outputs = [*self.send_home(output)]
        if lent:
            shared, shared_probs = self.give_back(loan, shared, shared_probs)
            outputs.append(self._run_shared(shared, tokens_per_slot[self._own + self._per_rank :], shared_probs))
            return torch.cat(outputs), bias
        return *self.give_back(loan, torch.cat(outputs)), bias

    def _run_shared(self, tokens: Any, counts: Any, probs: Any) -> Any:
        assert self._just_in_time is not None and self.dealt.loan is not None

        def run(tokens: Any, probs: Any) -> Any:
            return self.shared_module(tokens, counts, probs)[0]

        return self._just_in_time.compute(self.dealt.loan, run, tokens, probs, leave=partial(leave_delayed, self.shared_module))

    def leave_weight_grads(self) -> None:
        """Hand over what Transformer Engine's modules of the homes have queued."""
        defer_queued(list_delayed(self.layer.experts))

    @property
    def number(self) -> int:  # type: ignore[override]
        """The layer's number in the model, from 1; prediction layers come after all others."""
        layer = self.layer
        before = layer.config.num_layers if layer.is_mtp_layer else self.numbered_behind
        return int(layer.layer_number + before)

    def list_experts(self) -> LayerExperts:
        """Return the parameters of this rank's slots."""
        # Weight gradients that are delayed come behind those of homes.
        self.is_sent_early = self.clone_module is not None and not list_delayed(self.clone_module)
        homes = list_weights(self.layer.experts, self._own)
        clones = list_weights(self.clone_module, self._per_rank) if self.clone_module is not None else []
        shared = list_weights(self.shared_module, self._shared) if self.shared_module is not None else []
        return LayerExperts(homes, clones, self._packing, shared, self._shared_packing)


class KnownCounts:
    """The token counts of all sources, for a dispatcher that would gather them again."""

    def __init__(self) -> None:
        self._known: torch.Tensor | None = None

    @contextmanager
    def hold(self, counts: torch.Tensor | None) -> Iterator[None]:
        """Let the dispatcher's gather inside the block return ``counts``, ``[sources, slots]``, without a collective.

        Raises `SeamError` if the dispatcher does not gather. Does nothing if ``counts`` is None.
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
        """Wrap the gather that token dispatchers import: inside `hold` the first call returns the known counts."""

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
    """Wrappers of the methods with which Megatron builds and runs MoE layers."""

    def __init__(self, clones_per_rank: int, *, is_exact: bool, shared: int = 0) -> None:
        self._clones_per_rank, self._is_exact, self._shared = clones_per_rank, is_exact, shared
        self.counts = KnownCounts()

    def give_slots(self, build: Callable[..., None]) -> Callable[..., None]:
        """Wrap ``MoELayer.__init__``: the layer gets `MegatronSlots`, a dispatcher for slots, and clones."""

        @wraps(build)
        def build_with_slots(layer: Any, *args: Any, **kwargs: Any) -> None:
            build(layer, *args, **kwargs)
            if layer.ep_group.size() == 1:
                return  # every rank computes all experts: there is nothing to balance
            arguments = inspect.signature(build).bind(layer, *args, **kwargs).arguments
            groups = arguments.get("pg_collection") or _get_default_groups()
            layer.token_dispatcher = _make_slot_dispatcher(layer, self._clones_per_rank + self._shared, groups)
            clones = _build_clones(layer, self._clones_per_rank, groups, arguments.get("name"))
            shared = _build_clones(layer, self._shared, groups, arguments.get("name"), "shared_clones")
            slots = MegatronSlots(
                layer, layer.token_dispatcher, clones, self._clones_per_rank, is_exact=self._is_exact,
                shared_module=shared, shared=self._shared,
            )  # fmt: skip
            layer_slots[layer] = slots
            if clones is not None or shared is not None:
                _add_clones(layer.experts, slots)

        return build_with_slots

    def deal_to_slots(self, preprocess: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap ``MoELayer.preprocess``, which passes the routing map to the dispatcher: it gets a map over slots."""

        @wraps(preprocess)
        def preprocess_slots(layer: Any, hidden_states: Any, probs: Any, routing_map: Any) -> Any:
            slots = layer_slots.get(layer)
            if slots is None:
                return preprocess(layer, hidden_states, probs, routing_map)
            slot_probs, slot_map, shares = slots.deal(probs, routing_map)
            # Only this dispatcher gathers counts before it sends. Padding for quantization changes counts, so they are not known.
            config = layer.config
            is_known = config.moe_token_dispatcher_type == "alltoall" and not config.moe_router_padding_for_quantization
            with self.counts.hold(shares if is_known and layer.token_dispatcher.tp_ep_group.size() > 1 else None):
                return preprocess(layer, hidden_states, slot_probs, slot_map)

        return preprocess_slots

    def recall_behind(self, postprocess: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap ``MoELayer.postprocess``, which takes what was combined: at its gradient just-in-time clones come again."""

        @wraps(postprocess)
        def postprocess_recalled(layer: Any, output: Any, *args: Any, **kwargs: Any) -> Any:
            slots = layer_slots.get(layer)
            return postprocess(layer, output if slots is None else slots.recall(slots.dealt.loan, output), *args, **kwargs)

        return postprocess_recalled


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
    """Return a dispatcher of the layer's dispatcher class, for slots."""
    width = layer.num_local_experts + clones_per_rank
    config = copy.copy(layer.config)
    config.num_moe_experts = width * layer.ep_group.size()
    first = width * layer.ep_group.rank()
    dispatcher = type(layer.token_dispatcher)(width, list(range(first, first + width)), config=config, pg_collection=groups)
    if layer.use_shared_expert and layer.shared_expert_overlap:
        dispatcher.set_shared_experts(layer.shared_experts)
    return dispatcher


def _build_clones(layer: Any, count: int, groups: Any, name: str | None, called: str = "clones") -> Any:
    """Return a module of the experts' class for ``count`` clones; None for 0. Draws no random number."""
    if not count:
        return None
    config = copy.copy(layer.config)
    config.perform_initialization = False
    named = {"name": f"{name}.experts.{called}"} if name is not None else {}
    clones = layer.submodules.experts(count, config, pg_collection=groups, **named)
    add_behind_delayed(clones)
    return clones


def _add_clones(experts: Any, slots: MegatronSlots) -> None:
    """Make upstream's experts call their clones too: in forward, for delayed weight gradients, and to set the mode."""
    run_homes, finish_homes, set_homes_training = experts.forward, experts.backward_dw, experts.train

    @wraps(run_homes)
    def forward(tokens: Any, tokens_per_slot: Any, probs: Any, **kwargs: Any) -> Any:
        return slots.run_experts(run_homes, tokens, tokens_per_slot, probs, **kwargs)

    @wraps(finish_homes)
    def backward_dw() -> None:
        finish_homes()
        # Nothing is queued if no token of the micro-batch went to a clone.
        resident = slots.clone_module
        if resident is not None and all(not module.wgrad_store.context.empty() for module in list_delayed(resident)):
            resident.backward_dw()

    @wraps(set_homes_training)
    def train(mode: bool = True) -> Any:
        for clones in (slots.clone_module, slots.shared_module):
            if clones is not None:
                clones.train(mode)
        return set_homes_training(mode)

    experts.forward, experts.backward_dw, experts.train = forward, backward_dw, train


def _forget_cached_weights(module: Any) -> None:
    """Make Transformer Engine's linears of single experts quantize their weights again, as upstream does for the model's."""
    for part in module.modules():
        if hasattr(part, "is_first_microbatch"):
            part.is_first_microbatch = True


def list_delayed(module: Any) -> list[Any]:
    """Return Transformer Engine's modules in ``module`` that queue weight gradients."""
    found = [part for part in module.modules() if getattr(part, "wgrad_store", None) is not None]
    return [part for part in found if part.wgrad_store.delay_wgrad_compute()]


def leave_delayed(module: Any) -> None:
    """Hand over what a backward has queued in Transformer Engine's modules, and what it has left at their parameters.

    The W puts both back and computes. So each W finds what its own micro-batch has left, whatever came in between.
    """
    for part in list_delayed(module):
        queue, parameters = part.wgrad_store.context, [*filter(is_delayed, part.parameters(recurse=False))]
        while not queue.empty():
            left = [(one, one.grad, getattr(one, "grad_added_to_main_grad", False)) for one in parameters]
            defer_weight_grad(partial(_compute_delayed, part, queue.get(), left))
        for one in parameters:
            one.grad = None


def _compute_delayed(part: Any, queued: Any, left: list[tuple[Any, torch.Tensor | None, bool]]) -> None:
    part.wgrad_store.context.put(queued)
    for parameter, gradient, is_added in left:
        parameter.grad, parameter.grad_added_to_main_grad = gradient, is_added
    part.backward_dw()


def list_weights(experts: Any, count: int) -> list[list[torch.nn.Parameter]]:
    """Return the parameters of each of the ``count`` experts in upstream's module ``experts``.

    ``SequentialMLP`` has a module for each expert; Transformer Engine's grouped linears have a numbered weight (and bias) for
    each. Raises `SeamError` for any other module.
    """
    if hasattr(experts, "local_experts"):
        return [list(expert.parameters()) for expert in experts.local_experts]
    if not list_tensors(experts, 0):
        raise SeamError(
            f"{type(experts).__module__}.{type(experts).__name__} keeps its weights neither as local_experts nor as "
            "linear_fc1.weight0, …: --cf-eplb does not know how to clone one of its experts, drop the flag"
        )
    return [[getattr(linear, name) for linear, name in list_tensors(experts, index)] for index in range(count)]
