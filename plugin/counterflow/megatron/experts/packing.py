"""How experts' weights travel to clones under FP8: as FP8 data and scales, quantized at the home, half the bytes of BF16.

Transformer Engine keeps the FP8 form of a weight in its module's cache, and uses it again while ``is_first_microbatch`` is False.
A clone receives that form and puts it into its cache. Its own parameter is not read then. It holds NaN, so that a step which
reads it all the same cannot go unseen.

Only a form whose two directions are the same data travels so: one scale for a tensor, or one for each 128 x 128 block. MXFP8 has
a scale for 32 values along rows in one direction and along columns in the other; both together are as large as BF16.
"""

import math
from typing import Any
from weakref import ref

import torch

from counterflow.errors import SeamError
from counterflow.moe.clones import Landing, count_bytes

# What the quantizers of Transformer Engine make along rows: data and scales. The other direction is its transpose.
FORMS = {
    "Float8CurrentScalingQuantizer": ("_data", "_scale_inv"),
    "Float8BlockQuantizer": ("_rowwise_data", "_rowwise_scale_inv"),
}
CACHE = "_fp8_workspaces"


def pack_weights(homes: Any, home: int) -> list[torch.Tensor]:
    """Return what is sent of the expert at place ``home`` of a module of grouped linears."""
    packed: list[torch.Tensor] = []
    for linear, name in list_tensors(homes, home):
        tensor, quantizer = getattr(linear, name), find_quantizer(linear, name)
        packed += [tensor] if quantizer is None else _list_buffers(quantizer(tensor.detach()), quantizer)
    return packed


class EnginePacking:
    """Packs the weights of one layer's experts, which are Transformer Engine's grouped linears: ``homes`` and ``clones``.

    Weights travel quantized if the homes' last forward ran in FP8. All ranks of the expert-parallel group have run it, so both
    ends of a transfer decide alike. In the first step they travel as they are.
    """

    def __init__(self, homes: Any, clones: Any) -> None:
        self._homes, self._clones = homes, clones
        self._forms: dict[tuple[int, int], Any] = {}

    def pack(self, home: int) -> list[torch.Tensor]:
        """Return what is sent of the expert at place ``home``."""
        return pack_weights(self._homes, home)

    def land(self, clone: int) -> list[torch.Tensor]:
        """Return the tensors that the clone at place ``clone`` receives into, in the order of `pack`."""
        landing: list[torch.Tensor] = []
        homes, clones = list_tensors(self._homes, 0), list_tensors(self._clones, clone)
        for index, ((home, own), (linear, name)) in enumerate(zip(homes, clones, strict=True)):
            tensor, quantizer = getattr(linear, name).detach(), find_quantizer(home, own)
            if quantizer is None:
                self._forms.pop((clone, index), None)
                landing.append(tensor)
                continue
            form = self._forms.get((clone, index))
            if form is None:
                form = self._forms[clone, index] = quantizer.make_empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
                tensor.fill_(math.nan)
            landing += _list_buffers(form, quantizer)
        return landing

    def unpack(self, clone: int) -> None:
        """Let the clone at place ``clone`` compute with what it has received."""
        for index, (linear, name) in enumerate(list_tensors(self._clones, clone)):
            form = self._forms.get((clone, index))
            if form is not None:
                # The transpose is of earlier data.
                form.update_usage(rowwise_usage=True, columnwise_usage=False)
                form.update_usage(rowwise_usage=True, columnwise_usage=True)
                getattr(linear, CACHE)[name] = form
            if name.startswith("weight"):
                # True makes the linear quantize its weights again.
                linear.is_first_microbatch = form is None


