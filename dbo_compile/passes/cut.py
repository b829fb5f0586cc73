"""Cut: where one segment ends and the next begins. ATen graph and `TokenMap` to groups of nodes.

A segment stays on one lane and is played either per microbatch or once. So a group ends at every collective, at every
barrier and at every read of device data on the host. What a collective needs goes before it; what it neither needs nor
waits for (a shared expert, a residual) is a filler group that may be played under any communication. Never changes the
graph; every node but inputs, numbers and constants ends up in exactly one group.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import torch
from torch import fx

from dbo_compile import graph as g
from dbo_compile.ir.tokens import Shared, TokenMap
from dbo_compile.passes.analyze import CHECKS, draws_random_numbers
from dbo_compile.rules.collectives import comm_op, is_wait

aten = torch.ops.aten


class Kind(Enum):
    """What plays a node: kernels, a collective, or the host (which reads device data).

    A code may be `PLAIN` as well: kernels that are played as they are, since a compiler has to know how the arguments
    lie in memory, and for rows of these no code could tell from their number.
    """

    COMPUTE = "compute"
    COMM = "comm"
    HOST = "host"
    PLAIN = "plain"


@dataclass(frozen=True, slots=True)
class Mode:
    kind: Kind
    per_microbatch: bool


@dataclass(frozen=True, slots=True)
class Group:
    """The nodes of one segment, in the order of the graph; `after` are nodes of other groups that must come first
    although nothing of theirs is read: they read what a node of this group overwrites."""

    mode: Mode
    nodes: tuple[fx.Node, ...]
    after: tuple[fx.Node, ...]


# Ops whose time counts; everything else is cheap enough to move to where its result is used.
HEAVY = frozenset({
    aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default, aten.convolution.default,
    aten._grouped_mm.default, aten._scaled_mm.default, aten.sort.default, aten.sort.stable, aten.topk.default,
})  # fmt: skip


@dataclass(frozen=True, slots=True)
class Cut:
    """The groups, in an order that respects data flow, and the constants, made again in each group that reads them."""

    groups: tuple[Group, ...]
    constants: frozenset[fx.Node]


def cut(graph: fx.Graph, tokens: TokenMap) -> Cut:
    cutter = _Cutter(graph, tokens)
    return Cut(tuple(cutter.groups()), frozenset(cutter.constants))


class _Cutter:
    """Gives each node a mode, then a level (how many borders lie before it), then its group."""

    def __init__(self, graph: fx.Graph, tokens: TokenMap) -> None:
        self.tokens = tokens
        self.changing = frozenset(g.base(n) for m in g.body(graph) for n in g.written(m))
        self.index = {n: i for i, n in enumerate(graph.nodes)}
        self.definers = g.data_symbols(graph)
        self.constants: dict[fx.Node, None] = {}
        for node in g.body(graph):
            if self._is_constant(node):
                self.constants[node] = None
        self.nodes = [n for n in g.body(graph) if self._is_played(n)]
        self.host = _played_on_host(self.nodes)
        self.mode = {n: self._mode(n) for n in self.nodes}
        self.order_only = self._overwrites()
        self.needs = {n: self._needs(n) for n in self.nodes}
        self.users: dict[fx.Node, list[fx.Node]] = defaultdict(list)
        for node, needs in self.needs.items():
            for n in needs:
                self.users[n].append(node)

    def groups(self) -> list[Group]:
        level = self._levels()
        self._sink(level)
        feeds = self._feeds_a_border(level)
        keyed: dict[tuple[object, ...], list[fx.Node]] = defaultdict(list)
        for node in self.nodes:
            mode = self.mode[node]
            alone = self.index[_maker(node)] if mode.kind in (Kind.COMM, Kind.PLAIN) else -1
            keyed[level[node], alone, mode, feeds[node]].append(node)
        first = {key: (key[0], not key[3], self.index[nodes[0]]) for key, nodes in keyed.items()}
        return [self._group(keyed[key]) for key in sorted(keyed, key=first.__getitem__)]

    def _group(self, nodes: list[fx.Node]) -> Group:
        inside = set(nodes)
        after = dict.fromkeys(a for n in nodes for a in self.order_only.get(n, ()) if a not in inside)
        return Group(self.mode[nodes[0]], tuple(nodes), tuple(after))

    def _is_played(self, node: fx.Node) -> bool:
        if g.is_symbolic_number(node):
            return g.reads_number(node) or _is_result(node)
        if node.target in CHECKS:  # what was assumed of sizes alone is checked before the program is chosen
            return any(g.symbols_of(g.value(n)) & self.definers.keys() for n in node.all_input_nodes)
        return node not in self.constants

    def _is_constant(self, node: fx.Node) -> bool:
        """Whether a node costs nothing: a view of a weight, a constant tensor. Made again wherever it is used, it
        leaves layers that differ only in which weight they read the same code."""
        if _is_result(node) or any(u.target is operator.getitem and _is_result(u) for u in node.users):
            return False
        if node.target is operator.getitem:
            return node.args[0] in self.constants
        if node.op == "get_attr":
            return True
        is_once = draws_random_numbers(node) or node in self.tokens.barriers
        if is_once or not isinstance(self.tokens.places[node], Shared):
            return False
        tensors = [n for n in node.all_input_nodes if not g.is_symbolic_number(n)]
        if not tensors or g.written(node):
            return not tensors and isinstance(g.value(node), torch.Tensor)
        bases = set(g.viewed(node)) - self.changing
        return all(n in bases and (n.op == "placeholder" or n in self.constants) for n in tensors)

    def _mode(self, node: fx.Node) -> Mode:
        if node.target is operator.getitem or is_wait(node.target):
            return self._mode(node.args[0])  # type: ignore[arg-type]
        if g.is_symbolic_number(node) and not g.reads_number(node):  # a result, for all tokens
            return Mode(Kind.COMPUTE, per_microbatch=False)
        kind = Kind.COMM if comm_op(node.target) else Kind.HOST if node in self.host else Kind.COMPUTE
        if self.tokens.reads_others(node):  # alone: of some inputs it reads other rows than all else does
            kind = Kind.PLAIN
        places = [self.tokens.places[n] for n in (node, *node.all_input_nodes)]
        return Mode(kind, node not in self.tokens.barriers and not all(isinstance(p, Shared) for p in places))

    def _needs(self, node: fx.Node) -> list[fx.Node]:
        """The played nodes that must come before `node`: what it reads, through constants and numbers."""
        needs: dict[fx.Node, None] = {}
        todo = list(node.all_input_nodes)
        while todo:
            n = todo.pop()
            if n in self.mode:
                needs[n] = None
            elif g.is_symbolic_number(n):
                symbols = g.symbols_of(g.value(n))
                todo += [self.definers[s] for s in sorted(symbols, key=str) if s in self.definers]
            else:
                todo += n.all_input_nodes
        return [*needs, *(n for n in self.order_only.get(node, ()) if n not in needs)]

    def _overwrites(self) -> dict[fx.Node, list[fx.Node]]:
        """For memory that is written in place: who must come before whom although no value passes between them.

        The state of the random number generator is such memory too.
        """
        readers: dict[fx.Node | str, list[fx.Node]] = defaultdict(list)
        writer: dict[fx.Node | str, fx.Node] = {}
        order: dict[fx.Node, list[fx.Node]] = {}
        for node in self.nodes:
            roots: dict[fx.Node | str, None] = dict.fromkeys(
                r for n in self._tensors_read(node) if (r := g.base(n)) in self.changing
            )
            writes: set[fx.Node | str] = {g.base(n) for n in g.written(node)}
            if draws_random_numbers(node):
                roots["rng"] = None
                writes.add("rng")
            before = [writer[r] for r in roots if r in writer]
            before += [r for root in roots if root in writes for r in readers[root]]
            for root in roots:
                if root in writes:
                    writer[root], readers[root] = node, []
                else:
                    readers[root].append(node)
            if before := [n for n in dict.fromkeys(before) if n is not node]:
                order[node] = before
        return order

    def _tensors_read(self, node: fx.Node) -> list[fx.Node]:
        read, todo = [], list(node.all_input_nodes)
        while todo:
            n = todo.pop()
            read.append(n)
            if n not in self.mode and n.op != "placeholder" and not g.is_symbolic_number(n):
                todo += n.all_input_nodes
        return read

    def _levels(self) -> dict[fx.Node, int]:
        """How many borders lie before a node. Level 0 is what needs no tokens and comes before everything.

        A collective is on no lower level than the one before it in the graph: so programs can keep that order, which
        is the one of a rank that plays the whole graph.
        """
        level: dict[fx.Node, int] = {}
        last = 0
        for node in self.nodes:
            prologue = not self.mode[node].per_microbatch and self.mode[node].kind is Kind.COMPUTE
            prologue = prologue and node not in self.tokens.barriers and all(level[n] == 0 for n in self.needs[node])
            crossed = (level[n] + (level[n] > 0 and self._is_border(n, node)) for n in self.needs[node])
            level[node] = 0 if prologue else max(crossed, default=1) or 1
            if comm_op(node.target):
                level[node] = last = max(level[node], last)
        return level

    def _is_border(self, before: fx.Node, node: fx.Node) -> bool:
        if self.mode[before].kind is Kind.COMM:
            return _maker(before) is not _maker(node)
        return self.mode[before] != self.mode[node]

    def _sink(self, level: dict[fx.Node, int]) -> None:
        """Move what is cheap, and needed only after a later border, to where it is needed."""
        for node in reversed(self.nodes):
            users = self.users[node]
            mode = self.mode[node]
            if not users or mode != Mode(Kind.COMPUTE, per_microbatch=True) or self._must_stay(node):
                continue
            if all(self.mode[u] == mode for u in users):
                level[node] = max(level[node], min(level[u] for u in users))

    def _must_stay(self, node: fx.Node) -> bool:
        return is_heavy(node) or _is_result(node) or bool(g.written(node)) or node.target is operator.getitem

    def _feeds_a_border(self, level: dict[fx.Node, int]) -> dict[fx.Node, bool]:
        """Whether something on another lane, or played once, waits for a node through nodes of its own level."""
        feeds: dict[fx.Node, bool] = {}
        for node in reversed(self.nodes):
            ends = _is_result(node) or bool(g.written(node)) or node in self.host
            feeds[node] = ends or any(
                self.mode[u] != self.mode[node] or (level[u] == level[node] and feeds[u]) for u in self.users[node]
            )
        # The parts of a result, and the wait for a collective, stay with the op that they belong to.
        return {node: feeds[_maker(node)] for node in self.nodes}


def _is_result(node: fx.Node) -> bool:
    return any(u.op == "output" for u in node.users)


def is_heavy(node: fx.Node) -> bool:
    """Whether the time of an op counts: products, attention, sorting, and every op that is not PyTorch's own."""
    namespace, _, op = str(node.target).partition(".")
    is_own = namespace in ("aten", "prims", "_c10d_functional") or node.target is operator.getitem
    return node.op == "call_function" and (not is_own or node.target in HEAVY or "scaled_dot_product" in op)


