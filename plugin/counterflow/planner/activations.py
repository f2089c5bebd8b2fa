"""What a micro-batch leaves in memory on its way through a layer: bytes that its backward pass needs, and bytes while it runs.

Counted is what Megatron-Core with Transformer Engine's modules keeps: the inputs of norms, linears, activations and attention,
each tensor once. The dry run (`counterflow.megatron.dry_run`) counts the same on the real modules.
"""

from dataclasses import dataclass, replace

from counterflow.planner.layouts import Layout, Recompute, Stage, Training
from counterflow.planner.models import LINEAR, MLA, AttentionShape, FFNShape, LayerShape, ModelShape, MoEShape

BF16, FP32 = 2, 4
# Bytes of one element of a linear's saved input: FP8 data with its scales (blocks of 128, MX blocks of 32, 16 with 4 bits).
SAVED = {"fp32": 4.0, "bf16": 2.0, "fp16": 2.0, "fp8-delayed": 1.0, "fp8-tensorwise": 1.0, "fp8-blockwise": 1 + 4 / 128}
SAVED |= {"mxfp8": 1 + 1 / 32, "nvfp4": 0.5 + 1 / 16}
# A chunk of the gated delta rule, whose states the backward pass needs.
DELTA_CHUNK = 64


@dataclass(frozen=True)
class Held:
    """Bytes of one micro-batch.

    ``kept`` from its F to its B or I, ``queued`` from its I to its W, ``working`` while its B runs, ``ahead`` while its F runs.
    """

    kept: float = 0.0
    queued: float = 0.0
    working: float = 0.0
    ahead: float = 0.0

    def join(self, other: "Held") -> "Held":
        """Return what two layers hold, one behind the other."""
        return Held(
            self.kept + other.kept, self.queued + other.queued, max(self.working, other.working), max(self.ahead, other.ahead)
        )


@dataclass(frozen=True)
class _Sizes:
    """Tokens of a micro-batch on a rank: ``whole`` inside attention and feed-forwards, ``part`` where sequence parallelism cuts.

    ``saved`` bytes of an element of a linear's input, ``wide`` of any other tensor's, ``rows`` tokens that arrive at the rank's
    experts.
    """

    whole: float
    part: float
    saved: float
    wide: int
    rows: float
    layout: Layout
    seq: int
    precision: str

    @property
    def is_delayed(self) -> bool:
        """Whether scales are those of past steps."""
        return self.precision == "fp8-delayed"

    @property
    def is_quantized(self) -> bool:
        """Whether linears keep a copy of their input in fewer bits."""
        return self.saved < self.wide


def size_element(training: Training) -> int:
    """Return the bytes of an element of what layers pass on."""
    return FP32 if training.precision == "fp32" else BF16


def has_final_norm(stage: Stage, model: ModelShape) -> bool:
    """Tell whether a stage ends the decoder: the last norm stands before MTP layers, on a stage of their own or not."""
    if model.mtp_layers and model.layers:
        return bool(stage.numbers) and stage.numbers[-1] == len(model.layers) - 1
    return stage.head


def size_layer(layer: LayerShape, layout: Layout, training: Training, imbalance: float = 1.0) -> Held:
    """Return what a micro-batch holds in one layer; ``imbalance`` is the rank's tokens over the mean of its expert group."""
    sizes = _measure(layer, layout, training, imbalance)
    if layout.recompute.granularity == "full":
        whole = _size_parts(layer, sizes)
        first = sizes.wide * layer.hidden * sizes.part
        # The layer is run again before its backward pass: what it keeps is there only then.
        return Held(first, whole.queued, whole.working + whole.kept - first, whole.ahead)
    return _size_parts(layer, sizes)


