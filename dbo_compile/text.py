"""The levels of a graph as text, for explanations and dumps."""

from __future__ import annotations

from torch import fx

from dbo_compile import graph as g
from dbo_compile.report import Levels


def segments_text(levels: Levels) -> str:
    """One line a segment: lane, how often it is played, its code, what it reads and makes."""
    lines = []
    for s in levels.outline.segments.values():
        times = f"x{levels.program.num_microbatches}" if s.per_microbatch else "x1"
        code = "" if s.code == s.name else f"  code of {s.code}"
        kind = "host" if s.host else s.lane.value
        lines.append(f"  {kind:8}{times:4}{s.name}({', '.join(s.inputs)}) -> {', '.join(s.outputs)}{code}")
    return "\n".join(lines)


def placements_text(levels: Levels) -> str:
    """The ATen graph, one line an op: where its tokens are, why it is a barrier, what it takes on trust."""
    lines = []
    for node in levels.graph.nodes:
        if node.op == "output":
            continue
        place = levels.tokens.places[node]
        shown = ", ".join(map(str, place)) if isinstance(place, tuple) else str(place)
        lines.append(f"{node.name:40}{shown:24}{node.target}{_remarks(levels, node)}")
    return "\n".join(lines)


def _remarks(levels: Levels, node: fx.Node) -> str:
    remarks = []
    if node in levels.tokens.barriers:
        remarks.append(f"barrier: {levels.tokens.barriers[node]}")
    if node in levels.tokens.obligations:
        remarks.append(f"assumes that {levels.tokens.obligations[node]}")
    if not remarks:
        return ""
    return "  # " + "; ".join([*remarks, *([g.source_line(node)] if g.source_line(node) else [])])
