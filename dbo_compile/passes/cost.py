"""What a segment costs before anything is measured, from the bytes it moves and the operations it does.

The figures only rank segments against each other and against collectives. Those that order a program must be the same
on every rank, whatever its number of tokens, because every rank must play the same order: so there, all symbols count
the same fixed number. Charts show what is to be expected of the call that was traced.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from types import MappingProxyType
from typing import Any, cast

import sympy
import torch
from torch import fx

from dbo_compile import graph as g
from dbo_compile.passes.cut import Group, Kind

ALL_TO_ALL = torch.ops._c10d_functional.all_to_all_single.default
NUM_ROWS = 1024
# Which argument of a product is its left factor, whose last dim is summed over.
PRODUCTS = {
    "aten.mm.default": 0,
    "aten.bmm.default": 0,
    "aten.addmm.default": 1,
    "aten.baddbmm.default": 1,
    "aten._grouped_mm.default": 0,
    "transformers.grouped_mm_fallback.default": 0,
}


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


class CostModel:
    """Guesses how long each group of one graph takes; a symbol that is not in `sizes` counts `NUM_ROWS`."""

    def __init__(self, graph: fx.Graph, sizes: Mapping[sympy.Symbol, int] = MappingProxyType({})) -> None:
        self.expected = {symbol: sympy.Integer(size) for symbol, size in sizes.items()}
        for node in graph.nodes:
            if node.target is ALL_TO_ALL:
                self._expect_rows(node)

    def seconds(self, group: Group) -> float:
        tensors = [t for n in group.nodes for t in _tensors(n)]
        speeds = CPU if all(t.device.type == "cpu" for t in tensors) else ACCELERATOR
        match group.mode.kind:
            case Kind.HOST:
                return speeds.launch
            case Kind.COMM:
                return speeds.launch + self._bytes(group.nodes[:1]) / speeds.link
            case Kind.COMPUTE | Kind.PLAIN:
                flops = sum(map(self._flops, group.nodes))
                return speeds.launch + flops / speeds.flops + self._bytes(group.nodes) / speeds.memory

    def _expect_rows(self, exchange: fx.Node) -> None:
        """Take it that a rank receives as many rows as it sends, and as many from each rank."""
        rows, received = cast("tuple[fx.Node, list[Any]]", exchange.args[:2])
        symbols = [s for n in received if isinstance(n, fx.Node) for s in sorted(g.symbols_of(g.value(n)), key=str)]
        for symbol in symbols:
            each = self._size(g.value(rows).shape[0]) // len(symbols)
            self.expected.setdefault(symbol, sympy.Integer(each))

    def _bytes(self, nodes: Iterable[fx.Node]) -> int:
        return sum(self._numel(t) * t.element_size() for n in nodes for t in _tensors(n))

    def _flops(self, node: fx.Node) -> int:
        """Twice the multiplications of a product: the size of the result times what is summed over."""
        if str(node.target) in PRODUCTS:
            left = cast("fx.Node", node.args[PRODUCTS[str(node.target)]])
            return 2 * self._size(g.value(left).shape[-1]) * sum(map(self._numel, _tensors(node)))
        if "scaled_dot_product" in str(node.target):
            query, key = (g.value(n).shape for n in cast("tuple[fx.Node, ...]", node.args[:2]))
            return 4 * prod(map(self._size, query)) * self._size(key[-2])
        return 0

    def _numel(self, tensor: torch.Tensor) -> int:
        return prod(map(self._size, tensor.shape))

    def _size(self, size: Any) -> int:
        if isinstance(size, int):
            return size
        expr = g.expression(size)
        unknown = dict.fromkeys(expr.free_symbols - self.expected.keys(), sympy.Integer(NUM_ROWS))
        return int(expr.xreplace({**self.expected, **unknown}))


def _tensors(node: fx.Node) -> list[torch.Tensor]:
    val = g.value(node)
    return [v for v in (val if isinstance(val, tuple | list) else (val,)) if isinstance(v, torch.Tensor)]
