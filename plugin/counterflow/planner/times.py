"""Time of a layer's forward, input gradient and weight gradient on one GPU, by cause.

Each part is a roofline: operations over the peak that products of this shape reach, or bytes over the bandwidth that kernels
reach, whichever takes longer; communication is bytes over the links that its group crosses. The host's time to launch the
kernels stands beside the GPU's: a chunk takes the longer one of both.

Tokens are those of one micro-batch on one context-parallel rank. Times are seconds, sizes bytes.
"""

import math
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Self

from counterflow.planner.cluster import Cluster
from counterflow.planner.constants import Constants
from counterflow.planner.layouts import Layout, Recompute, Training
from counterflow.planner.models import LINEAR, MLA, AttentionShape, FFNShape, LayerShape, ModelShape, MoEShape

# Tiles of matrix products: rows and columns of the result that one unit computes at a time.
TILE_ROWS, TILE_COLUMNS = 128, 256
# Of a wave of tiles, how much the last, partly filled one costs on average.
TAIL = 0.35
# Depth in bytes at which filling and draining a tile's pipeline takes as long as its products.
DEPTH_BYTES = 512.0
# Keys at which a causal attention reaches half of what it reaches on very long sequences.
HALF_KEYS = 384.0
# A backward of attention has 2.5 times the products of its forward, at 0.8 of the efficiency.
ATTENTION_BACKWARD = 2.5 / 0.8
# Speed of attention in FP8 over BF16: the exponentials stay as they are.
FP8_ATTENTION = 1.4
# Kernels of a forward: launches of an eager step, counted in Megatron-Core's and Transformer Engine's modules.
ATTENTION_KERNELS, DENSE_KERNELS, ROUTER_KERNELS, DISPATCH_KERNELS, EXPERT_KERNELS = 22.0, 8.0, 22.0, 30.0, 10.0
# A grouped product launches one kernel an expert, from C++: a share of a Python launch. Scaled formats cast and swizzle each.
KERNELS_PER_EXPERT, SCALED_KERNELS_PER_EXPERT = 1.0, 9.0
SCALED_KERNELS = 10.0
# Launches of a backward's two halves, over those of the forward.
BACKWARD_KERNELS, WEIGHT_KERNELS = 1.1, 0.4
# Passes through memory of an activation with biases, over those of a fused one.
BIASED_PASSES = 5.0
# And the launches of an expert's biases, one expert after the other.
BIASED_KERNELS = 4.0
LATENCY = {"alltoall": 30e-6, "allgather": 30e-6, "deepep": 15e-6, "hybridep": 12e-6}
HOP_LATENCY = 10e-6


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds by cause. ``host`` is the host's time for launches; ``sync`` the GPU's wait for it; the others are the GPU's."""

    gemm: float = 0.0
    experts: float = 0.0
    attention: float = 0.0
    memory: float = 0.0
    tensor: float = 0.0
    context: float = 0.0
    expert: float = 0.0
    shards: float = 0.0
    sync: float = 0.0
    host: float = 0.0

    def __add__(self, other: Self) -> "Times":
        # Written out: a search adds up times of hundreds of thousands of layers.
        return Times(
            self.gemm + other.gemm, self.experts + other.experts, self.attention + other.attention, self.memory + other.memory,
            self.tensor + other.tensor, self.context + other.context, self.expert + other.expert, self.shards + other.shards,
            self.sync + other.sync, self.host + other.host,
        )  # fmt: skip

    def __mul__(self, factor: float) -> "Times":
        return Times(
            self.gemm * factor, self.experts * factor, self.attention * factor, self.memory * factor, self.tensor * factor,
            self.context * factor, self.expert * factor, self.shards * factor, self.sync * factor, self.host * factor,
        )  # fmt: skip

    @property
    def compute(self) -> float:
        """Seconds in which the GPU computes."""
        return self.gemm + self.experts + self.attention + self.memory

    @property
    def device(self) -> float:
        """Seconds of the GPU; shards of weights come beside the computation, over the network that experts' exchange needs."""
        return max(self.compute + self.tensor + self.context + self.sync, self.shards) + self.expert

    @property
    def seconds(self) -> float:
        """Seconds that it takes: the GPU's or the host's, whichever is longer."""
        return max(self.device, self.host)


NOTHING = Times()


