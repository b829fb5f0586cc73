"""The code of a segment: its arguments, and how nodes of the graph are copied into it.

Arguments are numbers first (rows of the microbatch, rows before it, data-dependent sizes), then tensors. Sizes become
arithmetic on those numbers, row numbers those of the whole step.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, cast

import sympy
import torch
from torch import fx

from dbo_compile import compat
from dbo_compile import graph as g
from dbo_compile.ir.schedule import ROWS, START
from dbo_compile.ir.tokens import TOKENS, Split, TokenMap
from dbo_compile.passes.attend import attend_to_all, attend_to_prefix
from dbo_compile.passes.cut import Kind
from dbo_compile.passes.layout import dense_strides, laid_out, order_of
from dbo_compile.rules.collectives import comm_op, is_wait

aten = torch.ops.aten
BEFORE = sympy.Symbol("B", integer=True, nonnegative=True)
"""The number of tokens before a microbatch."""


@dataclass(frozen=True, slots=True)
class TensorArg:
    """A tensor argument of a code: sizes and strides over its symbols."""

    sizes: tuple[sympy.Expr, ...]
    strides: tuple[sympy.Expr, ...]
    like: torch.Tensor

    def renamed(self, symbols: Mapping[sympy.Symbol, sympy.Symbol]) -> str:
        sizes, strides = ([e.xreplace(symbols) for e in dims] for dims in (self.sizes, self.strides))
        return f"{self.like.dtype} {self.like.device} {sizes} {strides}"


@dataclass(frozen=True, slots=True)
class Code:
    """What a segment runs. `numbers` are its first arguments, in order; `tensors` the others."""

    name: str
    module: fx.GraphModule
    kind: Kind
    numbers: tuple[sympy.Symbol, ...]
    tensors: tuple[TensorArg, ...]


class Numbers:
    """Which value holds each symbol, and every size of the graph as an expression over the symbols of a code."""

    def __init__(self, graph: fx.Graph, token_symbols: Collection[sympy.Symbol]) -> None:
        self.token_symbols = dict.fromkeys(token_symbols, TOKENS)
        self.value_of: dict[sympy.Symbol, str] = {TOKENS: ROWS, BEFORE: START}
        for node in graph.nodes:
            if g.is_symbolic_number(node) and (symbol := g.expression(g.value(node))).is_Symbol:
                self.value_of.setdefault(symbol, node.name)
        self.rank = {symbol: i for i, symbol in enumerate(self.value_of)}  # by name, u10 would come before u9

    def expr(self, size: Any) -> sympy.Expr:
        return g.expression(size).xreplace(self.token_symbols)

    def tensor(self, node: fx.Node) -> TensorArg:
        """How a code sees a value that comes in: results of other codes are dense."""
        val = g.value(node)
        sizes = tuple(map(self.expr, val.shape))
        strides = dense_strides(sizes, order_of(val)) if is_made_dense(node) else tuple(map(self.expr, val.stride()))
        return TensorArg(sizes, strides, val)


def is_made_dense(node: fx.Node) -> bool:
    """Whether a result is copied before it leaves its code: pieces of it could not be joined to the layout it has.

    Memory that is written in place is never copied, nor a view of an argument that the graph returns.
    """
    if node.op == "placeholder" or g.shares_input(node) or g.is_returned_view(node):
        return False
    return not g.is_dense(g.value(node))


def is_numbered(node: fx.Node, tokens: TokenMap) -> bool:
    """Whether an op makes row numbers out of nothing (`arange` over tokens)."""
    place = tokens.places[node]
    reads_tensor = any(not g.is_symbolic_number(n) for n in node.all_input_nodes)
    return isinstance(place, Split) and place.position and not reads_tensor and node.op == "call_function"


class Copier:
    """Copies nodes into a code; sizes become arithmetic on the numbers that come in, row numbers become right."""

    def __init__(self, graph: fx.Graph, tokens: TokenMap, numbers: Numbers, lanes: fx.Node | None) -> None:
        self.graph = graph
        self.lanes = lanes
        self.tracer = fx.proxy.GraphAppendingTracer(graph)
        self.tokens = tokens
        self.numbers = numbers
        self.new: dict[fx.Node, fx.Node] = {}
        self.number: dict[sympy.Expr, Any] = {}

    def copy(self, node: fx.Node) -> None:
        here = node in self.tokens.localised
        args = g.map_nodes(node.args, lambda n: self._argument(n, here=here))
        kwargs = g.map_nodes(node.kwargs, lambda n: self._argument(n, here=here))
        if self.lanes is not None:
            self.new[node] = self._started(node, args, kwargs)
            return
        if g.copies_to_host(node) and kwargs.get("non_blocking"):  # the host reads it next, to join it with others
            kwargs = {**kwargs, "non_blocking": False}
        if node in self.tokens.prefixes:
            self.new[node] = self._attend_to_prefix(node, g.named_args(node, args, kwargs))
            return
        if node in self.tokens.wholes:
            rows, before = self._number(TOKENS), self._number(BEFORE)
            self.new[node] = attend_to_all(self.graph, node, args, kwargs, rows, before)
            return
        if node.target is operator.getitem and self.tokens.reads_others(cast("fx.Node", node.args[0])):
            self.new[node] = args[0]  # the only result that is read
            return
        new = self.graph.create_node(node.op, node.target, args, kwargs, node.name)
        if is_numbered(node, self.tokens):  # counted from the first row of the step, not of the microbatch
            new = self.graph.call_function(aten.add.Tensor, (new, self._rows_before(node)))
        self.new[node] = new
        if g.is_symbolic_number(node) and (symbol := self.numbers.expr(g.value(node))).is_Symbol:
            self.number[symbol] = new

    def _attend_to_prefix(self, node: fx.Node, args: Mapping[str, Any]) -> fx.Node:
        rows, before, keys = (self._number(expr) for expr in (TOKENS, BEFORE, BEFORE + TOKENS))
        return attend_to_prefix(self.graph, node, args, rows, before, keys)

    def _started(self, node: fx.Node, args: Any, kwargs: Any) -> fx.Node:
        """A collective is handed to the lanes; waiting for it is the program's business, not the code's."""
        if comm_op(node.target):
            called = (self.lanes, cast("Any", node.target), *args)
            return self.graph.create_node("call_method", "issue", called, kwargs, node.name)
        if is_wait(node.target):
            return cast("fx.Node", args[0])
        return self.graph.create_node(node.op, node.target, args, kwargs, node.name)

    def result(self, node: fx.Node) -> fx.Node:
        """What leaves the code. What a collective returns is still on its way, so nothing may read it here; it lies in
        memory without gaps anyway, whatever its strides were traced to be."""
        if self.lanes is not None or g.is_symbolic_number(node) or not is_made_dense(node):
            return self.new[node]
        return laid_out(self.graph, self.new[node], order_of(g.value(node)))

    def _argument(self, node: fx.Node, *, here: bool) -> Any:
        if g.is_symbolic_number(node):
            return self._number(self.numbers.expr(g.value(node)))
        place = self.tokens.places[node]
        if here and isinstance(place, Split) and place.position:
            return self.graph.call_function(aten.sub.Tensor, (self.new[node], self._rows_before(node)))
        return self.new[node]

    def _rows_before(self, node: fx.Node) -> Any:
        place = self.tokens.places[node]
        assert isinstance(place, Split), f"{node} has no row numbers"
        return self._number(BEFORE * (self.numbers.expr(g.value(node).shape[place.dim]) / TOKENS))

    def _number(self, expr: sympy.Expr) -> Any:
        if expr not in self.number:
            symbols = {s: fx.Proxy(self.number[s], self.tracer) for s in expr.free_symbols}
            made = compat.evaluate(expr, symbols)
            self.number[expr] = made.node if isinstance(made, fx.Proxy) else made
        return self.number[expr]
