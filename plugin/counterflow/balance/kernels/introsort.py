"""The order in which libstdc++, the C++ library that comes with GCC, leaves equal keys when it sorts; compiled.

`std::sort` is not stable, so the algorithm alone decides where equal keys end up, and whoever has to agree with a program that
sorts with it has to take the same steps. They are those of introsort (D. Musser, Introspective Sorting and Selection Algorithms,
1997): quicksort around the median of the second, the middle and the last key, which is first swapped to the front; a range of 16
keys or fewer is left to one insertion sort at the end, and one that comes out of 2 log2(n) splits with more is sorted by a heap.
Ordinary loads get that far: those that rise and then fall from expert to expert, or sorted ones of which a few have changed.
"""

import numpy as np

from counterflow.arrays import Array
from counterflow.compiling import compile_fast

# Ranges of so many keys are left to the insertion sort.
SHORT = 16


@compile_fast
def sort_descending(keys: Array) -> Array:
    """Return ``int64[n]``, the indices of ``keys[n]`` from the largest to the smallest, equal keys in the order of `std::sort`.

    The keys must not be NaN. Up to 16 keys the order is stable. It is that of torch's `sort(descending=True)` on the CPU where
    torch is built with libstdc++ and without x86-simd-sort, as its Linux wheels are; others order equal keys in other ways.
    """
    count = keys.shape[0]
    order = np.arange(count)
    splits = 0
    while count >> (splits + 1) > 0:
        splits += 1
    # Ranges are independent once split, so the order in which they are taken does not show.
    ranges = [(0, count, 2 * splits)]
    while len(ranges) > 0:
        first, last, left = ranges.pop()
        if last - first <= SHORT:
            continue
        if left == 0:
            sort_as_heap(keys, order[first:last])
            continue
        middle = first + split_range(keys, order[first:last])
        ranges.append((first, middle, left - 1))
        ranges.append((middle, last, left - 1))
    insert_in_order(keys, order)
    return order


@compile_fast
def split_range(keys: Array, order: Array) -> int:
    """Order a range such that no key before the returned position is smaller than a key from there on."""
    first, last = 1, len(order)
    front = find_median(keys, order, 1, last // 2, last - 1)
    order[0], order[front] = order[front], order[0]
    pivot = keys[order[0]]
    # The scans need no bounds: of the three keys compared, one each way does not pass the median.
    while True:
        while keys[order[first]] > pivot:
            first += 1
        last -= 1
        while pivot > keys[order[last]]:
            last -= 1
        if first >= last:
            return first
        order[first], order[last] = order[last], order[first]
        first += 1


@compile_fast
def find_median(keys: Array, order: Array, a: int, b: int, c: int) -> int:
    """Return which of three positions has the key between the others; of equal keys the one that libstdc++ takes."""
    if keys[order[a]] > keys[order[b]]:
        low, high = b, a
    else:
        low, high = a, b
    if keys[order[low]] > keys[order[c]]:
        return low
    return c if keys[order[high]] > keys[order[c]] else high


@compile_fast
def insert_in_order(keys: Array, order: Array) -> None:
    """Sort by insertion: stable, and fast where every key is near its place."""
    for place in range(1, len(order)):
        index, gap = order[place], place
        while gap > 0 and keys[index] > keys[order[gap - 1]]:
            order[gap] = order[gap - 1]
            gap -= 1
        order[gap] = index


@compile_fast
def sort_as_heap(keys: Array, order: Array) -> None:
    """Sort by a heap with the smallest key on top, which goes to the end."""
    for top in range(len(order) // 2 - 1, -1, -1):
        sift(keys, order, top, order[top])
    for last in range(len(order) - 1, 0, -1):
        index = order[last]
        order[last] = order[0]
        sift(keys, order[:last], 0, index)


@compile_fast
def sift(keys: Array, heap: Array, top: int, index: int) -> None:
    """Put ``index`` in place in the heap below ``top``: a gap sinks to the bottom first, then the index rises from there."""
    gap = top
    child = 2 * gap + 1
    while child < len(heap):
        # The right one of two equal children.
        if child + 1 < len(heap) and not keys[heap[child + 1]] > keys[heap[child]]:
            child += 1
        heap[gap] = heap[child]
        gap, child = child, 2 * child + 1
    parent = (gap - 1) // 2
    while gap > top and keys[heap[parent]] > keys[index]:
        heap[gap] = heap[parent]
        gap, parent = parent, (parent - 1) // 2
    heap[gap] = index
