"""What a segment costs before anything is measured, from the bytes it moves and the operations it does.

The figures only rank segments against each other and against collectives. They must be the same on every rank, whatever
its number of tokens, because every rank must play the same order: so all symbols count the same fixed number.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from typing import Any

import sympy
import torch
from torch import fx

from dbo_compile import graph as g
from dbo_compile.passes.cut import Group, Kind

aten = torch.ops.aten
NUM_ROWS = 1024


@dataclass(frozen=True, slots=True)
class Speeds:
    """Floating-point operations, bytes of memory and bytes of link per second, and seconds to start a segment."""

    flops: float
    memory: float
    link: float
    launch: float


# Orders of magnitude: one core of a server over 10 Gbit/s; an H100-class chip (bf16, HBM3) over a 400 Gbit/s NIC.
CPU = Speeds(flops=3e10, memory=1e10, link=1e9, launch=1e-5)
ACCELERATOR = Speeds(flops=5e14, memory=3e12, link=5e10, launch=5e-6)


def seconds(group: Group) -> float:
    """A guess at how long a microbatch of `NUM_ROWS` tokens takes in `group`."""
    tensors = [t for n in group.nodes for t in _tensors(n)]
    speeds = CPU if all(t.device.type == "cpu" for t in tensors) else ACCELERATOR
    match group.mode.kind:
        case Kind.HOST:
            return speeds.launch
        case Kind.COMM:
            return speeds.launch + _bytes(group.nodes[:1]) / speeds.link
        case Kind.COMPUTE:
            flops = sum(map(_flops, group.nodes))
            return speeds.launch + flops / speeds.flops + _bytes(group.nodes) / speeds.memory


def _bytes(nodes: Iterable[fx.Node]) -> int:
    return sum(_numel(t) * t.element_size() for n in nodes for t in _tensors(n))


def _flops(node: fx.Node) -> int:
    """Twice the multiplications of a product: rows and columns of the result times what is summed over."""
    if node.target in (aten.mm.default, aten.bmm.default, aten.addmm.default, aten.baddbmm.default):
        summed = _size(g.value(node.args[-2]).shape[-1])  # type: ignore[arg-type]
        return 2 * summed * sum(map(_numel, _tensors(node)))
    if str(node.target).startswith(("aten._grouped_mm", "transformers.grouped_mm")):
        summed = _size(g.value(node.args[0]).shape[-1])  # type: ignore[arg-type]
        return 2 * summed * sum(map(_numel, _tensors(node)))
    if "scaled_dot_product" in str(node.target):
        query, key = (g.value(n).shape for n in node.args[:2])  # type: ignore[arg-type]
        return 4 * prod(map(_size, query)) * _size(key[-2])
    return 0


def _tensors(node: fx.Node) -> list[torch.Tensor]:
    val = g.value(node)
    return [v for v in (val if isinstance(val, tuple | list) else (val,)) if isinstance(v, torch.Tensor)]


def _numel(tensor: torch.Tensor) -> int:
    return prod(map(_size, tensor.shape))


def _size(size: Any) -> int:
    expr = g.expression(size)
    return int(expr.xreplace(dict.fromkeys(expr.free_symbols, sympy.Integer(NUM_ROWS))))
