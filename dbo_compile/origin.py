"""Where nodes come from: the module of the user's model, and the line of the user's code."""

from __future__ import annotations

import os
import re
from typing import Any

from torch import fx


def module_source(node: fx.Node) -> str:
    """The module that `node` comes from as Dynamo calls it, e.g. `L['self'].model.layers.0.mlp`; "" for none."""
    stack = node.meta.get("nn_module_stack")
    return str(list(stack.values())[-1][0]) if stack else ""


def restate(node: fx.Node, val: Any, source: str, target: str) -> None:
    """Say of a copy of a node from the module `source`, or from one inside of it, that it is from `target`, with `val`
    as its fake value."""
    node.meta["val"] = val
    stack = node.meta.get("nn_module_stack")
    if stack and source:
        moved = {key: (str(path).replace(source, target, 1), kind) for key, (path, kind) in stack.items()}
        node.meta["nn_module_stack"] = moved


def module_path(node: fx.Node) -> str:
    """The path of the module that `node` comes from, e.g. `model.layers.0.mlp`; "" for none."""
    return path_of(module_source(node))


def path_of(source: str) -> str:
    """What Dynamo calls a module, or what a module owns, as a path in the model: `model.layers.0.mlp.gate.weight`."""
    inside = re.sub(r"^[LG]\['\w+'\]\.?", "", source)  # what Dynamo calls the model depends on how it was called
    return re.sub(r"\.?_(?:modules|parameters|buffers)\['(\w+)'\]|\['?(\w+)'?\]", r".\1\2", inside).strip(".")


def source_line(node: fx.Node) -> str:
    """The user's line that `node` comes from: `file.py:12, code`; "" for none."""
    trace = [line.strip() for line in (node.meta.get("stack_trace") or "").splitlines() if line.strip()]
    frames = [i for i, line in enumerate(trace) if line.startswith("File ")]
    if not frames:
        return ""
    own = [i for i in frames if f"{os.sep}torch{os.sep}" not in trace[i]]  # `F.pad` is no line of the user's
    at = (own or frames)[-1]
    file, line = trace[at].removeprefix("File ").split(", ")[:2]
    code = trace[at + 1] if at + 1 < len(trace) else ""
    return f"{file.strip(chr(34))}:{line.removeprefix('line ')}, {code}"