@dataclass(frozen=True)
class Work:
    """Times of forward, input gradient and weight gradient."""

    f: Times = NOTHING
    i: Times = NOTHING
    w: Times = NOTHING

    def __add__(self, other: Self) -> "Work":
        return Work(self.f + other.f, self.i + other.i, self.w + other.w)

    def __mul__(self, factor: float) -> "Work":
        return Work(self.f * factor, self.i * factor, self.w * factor)


@dataclass(frozen=True)
class Setting:
    """All that the time of a layer depends on besides its shape. ``imbalance``: slowest expert rank over the mean."""

    cluster: Cluster
    constants: Constants
    layout: Layout
    training: Training
    imbalance: float = 1.0
    fp8_attention: bool = False
    fused_permute: bool = False

    @cached_property
    def local(self) -> "Setting":
        """The setting without what no layer's time depends on, so that layers of other pipelines need not be timed again."""
        return replace(self, layout=self.layout.local)

    @cached_property
    def without_blocks(self) -> "Setting":
        """The setting of layers that the method ``block`` leaves alone: all but the first so many of a chunk, and MTP."""
        is_block = self.layout.recompute.method == "block"
        return replace(self, layout=replace(self.layout, recompute=Recompute())) if is_block else self

    @property
    def tokens(self) -> float:
        """Tokens of a micro-batch on a context-parallel rank."""
        return self.layout.micro_batch_size * self.training.seq_length / self.layout.cp

    @property
    def shared(self) -> float:
        """Tokens where sequence parallelism cuts them."""
        return self.tokens / (self.layout.tp if self.layout.sequence_parallel else 1)

    @property
    def is_scaled(self) -> bool:
        """Whether operands of products are cast to a narrower format first."""
        return self.training.precision not in ("bf16", "fp16", "fp32")

    @property
    def is_fused(self) -> bool:
        """Whether experts' products, activation and casts are one kernel, as where a graph holds the whole step in MXFP8."""
        return self.training.precision in ("mxfp8", "nvfp4") and "full_iteration" in self.layout.cuda_graph

    @property
    def memory_rate(self) -> float:
        """Bytes a second of memory-bound kernels."""
        return self.cluster.gpu.hbm * self.constants["general.memory"]

    @property
    def grad_bytes(self) -> int:
        """Bytes of a gradient that micro-batches add to."""
        return 4 if self.training.main_grads == "fp32" else 2

    def launch(self, kernels: float) -> float:
        """Return the host's seconds for so many launches."""
        return 0.0 if "full_iteration" in self.layout.cuda_graph else kernels * 1e-6 * self.constants["general.host_us"]

    def is_graphed(self, *names: str) -> bool:
        """Tell whether CUDA graphs hold one of these modules, or everything."""
        return bool({"full_iteration", *names} & set(self.layout.cuda_graph))


def pick_format(setting: Setting, precision: str) -> str:
    """Return the name under which ``constants.toml`` has a number format on this GPU."""
    name = {"fp16": "bf16", "fp32": "bf16"}.get(precision, precision)
    name = "fp8" if name.startswith("fp8") else name
    gpu = setting.cluster.gpu
    return name if name in gpu.peak else next(wider for wider in ("fp8", "bf16") if wider in gpu.peak)


def time_products(
    setting: Setting, rows: float, columns: float, depth: float, count: float = 1.0, precision: str = "", written: float = 2.0
) -> float:
    """Return the time of ``count`` products [rows x depth] x [depth x columns]; ``written``: bytes of an element of a result."""
    precision = precision or setting.training.precision
    gpu, name = setting.cluster.gpu, pick_format(setting, precision)
    size = {"bf16": 2.0, "nvfp4": 0.5625}.get(name, 1.0)
    peak = gpu.find_peak(precision) * gpu.sustained * setting.constants[f"gemm.{gpu.family}.{name}"]
    if count > 1:
        peak *= setting.constants["general.grouped"]
    tiles = count * max(rows / TILE_ROWS, 1.0) * max(columns / TILE_COLUMNS, 1.0)
    padded = max(rows, TILE_ROWS) + (TILE_ROWS / 2 if count > 1 else 0.0)
    compute = 2.0 * count * padded * TILE_ROWS * math.ceil(columns / TILE_ROWS) * depth / peak
    compute *= (1.0 + TAIL * gpu.units / max(tiles, 0.25 * gpu.units)) * (1.0 + DEPTH_BYTES / (depth * size))
    moved = count * ((rows * depth + depth * columns) * size + rows * columns * written)
    return max(compute, moved / setting.memory_rate)


