"""Outline: groups of nodes to segments, and the code of each distinct one.

The code of a segment is a small FX graph. Its arguments are numbers first (rows of the microbatch, rows before it,
data-dependent sizes), then tensors; every size in it is computed from those numbers, so one code serves every
microbatch, every size and every layer of the same structure. Never changes the graph it reads.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import sympy
import torch
from torch import fx

from dbo_compile import compat
from dbo_compile import graph as g
from dbo_compile.ir.schedule import ROWS, START, Lane, Segment
from dbo_compile.ir.tokens import TOKENS, Placement, Split, TokenMap
from dbo_compile.passes.analyze import CHECKS
from dbo_compile.passes.cut import Cut, Group, Kind
from dbo_compile.passes.name import names_of
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


@dataclass(frozen=True, slots=True)
class Outline:
    """The segments in the order of the graph, each distinct code once, and where the tokens are in every value that
    passes between segments. `inputs` and `outputs` are the names of the graph's arguments and results; a result that
    is no value of the graph stands there itself."""

    segments: Mapping[str, Segment]
    groups: Mapping[str, Group]
    codes: Mapping[str, Code]
    places: Mapping[str, Placement]
    inputs: tuple[str, ...]
    outputs: tuple[Any, ...]


def outline(gm: fx.GraphModule, cut: Cut, tokens: TokenMap, symbols: Collection[sympy.Symbol]) -> Outline:
    """Give each group a name, its arguments and results, and its code; equal codes are kept once."""
    names = names_of(cut.groups)
    numbers = Numbers(gm.graph, symbols)
    segment_of = {n: name for name, group in zip(names, cut.groups, strict=True) for n in group.nodes}
    segments: dict[str, Segment] = {}
    codes: dict[str, Code] = {}
    known: dict[str, str] = {}
    for name, group in zip(names, cut.groups, strict=True):
        after = tuple(dict.fromkeys(segment_of[n] for n in group.after))
        writer = _CodeWriter(gm, group, cut.constants, tokens, numbers)
        code = writer.code(name)
        key = known.setdefault(_canonical(code), name)
        codes.setdefault(key, code)
        segments[name] = replace(writer.segment(name), code=key, after=after)
    places = {n.name: p for n, p in tokens.places.items() if not isinstance(p, tuple)}
    outputs = tuple(n.name if isinstance(n, fx.Node) else n for n in g.results(gm.graph))
    groups = dict(zip(names, cut.groups, strict=True))
    return Outline(segments, groups, codes, places, tuple(n.name for n in g.inputs(gm.graph)), outputs)


class Numbers:
    """Which value holds each symbol, and every size of the graph as an expression over the symbols of a code."""

    def __init__(self, graph: fx.Graph, token_symbols: Collection[sympy.Symbol]) -> None:
        self.token_symbols = dict.fromkeys(token_symbols, TOKENS)
        self.value_of: dict[sympy.Symbol, str] = {TOKENS: ROWS, BEFORE: START}
        for node in graph.nodes:
            if g.is_symbolic_number(node) and (symbol := g.expression(g.value(node))).is_Symbol:
                self.value_of.setdefault(symbol, node.name)

    def expr(self, size: Any) -> sympy.Expr:
        return g.expression(size).xreplace(self.token_symbols)

    def tensor(self, node: fx.Node) -> TensorArg:
        """How a code sees a value that comes in: results of other codes are dense."""
        val = g.value(node)
        sizes = tuple(map(self.expr, val.shape))
        strides = _contiguous(sizes) if is_made_dense(node) else tuple(map(self.expr, val.stride()))
        return TensorArg(sizes, strides, val)


def is_made_dense(node: fx.Node) -> bool:
    """Whether a result is copied before it leaves its code: pieces of it could not be joined to the layout it has.

    Memory that is written in place is never copied.
    """
    return node.op != "placeholder" and not g.shares_input(node) and not g.is_dense(g.value(node))


def _contiguous(sizes: tuple[sympy.Expr, ...]) -> tuple[sympy.Expr, ...]:
    return tuple(sympy.Mul(*sizes[d + 1 :]) for d in range(len(sizes)))


class _CodeWriter:
    """Writes the code of one group: first finds what it reads, then copies it over."""

    def __init__(
        self, gm: fx.GraphModule, group: Group, constants: frozenset[fx.Node], tokens: TokenMap, numbers: Numbers
    ) -> None:
        self.gm = gm
        self.group = group
        self.tokens = tokens
        self.numbers = numbers
        self.inside = frozenset(group.nodes)
        self.nodes: list[fx.Node] = []  # the group, and each constant before its first reader
        self.tensors: list[fx.Node] = []  # what comes in
        self._collect(constants)
        self.results = [n for n in group.nodes if self._goes_out(n)]
        self.symbols = self._find_symbols()

    def segment(self, name: str) -> Segment:
        collectives = [(n, op) for n in self.group.nodes if (op := comm_op(n.target))]
        group_args = [n.args[op.group_arg] for n, op in collectives if op.group_arg is not None]
        written = [self._base(t) for n in self.group.nodes for t in g.written(n)]
        return Segment(
            name=name,
            lane=Lane.COMM if self.group.mode.kind is Kind.COMM else Lane.COMPUTE,
            inputs=(*(self.numbers.value_of[s] for s in self.symbols), *(n.name for n in self.tensors)),
            outputs=tuple(n.name for n in self.results),
            per_microbatch=self.group.mode.per_microbatch,
            group=str(group_args[0]) if group_args else "",
            host=self.group.mode.kind is Kind.HOST,
            writes=tuple(dict.fromkeys(n.name for n in written if n in self.tensors)),
            aliases={n.name: b.name for n in self.results if (b := self._base(n)) in self.tensors},
        )

    def code(self, name: str) -> Code:
        graph = fx.Graph()
        is_comm = self.group.mode.kind is Kind.COMM
        lanes = graph.placeholder("lanes") if is_comm else None
        copier = _Copier(graph, self.tokens, self.numbers, lanes)
        for symbol in self.symbols:
            copier.number[symbol] = graph.placeholder(self.numbers.value_of[symbol])
        for node in self.tensors:
            copier.new[node] = graph.placeholder(node.name)
        for node in self.nodes:
            copier.copy(node)
        graph.output(tuple(copier.result(n) for n in self.results))
        args = tuple(map(self.numbers.tensor, self.tensors))
        return Code(name, fx.GraphModule(self.gm, graph, name), self.group.mode.kind, self.symbols, args)

    def _collect(self, constants: frozenset[fx.Node]) -> None:
        seen: set[fx.Node] = set()

        def add(node: fx.Node) -> None:
            if node in seen or (g.is_symbolic_number(node) and node not in self.inside):
                return
            seen.add(node)
            if node not in self.inside and node not in constants:
                self.tensors.append(node)
                return
            for n in node.all_input_nodes:
                add(n)
            self.nodes.append(node)

        for node in self.group.nodes:
            add(node)

    def _goes_out(self, node: fx.Node) -> bool:
        """Whether another group, or the caller, reads the result of `node`; numbers are read through their symbols."""
        if isinstance(g.value(node), tuple | list):
            return False
        return g.is_symbolic_number(node) or any(u not in self.inside for u in node.users)

    def _find_symbols(self) -> tuple[sympy.Symbol, ...]:
        """The symbols that the code computes sizes from, the rows of the microbatch first."""
        own = {s for n in self.inside if g.reads_number(n) for s in g.symbols_of(g.value(n))}
        args = [self.numbers.tensor(n) for n in self.tensors]
        dims = [d for a in args for d in (*a.sizes, *a.strides)]
        dims += [g.value(i) for n in self.nodes for i in n.all_input_nodes if g.is_symbolic_number(i)]
        found = {s for d in dims for s in self.numbers.expr(d).free_symbols} - own
        if any(is_numbered(n, self.tokens) or n in self.tokens.localised for n in self.nodes):
            found |= {TOKENS, BEFORE}
        rank = {TOKENS: 0, BEFORE: 1}
        return tuple(sorted(found, key=lambda s: (rank.get(s, 2), str(s))))

    def _base(self, node: fx.Node) -> fx.Node:
        """The node whose memory `node` shares, as far back as this code goes."""
        while node not in self.tensors and (bases := g.viewed(node)):
            node = bases[0]
        return node


def is_numbered(node: fx.Node, tokens: TokenMap) -> bool:
    """Whether an op makes row numbers out of nothing (`arange` over tokens)."""
    place = tokens.places[node]
    reads_tensor = any(not g.is_symbolic_number(n) for n in node.all_input_nodes)
    return isinstance(place, Split) and place.position and not reads_tensor and node.op == "call_function"


class _Copier:
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
        new = self.graph.create_node(node.op, node.target, args, kwargs, node.name)
        if is_numbered(node, self.tokens):  # counted from the first row of the step, not of the microbatch
            new = self.graph.call_function(aten.add.Tensor, (new, self._rows_before(node)))
        self.new[node] = new
        if g.is_symbolic_number(node) and (symbol := self.numbers.expr(g.value(node))).is_Symbol:
            self.number[symbol] = new

    def _started(self, node: fx.Node, args: Any, kwargs: Any) -> fx.Node:
        """A collective is handed to the lanes; waiting for it is the program's business, not the code's."""
        if comm_op(node.target):
            called = (self.lanes, cast("Any", node.target), *args)
            return self.graph.create_node("call_method", "issue", called, kwargs, node.name)
        if is_wait(node.target):
            return cast("fx.Node", args[0])
        return self.graph.create_node(node.op, node.target, args, kwargs, node.name)

    def result(self, node: fx.Node) -> fx.Node:
        if g.is_symbolic_number(node) or not is_made_dense(node):
            return self.new[node]
        return self.graph.call_function(
            aten.clone.default, (self.new[node],), {"memory_format": torch.contiguous_format}
        )

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


def _canonical(code: Code) -> str:
    """A text that two codes share exactly if one can stand for the other: names are positions in it."""
    symbols = {s: sympy.Symbol(f"n{i}") for i, s in enumerate(code.numbers)}
    lines = [str(code.kind), *(arg.renamed(symbols) for arg in code.tensors)]
    index: dict[fx.Node, str] = {}
    for i, node in enumerate(code.module.graph.nodes):
        index[node] = f"%{i}"
        target = "" if node.op == "placeholder" else _target(node, code.module)
        args = node.args[:1] if node.target in CHECKS else node.args  # the message of a check names its nodes
        lines.append(f"{node.op} {target} {g.map_nodes((args, node.kwargs), lambda n: (index[n],))}")
    return "\n".join(lines)


def _target(node: fx.Node, module: fx.GraphModule) -> str:
    """An op by name; an attribute by identity: two different constants are two codes."""
    return f"attr {id(getattr(module, str(node.target), node))}" if node.op == "get_attr" else str(node.target)
