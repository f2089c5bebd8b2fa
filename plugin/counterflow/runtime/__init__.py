"""Executes a schedule table over model chunks; knows nothing of whose model it is."""

from counterflow.runtime.communication import communicate
from counterflow.runtime.weight_grads import defer_weight_grad, hold_weight_grads

__all__ = ["communicate", "defer_weight_grad", "hold_weight_grads"]