def time_linear(setting: Setting, tokens: float, inner: float, outer: float, count: float = 1.0, precision: str = "") -> Work:
    """Return the time of a linear layer from ``inner`` to ``outer``, or of ``count`` of them with ``tokens`` each."""
    precision = precision or setting.training.precision
    forward = time_products(setting, tokens, outer, inner, count, precision)
    data = time_products(setting, tokens, inner, outer, count, precision)
    # The weight gradient is added to what earlier micro-batches left.
    weight = time_products(setting, inner, outer, tokens, count, precision, 2.0 * setting.grad_bytes)
    cause = "experts" if count > 1 else "gemm"
    casts = 0.0 if count > 1 and setting.is_fused else 1.0
    cast_in, cast_out = (casts * cast(setting, count * tokens * size, precision) for size in (inner, outer))
    return Work(
        Times(**{cause: forward}, memory=cast_in), Times(**{cause: data}, memory=cast_out), Times(**{cause: weight})
    )  # fmt: skip


def cast(setting: Setting, elements: float, precision: str) -> float:
    """Return the time of casting elements to a narrower format, as they are and transposed."""
    if precision in ("bf16", "fp16", "fp32"):
        return 0.0
    # Tensorwise and FP4 recipes read twice: their scale is of the whole tensor.
    reads = 2.0 if precision in ("fp8-tensorwise", "nvfp4") else 1.0
    return elements * (2.0 * reads + 2.0) / setting.memory_rate


def move(setting: Setting, moved: float) -> Work:
    """Return the time of kernels that move so many bytes forward, and twice as many backward."""
    seconds = moved / setting.memory_rate
    return Work(Times(memory=seconds), Times(memory=2.0 * seconds))


@lru_cache(maxsize=4096)
def time_layer(layer: LayerShape, setting: Setting) -> Work:
    """Return the time of one layer, recomputation included."""
    attention = time_attention(layer, setting)
    rest = time_moe(layer, layer.moe, setting) if layer.moe is not None else time_dense(layer, layer.ffn, setting)
    norms = move(setting, 20.0 * layer.hidden * setting.shared)
    whole = attention + rest + norms
    recompute = setting.layout.recompute
    if recompute.granularity == "full":
        return Work(whole.f, whole.i + whole.f, whole.w)
    again = NOTHING
    modules = recompute.modules
    if "core_attn" in modules and not setting.layout.fused_attention:
        again += time_core(layer.attention, setting).f
    if "layernorm" in modules:
        again += norms.f * 0.4
    if "mla_up_proj" in modules and layer.attention.kind == MLA:
        again += _time_up(layer.attention, setting).f
    if "mlp" in modules and layer.moe is None:
        again += rest.f
    if "moe" in modules and layer.moe is not None:
        again += rest.f
    if layer.moe is not None and not {"moe", "mlp"} & modules:
        if "moe_act" in modules:
            again += _time_act(layer.moe, setting).f
        if "shared_experts" in modules and layer.moe.shared is not None:
            again += _time_ffn(layer.hidden, layer.moe.shared, setting).f
    return Work(whole.f, whole.i + again, whole.w)


def time_attention(layer: LayerShape, setting: Setting) -> Work:
    """Return the time of an attention with its projections and tensor-parallel collectives."""
    a, h, tp, tokens = layer.attention, layer.hidden, setting.layout.tp, setting.tokens
    if a.kind == MLA:
        down = time_linear(setting, setting.shared, h, a.q_lora + a.kv_lora + a.rope_dim)
        projections = down + _time_up(a, setting)
        rotated = a.heads * (a.head_dim + a.qk_nope + 2 * a.v_head_dim) / tp
        first = float(a.q_lora + a.kv_lora)
    else:
        groups = max(a.kv_heads / tp, 1.0)
        queries = a.heads * a.head_dim * (2 if a.output_gate else 1) / tp
        width = a.heads * a.v_head_dim / tp + groups * a.head_dim if a.kind == LINEAR else groups * a.head_dim
        projections = time_linear(setting, tokens, h, queries + 2 * width)
        rotated = queries + groups * a.head_dim
        first = rotated if a.qk_norm else 0.0
    out = time_linear(setting, tokens, a.heads * a.v_head_dim / tp, h)
    small = move(setting, 4.0 * tokens * (rotated + first))
    kernels = ATTENTION_KERNELS + 4.0 * (a.kind == MLA) + 3.0 * (a.kind == LINEAR) + (SCALED_KERNELS if setting.is_scaled else 0)
    return (
        projections + time_core(a, setting) + out + small + time_tensor(h, setting) + time_context(a, setting)
        + launch(setting, kernels, "attn")
    )  # fmt: skip


