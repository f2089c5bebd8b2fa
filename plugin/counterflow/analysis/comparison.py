"""Two windows against each other: what changed, by kind of kernel and by phase, so that the parts add up to the difference."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from counterflow.analysis.chunks import find_part, sum_parts
from counterflow.analysis.cluster import find_pipeline_rank
from counterflow.analysis.overlap import Device
from counterflow.errors import TraceError

# The rest of a chunk's window.
NO_PART = "no part of a chunk"


@dataclass(frozen=True)
class Change:
    """Nanoseconds a step that one part owned in the window before and in the window after."""

    name: str
    before: float
    after: float

    @property
    def difference(self) -> float:
        """What it adds to the step; below 0 where it saves."""
        return self.after - self.before


@dataclass(frozen=True)
class Comparison:
    """A device's step before and after; each of ``kinds``, ``phases`` and ``parts`` adds up to the difference.

    ``explained`` is the share of the difference in the windows that the changes of kinds add up to.
    """

    before: Device
    after: Device
    steps: tuple[int, int]
    kinds: tuple[Change, ...]
    phases: tuple[Change, ...]
    parts: tuple[Change, ...]

    @property
    def step(self) -> Change:
        """The windows, a step each."""
        return Change("step", self.before.window / self.steps[0], self.after.window / self.steps[1])

    @property
    def explained(self) -> float:
        """Of the step's difference, the share that the changes of kinds add up to."""
        whole = self.step.difference
        return sum(change.difference for change in self.kinds) / whole if whole else 1.0


def compare_devices(before: Sequence[Device], after: Sequence[Device]) -> list[Comparison]:
    """Compare devices of the same rank and label, else of the same pipeline rank, else as many in their order.

    Raises `TraceError` for devices that have nothing to do with each other.
    """
    if not before or not after:
        raise TraceError("nothing to compare: one side has no devices with kernels")
    _check_kinds(before, after)
    return [_compare(*pair) for pair in _match(before, after)]


def _match(before: Sequence[Device], after: Sequence[Device]) -> list[tuple[Device, Device]]:
    keys: tuple[Callable[[Device], object], ...] = (_find_rank, _find_place)
    for find in keys:
        known: dict[object, Device] = {}
        for device in before:
            known.setdefault(find(device), device)
        if None not in known and all(find(device) in known for device in after):
            return [(known[find(device)], device) for device in after]
    if len(before) != len(after):
        raise TraceError(
            f"--against compares rank by rank: {_name(before)} has {_count(before)} and {_name(after)} {_count(after)}, and they "
            "have not the same numbers; give traces of the same ranks"
        )
    return list(zip(before, after, strict=True))


def _find_rank(device: Device) -> object:
    return device.trace.rank, device.label


def _find_place(device: Device) -> object:
    """Return the pipeline rank of a device with actions: a simulated step has no other number."""
    return find_pipeline_rank(device.trace)


def _check_kinds(before: Sequence[Device], after: Sequence[Device]) -> None:
    """Refuse kernels against actions where no phase says which action a kernel is of: then no part stands for another."""
    sides = [(devices, devices[0].trace.timeline is not None) for devices in (before, after)]
    if sides[0][1] == sides[1][1]:
        return
    (kernels,) = (devices for devices, has_actions in sides if not has_actions)
    if not any(sum_parts(device) for device in kernels):
        (actions,) = (devices for devices, has_actions in sides if has_actions)
        raise TraceError(
            f"--against: {_name(kernels)} has kernels without phases NAME(F), NAME(B) or NAME(W), and {_name(actions)} has "
            "actions: they have no part in common; annotate the phases, or compare two traces of kernels"
        )


def _name(devices: Sequence[Device]) -> str:
    return devices[0].trace.path


def _count(devices: Sequence[Device]) -> str:
    return f"{len(devices)} rank{'s' if len(devices) != 1 else ''}"


def _compare(before: Device, after: Device) -> Comparison:
    steps = (max(1, len(before.trace.steps)), max(1, len(after.trace.steps)))
    return Comparison(
        before,
        after,
        steps,
        *(_list_changes(before, after, steps, find) for find in (_find_kind, _find_phase, _find_part)),
    )


def _find_kind(kind: str, phase: str) -> str:
    return kind


def _find_phase(kind: str, phase: str) -> str:
    return kind if kind in ("copies", "idle") else phase


def _find_part(kind: str, phase: str) -> str:
    return kind if kind in ("copies", "idle") else find_part(phase) or NO_PART


def _list_changes(before: Device, after: Device, steps: tuple[int, int], find: Callable[[str, str], str]) -> tuple[Change, ...]:
    """Return changes of what owns the windows, the largest first."""
    sums = [_sum(device.owned, find, count) for device, count in zip((before, after), steps, strict=True)]
    names = sorted(set(sums[0]) | set(sums[1]))
    changes = [Change(name, sums[0].get(name, 0.0), sums[1].get(name, 0.0)) for name in names]
    return tuple(sorted(changes, key=lambda change: -abs(change.difference)))


def _sum(owned: Mapping[tuple[str, str], int], find: Callable[[str, str], str], steps: int) -> dict[str, float]:
    sums: dict[str, float] = {}
    for key, time in owned.items():
        name = find(*key)
        sums[name] = sums.get(name, 0.0) + time / steps
    return sums


def describe_comparison(comparison: Comparison) -> dict[str, object]:
    """Return a comparison as ``--json`` prints it: microseconds a step."""
    step = comparison.step
    tables = {
        name: [{"name": c.name, **_describe(c)} for c in changes]
        for name, changes in (("kinds", comparison.kinds), ("phases", comparison.phases), ("parts", comparison.parts))
    }
    return {
        "device": comparison.after.label,
        "rank": comparison.after.trace.rank,
        "against": comparison.before.trace.path,
        "steps": list(comparison.steps),
        "step": _describe(step),
        "explained": round(comparison.explained, 6),
        **tables,
    }


def _describe(change: Change) -> dict[str, float]:
    values = {"before_us": change.before, "after_us": change.after, "difference_us": change.difference}
    return {name: round(value / 1000, 3) for name, value in values.items()}
