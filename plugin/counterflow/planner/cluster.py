"""GPUs and what joins them: the data of a GPU's type (``gpus.toml``), a plan's cluster, and which links a group of ranks crosses.

Rates are in bytes a second, for each GPU and direction.
"""

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from counterflow.bounds import show
from counterflow.errors import PlanError
from counterflow.planner.config import ClusterSection, fold, suggest

GIGA = 1e9


@dataclass(frozen=True)
class GPU:
    """A GPU's type; ``peak`` in FLOP/s by number format, the other figures as ``gpus.toml`` describes them."""

    name: str
    family: str
    peak: Mapping[str, float] = field(hash=False)
    hbm: float
    memory_gib: float
    nvlink: float
    nvlink_domain: int
    network: float
    gpus_per_node: int
    pcie: float
    units: int
    sustained: float
    source: str

    def find_peak(self, precision: str) -> float:
        """Return the dense peak in FLOP/s of a number format; of one that the GPU has not, that of the next wider one."""
        for name in _WIDER[precision]:
            if name in self.peak:
                return self.peak[name]
        raise PlanError(f"{self.name} has no {precision}")

    def has_format(self, precision: str) -> bool:
        """Tell whether products in a number format run as such, not in a wider one."""
        return _WIDER[precision][0] in self.peak


_WIDER = {
    "fp32": ("fp32",),
    "fp16": ("fp16",),
    "bf16": ("bf16",),
    "fp8-delayed": ("fp8", "bf16"),
    "fp8-tensorwise": ("fp8", "bf16"),
    "fp8-blockwise": ("fp8", "bf16"),
    "mxfp8": ("mxfp8", "fp8", "bf16"),
    "nvfp4": ("nvfp4", "fp8", "bf16"),
}


@dataclass(frozen=True)
class Cluster:
    """GPUs of one type in NVLink domains of ``domain``, joined by a network that is ``oversubscription`` times too narrow."""

    gpu: GPU
    domain: int
    nvlink: float
    network: float
    memory_gib: float

    def is_local(self, ranks: int) -> bool:
        """Tell whether so many consecutive ranks are in one NVLink domain."""
        return ranks <= self.domain

    def find_rate(self, ranks: int, stride: int = 1) -> float:
        """Return the rate of a ring of ``ranks``, each ``stride`` behind the other: that of its slowest link."""
        return self.nvlink if self.is_local(ranks * stride) else self.network

    def count_domains(self, ranks: int) -> int:
        """Return the number of NVLink domains that so many consecutive ranks are in."""
        return -(-ranks // self.domain)


@cache
def read_gpus() -> dict[str, GPU]:
    """Return the GPUs of ``gpus.toml`` by name."""
    return {name: _read_gpu(name, entry) for name, entry in _read_entries().items()}


@cache
def _read_entries() -> dict[str, dict[str, Any]]:
    with (Path(__file__).parent / "gpus.toml").open("rb") as file:
        return tomllib.load(file)


def _read_gpu(name: str, entry: Mapping[str, Any]) -> GPU:
    return GPU(
        name, entry["family"], {key: value * 1e12 for key, value in entry["peak_tflops"].items()}, entry["hbm_gbps"] * GIGA,
        entry["memory_gib"], entry["nvlink_gbps"] * GIGA, entry["nvlink_domain"], entry["network_gbps"] * GIGA,
        entry["gpus_per_node"], entry["pcie_gbps"] * GIGA, entry["units"], entry.get("sustained", 1.0), entry["source"],
    )  # fmt: skip


def find_gpu(name: str) -> GPU:
    """Return a GPU by name or alias; raises `PlanError` with the nearest names."""
    names = {fold(word): known for known, entry in _read_entries().items() for word in (known, *entry["aliases"])}
    # Makers and sizes are left out: NVIDIA H100 80GB.
    bare = re.sub(r"\b(nvidia|amd|instinct|\d+ ?gi?b|sxm\d?|hbm3e?|nvl\d+)\b", "", name.lower())
    for word in (fold(name), fold(bare)):
        if word in names:
            return read_gpus()[names[word]]
    raise PlanError(f"cluster.gpu {show(name)} is not known; allowed: {', '.join(read_gpus())}{suggest(name, read_gpus())}")


def build_cluster(section: ClusterSection) -> Cluster:
    """Return the cluster that a plan describes; raises `PlanError` for a GPU that is not known."""
    gpu = find_gpu(section.gpu)
    domain = section.nvlink_domain or _choose_domain(gpu, section.gpus_per_node)
    network = GIGA * section.network_gbps if section.network_gbps else gpu.network
    return Cluster(
        gpu, domain, GIGA * section.nvlink_gbps if section.nvlink_gbps else gpu.nvlink,
        network / (section.oversubscription or 1.0), section.memory_gib or gpu.memory_gib,
    )  # fmt: skip


def _choose_domain(gpu: GPU, gpus_per_node: int | None) -> int:
    """A node of more or fewer GPUs than usual is a domain of its own, unless domains of this type span nodes."""
    spans_nodes = gpu.nvlink_domain > gpu.gpus_per_node
    return gpu.nvlink_domain if gpus_per_node is None or spans_nodes else gpus_per_node