def _time_up(a: AttentionShape, setting: Setting) -> Work:
    tp, tokens = setting.layout.tp, setting.tokens
    queries = time_linear(setting, tokens, a.q_lora, a.heads * a.head_dim / tp) if a.q_lora else Work()
    return queries + time_linear(setting, tokens, a.kv_lora, a.heads * (a.qk_nope + a.v_head_dim) / tp)


def time_core(a: AttentionShape, setting: Setting) -> Work:
    """Return the time of softmax(QK)V without projections."""
    layout, seq = setting.layout, setting.training.seq_length
    heads = a.heads / layout.tp
    if a.kind == LINEAR:
        # The state of each head goes through memory once a block of 64 tokens; queries, keys, values, gates several times.
        state = a.head_dim * a.v_head_dim * 4.0 / 64.0
        per_token = heads * (state + 2.0 * 6.0 * (2 * a.head_dim + 2 * a.v_head_dim))
        return move(setting, 2.0 * setting.tokens * per_token)
    keys = seq / 2.0 if a.window is None else min(seq / 2.0, float(a.window))
    gpu = setting.cluster.gpu
    operations = 2.0 * setting.tokens * keys * heads * (a.head_dim + a.v_head_dim)
    width = min(1.0, 0.4 + 0.6 * a.v_head_dim / 128.0)
    # A ring computes its part in as many calls as there are ranks, and adds up their results.
    rate = gpu.find_peak("bf16") * setting.constants[f"attention.{gpu.family}"] * width / (1.0 + HALF_KEYS * layout.cp / keys)
    sums = 16.0 * (layout.cp - 1) * setting.tokens * heads * a.v_head_dim / setting.memory_rate
    forward = operations / rate / (FP8_ATTENTION if setting.fp8_attention else 1.0) + sums
    if not layout.fused_attention:
        scores = setting.tokens * seq * heads * 16.0 / setting.memory_rate
        return Work(Times(attention=forward + scores), Times(attention=forward * ATTENTION_BACKWARD + 2.0 * scores))
    return Work(Times(attention=forward), Times(attention=forward * ATTENTION_BACKWARD))


def time_tensor(hidden: int, setting: Setting) -> Work:
    """Return the exposed time of the collectives around one block (attention or feed-forward) over tensor-parallel ranks."""
    tp = setting.layout.tp
    if tp == 1:
        return Work()
    moved = 2.0 * hidden * setting.tokens * (tp - 1) / tp
    rate = setting.cluster.find_rate(tp) * _share(setting, setting.cluster.is_local(tp))
    once = (moved / rate + HOP_LATENCY) * (1.0 - setting.constants["general.tensor_hidden"])
    # Gather and scatter; the backward's weight gradient gathers the input again.
    return Work(Times(tensor=2.0 * once), Times(tensor=2.0 * once), Times(tensor=once))


def _share(setting: Setting, is_local: bool) -> float:
    return setting.constants["general.nvlink" if is_local else "general.network"]


def time_context(a: AttentionShape, setting: Setting) -> Work:
    """Return the exposed time of passing keys and values around the context-parallel ranks, beside the attention's products."""
    cp, tp = setting.layout.cp, setting.layout.tp
    if cp == 1 or a.kind == LINEAR:
        return Work()
    width = a.heads * (a.head_dim + a.v_head_dim) if a.kind == MLA else 2 * a.kv_heads * a.head_dim
    moved = 2.0 * setting.tokens * (cp - 1) * max(width / tp, 2 * a.head_dim)
    rate = setting.cluster.find_rate(cp, tp) * _share(setting, setting.cluster.is_local(cp * tp))
    once = moved / rate + (cp - 1) * HOP_LATENCY
    core = time_core(a, setting)
    # Of one step in cp, the first, nothing is hidden; gradients of keys and values travel with them.
    forward = max(once - core.f.attention, once / cp)
    backward = max(2.0 * once - core.i.attention, 2.0 * once / cp)
    return Work(Times(context=forward), Times(context=backward))


