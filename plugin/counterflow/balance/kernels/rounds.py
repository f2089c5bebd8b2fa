"""Rounds of transfers, compiled: the edges of a bipartite graph coloured with as few colours as there can be (Kőnig)."""

import numpy as np

from counterflow.arrays import Array
from counterflow.compiling import compile_fast


@compile_fast
def colour_transfers(sender: Array, receiver: Array, ranks: int, colours: int) -> Array:
    """Return ``int64[transfers]``: a colour below ``colours`` for each; no rank sends two of one colour, or receives two.

    ``colours`` has to be at least what any rank sends, and what any rank receives; that many are enough. Where the sender and the
    receiver of a transfer have no colour free in common, two colours change places along the path of transfers that has them in
    turn.
    """
    transfers = sender.shape[0]
    colour_of = np.empty(transfers, np.int64)
    # Which transfer has a colour at a rank, as its sender (0) and as its receiver (1).
    at = np.full((2, ranks, colours), -1)
    ends = np.empty((2, transfers), np.int64)
    ends[0], ends[1] = sender, receiver
    path = np.empty(2 * ranks, np.int64)
    for transfer in range(transfers):
        first = find_free(at[0, sender[transfer]])
        second = find_free(at[1, receiver[transfer]])
        # Free the sender's colour at the receiver: the path cannot come back to the sender, which has no transfer of that colour.
        length, side, rank, wanted = 0, 1, receiver[transfer], first
        while at[side, rank, wanted] >= 0:
            path[length] = at[side, rank, wanted]
            side = 1 - side
            rank = ends[side, path[length]]
            wanted = first + second - wanted
            length += 1
        for step in range(length):
            edge = path[step]
            for end in range(2):
                at[end, ends[end, edge], colour_of[edge]] = -1
        for step in range(length):
            edge = path[step]
            colour_of[edge] = first + second - colour_of[edge]
            for end in range(2):
                at[end, ends[end, edge], colour_of[edge]] = edge
        colour_of[transfer] = first
        at[0, sender[transfer], first] = transfer
        at[1, receiver[transfer], first] = transfer
    return colour_of


@compile_fast
def find_free(taken: Array) -> int:
    """Return the first colour that no transfer has, -1 where none is free."""
    for colour, transfer in enumerate(taken):
        if transfer < 0:
            return colour
    return -1
