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

    ``saved`` bytes of an element of a linear's input, ``rows`` tokens that arrive at the rank's experts.
    """

    whole: float
    part: float
    saved: float
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
        return self.saved < BF16


def size_layer(layer: LayerShape, layout: Layout, training: Training, imbalance: float = 1.0) -> Held:
    """Return what a micro-batch holds in one layer; ``imbalance`` is the rank's tokens over the mean of its expert group."""
    sizes = _measure(layer, layout, training, imbalance)
    if layout.recompute.granularity == "full":
        whole = _size_parts(layer, sizes)
        first = BF16 * layer.hidden * sizes.part
        # The layer is run again before its backward pass: what it keeps is there only then.
        return Held(first, whole.queued, whole.working + whole.kept - first, whole.ahead)
    return _size_parts(layer, sizes)


def _measure(layer: LayerShape, layout: Layout, training: Training, imbalance: float) -> _Sizes:
    whole = layout.micro_batch_size * training.seq_length / layout.cp
    part = whole / layout.tp if layout.sequence_parallel else whole
    topk = layer.moe.topk if layer.moe is not None else 0
    rows = part * topk * layout.etp * imbalance
    return _Sizes(whole, part, SAVED[training.precision], rows, layout, training.seq_length, training.precision)


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
    saved = sizes.saved if has_linear else BF16
    output = 0 if "layernorm" in sizes.layout.recomputes and not is_fused else saved * hidden
    return sizes.part * (BF16 * hidden + FP32 + output)


def _size_attention(a: AttentionShape, hidden: int, s: _Sizes) -> Held:
    norm, tp = _size_norm(hidden, s, has_linear=True, is_fused=a.kind != MLA), s.layout.tp
    heads = a.heads / tp
    if a.kind == LINEAR:
        return _size_delta(a, hidden, norm, s)
    queries, values = heads * a.head_dim, heads * a.v_head_dim
    keys = max(a.kv_heads / tp, 1) * a.head_dim
    out = s.whole * values
    # Queries, keys and values as attention takes them; its output, which is the projection's input too.
    inputs = BF16 * s.whole * (queries + (queries + values if a.kind == MLA else 2 * keys))
    # With delayed scales the projection keeps a quantized copy of its input too.
    kept = inputs + BF16 * out + (s.saved * out if s.is_delayed else 0.0)
    if "core_attn" in s.layout.recomputes:
        # Values are a part of what the first linear made, which stays whole; a kernel would have taken a copy.
        kept += 0.0 if a.kind == MLA else BF16 * s.whole * (queries + keys)
    elif s.layout.fused_attention:
        kept += FP32 * s.whole * heads
    else:
        kept += _size_scores(heads, s) + (0.0 if a.kind == MLA else BF16 * s.whole * (queries + keys))
    first = 0.0
    if a.kind == MLA:
        # The compressed tensors before their norms, the keys' position beside them, and behind the norms.
        first = BF16 * s.part * (a.q_lora + a.kv_lora + a.rope_dim)
        if "mla_up_proj" in s.layout.recomputes:
            # The norms lie inside the part that is run again.
            kept -= inputs
        else:
            first += s.saved * s.part * (a.q_lora + a.kv_lora)
    else:
        first = BF16 * s.whole * (queries + keys) * (2 if a.output_gate else 1) if a.qk_norm or a.output_gate else 0.0
    gate = BF16 * s.whole * queries if a.output_gate else 0.0
    # Gradients of queries, keys, values and the output, and what is gathered for the first linear.
    working = inputs + BF16 * out + BF16 * hidden * (s.whole + 2 * s.part)
    if not s.layout.fused_attention:
        working += _size_scores(heads, s)
    if "mla_up_proj" in s.layout.recomputes:
        working += inputs
    queued = s.part * hidden * s.saved + s.saved * out + BF16 * (inputs / BF16 + s.part * hidden)
    return Held(norm + kept + first + gate, queued, working, inputs + BF16 * out)


def _size_scores(heads: float, s: _Sizes) -> float:
    """Return the bytes of attention's softmax and its mask where no fused kernel avoids them."""
    return BF16 * heads * s.whole * s.seq + s.seq * s.seq / s.layout.cp