def time_dense(layer: LayerShape, ffn: FFNShape | None, setting: Setting) -> Work:
    """Return the time of a dense feed-forward."""
    if ffn is None:
        return Work()
    kernels = DENSE_KERNELS + (SCALED_KERNELS / 2 if setting.is_scaled else 0)
    return _time_ffn(layer.hidden, ffn, setting) + time_tensor(layer.hidden, setting) + launch(setting, kernels, "mlp")


def _time_ffn(hidden: int, ffn: FFNShape, setting: Setting) -> Work:
    tp, tokens = setting.layout.tp, setting.tokens
    first = (2 if ffn.gated else 1) * ffn.size / tp
    act = move(setting, 2.0 * tokens * (first + ffn.size / tp))
    return time_linear(setting, tokens, hidden, first) + act + time_linear(setting, tokens, ffn.size / tp, hidden)


def count_expert_tokens(moe: MoEShape, setting: Setting) -> float:
    """Return the tokens that come to each expert-parallel rank, all its experts together."""
    layout = setting.layout
    # Each of tp (with sequence parallelism) ranks sends its part; etp ranks gather what they share.
    return setting.tokens * moe.topk * layout.etp / layout.tp


def time_moe(layer: LayerShape, moe: MoEShape, setting: Setting) -> Work:
    """Return the time of router, dispatch, experts, combine and shared experts."""
    layout, h = setting.layout, layer.hidden
    local = moe.experts / layout.ep
    routed = count_expert_tokens(moe, setting)
    size = moe.expert.size / layout.etp
    first = (2 if moe.expert.gated else 1) * size
    experts = time_linear(setting, routed / local, h, first, max(local, 1.001)) + time_linear(
        setting, routed / local, size, h, max(local, 1.001)
    )
    # Rows in and out of the experts, once, or once more where the exchange wants them sorted by rank.
    passes = 2.0 if layout.dispatcher in ("alltoall", "allgather") else 1.0
    permute = move(setting, (4.0 if setting.fused_permute else 8.0 * passes) * routed * h)
    slowest = (experts + permute + _time_act(moe, setting) + time_exchange(moe, h, setting)) * setting.imbalance
    router = time_products(setting, setting.shared, moe.experts, h, precision="bf16", written=4.0)
    routing = Work(Times(gemm=router), Times(gemm=router), Times(gemm=router)) + move(
        setting, 24.0 * setting.shared * moe.experts
    )
    shared = Work() if moe.shared is None else _time_ffn(h, moe.shared, setting) + time_tensor(h, setting)
    return routing + slowest + shared + _launch_moe(moe, local, setting)


def _launch_moe(moe: MoEShape, local: float, setting: Setting) -> Work:
    per_expert = SCALED_KERNELS_PER_EXPERT if setting.is_scaled else KERNELS_PER_EXPERT
    experts = EXPERT_KERNELS + (2.0 * per_expert + (BIASED_KERNELS if moe.expert.bias else 0.0)) * local
    dense = (DENSE_KERNELS + (SCALED_KERNELS / 2 if setting.is_scaled else 0)) if moe.shared is not None else 0.0
    # One dispatch kernel takes the place of sorting, counting and exchanging.
    exchange = DISPATCH_KERNELS * (1.0 if setting.layout.dispatcher in ("alltoall", "allgather") else 0.6)
    whole = launch(setting, experts + dense, "moe") + launch(setting, ROUTER_KERNELS, "moe_router", "moe")
    wait = 0.0 if setting.is_graphed("moe") else 1e-6 * setting.constants["general.sync_us"]
    return whole + launch(setting, exchange, "moe_preprocess", "moe") + Work(Times(sync=wait))


def launch(setting: Setting, kernels: float, *graphs: str) -> Work:
    """Return the host's time for a part with so many kernels forward, unless one of these CUDA graphs holds it."""
    if setting.is_graphed(*graphs):
        return Work(*(Times(host=setting.launch(1.0)) for _ in range(3)))
    return Work(
        Times(host=setting.launch(kernels)), Times(host=setting.launch(kernels * BACKWARD_KERNELS)),
        Times(host=setting.launch(kernels * WEIGHT_KERNELS)),
    )  # fmt: skip


