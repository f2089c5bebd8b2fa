"""Runs a schedule table over the model chunks of any trainer."""

from counterflow.runtime.communication import communicate
from counterflow.runtime.weight_grads import defer_weight_grad, hold_weight_grads

__all__ = ["communicate", "defer_weight_grad", "hold_weight_grads"]