def _measure(layer: LayerShape, layout: Layout, training: Training, imbalance: float) -> _Sizes:
    whole = layout.micro_batch_size * training.seq_length / layout.cp
    part = whole / layout.tp if layout.sequence_parallel else whole
    topk = layer.moe.topk if layer.moe is not None else 0
    rows = part * topk * layout.etp * imbalance
    wide = size_element(training)
    return _Sizes(whole, part, SAVED[training.precision], wide, rows, layout, training.seq_length, training.precision)


def _size_parts(layer: LayerShape, sizes: _Sizes) -> Held:
    attention = _size_attention(layer.attention, layer.hidden, sizes)
    if layer.moe is not None:
        return attention.join(_size_moe(layer.moe, layer.hidden, sizes))
    assert layer.ffn is not None
    return attention.join(_size_dense(layer.ffn, layer.hidden, sizes))


def _size_norm(hidden: int, sizes: _Sizes, has_linear: bool, is_fused: bool) -> float:
    """Return the bytes of a norm: its input, a number per token, and its output unless that is computed again.

    A norm in one module with the linear behind it is not computed again.
    """
    saved = sizes.saved if has_linear else sizes.wide
    output = 0 if "layernorm" in sizes.layout.recomputes and not is_fused else saved * hidden
    return sizes.part * (sizes.wide * hidden + FP32 + output)


def _size_attention(a: AttentionShape, hidden: int, s: _Sizes) -> Held:
    norm, tp = _size_norm(hidden, s, has_linear=True, is_fused=a.kind != MLA), s.layout.tp
    heads = a.heads / tp
    if a.kind == LINEAR:
        return _size_delta(a, hidden, norm, s)
    queries, values = heads * a.head_dim, heads * a.v_head_dim
    keys = max(a.kv_heads / tp, 1) * a.head_dim
    out = s.whole * values
    # Queries, keys and values as attention takes them; its output, which is the projection's input too.
    inputs = s.wide * s.whole * (queries + (queries + values if a.kind == MLA else 2 * keys))
    # With delayed scales the projection keeps a quantized copy of its input too.
    kept = inputs + s.wide * out + (s.saved * out if s.is_delayed else 0.0)
    if "core_attn" in s.layout.recomputes:
        # Values are a part of what the first linear made, which stays whole; a kernel would have taken a copy.
        kept += 0.0 if a.kind == MLA else s.wide * s.whole * (queries + keys)
    elif s.layout.fused_attention:
        kept += FP32 * s.whole * heads
    else:
        kept += _size_scores(heads, s) + (0.0 if a.kind == MLA else s.wide * s.whole * (queries + keys))
    first = 0.0
    if a.kind == MLA:
        # The compressed tensors before their norms, the keys' position beside them, and behind the norms.
        first = s.wide * s.part * (a.q_lora + a.kv_lora + a.rope_dim)
        if "mla_up_proj" in s.layout.recomputes:
            # The norms lie inside the part that is run again.
            kept -= inputs
        else:
            first += s.saved * s.part * (a.q_lora + a.kv_lora)
            if not a.q_lora:
                # Megatron puts a second norm before the queries' linear.
                first += s.part * (s.saved * hidden + FP32)
    else:
        first = s.wide * s.whole * (queries + keys) * (2 if a.output_gate else 1) if a.qk_norm or a.output_gate else 0.0
    gate = s.wide * s.whole * queries if a.output_gate else 0.0
    # Gradients of queries, keys, values and the output, and what is gathered for the first linear.
    working = inputs + s.wide * out + s.wide * hidden * (s.whole + 2 * s.part)
    if not s.layout.fused_attention:
        working += _size_scores(heads, s)
    if "mla_up_proj" in s.layout.recomputes:
        working += inputs
    queued = s.part * hidden * s.saved + s.saved * out + s.wide * (inputs / s.wide + s.part * hidden)
    return Held(norm + kept + first + gate, queued, working, inputs + s.wide * out)


def _size_scores(heads: float, s: _Sizes) -> float:
    """Return the bytes of attention's softmax and its mask where no fused kernel avoids them."""
    return s.wide * heads * s.whole * s.seq + s.seq * s.seq / s.layout.cp