def _time_act(moe: MoEShape, setting: Setting) -> Work:
    if setting.is_fused:
        return Work()
    routed, size = count_expert_tokens(moe, setting), moe.expert.size / setting.layout.etp
    # Biases are added expert by expert, and the pieces joined.
    passes = (3.0 if moe.expert.gated else 2.0) * (BIASED_PASSES if moe.expert.bias else 1.0)
    return move(setting, 2.0 * routed * size * passes)


def time_exchange(moe: MoEShape, hidden: int, setting: Setting) -> Work:
    """Return the time of dispatch and combine, forward and backward."""
    layout = setting.layout
    once = time_transfer(moe, hidden, setting)
    if layout.etp > 1:
        rate = setting.cluster.find_rate(layout.etp) * _share(setting, setting.cluster.is_local(layout.etp))
        once += 2.0 * count_expert_tokens(moe, setting) * hidden * (layout.etp - 1) / layout.etp / rate
    return Work(Times(expert=2.0 * once), Times(expert=2.0 * once))


def time_transfer(moe: MoEShape, hidden: int, setting: Setting) -> float:
    """Return the time of one exchange of tokens among expert-parallel ranks.

    An all-to-all sends a token to each of its experts. Dispatch kernels send it once to each rank that has one of them: once over
    the network to each NVLink domain, at most ``group_topk`` where routing is limited so, and on inside the domain.
    """
    layout, cluster = setting.layout, setting.cluster
    if layout.ep == 1:
        return 0.0
    tokens = setting.shared if layout.sequence_parallel else setting.tokens / layout.tp
    domains = cluster.count_domains(layout.ep * layout.etp)
    copies = moe.topk * (layout.ep - 1) / layout.ep
    if layout.dispatcher == "allgather":
        local = far = float(layout.ep - 1) if domains == 1 else layout.ep * (domains - 1) / domains
        local = float(layout.ep - 1)
    elif layout.dispatcher == "alltoall":
        far = moe.topk * (domains - 1) / domains
        local = copies - far
    else:
        reached = min(_count_distinct(domains, moe.topk), float(moe.group_topk or domains))
        far = reached * (domains - 1) / domains
        local = _count_distinct(layout.ep, moe.topk) * (layout.ep - 1) / layout.ep
    share = setting.constants["general.alltoall"] if layout.dispatcher in ("alltoall", "allgather") else 1.0
    sent = 2.0 * hidden * tokens / share
    inside = sent * local / (cluster.nvlink * setting.constants["general.nvlink"])
    outside = sent * far / (cluster.network * setting.constants["general.network"]) if domains > 1 else 0.0
    return max(inside, outside) + LATENCY[layout.dispatcher]


def _count_distinct(places: int, draws: int) -> float:
    """Return how many of ``places`` are hit by so many draws, on average."""
    return places * (1.0 - (1.0 - 1.0 / places) ** draws)


def time_embedding(model: ModelShape, setting: Setting) -> Work:
    """Return the time of looking up and cutting the embedding of the first stage."""
    return move(setting, 6.0 * setting.tokens * model.hidden) + launch(setting, 10.0)


def time_head(model: ModelShape, setting: Setting) -> Work:
    """Return the time of the last norm, the head and the loss."""
    tp, tokens = setting.layout.tp, setting.tokens
    vocab = model.pad_vocab(tp) / tp
    # Passes over the logits: a cast to FP32, maximum, exponential, sum, loss and gradient, or two in one fused kernel.
    loss = move(setting, (6.0 if setting.layout.cross_entropy_fusion else 12.0) * tokens * vocab)
    head = time_linear(setting, tokens, model.hidden, vocab, precision="bf16")
    return head + loss + time_tensor(model.hidden, setting) + launch(setting, 20.0)


def time_mtp(model: ModelShape, setting: Setting) -> Work:
    """Return the time of one MTP layer: its layer, the projection of both halves, and the head once more."""
    if model.mtp is None:
        return Work()
    projection = time_linear(setting, setting.tokens, 2 * model.hidden, model.hidden / setting.layout.tp)
    return time_layer(model.mtp, setting) + projection + time_head(model, setting) + launch(setting, 10.0)
