"""Split the backward of any autograd graph: input gradients now, weight gradients when the W comes.

The I runs the nodes that lead to the chunk's inputs, and keeps the graph. Where such a node has a weight on another way, the
gradient that reaches the node is captured; autograd computes no gradient that nobody asked for, so the weight's is left out. The
W runs the captured nodes again, each for its weights alone. Nothing is known of the modules.

It costs memory and some time: the whole graph of a chunk, with all that it has saved, lives until its W, and autograd is started
once for each weight. Some gradients are computed in the I, where they come with the others, since leaving them would not be exact
or would gain nothing:

- what a function written in Python (`torch.autograd.Function`) computes: it runs whole, and once, since it may communicate;
- a weight that is used at one place of the graph and again at one below it, since autograd adds its uses up in one backward;
- biases and other vectors, and what the caller does not let wait; where no input needs a gradient, the lowest weight too.
"""

from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import GradientEdge

from counterflow.runtime.weight_grads import defer_weight_grad

Node = Any
# Adds a weight's gradient to where its sum is kept.
Add = Callable[[torch.Tensor, torch.Tensor], None]


class _Group(NamedTuple):
    """Weights whose gradients are computed together in the W, from these nodes."""

    sources: list[Node]
    weights: list[torch.Tensor]


class _Graph:
    """The nodes of a backward, those that run first in front, and where each leads."""

    def __init__(self, roots: Sequence[torch.Tensor]) -> None:
        self.edges: dict[Node, list[Node]] = {}
        found: list[Node] = []
        stack = [(root.grad_fn, False) for root in roots]
        while stack:
            node, is_left = stack.pop()
            if is_left:
                found.append(node)
            elif node is not None and node not in self.edges:
                self.edges[node] = [following for following, _ in node.next_functions if following is not None]
                stack.append((node, True))
                stack += [(following, False) for following in self.edges[node]]
        self.order = found[::-1]
        self.place = {node: place for place, node in enumerate(self.order)}
        self.leaves = {node: node.variable for node in self.order if hasattr(node, "variable")}

    def find_lowest(self) -> list[Node]:
        """Return the leaves that are farthest from the roots."""
        depth: dict[Node, int] = {}
        for node in self.order:
            for following in self.edges[node]:
                depth[following] = max(depth.get(following, 0), depth.get(node, 0) + 1)
        most = max((depth.get(leaf, 0) for leaf in self.leaves), default=0)
        return [leaf for leaf in self.leaves if depth.get(leaf, 0) == most]

    def find_above(self, targets: Collection[Node]) -> set[Node]:
        """Return the targets, and the nodes that lead to one."""
        above = set(targets)
        for node in reversed(self.order):
            if not above.isdisjoint(self.edges[node]):
                above.add(node)
        return above

    def leads_to_another(self, sources: list[Node]) -> bool:
        """Tell whether one of these nodes leads to another one of them."""
        last, seen = max(self.place[source] for source in sources), set[Node]()
        stack = [following for source in sources for following in self.edges[source]]
        while stack:
            node = stack.pop()
            if node not in seen and self.place[node] <= last:
                seen.add(node)
                stack += self.edges[node]
        return not seen.isdisjoint(sources)


def run_split(
    roots: Sequence[torch.Tensor],
    starts: Sequence[torch.Tensor],
    inputs: Sequence[torch.Tensor],
    may_wait: Callable[[torch.Tensor], bool],
    add: Add,
    once: Collection[Node] = (),
) -> None:
    """Run the backward of ``roots`` from their gradients ``starts``: gradients of ``inputs`` now, those of weights deferred.

    ``may_wait`` says which leaves may get their gradients in the W, by ``add``; others get them in ``.grad``, now.
    Nodes of ``once`` are not run twice: tensors that they belong to have hooks. What is deferred goes to `defer_weight_grad`.
    """
    graph = _Graph(roots)
    groups, targets = _plan(graph, roots, inputs, may_wait, set(once))
    captured: dict[Node, tuple[torch.Tensor | None, ...]] = {}
    for root, start in zip(roots, starts, strict=True):
        # A root that leads to no input does not run now.
        captured[root.grad_fn] = (*(None,) * root.output_nr, start)
    handles = [
        source.register_prehook(partial(captured.__setitem__, source))
        for source in {source for group in groups for source in group.sources}
    ]
    torch.autograd.Variable._execution_engine.run_backward(
        tuple(roots), tuple(starts), True, False, tuple(targets), allow_unreachable=True, accumulate_grad=True
    )
    for handle in handles:
        handle.remove()
    for group in groups:
        kept = [(source, captured[source]) for source in group.sources if source in captured]
        defer_weight_grad(partial(_compute, kept, group.weights, add))


def _plan(
    graph: _Graph,
    roots: Sequence[torch.Tensor],
    inputs: Sequence[torch.Tensor],
    may_wait: Callable[[torch.Tensor], bool],
    once: set[Node],
) -> tuple[list[_Group], list[torch.Tensor]]:
    """Return what waits, in groups, and the leaves whose gradients are computed now."""
    taken = {id(one) for one in inputs}
    now = {node for node, leaf in graph.leaves.items() if id(leaf) in taken or leaf.dim() < 2 or not may_wait(leaf)}
    if not any(id(leaf) in taken for leaf in graph.leaves.values()):
        now |= set(graph.find_lowest())
    while True:
        above = graph.find_above(now)
        reached: dict[Node, set[Node]] = {}
        early: set[Node] = set()
        for node in reversed(graph.order):
            below = [reached[following] for following in graph.edges[node] if following not in above]
            found = set[Node]().union(*below) if node not in graph.leaves else {node}
            if _runs_once(node) or node in once:
                early |= found
            reached[node] = found
        tops = {root.grad_fn for root in roots}
        sources = {node: reached[node] for node in graph.order if reached[node] - now and (node in above or node in tops)}
        groups = _join(sources)
        for nodes, leaves in groups:
            if len(nodes) > 1 and graph.leads_to_another(nodes):
                early |= leaves
        if not early - now:
            weights = [_Group(nodes, [graph.leaves[leaf] for leaf in leaves]) for nodes, leaves in groups]
            return weights, [graph.leaves[node] for node in now]
        now |= early


def _runs_once(node: Node) -> bool:
    return isinstance(node, BackwardCFunction) or "CppNode" in node.name()


def _join(sources: dict[Node, set[Node]]) -> list[tuple[list[Node], set[Node]]]:
    """Put nodes that lead to the same leaves together."""
    group_of: dict[Node, tuple[list[Node], set[Node]]] = {}
    for node, leaves in sources.items():
        nodes, together = [], set(leaves)
        for others, found in {id(group_of[leaf]): group_of[leaf] for leaf in leaves if leaf in group_of}.values():
            nodes += others
            together |= found
        group_of |= dict.fromkeys(together, ([*nodes, node], together))
    return list({id(group): group for group in group_of.values()}.values())


def _compute(kept: list[tuple[Node, tuple[torch.Tensor | None, ...]]], weights: list[torch.Tensor], add: Add) -> None:
    """Compute the gradients of a group's weights, and drop what was kept for them."""
    edges = [(GradientEdge(node, place), one) for node, found in kept for place, one in enumerate(found) if one is not None]
    kept.clear()
    if not edges:
        return
    outputs, starts = zip(*edges, strict=True)
    gradients = torch.autograd.grad(outputs, weights, starts, allow_unused=True)
    for weight, gradient in zip(weights, gradients, strict=True):
        if gradient is not None:
            add(weight, gradient)