def _size_delta(a: AttentionShape, hidden: int, norm: float, s: _Sizes) -> Held:
    """Gated delta rule: what its linears, convolution, norms and chunked kernel keep.

    The first linear's output is the convolution's input. Queries and keys are there as the norm of heads leaves them and, copied
    for each head of values, as the kernel takes them; values, the kernel's output, that output's norm, its gate and the product
    of both. The states of chunks are computed again when the backward pass needs them.
    """
    tp, whole = s.layout.tp, s.whole
    heads, groups = a.heads / tp, a.kv_heads / tp
    keys, values, copied = groups * a.head_dim, heads * a.v_head_dim, heads * a.head_dim
    first = 2 * keys + 2 * values + 2 * heads
    small = s.wide * 3 * heads + FP32 * (2 * heads + 2 * groups)
    inner = first + 2 * keys + 2 * copied + 4 * values + heads * DELTA_CHUNK
    kept = norm + whole * (s.wide * inner + s.saved * values + small)
    states = whole / DELTA_CHUNK * heads * a.head_dim * a.v_head_dim
    queued = s.saved * (s.part * hidden + whole * values) + s.wide * (whole * first + s.part * hidden)
    working = s.wide * (whole * (first + 2 * copied + 3 * values + hidden) + states)
    return Held(kept, queued, working, s.wide * (whole * (first + 2 * copied + values) + states))


def _size_ffn(ffn: FFNShape, tokens: float, parts: int, s: _Sizes) -> tuple[float, float]:
    """Return the elements of the first linear's output, and of the activation's."""
    inner = tokens * ffn.size / parts
    return inner * (2 if ffn.gated else 1), inner


def _size_dense(ffn: FFNShape, hidden: int, s: _Sizes) -> Held:
    norm = _size_norm(hidden, s, has_linear=True, is_fused=True)
    first, inner = _size_ffn(ffn, s.whole, s.layout.tp, s)
    kept = s.wide * first + s.saved * inner
    working = s.wide * (first + inner + hidden * (s.whole + 2 * s.part))
    queued = s.saved * (s.part * hidden + inner) + s.wide * (first + s.part * hidden)
    if "mlp" in s.layout.recomputes:
        # The norm lies inside the part that is run again.
        return Held(s.part * s.wide * hidden, queued, working + kept + norm, s.wide * (first + inner))
    return Held(norm + kept, queued, working, s.wide * (first + inner))


def _size_moe(moe: MoEShape, hidden: int, s: _Sizes) -> Held:
    norm = _size_norm(hidden, s, has_linear=False, is_fused=False)
    recomputes, layout = s.layout.recomputes, s.layout
    first, inner = _size_ffn(moe.expert, s.rows, layout.etp, s)
    # Logits, scores and probabilities in FP32, the map of tokens to experts, and the order of tokens.
    router = s.part * moe.experts * (3 * FP32 + 1) + s.rows * 2 * FP32
    activation = 0.0 if "moe_act" in recomputes else s.saved * inner
    experts = s.saved * s.rows * hidden + s.wide * first + activation + FP32 * s.rows
    shared = shared_queue = 0.0
    if moe.shared is not None:
        outer, middle = _size_ffn(moe.shared, s.whole, layout.tp, s)
        shared = s.wide * outer + s.saved * middle + (s.saved * hidden * s.part if s.is_quantized else 0.0)
        shared_queue = shared + s.wide * (outer + s.part * hidden)
        # The gate is multiplied with the shared experts' output, which is kept for it, and so is the gate.
        shared += s.wide * s.part * (hidden + 1) if moe.shared_gate else 0.0
        shared = 0.0 if "shared_experts" in recomputes else shared
    # Gradients of the experts' outputs before and behind the exchange, of the activation, of the first linear and its input.
    working = s.wide * (3 * s.rows * hidden + inner + first) + (s.saved * inner if "moe_act" in recomputes else 0.0)
    ahead = s.wide * 2 * s.rows * hidden
    queued = s.saved * (s.rows * hidden + inner) + s.wide * (first + s.rows * hidden) + shared_queue
    if "moe" in recomputes:
        return Held(norm, queued, working + router + experts + shared, ahead)
    return Held(norm + router + experts + shared, queued, working, ahead)


