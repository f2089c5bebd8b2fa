"""The device that a rank computes on, and marks in its stream of work.

Every room but the platform asks here and nowhere else. Under the CPU platform `torch.cuda` itself means the CPU.
"""

from typing import Any

import torch


def find_device() -> torch.device:
    """Return the device that this rank computes on: its current GPU, or the CPU where there is none."""
    return torch.device(torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def make_event(*, timed: bool = False) -> Any:
    """Return an event; ``timed`` ones know when a stream reached them."""
    return torch.cuda.Event(enable_timing=timed)  # type: ignore[no-untyped-call]


def wait_for_device() -> None:
    """Wait until the device has done all work that was issued to it."""
    torch.cuda.synchronize()
