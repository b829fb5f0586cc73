"""Placement analysis: ATen graph to `TokenMap`, one walk over the graph, asking one rule per op.

An op whose rule refuses becomes a barrier: played once on all tokens. Rows in an order of their own (`Local`) cannot be
joined for it, so the ops that arranged them are played once as well, and the graph is walked again. Never changes
the graph.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from inspect import signature
from types import MappingProxyType
from typing import Any

import sympy
import torch
from torch import fx

from dbo_compile import graph as g
from dbo_compile.errors import CannotSplit, NotSplit
from dbo_compile.ir.tokens import (
    FRESH,
    TOKENS,
    Count,
    Function,
    Given,
    Local,
    Number,
    Placement,
    Ruling,
    Shared,
    Split,
    TokenMap,
    Value,
)
from dbo_compile.passes.attend import read_beyond
from dbo_compile.passes.causal import hides_later_tokens
from dbo_compile.passes.connected import Connected
from dbo_compile.passes.given import given_numbers
from dbo_compile.rules import rule_of
from dbo_compile.rules.registry import Rule, reads_whole

aten = torch.ops.aten
# Checks on numbers: they have no result, and each microbatch makes them on its own numbers.
CHECKS = frozenset({aten._assert_scalar.default, aten.sym_constrain_range_for_size.default})


def analyze(
    graph: fx.Graph,
    token_dims: Mapping[fx.Node, int],
    symbols: Collection[sympy.Symbol],
    whole: Mapping[fx.Node, str],
    given: Mapping[fx.Node, Given] = MappingProxyType({}),
) -> TokenMap:
    """Place every value of `graph`.

    `token_dims` says which inputs carry tokens, in which dim; `symbols` are the symbols that stand for their number.
    `whole` holds ops that are to be barriers whatever their rule says, each with the reason. `given` are the inputs of
    which each microbatch has a value of its own; the symbols in their sizes are such numbers, too.
    """
    whole = {**returned_views(graph), **whole}
    numbers = given_numbers(graph, given, symbols)
    while True:
        walk = _Walk(token_dims, dict.fromkeys(symbols, TOKENS), whole, {**given, **numbers})
        for node in graph.nodes:
            walk.visit(node)
        arrangers = walk.arrangers()
        if not arrangers.keys() - whole.keys():
            return walk.token_map()
        whole |= arrangers


def returned_views(graph: fx.Graph) -> dict[fx.Node, str]:
    """The ops that make views of arguments which the graph returns, each with the reason why they are played once.

    AOTAutograd hands out a view of the argument itself, and reads off our result how that lies in memory.
    """
    views: dict[fx.Node, str] = {}
    for node in filter(g.is_returned_view, g.body(graph)):
        while (g.viewed(node) and not g.written(node)) or node.target is operator.getitem:
            if node.target is not operator.getitem:
                views[node] = f"{node.name} is part of a result that is a view of an argument"
            node = g.flat(node.args)[0]
    return views


class _Walk:
    """One walk: the tables it fills, and which rows in an order of their own turn out to be needed whole."""

    def __init__(
        self,
        token_dims: Mapping[fx.Node, int],
        symbols: dict[sympy.Symbol, sympy.Symbol],
        whole: Mapping[fx.Node, str],
        given: Mapping[fx.Node, Given],
    ) -> None:
        self.token_dims = token_dims
        self.given = given
        self.symbols = symbols
        self.whole = whole
        self.places: dict[fx.Node, Placement | tuple[Placement, ...]] = {}
        self.barriers: dict[fx.Node, str] = {}
        self.obligations: dict[fx.Node, str] = {}
        self.localised: dict[fx.Node, None] = {}
        self.paged: dict[fx.Node, None] = {}
        self.whole_requests: dict[fx.Node, None] = {}
        self.prefixes: dict[fx.Node, tuple[fx.Node, ...]] = {}
        self.wholes: dict[fx.Node, tuple[fx.Node, ...]] = {}
        self.needed_whole: dict[fx.Node, str] = {}
        self.shared_numbers: set[sympy.Symbol] = set()  # read out of data that is the same for all microbatches
        self.region = Connected()

    def token_map(self) -> TokenMap:
        return TokenMap(
            self.places, self.barriers, self.obligations, self.localised, self.paged, self.whole_requests,
            self.prefixes, self.wholes,
        )  # fmt: skip

    def visit(self, node: fx.Node) -> None:
        if node.op == "placeholder":
            self.places[node] = self._input(node)
            return
        if node.op == "output":
            self._check_results(node)
            return
        self.region.join(node, self._local_inputs(node))
        self._refuse_writing_what_is_given(node)
        try:
            if node in self.whole:
                raise CannotSplit(self.whole[node])
            self.places[node] = self._place(node)
        except CannotSplit as why:
            self.barriers[node] = str(why)
            self.places[node] = self._from_shape(g.value(node))
            reason = f"{node.name} needs its result for all tokens at once, because {why}"
            self.needed_whole |= {n: reason for n in self._local_inputs(node)}

    def _input(self, node: fx.Node) -> Placement:
        if node in self.given:
            return self.given[node]
        if node in self.token_dims:
            return Split(self.token_dims[node])
        if g.is_symbolic_number(node):
            return Count() if self._expr(g.value(node)).has(TOKENS) else Shared()
        return Shared()

    def _place(self, node: fx.Node) -> Placement | tuple[Placement, ...]:
        if node.target is operator.getitem:
            made = self.places[node.args[0]]  # type: ignore[index]
            return made[node.args[1]] if isinstance(made, tuple) else made  # type: ignore[index]
        if g.is_symbolic_number(node) or node.target in CHECKS:
            return self._number_place(node)
        if all(isinstance(p, Shared) for n in node.all_input_nodes for p in _flat(self.places[n])):
            return Shared()
        if draws_random_numbers(node):
            raise CannotSplit("it draws random numbers: their order would depend on the split")
        return self._apply_rule(node)

    def _number_place(self, node: fx.Node) -> Placement:
        places = [self.places[n] for n in node.all_input_nodes]
        if any(isinstance(p, Split) for p in places) and node.target is not aten.sym_size.int:
            raise CannotSplit("it reads a number out of a tensor that has rows of tokens")
        if any(isinstance(p, Local | Given) for p in places):
            return Local(position=True)
        val = g.value(node)
        if g.is_symbolic_number(node):
            if self._expr(val).has(TOKENS):
                return Count()
            if g.reads_number(node):
                self.shared_numbers |= g.symbols_of(val)
            return Shared()
        if Count() in places and self.shared_numbers & g.symbols_of([g.value(n) for n in node.all_input_nodes]):
            raise CannotSplit("it checks the number of all tokens against one that is the same for all microbatches")
        return Count() if Count() in places else Shared()

    def _apply_rule(self, node: fx.Node) -> Placement | tuple[Placement, ...]:
        whole = [n for n in node.all_input_nodes if self._is_whole(n)]
        if whole and not reads_whole(node.target):
            raise CannotSplit(f"it reads {whole[0].name}, whose size counts the tokens of all microbatches")
        if (rule := rule_of(node.target)) is None:
            raise CannotSplit(f"{node.target} has no placement rule; teach it one with dbo_compile.register_rule")
        args, kwargs = g.map_nodes(node.args, self._argument), g.map_nodes(node.kwargs, self._argument)
        try:
            ruling = rule(*args, **kwargs)
        except TypeError:
            _check_fits(rule, node, args, kwargs)
            raise
        if not isinstance(ruling, Ruling):
            ruling = Ruling(ruling)
        self._note(node, ruling)
        if isinstance(ruling.place, tuple):
            return tuple(_named(p, node) for p in ruling.place)
        return _named(ruling.place, node)

    def _note(self, node: fx.Node, ruling: Ruling) -> None:
        if ruling.assumes and not g.is_vouched_for(node):
            self.obligations[node] = ruling.assumes
        if ruling.local_positions:
            self.localised[node] = None
        if ruling.paged:
            self.paged[node] = None
        if ruling.whole_requests:
            self.whole_requests[node] = None
        if ruling.prefix:
            self.prefixes[node] = read_beyond(node, ruling.prefix, self.places)
        if ruling.whole:
            self.wholes[node] = read_beyond(node, ruling.whole, self.places)

    def _is_whole(self, node: fx.Node) -> bool:
        """Whether a value is the same for all microbatches and yet has a size that counts tokens."""
        val = g.value(node)
        sizes = val.shape if isinstance(val, torch.Tensor) else ()
        return self.places[node] == Shared() and any(self._expr(s).has(TOKENS) for s in sizes)

    def _argument(self, node: fx.Node) -> Any:
        val, place = g.value(node), self.places[node]
        is_given = isinstance(place, Given)
        if isinstance(place, Given):
            is_integer = not (isinstance(val, torch.Tensor) and val.dtype.is_floating_point)
            place = Local(place.order, position=is_integer)
        if g.is_symbolic_number(node):
            assert not isinstance(place, tuple)
            return Number(self._expr(val), place)
        if isinstance(val, torch.Tensor):
            assert not isinstance(place, tuple)
            is_causal = self._is_whole(node) and hides_later_tokens(node, self.places)
            return Value(tuple(self._expr(s) for s in val.shape), place, val.dtype, is_causal, is_given)
        if (function := g.function(node)) is not None:
            return Function(frozenset(i for i, n in enumerate(g.inputs(function)) if n.users))
        raise CannotSplit(f"{node.name} is neither a tensor nor a number")

    def _refuse_writing_what_is_given(self, node: fx.Node) -> None:
        for written in map(g.base, g.written(node)):
            if isinstance(self.places.get(written), Given):
                raise NotSplit(f"it writes its input {written.name} in place, of which each microbatch has its own")

    def _expr(self, size: Any) -> sympy.Expr:
        return g.expression(size).xreplace(self.symbols)

    def _from_shape(self, val: Any) -> Placement | tuple[Placement, ...]:
        """Where a value that was made on all tokens can be split again: slicing is sound wherever rules agree to it."""
        if isinstance(val, list | tuple):
            return tuple(p for v in val for p in _flat(self._from_shape(v)))
        if not isinstance(val, torch.Tensor):
            return Shared()
        dims = [d for d, size in enumerate(val.shape) if _counts_tokens(self._expr(size))]
        return Split(dims[0]) if len(dims) == 1 else Shared()

    def _check_results(self, node: fx.Node) -> None:
        reason = "the graph returns rows of many tokens in an order of their own"
        self.needed_whole |= {n: reason for n in self._local_inputs(node)}

    def arrangers(self) -> dict[fx.Node, str]:
        """The ops that made rows `Local` which are needed for all tokens at once, each with the reason.

        What one exchange arranges, counts and sends belongs together: if some of it is needed whole, all of it is.
        """
        why = {self.region.find(n): reason for n, reason in self.needed_whole.items()}
        makers = [n for n, place in self.places.items() if _is_local(place) and not self._local_inputs(n)]
        return {n: why[root] for n in makers if (root := self.region.find(n)) in why}

    def _local_inputs(self, node: fx.Node) -> list[fx.Node]:
        return [n for n in node.all_input_nodes if _is_local(self.places[n])]


def _check_fits(rule: Rule, node: fx.Node, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Raise `TypeError`, with the arguments as the graph has them, if `rule` does not take what its op takes."""
    try:
        signature(rule).bind(*args, **kwargs)
    except TypeError as why:
        given = ", ".join([*map(str, node.args), *(f"{name}={value}" for name, value in node.kwargs.items())])
        raise TypeError(
            f"the rule of {node.target} cannot be called with the op's arguments ({given}): {why}"
        ) from None


def draws_random_numbers(node: fx.Node) -> bool:
    """By its tag; an op that may or may not (attention with dropout) has a rule, which refuses where it does."""
    return g.has_tag(node, torch.Tag.nondeterministic_seeded) and rule_of(node.target) is None


def _is_local(place: Placement | tuple[Placement, ...]) -> bool:
    return any(isinstance(p, Local) for p in _flat(place))


def _flat(place: Placement | tuple[Placement, ...]) -> tuple[Placement, ...]:
    return place if isinstance(place, tuple) else (place,)


def _named(place: Placement, node: fx.Node) -> Placement:
    return replace(place, order=node.name) if isinstance(place, Local) and place.order == FRESH else place


def _counts_tokens(size: sympy.Expr) -> bool:
    """Whether a size is k tokens' worth of rows, for some k."""
    return bool(size.has(TOKENS)) and not (size / TOKENS).has(TOKENS)
