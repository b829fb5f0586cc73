"""What the engine is to know of the arguments and results of an ATen graph: the graph and `TokenMap` to `Signature`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import Any

import sympy
import torch
from torch import fx

from dbo_compile import capture, compat, origin
from dbo_compile import graph as g
from dbo_compile.axes import Axis, is_given
from dbo_compile.config import Config
from dbo_compile.errors import NotSplit
from dbo_compile.ir.schedule import ROWS, START
from dbo_compile.ir.tokens import TOKENS, Given, Shared, Split, TokenMap
from dbo_compile.passes.analyze import draws_random_numbers
from dbo_compile.passes.given import fixed_sizes, given_numbers, number_sources, placement_of
from dbo_compile.rules.collectives import comm_op
from dbo_compile.runtime.given import RequestInputs
from dbo_compile.runtime.signature import Signature, TokenInput

TAKEN = frozenset((ROWS, START, "self"))
"""Names of something else wherever an argument has one: in programs, and in the code that FX generates."""


@dataclass(frozen=True, slots=True)
class Traced:
    """An ATen graph as captured: which inputs carry tokens, and in which dim, and which symbols count them.

    `hints` has the value of each symbol in the call that was traced. `axes` has the inputs that `token_dims` says
    something else of, by name; `given` are those of them of which each microbatch has a value of its own.
    """

    gm: fx.GraphModule
    token_dims: Mapping[fx.Node, int]
    symbols: tuple[sympy.Symbol, ...]
    hints: Mapping[sympy.Symbol, int]
    axes: Mapping[str, tuple[fx.Node, Axis]] = field(default_factory=dict)
    given: Mapping[fx.Node, Given] = field(default_factory=dict)

    @property
    def own(self) -> dict[fx.Node, Given]:
        """The inputs that hold sizes of what is given."""
        return given_numbers(self.gm.graph, self.given, self.symbols)

    def sizes(self, num_parts: int) -> dict[sympy.Symbol, int]:
        """What symbols stand for in one of `num_parts` parts of the call that was traced, `TOKENS` as well.

        Never 0 or 1 tokens, on which a compiler would specialise. Numbers of requests are left out: a microbatch may
        have one, or none.
        """
        own = {g.expression(g.value(node)) for node in self.own}
        num_rows = max(2, self.hints[TOKENS] // num_parts)
        known = {symbol: hint for symbol, hint in self.hints.items() if symbol not in own}
        return known | dict.fromkeys((TOKENS, *self.symbols), num_rows)


def name_inputs(graph: fx.Graph, names: Sequence[str]) -> None:
    """Call the inputs of an ATen graph by the names of the arguments of the Dynamo graph that they are. Only for people
    to read: nothing is found by these names, and Inductor gives names of its own."""
    inputs = g.inputs(graph)
    for argument, i in compat.argument_positions(inputs).items():
        name = names[argument]
        g.rename_input(inputs[i], f"{name}_" if name in TAKEN else name)


def as_traced(
    gm: fx.GraphModule,
    token_dims: Mapping[fx.Node, int],
    axes: Mapping[str, tuple[fx.Node, Axis]] = MappingProxyType({}),
) -> Traced:
    """Find the symbols of a graph; raises `NotSplit` if tokens or requests cannot be told from other sizes."""
    token_dims, symbols = _rows_of_tokens(token_dims)
    if not all(symbol.is_Symbol for symbol in symbols):
        raise NotSplit(capture.SPECIALISED)
    numbers = [g.value(n) for n in g.inputs(gm.graph) if g.is_symbolic_number(n)]
    hints = {g.expression(number): int(number.node.hint) for number in numbers}
    num_tokens = max(hints.pop(s) for s in symbols)
    given = {node: placement_of(axis) for node, axis in axes.values() if is_given(axis)}
    return Traced(gm, token_dims, symbols, {TOKENS: num_tokens, **hints}, axes, given)


def _rows_of_tokens(token_dims: Mapping[fx.Node, int]) -> tuple[dict[fx.Node, int], tuple[sympy.Expr, ...]]:
    """The inputs that carry tokens, and the symbols that count these; the first input tells what tokens are.

    Left out are those that have a number for each pair of tokens, as masks have, and those whose rows count something
    else that was just as many in the call that was traced: the size of another dim of a token is no number of tokens.
    """
    rows: dict[fx.Node, int] = {}
    counts: dict[sympy.Expr, None] = {}
    others: set[sympy.Expr] = set()
    for node, dim in token_dims.items():
        sizes = [g.expression(size) for size in g.value(node).shape]
        count, beside = sizes.pop(dim), sizes
        if count not in counts and count in others:
            continue
        counts[count] = None
        if not any(size.has(*counts) for size in beside):
            rows[node] = dim
            others.update(beside)
    if not rows:
        name = next(iter(token_dims)).name
        raise NotSplit(f"{name} has another dim whose size is traced as the number of tokens: call it first "
                       "with a number of tokens that is no other size of the model")
    return rows, tuple(counts)


def signature_of(
    graph: fx.Graph, placed: TokenMap, tokens: Sequence[tuple[int, int, str]], traced: Traced, config: Config
) -> Signature:
    """What the engine knows of arguments and results; `tokens` has position, token dim and name of token inputs."""
    inputs = list(g.inputs(graph))
    written = dict.fromkeys(g.base(n) for m in g.body(graph) for n in g.written(m))
    symbol_inputs = g.symbol_inputs(graph)
    names = {inputs[i]: name for i, _, name in tokens}
    return Signature(
        token_inputs=tuple(TokenInput(*t, config.pad_values.get(t[2], 0)) for t in tokens),
        token_numbers=tuple(i for s, i in symbol_inputs.items() if s in traced.symbols),
        symbol_inputs={s: i for s, i in symbol_inputs.items() if s not in traced.symbols},
        written=tuple(i for i, n in enumerate(inputs) if n in written),
        output_dims=tuple(_token_dim(n, placed) for n in g.results(graph)),
        unpaddable=_why_not_padded(graph, placed, traced, names, config.pad_values),
        same_size=any(g.symbols_of(v) & {*traced.symbols} for n in g.body(graph) for v in _sent(n)),
        draws_random_numbers=any(map(draws_random_numbers, g.body(graph))),
        requests=_requests(graph, traced),
        whole_requests=bool(placed.whole_requests),
    )


def _requests(graph: fx.Graph, traced: Traced) -> RequestInputs | None:
    if not traced.given:
        return None
    position = {node: i for i, node in enumerate(g.inputs(graph))}
    axes = {name: (position[node], axis) for name, (node, axis) in traced.axes.items()}
    numbers = number_sources(graph, traced.given, traced.own)
    return RequestInputs(axes, numbers, fixed_sizes(graph, traced.given, traced.symbols))


def _token_dim(result: Any, placed: TokenMap) -> int | None:
    place = placed.places[result] if isinstance(result, fx.Node) else None
    return place.dim if isinstance(place, Split) else None


def _why_not_padded(
    graph: fx.Graph, placed: TokenMap, traced: Traced, names: Mapping[fx.Node, str], values: Mapping[str, Any]
) -> str:
    """Why rows of padding could change what is computed of the others; "" if they cannot. `names` are those of the
    inputs that carry tokens, `values` what some of them are padded with."""
    for node in g.inputs(graph):
        rows = g.symbols_of(g.value(node)) & {*traced.symbols}
        if rows and node not in traced.token_dims and not g.is_symbolic_number(node):
            return f"{node.name} has a row for each token, and only inputs that token_dims names are padded"
    for node in placed.wholes:
        return f"{node.name} ({origin.source_line(node)}) attends to all tokens, and would to padding"
    for node, why in placed.barriers.items():
        return f"{node.name} ({origin.source_line(node)}) sees all tokens at once: {why}"
    for node in g.results(graph):
        if isinstance(node, fx.Node) and g.is_symbolic_number(node) and g.symbols_of(g.value(node)) & {*traced.symbols}:
            return "it returns the number of tokens"
    for node in filter(partial(_writes_for_tokens, placed), g.body(graph)):
        sources = _sources(_places_read(node))
        says_where = [name for n, name in names.items() if n in sources]
        undirected = [name for name in says_where if name not in values]
        if undirected or not says_where:
            why = (f"; give pad_values for {', '.join(undirected)} that have it write where nobody reads"
                   if undirected else ", and no input of tokens says where")  # fmt: skip
            return f"{node.name} ({origin.source_line(node)}) writes a buffer of all tokens{why}"
    return ""


def _writes_for_tokens(placed: TokenMap, node: fx.Node) -> bool:
    """Whether an op writes something of its tokens to a buffer of all tokens."""
    written = g.written(node)
    return any(isinstance(placed.places[n], Shared) for n in written) and any(
        not isinstance(placed.places[n], Shared) for n in node.all_input_nodes
    )


def _places_read(node: fx.Node) -> list[fx.Node]:
    """The arguments that may say where an op writes: all integers that it reads, whatever it calls them."""
    read = [n for n in node.all_input_nodes if n not in g.written(node)]
    return [n for n in read if g.is_integer(n)]


def _sources(nodes: Sequence[fx.Node]) -> list[fx.Node]:
    """The inputs of the graph that values are made of."""
    found, todo = dict.fromkeys(nodes), list(nodes)
    while todo:
        new = [n for n in todo.pop().all_input_nodes if n not in found]
        found |= dict.fromkeys(new)
        todo += new
    return [n for n in found if n.op == "placeholder"]


def _sent(node: fx.Node) -> list[Any]:
    """What a collective sends and receives; nothing for other ops."""
    if comm_op(node.target) is None:
        return []
    return [v for v in map(g.value, (node, *node.all_input_nodes)) if isinstance(v, torch.Tensor)]
