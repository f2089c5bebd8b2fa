"""What the traces of a profiled training have to say."""

from collections.abc import Sequence
from pathlib import Path

from counterflow.analysis import analyze_trace, read_traces


def check_layers(folder: Path, layers: Sequence[str]) -> None:
    """Raise unless the ranks' traces have these layers, forward and backward, which compute most and share no time."""
    devices = [device for trace in read_traces(folder) for device in analyze_trace(trace)]
    found = {(layer.name, layer.part): layer for device in devices for layer in device.layers}
    assert {name for name, _ in found} == set(layers), "other layers than the model has"
    for name in layers:
        assert found[name, "F"].compute > 0 and found[name, "B"].compute > 0, f"layer {name} computes nothing"
    for device in devices:
        computed = sum(layer.compute for layer in device.layers)
        assert 0.3 * device.compute.length < computed <= device.compute.length, "time outside of layers, or counted twice"
        experts = sum(device.kinds[kind].time for kind in ("all_to_all", "all_gather") if kind in device.kinds)
        assert sum(layer.communication for layer in device.layers) <= 1.05 * experts
    assert any(layer.communication > 0 for layer in found.values()), "no layer communicates"