def _size_delta(a: AttentionShape, hidden: int, norm: float, s: _Sizes) -> Held:
    """Gated delta rule: projections, convolution, the state of each chunk of tokens, and the gated norm of its output."""
    tp = s.layout.tp
    keys, values = a.kv_heads * a.head_dim / tp, a.heads * a.v_head_dim / tp
    states = s.whole / DELTA_CHUNK * (a.heads / tp) * a.head_dim * a.v_head_dim
    inputs = BF16 * s.whole * (2 * keys + values)
    kept = norm + 2 * inputs + BF16 * (s.whole * values * 3 + states) + 2 * FP32 * s.whole * a.heads / tp
    return Held(kept, norm + inputs, 2 * inputs + BF16 * (s.whole * hidden + states), inputs)


def _size_ffn(ffn: FFNShape, tokens: float, parts: int, s: _Sizes) -> tuple[float, float]:
    """Return the elements of the first linear's output, and of the activation's."""
    inner = tokens * ffn.size / parts
    return inner * (2 if ffn.gated else 1), inner


def _size_dense(ffn: FFNShape, hidden: int, s: _Sizes) -> Held:
    norm = _size_norm(hidden, s, has_linear=True, is_fused=True)
    first, inner = _size_ffn(ffn, s.whole, s.layout.tp, s)
    kept = BF16 * first + s.saved * inner
    working = BF16 * (first + inner + hidden * (s.whole + 2 * s.part))
    queued = s.saved * (s.part * hidden + inner) + BF16 * (first + s.part * hidden)
    if "mlp" in s.layout.recomputes:
        # The norm lies inside the part that is run again.
        return Held(s.part * BF16 * hidden, queued, working + kept + norm, BF16 * (first + inner))
    return Held(norm + kept, queued, working, BF16 * (first + inner))


def _size_moe(moe: MoEShape, hidden: int, s: _Sizes) -> Held:
    norm = _size_norm(hidden, s, has_linear=False, is_fused=False)
    recomputes, layout = s.layout.recomputes, s.layout
    first, inner = _size_ffn(moe.expert, s.rows, layout.etp, s)
    # Logits, scores and probabilities in FP32, the map of tokens to experts, and the order of tokens.
    router = s.part * moe.experts * (3 * FP32 + 1) + s.rows * 2 * FP32
    activation = 0.0 if "moe_act" in recomputes else s.saved * inner
    experts = s.saved * s.rows * hidden + BF16 * first + activation + FP32 * s.rows
    shared = shared_queue = 0.0
    if moe.shared is not None:
        outer, middle = _size_ffn(moe.shared, s.whole, layout.tp, s)
        shared = BF16 * outer + s.saved * middle + (s.saved * hidden * s.part if s.is_quantized else 0.0)
        shared_queue = shared + BF16 * (outer + s.part * hidden)
        shared = 0.0 if "shared_experts" in recomputes else shared
    # Gradients of the experts' outputs before and behind the exchange, of the activation, of the first linear and its input.
    working = BF16 * (3 * s.rows * hidden + inner + first) + (s.saved * inner if "moe_act" in recomputes else 0.0)
    ahead = BF16 * 2 * s.rows * hidden
    queued = s.saved * (s.rows * hidden + inner) + BF16 * (first + s.rows * hidden) + shared_queue
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
        model, layout = self._model, self._layout
        tokens = layout.micro_batch_size * self._training.seq_length / layout.cp
        part = tokens / layout.tp if layout.sequence_parallel else tokens
        found = {"layers": self._size_layers(stage)}
        if stage.embedding:
            found["embedding"] = Held(8 * tokens, 0.0, BF16 * part * model.hidden, BF16 * part * model.hidden)
        if stage.head:
            found["head"] = _size_head(model, layout, tokens, part)
        if stage.mtp and model.mtp is not None:
            # Megatron leaves MTP as it is where a number of layers of each chunk is recomputed.
            recompute = layout.recompute
            is_whole = recompute.granularity == "full" and recompute.method != "block"
            one = self._size_layer(model.mtp, recompute.granularity == "full" and not is_whole)
            one = one.join(_size_head(model, layout, tokens, part))
            # Both halves, their norms and what is projected; recomputed with the layer.
            both = BF16 * part * model.hidden * (0 if is_whole else 4)
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


def _size_head(model: ModelShape, layout: Layout, tokens: float, part: float) -> Held:
    """Final norm, logits and loss: the softmax is kept in FP32; logits and their gradient are in BF16 beside it."""
    logits = tokens * model.pad_vocab(layout.tp) / layout.tp
    kept = part * (2 * BF16 * model.hidden + FP32) + FP32 * logits
    return Held(kept, BF16 * (part * model.hidden + logits), BF16 * (logits + 2 * part * model.hidden), BF16 * logits)