class SharedEnginePacking:
    """Packs the weights of a MoE ``layer`` for slots whose memory all layers share: ``clones`` is its module of ``count`` slots.

    Autograd keeps the quantized tensors that are in the module's cache. They are this layer's own, without memory but while they
    compute: `place` gives them that of what has come, and `lift` takes it away. So a backward computes with what came for it.
    Where a model computes in FP8 and weights come as they are, `place` quantizes them, in that memory.

    What comes quantized is known before the first step, so that the weights themselves need no memory.
    """

    def __init__(self, layer: Any, clones: Any, count: int) -> None:
        self._homes, self._clones, self._count = layer.experts, clones, count
        # Weakly, as whatever belongs to a layer.
        self._find_layer = ref(layer)
        self._forms: dict[tuple[int, int], Any] = {}
        self._packed: frozenset[int] = frozenset()

    def pack(self, home: int) -> list[torch.Tensor]:
        """Return what is sent of the expert at place ``home``."""
        if self._list_packed() != self._packed:
            raise SeamError(
                "a layer computes outside of the FP8 in which its just-in-time clones travel: run it as Megatron's layers run, "
                "or give --cf-eplb-plan predicted and per-layer buffers"
            )
        return pack_weights(self._homes, home)

    def prepare(self) -> frozenset[int]:
        """Return which of an expert's tensors will travel quantized."""
        from megatron.core.fp8_utils import get_fp8_context

        layer: Any = self._find_layer()
        if layer.config.fp8:
            # As upstream enters a layer: those of a prediction have no number of their own.
            with get_fp8_context(layer.config, -1 if layer.is_mtp_layer else layer.layer_number - 1):
                for linear in {linear for linear, _ in list_tensors(self._homes, 0)}:
                    # As its first forward does.
                    linear.init_fp8_metadata(num_gemms=linear.num_gemms)
        self._packed = self._list_packed()
        return self._packed

    def _list_packed(self) -> frozenset[int]:
        named = enumerate(list_tensors(self._homes, 0))
        return frozenset(index for index, (linear, name) in named if find_quantizer(linear, name) is not None)

    def measure(self) -> int:
        """Return the bytes of one slot's quantized weights, with their scales."""
        size = 0
        for linear, name in list_tensors(self._homes, 0):
            if (quantizer := find_computing_quantizer(linear, name)) is not None:
                form = _make_form(quantizer, getattr(linear, name).detach())
                size += count_bytes(filter(torch.is_tensor, vars(form).values()))
        return size

    def land(self, slots: list[list[torch.Tensor]], memory: Landing) -> list[list[torch.Tensor]]:
        """Return the tensors that each slot receives into, in the order of `pack`."""
        memory.is_placed = False
        landing: list[list[torch.Tensor]] = [[] for _ in slots]
        for clone, weights in enumerate(slots):
            for index, ((home, own), weight) in enumerate(zip(list_tensors(self._homes, 0), weights, strict=True)):
                if index not in self._packed:
                    landing[clone].append(weight)
                    continue
                if (clone, index) not in memory.forms:
                    memory.forms[clone, index] = _make_form(find_quantizer(home, own), weight)
                form = memory.forms[clone, index]
                # The other direction is of earlier data.
                form.update_usage(rowwise_usage=True, columnwise_usage=False)
                landing[clone] += _list_buffers(form, form._quantizer)
        return landing

    def place(self, memory: Landing) -> None:
        """Let the clones compute with what was received; tell the modules that what is in their caches is new enough."""
        for clone in range(self._count):
            homes = list_tensors(self._homes, 0)
            for index, ((home, own), (linear, name)) in enumerate(zip(homes, list_tensors(self._clones, clone), strict=True)):
                quantizer = find_computing_quantizer(home, own)
                if quantizer is None:
                    continue
                key = clone, index
                if index not in self._packed and not memory.is_placed:
                    weight = getattr(linear, name).detach()
                    if key not in memory.forms:
                        memory.forms[key] = _make_form(quantizer, weight)
                    quantizer.update_quantized(weight, memory.forms[key])
                memory.forms[key].update_usage(rowwise_usage=True, columnwise_usage=True)
                if key not in self._forms:
                    self._forms[key] = memory.forms[key].detach()
                form = self._forms[key]
                vars(form).update({part: one for part, one in vars(memory.forms[key]).items() if _is_memory(part, one)})
                getattr(linear, CACHE)[name] = form
                linear.is_first_microbatch = False
        memory.is_placed = True

    def lift(self) -> None:
        """Take the memory from what the modules have in their caches."""
        for form in self._forms.values():
            vars(form).update({part: None for part, one in vars(form).items() if torch.is_tensor(one)})


