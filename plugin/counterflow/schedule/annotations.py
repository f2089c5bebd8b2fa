"""What actions are called in a profiler's trace: one annotation around each, in it the phase of a chunk, in that its layers."""

import re
from dataclasses import dataclass

from counterflow.errors import ScheduleError
from counterflow.schedule.actions import Action, parse_action

# What stands for an action in a phase's name: an I, or a whole backward, is (B).
LETTERS = {"F": "F", "I": "B", "B": "B", "W": "W"}
PREFIX = "counterflow step "
NAME = re.compile(PREFIX + r"(\d{1,15}) pipeline (\d{1,9}) rank (\d{1,9}): (.{1,200})")
PHASE = re.compile(r"stage (\d{1,9}) \(([FBW])\)")
LAYER_PREFIX = "counterflow layer "
LAYER = re.compile(LAYER_PREFIX + r"(.{1,200}) \(([FBW])\)")


@dataclass(frozen=True, slots=True)
class Annotation:
    """An action of a training step, by the trainer's number; ``pipeline`` is the global rank of the pipeline's first rank."""

    step: int
    pipeline: int
    rank: int
    action: Action

    def __str__(self) -> str:
        return f"{PREFIX}{self.step} pipeline {self.pipeline} rank {self.rank}: {self.action}"


def read_annotation(name: str) -> Annotation | None:
    """Return what an annotation says; None for one that is not of an action."""
    match = NAME.fullmatch(name)
    if match is None:
        return None
    try:
        return Annotation(int(match[1]), int(match[2]), int(match[3]), parse_action(match[4]))
    except ScheduleError:
        return None


def name_phase(kind: str, stage: int) -> str:
    """Return the name of the phase of an F, I, B or W of a stage: ``stage 2 (F)``."""
    return f"stage {stage} ({LETTERS[kind]})"


def name_layer(layer: str, letter: str) -> str:
    """Return the annotation of a layer's forward (F), backward (B) or weight gradients (W)."""
    return f"{LAYER_PREFIX}{layer} ({letter})"


def read_layer(name: str) -> tuple[str, str] | None:
    """Return the layer and the letter of an annotation; None for one that is not of a layer."""
    match = LAYER.fullmatch(name)
    return (match[1], match[2]) if match else None