class StageSizes:
    """Sizes of the stages of one plan; equal layers are sized once."""

    def __init__(self, model: ModelShape, layout: Layout, training: Training, imbalance: float = 1.0) -> None:
        self._model, self._layout, self._training, self._imbalance = model, layout, training, imbalance
        self._plain = replace(layout, recompute=Recompute())
        self._layers: dict[tuple[int, bool], Held] = {}

    def size(self, stage: Stage) -> dict[str, Held]:
        """Return what a micro-batch holds in a stage, by part: ``layers``, ``head`` (logits and loss), ``mtp``, ``embedding``."""
        model, layout, wide = self._model, self._layout, size_element(self._training)
        tokens = layout.micro_batch_size * self._training.seq_length / layout.cp
        part = tokens / layout.tp if layout.sequence_parallel else tokens
        found = {"layers": self._size_layers(stage)}
        if stage.embedding:
            found["embedding"] = Held(8 * tokens, 0.0, wide * part * model.hidden, wide * part * model.hidden)
        if stage.head or has_final_norm(stage, model):
            found["head"] = Held()
        if has_final_norm(stage, model):
            found["head"] = _size_final_norm(model, part, wide)
        if stage.head:
            found["head"] = found["head"].join(_size_logits(model, layout, tokens, part, wide))
        if stage.mtp and model.mtp is not None:
            # Megatron leaves MTP as it is where a number of layers of each chunk is recomputed.
            recompute = layout.recompute
            is_whole = recompute.granularity == "full" and recompute.method != "block"
            one = self._size_layer(model.mtp, recompute.granularity == "full" and not is_whole)
            one = one.join(_size_final_norm(model, part, wide)).join(_size_logits(model, layout, tokens, part, wide))
            # Both halves, their norms and what is projected; recomputed with the layer.
            both = wide * part * model.hidden * (0 if is_whole else 4)
            found["mtp"] = Held((one.kept + both) * stage.mtp, (one.queued + both) * stage.mtp, one.working, one.ahead)
        return found

    def _size_layer(self, layer: LayerShape, is_plain: bool) -> Held:
        key = (id(layer), is_plain)
        if key not in self._layers:
            layout = self._plain if is_plain else self._layout
            self._layers[key] = size_layer(layer, layout, self._training, self._imbalance)
        return self._layers[key]

    def _size_layers(self, stage: Stage) -> Held:
        recompute, total = self._layout.recompute, Held()
        every = min(recompute.layers or 1, len(stage.layers)) if recompute.method == "uniform" else 1
        for index, layer in enumerate(stage.layers):
            one = self._size_layer(layer, recompute.method == "block" and index >= (recompute.layers or 0))
            # Of a group one input is kept, and all its layers are there when it is run again.
            total = total.join(Held(one.kept / every, one.queued, one.working * every, one.ahead))
        return total


def _size_final_norm(model: ModelShape, part: float, wide: int) -> Held:
    """Return what the last norm keeps: its input and a number per token."""
    return Held(part * (wide * model.hidden + FP32), 0.0, wide * part * model.hidden)


def _size_logits(model: ModelShape, layout: Layout, tokens: float, part: float, wide: int) -> Held:
    """Head and loss: the head's input and the softmax in FP32; logits and their gradient are beside it in the model's format."""
    logits, states = tokens * model.pad_vocab(layout.tp) / layout.tp, part * model.hidden
    return Held(wide * states + FP32 * logits, wide * (states + logits), wide * (logits + 2 * states), wide * logits)