def _played_on_host(nodes: Sequence[fx.Node]) -> dict[fx.Node, None]:
    """The nodes that the host plays: reads of numbers, copies of device tensors to the host (`counts.cpu()`, for which
    it waits), and what is then done with those copies there."""
    host: dict[fx.Node, None] = {}
    for node in nodes:
        on = g.is_on_host(node) and any(n in host and g.is_on_host(n) for n in node.all_input_nodes)
        if on or g.reads_number(node) or g.copies_to_host(node) or node.target in CHECKS:
            host[node] = None
    return host


def _maker(node: fx.Node) -> fx.Node:
    """The op that a node belongs to: itself, or the one whose result it takes a part of, or waits for."""
    while node.target is operator.getitem or is_wait(node.target):
        node = node.args[0]  # type: ignore[assignment]
    return node


def unsplit_writes(group: Group, tokens: TokenMap, *, straddles: bool = True) -> bool:
    """Whether a group played per microbatch writes what all tokens share: its microbatches keep their order.

    Unless a request `straddles` two of them, those that write to places of their own requests only need none.
    """
    targets = [n for m in group.nodes if straddles or m not in tokens.paged for n in g.written(m)]
    return group.mode.per_microbatch and any(isinstance(tokens.places[n], Shared) for n in targets)
