"""Outline: groups of nodes to segments, and the code of each distinct one.

The code of a segment is a small FX graph. Its arguments are numbers first (rows of the microbatch, rows before it,
data-dependent sizes), then tensors; every size in it is computed from those numbers, so one code serves every
microbatch, every size and every layer of the same structure. Never changes the graph it reads.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch
from torch import fx

from dbo_compile import compat
from dbo_compile import graph as g
from dbo_compile.errors import InvalidProgram
from dbo_compile.ir.schedule import Lane, Segment
from dbo_compile.ir.tokens import TOKENS, Placement, Split, TokenMap
from dbo_compile.passes.analyze import CHECKS
from dbo_compile.passes.code import BEFORE, Code, Copier, Numbers, TensorArg, is_numbered
from dbo_compile.passes.cut import Cut, Group, Kind
from dbo_compile.passes.name import names_of
from dbo_compile.rules.collectives import comm_op


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
        graph = writer.graph()
        args = tuple(map(numbers.tensor, writer.tensors))
        key = known.setdefault(_canonical(gm, graph, writer.kind, writer.symbols, args), name)
        if key == name:
            codes[key] = Code(name, fx.GraphModule(gm, graph, name), writer.kind, writer.symbols, args)
        segments[name] = replace(writer.segment(name), code=key, after=after)
    places = {n.name: p for n, p in tokens.places.items() if not isinstance(p, tuple)}
    outputs = tuple(n.name if isinstance(n, fx.Node) else n for n in g.results(gm.graph))
    groups = dict(zip(names, cut.groups, strict=True))
    return Outline(segments, groups, codes, places, tuple(n.name for n in g.inputs(gm.graph)), outputs)


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
        is_plain = group.mode.kind is Kind.COMPUTE and any(map(self._is_laid_out_apart, self.tensors))
        self.kind = Kind.PLAIN if is_plain else group.mode.kind

    def segment(self, name: str) -> Segment:
        collectives = [(n, op) for n in self.group.nodes if (op := comm_op(n.target))]
        group_args = [n.args[op.group_arg] for n, op in collectives if op.group_arg is not None]
        writers = {n: [self._base(t) for t in g.written(n)] for n in self.group.nodes}
        written = dict.fromkeys(t for targets in writers.values() for t in targets)
        for_all = {t for n, targets in writers.items() if n not in self.tokens.paged for t in targets}
        return Segment(
            name=name,
            lane=Lane.COMM if self.group.mode.kind is Kind.COMM else Lane.COMPUTE,
            inputs=(*(self.numbers.value_of[s] for s in self.symbols), *(n.name for n in self.tensors)),
            outputs=tuple(n.name for n in self.results),
            per_microbatch=self.group.mode.per_microbatch,
            group=str(group_args[0]) if group_args else "",
            payload="; ".join(f"{n.target} {_common(g.value(n))}" for n, _ in collectives),
            host=self.group.mode.kind is Kind.HOST,
            prefix=tuple(dict.fromkeys(n.name for m in self.nodes for n in self.tokens.prefixes.get(m, ()))),
            whole=tuple(dict.fromkeys(n.name for m in self.nodes for n in self.tokens.wholes.get(m, ()))),
            writes=tuple(n.name for n in written if n in self.tensors),
            paged=tuple(n.name for n in written if n in self.tensors and n not in for_all),
            aliases={n.name: b.name for n in self.results if (b := self._base(n)) in self.tensors},
        )

    def graph(self) -> fx.Graph:
        graph = fx.Graph()
        lanes = g.add_input(graph, "lanes") if self.group.mode.kind is Kind.COMM else None
        copier = Copier(graph, self.tokens, self.numbers, lanes)
        for symbol in self.symbols:
            copier.number[symbol] = g.add_input(graph, self.numbers.value_of[symbol])
        for node in self.tensors:
            copier.new[node] = g.add_input(graph, node.name)
        for node in self.nodes:
            copier.copy(node)
        graph.output(tuple(copier.result(n) for n in self.results))
        _check_nothing_reads_what_is_on_its_way(graph)
        return graph

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
        numbers = {i for n in self.nodes for i in n.all_input_nodes if g.is_symbolic_number(i)}
        exprs = [d for a in args for d in (*a.sizes, *a.strides)] + [self.numbers.expr(g.value(n)) for n in numbers]
        found = {s for e in exprs for s in compat.symbols_in(e)} - own
        tokens = self.tokens
        if any(is_numbered(n, tokens) or n in tokens.localised or tokens.reads_others(n) for n in self.nodes):
            found |= {TOKENS, BEFORE}
        return tuple(sorted(found, key=self.numbers.rank.__getitem__))

    def _is_laid_out_apart(self, node: fx.Node) -> bool:
        """Whether an argument may lie in memory in another way than its sizes and strides say.

        They say how all rows lie. Rows of a microbatch lie the same way if the token dim is the outermost one in
        memory, or if they were copied, as memory without gaps is that is never written; a join is a copy, too.
        """
        val, place, is_kept = g.value(node), self.tokens.places[node], g.shares_input(node)
        if not isinstance(place, Split) or not (is_kept or (node.op == "placeholder" and not g.is_dense(val))):
            return False
        if self.group.mode.per_microbatch:
            return not g.lies_together(val, place.dim)
        return node.op != "placeholder" and not g.is_dense(val)

    def _base(self, node: fx.Node) -> fx.Node:
        """The node whose memory `node` shares, as far back as this code goes."""
        while node not in self.tensors and (bases := g.viewed(node)):
            node = bases[0]
        return node


def _check_nothing_reads_what_is_on_its_way(graph: fx.Graph) -> None:
    """The proof orders codes; inside of one, nothing waits for a collective that it has started (but the next one)."""
    pending: set[fx.Node] = set()
    for node in graph.nodes:
        reads = pending.intersection(node.all_input_nodes)
        if node.target == "issue" or (reads and node.target is operator.getitem):
            pending.add(node)
        elif reads and node.op != "output":
            raise InvalidProgram(f"{node} reads what was started here, before it is waited for:\n{graph}")


def _common(val: Any) -> str:
    """What every rank has in common of a value: its type, and the sizes that do not depend on the step."""
    vals = [v for v in (val if isinstance(val, tuple | list) else [val]) if isinstance(v, torch.Tensor)]
    return ", ".join(f"{v.dtype}[{', '.join(str(s) if isinstance(s, int) else '*' for s in v.shape)}]" for v in vals)


def _canonical(
    gm: fx.GraphModule, graph: fx.Graph, kind: Kind, numbers: Sequence[sympy.Symbol], tensors: Sequence[TensorArg]
) -> str:
    """A text that two codes share exactly if one can stand for the other: names are positions in it."""
    symbols = {s: sympy.Symbol(f"n{i}") for i, s in enumerate(numbers)}
    lines = [str(kind), *(arg.renamed(symbols) for arg in tensors)]
    index: dict[fx.Node, str] = {}
    for i, node in enumerate(graph.nodes):
        index[node] = f"%{i}"
        target = "" if node.op == "placeholder" else _target(node, gm)
        args = node.args[:1] if node.target in CHECKS else node.args  # the message of a check names its nodes
        lines.append(f"{node.op} {target} {g.map_nodes((args, node.kwargs), lambda n: (index[n],))}")
    return "\n".join(lines)


def _target(node: fx.Node, gm: fx.GraphModule) -> str:
    """An op by name, a function by what it does, a constant by identity: two different ones are two codes."""
    if node.op != "get_attr":
        return str(node.target)
    held = getattr(gm, str(node.target), node)
    is_function = isinstance(held, fx.GraphModule) and not held.graph.find_nodes(op="get_attr")
    return str(held.graph) if is_function else f"attr {id(held)}"
