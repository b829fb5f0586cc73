"""The levels of a graph as text, for explanations and dumps."""

from __future__ import annotations

import operator

from torch import fx

from dbo_compile import origin
from dbo_compile.ir.tokens import Placement
from dbo_compile.levels import Levels


def captured_text(graph: fx.Graph) -> str:
    """The graph as Dynamo made it, with the user's lines."""
    return graph.python_code("self", verbose=True).src.strip() + "\n"


def segments_text(levels: Levels) -> str:
    """One line a segment: lane, how often it is played, its code, what it reads and makes."""
    lines = []
    for s in levels.outline.segments.values():
        times = f"x{levels.program.num_microbatches}" if s.per_microbatch else "x1"
        code = "" if s.code == s.name else f"  code of {s.code}"
        kind = "host" if s.host else s.lane.value
        lines.append(f"  {kind:8}{times:4}{s.name}({', '.join(s.inputs)}) -> {', '.join(s.outputs)}{code}")
    return "\n".join([*lines, ""])


def placements_text(levels: Levels) -> str:
    """The ATen graph, one line an op: where its tokens are, why it is a barrier, what it takes on trust."""
    nodes = [n for n in levels.graph.nodes if n.op != "output"]
    places = [_place(levels.tokens.places[n]) for n in nodes]
    wide = max(len(n.name) for n in nodes), max(map(len, places))
    return "".join(
        f"{n.name:{wide[0]}}  {place:{wide[1]}}  {_op(n)}{_remarks(levels, n)}".rstrip() + "\n"
        for n, place in zip(nodes, places, strict=True)
    )


def _place(place: Placement | tuple[Placement, ...]) -> str:
    return ", ".join(map(str, place)) if isinstance(place, tuple) else str(place)


def _op(node: fx.Node) -> str:
    """The op and what it reads; an argument of the graph is called that."""
    if node.op == "placeholder":
        return "argument"
    name = getattr(node.target, "__name__", "") if node.target is operator.getitem else str(node.target)
    return f"{name}({', '.join(n.name for n in node.all_input_nodes)})"


def _remarks(levels: Levels, node: fx.Node) -> str:
    remarks = []
    if node in levels.tokens.barriers:
        remarks.append(f"barrier: {levels.tokens.barriers[node]}")
    if node in levels.tokens.obligations:
        remarks.append(f"assumes that {levels.tokens.obligations[node]}")
    if not remarks:
        return ""
    return "  # " + "; ".join([*remarks, *([origin.source_line(node)] if origin.source_line(node) else [])])
