"""Slow and obvious counterparts of this room's fast functions, for the tests."""

import numpy as np

from counterflow.arrays import Array


def place_one_by_one(routed: Array, held: Array, shares: Array | None) -> Array:
    """Return the slot map ``bool[tokens, slots]`` of ``routed``, ``bool[tokens, experts]``, token by token.

    ``held``, ``int64[slots]``, is each slot's expert, -1 for an empty slot. A token goes to the first slot of its expert that
    has fewer tokens than its share in ``shares``, ``int64[slots]``. Without shares, the tokens of an expert take turns over its
    slots. Reference of `place_exactly` and `place_evenly`.
    """
    tokens, experts = routed.shape
    placed = np.zeros((tokens, len(held)), np.bool_)
    for expert in range(experts):
        slots = [slot for slot in range(len(held)) if held[slot] == expert]
        for turn, token in enumerate(np.flatnonzero(routed[:, expert])):
            if shares is None:
                slot = slots[turn % len(slots)]
            else:
                slot = next(slot for slot in slots if placed[:, slot].sum() < shares[slot])
            placed[token, slot] = True
    return placed
