"""Inputs of which every microbatch has a value of its own: the numbers among them, and where these come from."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Literal

import sympy
import torch
from torch import fx

from dbo_compile import graph as g
from dbo_compile.axes import Axis, request_dim
from dbo_compile.errors import NotSplit
from dbo_compile.ir.tokens import REQUESTS, Given


def given_numbers(
    graph: fx.Graph, given: Mapping[fx.Node, Given], symbols: Collection[sympy.Symbol]
) -> dict[fx.Node, Given]:
    """The inputs that hold a size of `given` tensors alone, numbers of requests say.

    Raises `NotSplit` if another input has the same size: nobody could tell whose it is.
    """
    own = {s for n in given for s in g.symbols_of(g.value(n))} - set(symbols)
    for node in g.inputs(graph):
        if not (node in given or g.is_symbolic_number(node)) and (both := g.symbols_of(g.value(node)) & own):
            size = min(both, key=str)
            raise NotSplit(f"{node.name} is traced with a size ({size}) that counts requests: call it first with a "
                           "number of requests that is no other size of the model")  # fmt: skip
    return {n: Given() for n in g.inputs(graph) if g.is_symbolic_number(n) and g.symbols_of(g.value(n)) & own}


def placement_of(axis: Axis) -> Given:
    """The placement of an input that is given; rows of requests are in their order."""
    return Given("" if request_dim(axis) is None else REQUESTS)


def fixed_sizes(
    graph: fx.Graph, given: Collection[fx.Node], symbols: Collection[sympy.Symbol] = ()
) -> dict[int, tuple[int | Literal["rows"] | None, ...]]:
    """The sizes of each of `given`, by position among the inputs, that code is made for; None for those that are
    symbols of their own, "rows" for those that were found to be the number of tokens (`symbols`), as in decode."""
    inputs = {i: g.value(n) for i, n in enumerate(g.inputs(graph)) if n in given}
    return {i: tuple(_fixed(s, symbols) for s in val.shape) for i, val in inputs.items()}


def _fixed(size: int | torch.SymInt, symbols: Collection[sympy.Symbol]) -> int | Literal["rows"] | None:
    return size if isinstance(size, int) else "rows" if g.expression(size) in symbols else None


def number_sources(
    graph: fx.Graph, given: Collection[fx.Node], numbers: Collection[fx.Node]
) -> dict[int, tuple[int, int]]:
    """For each of `numbers`, by position among the inputs, which `given` tensor has it as a size, and in which dim."""
    position = {n: i for i, n in enumerate(g.inputs(graph))}
    sizes = {g.expression(size): (position[n], d) for n in given for d, size in enumerate(g.value(n).shape)}
    for n in numbers:
        if g.expression(g.value(n)) not in sizes:
            raise NotSplit(f"{n.name} says how an input that tells of requests lies in memory: make it contiguous")
    return {position[n]: sizes[g.expression(g.value(n))] for n in numbers}
