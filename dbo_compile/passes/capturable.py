"""Why the programs of a graph cannot be captured as graphs of their device: known before anything runs."""

from __future__ import annotations

import torch
from torch import fx

from dbo_compile import graph as g
from dbo_compile import origin

EXCHANGES = (
    'exchange tokens with "dbo_static" or "dbo_device" of dbo_compile.integrations, which leave nothing to the host'
)


def why_not_captured(graph: fx.Graph) -> str:
    """The first op that a capture would not survive, with the user's line and what to do; "" if there is none.

    A read on the host would have to run while nothing runs, and what it decides (sizes, branches) would be frozen.
    """
    for node in g.body(graph):
        if g.reads_number(node) or g.copies_to_host(node):
            return f"{_named(node)} reads data of the device on the host; {EXCHANGES}"
        if g.has_tag(node, torch.Tag.cudagraph_unsafe):
            return f"{_named(node)} says of itself that it cannot be captured"
    return ""


def _named(node: fx.Node) -> str:
    line = origin.source_line(node)
    return f"{node.target} ({line})" if line else str(node.target)
