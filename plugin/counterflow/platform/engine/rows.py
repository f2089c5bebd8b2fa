"""Padding of the rows that each expert gets, to the sizes that FP8 products need."""

import torch

Tensor = torch.Tensor


def fused_multi_row_padding(rows: Tensor, out: Tensor, sizes: list[int], padded: list[int]) -> None:
    """Copy groups of rows, ``sizes`` long, to places ``padded`` long; what is left is zero."""
    out.zero_()
    read = written = 0
    for size, room in zip(sizes, padded, strict=True):
        out[written : written + size] = rows[read : read + size]
        read, written = read + size, written + room


def fused_multi_row_unpadding(rows: Tensor, out: Tensor, padded: list[int], sizes: list[int]) -> None:
    """Copy the same rows back."""
    read = written = 0
    for room, size in zip(padded, sizes, strict=True):
        out[written : written + size] = rows[read : read + size]
        read, written = read + room, written + size
