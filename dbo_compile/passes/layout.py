"""How values lie in memory that pass between segments: without gaps, with their dims in the order that was traced.

Ops lay out their results as their arguments lie (attention, everything elementwise), and code is made for that.
"""

from __future__ import annotations

from collections.abc import Sequence

import sympy
import torch
from torch import fx

from dbo_compile import graph as g

aten = torch.ops.aten


def order_of(val: torch.Tensor) -> list[int]:
    """The dims of a tensor, the outermost in memory first; as they are, if rows of it share memory."""
    shares = any(g.expression(s) == 0 and g.expression(d) != 1 for s, d in zip(val.stride(), val.shape, strict=True))
    return list(range(val.ndim)) if shares else g.stride_order(val)


def dense_strides(sizes: Sequence[sympy.Expr], order: Sequence[int]) -> tuple[sympy.Expr, ...]:
    """The strides of memory without gaps, with the dims in that order."""
    inner = {d: order[at + 1 :] for at, d in enumerate(order)}
    return tuple(sympy.Mul(*(sizes[i] for i in inner[d])) for d in range(len(sizes)))


def laid_out(graph: fx.Graph, node: fx.Node, order: Sequence[int]) -> fx.Node:
    """A copy of `node` in memory without gaps, with the dims in that order."""
    if list(order) == sorted(order):
        return _clone(graph, node)
    turned = _clone(graph, graph.call_function(aten.permute.default, (node, list(order))))
    return graph.call_function(aten.permute.default, (turned, [order.index(d) for d in range(len(order))]))


def _clone(graph: fx.Graph, node: fx.Node) -> fx.Node:
    return graph.call_function(aten.clone.default, (node,), {"memory_format": torch.contiguous_format})
