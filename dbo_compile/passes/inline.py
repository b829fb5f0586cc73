"""Inline: what `torch.compiler.nested_compile_region` keeps apart becomes part of the graph, once for each call of it.

PyTorch traces such a region once, however many layers a model has. Tokens are placed, and microbatches scheduled, over
the whole graph, so here each call gets nodes of its own, and its own symbols for the numbers that it reads out of data.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import sympy
import torch
from torch import fx

from dbo_compile import compat, origin
from dbo_compile import graph as g
from dbo_compile.errors import NotSplit

CALL = torch.ops.higher_order.invoke_subgraph
COPY = torch.ops.aten.copy_.default


@dataclass(frozen=True, slots=True)
class _Call:
    """A call of the region that `module` is, and what it reads.

    Its results are those of the region, then each argument that it writes in place (`written`) as it is afterwards.
    """

    node: fx.Node
    module: fx.Node
    args: Sequence[Any]
    written: Sequence[int] = ()


def inline_regions(gm: fx.GraphModule) -> None:
    """Put the nodes of every nested compile region in place of each call of it, those of regions inside of it, too.

    Raises `NotSplit` for a region that writes a part of one of its arguments in place.
    """
    homes: dict[str, str] = {}
    while nodes := [node for node in gm.graph.nodes if _calls_region(node)]:
        for node in nodes:
            _inline(gm, _call(node), homes)
    if homes and compat.updates_inputs(gm):
        compat.retrace_values(gm)  # whether memory is shared decides what is updated in place


def _calls_region(node: fx.Node) -> bool:
    return node.target is CALL or (compat.is_functionalized(node) and cast("Any", node.args[0]) is CALL)


def _call(node: fx.Node) -> _Call:
    if node.target is CALL:
        module, _, *args = cast("list[Any]", node.args)
        return _Call(node, module, args)
    kwargs = cast("dict[str, Any]", node.kwargs)
    bases = kwargs["_all_bases"]
    args, position = [], {}
    while (name := f"arg{len(args)}") in kwargs or f"_{name}_base_index" in kwargs:
        if name not in kwargs:
            position[kwargs[f"_{name}_base_index"]] = len(args)
        args.append(kwargs[name] if name in kwargs else bases[kwargs[f"_{name}_base_index"]])
    parts = [key for key in kwargs if key.startswith("_arg") and not key.endswith("_base_index")]
    if parts or any(args.count(base) != 1 for base in bases):
        raise NotSplit(f"a nested compile region writes a part of its argument in place ({origin.source_line(node)})")
    return _Call(node, kwargs["subgraph"], args, [position[i] for i in range(len(bases))])


def _inline(gm: fx.GraphModule, call: _Call, homes: dict[str, str]) -> None:
    """`homes` has the module that each region was traced in, by the name of the region."""
    name, here = str(call.module.target), origin.module_source(call.node)
    home, region = homes.setdefault(name, here), getattr(gm, name)
    inputs, nodes = g.inputs(region.graph), list(g.body(region.graph))
    numbers = compat.OtherNumbers(_symbols(nodes) - _symbols(inputs))
    new: dict[fx.Node, Any] = dict(zip(inputs, call.args, strict=True))
    with gm.graph.inserting_before(call.node):
        for node in nodes:
            if node.target is COPY and node.args[0] in inputs:
                new[cast("fx.Node", node.args[0])] = new[cast("fx.Node", node.args[1])]
                continue
            new[node] = copied = gm.graph.node_copy(node, new.__getitem__)
            origin.restate(copied, numbers.value(g.value(node)), home, here)
            if node.op == "get_attr":
                copied.target = f"{name}_{node.target}"
                setattr(gm, copied.target, getattr(region, str(node.target)))
    results = [*(new.get(r, r) for r in g.results(region.graph)), *(new[inputs[i]] for i in call.written)]
    for part in list(call.node.users):  # each takes one of the results out of the tuple
        part.replace_all_uses_with(results[cast("int", part.args[1])])
        gm.graph.erase_node(part)
    held = [n for n in call.node.all_input_nodes if n.op == "get_attr"]
    gm.graph.erase_node(call.node)
    for node in held:  # the region itself, and what describes it
        if not node.users:
            gm.graph.erase_node(node)


def _symbols(nodes: Iterable[fx.Node]) -> set[sympy.Symbol]:
    return {symbol for node in nodes for symbol in g.symbols_of(g.value(node))}
