"""Attention of a microbatch to rows of other ones too, of earlier or of all: what it reads, and which op does it."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from dbo_compile import graph as g
from dbo_compile.errors import CannotSplit
from dbo_compile.ir.tokens import Places, Split
from dbo_compile.passes.blocks import FLEX, attend_in_blocks
from dbo_compile.passes.layout import laid_out, order_of

aten = torch.ops.aten

ALIGNED_RIGHT = frozenset({aten._scaled_dot_product_flash_attention.default})
"""Ops whose causal mask lets the last query see the last key already; that of all others begins at the upper left."""
MASKS = ("attn_mask", "attn_bias")


def read_beyond(node: fx.Node, positions: Sequence[int], places: Places) -> tuple[fx.Node, ...]:
    """The arguments, at these positions or in lists there, of which `node` reads rows of other microbatches as well."""
    read = g.flat([node.args[i] for i in positions])
    found = tuple(dict.fromkeys(n for n in read if isinstance(n, fx.Node) and isinstance(places[n], Split)))
    if any(arg in found for i, arg in enumerate(node.args) if i not in positions):
        raise CannotSplit("it attends from rows to those same rows")
    if any(user.target is operator.getitem and user.args[1] != 0 and user.users for user in node.users):
        raise CannotSplit("more than its output is read")
    return found


def attend_to_prefix(
    graph: fx.Graph, node: fx.Node, args: Mapping[str, Any], rows: Any, before: Any, keys: Any
) -> fx.Node:
    """The first result of causal attention `node`, for `rows` queries behind `before` others, to `keys` rows of keys.

    `args` are those of `node` in `graph`, by name. The result lies in memory as it did when it was traced.
    """
    if node.target in ALIGNED_RIGHT:
        made = graph.call_function(node.target, (), dict(args))
        return graph.call_function(operator.getitem, (made, 0))
    query, key = (g.value(node.args[i]) for i in (0, 1))  # type: ignore[arg-type]
    if masks := _rows_of_mask(graph, args, rows, before):
        (mask,) = masks.values()
        seen = graph.call_function(aten.narrow.default, (mask, -1, 0, keys))
    else:
        seen = graph.call_function(aten.ones.default, ([rows, keys],), {"dtype": torch.bool, "device": query.device})
        seen = graph.call_function(aten.tril.default, (seen, before))
    out = graph.call_function(
        aten.scaled_dot_product_attention.default,
        (args["query"], args["key"], args["value"], seen),
        {"scale": args.get("scale"), "enable_gqa": query.shape[1] != key.shape[1]},
    )
    made = g.value(node)
    return laid_out(graph, out, order_of(made[0] if isinstance(made, tuple | list) else made))


def attend_to_all(
    graph: fx.Graph, node: fx.Node, args: tuple[Any, ...], kwargs: Mapping[str, Any], rows: Any, before: Any
) -> fx.Node:
    """The first result of attention `node` for `rows` queries behind `before` others, to all keys; `args` and `kwargs`
    are those in `graph`."""
    if node.target is FLEX:
        return graph.call_function(attend_in_blocks, (before, *args), dict(kwargs))
    named = g.named_args(node, args, kwargs)
    made = graph.create_node(node.op, node.target, (), {**named, **_rows_of_mask(graph, named, rows, before)})
    return graph.call_function(operator.getitem, (made, 0)) if isinstance(g.value(node), tuple | list) else made


def _rows_of_mask(graph: fx.Graph, args: Mapping[str, Any], rows: Any, before: Any) -> dict[str, fx.Node]:
    """The rows of the queries of a mask over all tokens, by the name of that argument; empty if there is none."""
    masks = {name: args[name] for name in MASKS if args.get(name) is not None}
    return {name: graph.call_function(aten.narrow.default, (m, -2, before, rows)) for name, m in masks.items()}