def _is_memory(part: str, value: Any) -> bool:
    """Tell whether an attribute of a quantized tensor is its memory, or says what that holds."""
    return torch.is_tensor(value) or part == "_transpose_invalid" or value is None


def _make_form(quantizer: Any, like: torch.Tensor) -> Any:
    return quantizer.make_empty(like.shape, dtype=like.dtype, device=like.device)


def make_packing(homes: Any, clones: Any) -> EnginePacking | None:
    """Return a packing for experts that are grouped linears of Transformer Engine; None for others, and without clones."""
    return EnginePacking(homes, clones) if _is_grouped(clones) else None


def make_shared_packing(layer: Any, clones: Any, count: int) -> SharedEnginePacking | None:
    """Return a packing for ``count`` shared slots, as `make_packing` does for a layer's own."""
    return SharedEnginePacking(layer, clones, count) if _is_grouped(clones) else None


def _is_grouped(clones: Any) -> bool:
    linear = getattr(clones, "linear_fc1", None)
    return hasattr(linear, "num_gemms") and hasattr(linear, "is_first_microbatch")


def list_tensors(experts: Any, place: int) -> list[tuple[Any, str]]:
    """Return the weights and biases of the expert at ``place`` of a module of grouped linears, as module and attribute."""
    named = [(getattr(experts, f"linear_fc{n}", None), f"{kind}{place}") for n in (1, 2) for kind in ("weight", "bias")]
    # A linear without biases has empty tensors in their place.
    return [(linear, name) for linear, name in named if isinstance(getattr(linear, name, None), torch.nn.Parameter)]


def find_quantizer(linear: Any, name: str) -> Any:
    """Return a quantizer along rows, as the one by which ``linear`` quantizes a weight; None if that is not to travel.

    Raises `SeamError` if the module does not keep quantizers and their results where they are known to be.
    """
    quantizer = find_computing_quantizer(linear, name)
    is_known = type(quantizer).__name__ in FORMS and getattr(quantizer, "block_scaling_dim", 2) == 2
    if quantizer is None or not is_known or getattr(quantizer, "with_amax_reduction", False):
        return None
    quantizer.set_usage(rowwise=True, columnwise=False)
    return quantizer


def find_computing_quantizer(linear: Any, name: str) -> Any:
    """Return a quantizer in both directions, as the one by which ``linear`` quantizes a weight; None if it keeps none.

    Raises `SeamError` as `find_quantizer` does.
    """
    if not (name.startswith("weight") and getattr(linear, "fp8", False) and getattr(linear, "fp8_initialized", False)):
        return None
    if linear.disable_parameter_transpose_cache:
        return None
    if not (hasattr(linear, CACHE) and hasattr(linear, "_get_weight_quantizers")):
        raise SeamError(
            f"{type(linear).__mro__[1].__module__}.{type(linear).__mro__[1].__name__} keeps FP8 weights where they are not known "
            "to be, so clones would compute with old ones: drop --cf-eplb or FP8"
        )
    quantizer = linear._get_weight_quantizers()[int(name.removeprefix("weight"))].copy()
    quantizer.internal = False
    quantizer.set_usage(rowwise=True, columnwise=True)
    return quantizer


def _list_buffers(form: Any, quantizer: Any) -> list[torch.Tensor]:
    return [getattr(form, name) for name in FORMS[type(quantizer).__name__]]
