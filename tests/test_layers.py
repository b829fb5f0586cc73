"""Who may know what: imports go down, and private PyTorch, FX and its metadata each stay in their rooms."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "dbo_compile"

FLOORS = (
    ("errors", "axes", "trust"),
    ("kinds", "log", "files", "advice"),
    ("config",),
    ("ir",),
    ("compat",),
    ("rules", "graph", "origin"),
    ("passes", "runtime"),
    ("capture", "levels"),
    ("arguments",),
    ("compilation",),
    ("report", "chart"),
    ("text", "trace", "runnable", "measure", "page", "overview"),
    ("dump",),
    ("backend",),
    ("decorated",),
    ("explanation", "debugging", "decorator", "integrations"),
    ("demo", "subject", "example", "doctor"),
    ("bench",),
    ("cli",),
    ("__init__",),
    ("__main__",),
)
"""From the ground up. A room may import itself and the floors below, never a neighbour."""

FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
RUNTIME_NEVER_IMPORTS = ("passes", "rules", "graph", "origin")
READS_METADATA = ("graph.py", "origin.py")
WITHOUT_FX = ("ir", "runtime")
KNOWS_FX_ALL_THE_SAME = ("ir/tokens.py",)
MAKES_NODES = ("passes/emit.py", "passes/code.py", "passes/layout.py", "passes/attend.py")
NODE_MAKERS = ("create_node", "call_function", "call_module", "call_method")


@dataclass(frozen=True)
class Source:
    """The text of a module of the package; `path` is relative to the package."""

    path: str
    text: str

    @property
    def room(self) -> str:
        return self.path.split("/")[0].removesuffix(".py")

    @cached_property
    def nodes(self) -> list[ast.AST]:
        return list(ast.walk(ast.parse(self.text)))

    @cached_property
    def imports(self) -> list[tuple[ast.AST, str, str]]:
        """Each import: the statement, the name here, the full name of what is imported."""
        found = []
        for node in self.nodes:
            if isinstance(node, ast.Import | ast.ImportFrom):
                origin = f"{'.' * node.level}{node.module or ''}." if isinstance(node, ast.ImportFrom) else ""
                found += [(node, alias.asname or alias.name, origin + alias.name) for alias in node.names]
        return found

    @cached_property
    def names(self) -> list[tuple[ast.AST, str]]:
        """Every import, and every dotted name, in full: `dist._x` too."""
        full = {here: name for _, here, name in self.imports}
        dotted = [(node, *_dotted(node).partition(".")) for node in self.nodes if isinstance(node, ast.Attribute)]
        return [
            *((node, name) for node, _, name in self.imports),
            *((node, f"{full.get(first, first)}.{rest}") for node, first, _, rest in dotted),
        ]


def _dotted(node: ast.AST) -> str:
    match node:
        case ast.Name(): return node.id
        case ast.Attribute() if head := _dotted(node.value): return f"{head}.{node.attr}"
        case _: return ""


def upward_imports(source: Source) -> Iterator[tuple[ast.AST, str]]:
    top = len(FLOORS)
    for node, _, name in source.imports:
        package, _, inside = name.partition(".")
        room = inside.split(".")[0]
        if name.startswith("."):
            yield node, f"imports {name}: imports are absolute"
        elif package != "dbo_compile" or room == source.room:
            continue
        elif FLOOR_OF.get(room, top) >= FLOOR_OF[source.room]:
            yield node, f"{source.room} may not import {name}: it is not on a floor below"
        elif source.room == "runtime" and room in RUNTIME_NEVER_IMPORTS:
            yield node, f"runtime may not import {name}: programs play without a graph"


def private_names(source: Source) -> Iterator[tuple[ast.AST, str]]:
    """`torch.ops._c10d_functional` is how an operator is called, no private API."""
    if source.room == "compat":
        return
    for node, name in source.names:
        if private := re.match(r"torch\.(?!ops\.)(?:\w+\.)*?_(?!_)\w*", name):
            yield node, f"{private[0]} is private to PyTorch: ask compat"


def fx_names(source: Source) -> Iterator[tuple[ast.AST, str]]:
    if source.room not in WITHOUT_FX or source.path in KNOWS_FX_ALL_THE_SAME:
        return
    for node, name in source.names:
        if f"{name}.".startswith("torch.fx."):
            yield node, f"{source.room} knows nothing of FX, and so not {name}"


def metadata(source: Source) -> Iterator[tuple[ast.AST, str]]:
    if source.path in READS_METADATA or source.room == "compat":  # PyTorch's keys are private to it
        return
    for node in source.nodes:
        if isinstance(node, ast.Attribute) and node.attr == "meta":
            yield node, "reads or writes the metadata of a node: ask graph"
    for node, name in source.names:
        if name in ("torch.fx.node.Argument", "torch.fx.Argument"):
            yield node, f"{name}: ask graph"


def made_nodes(source: Source) -> Iterator[tuple[ast.AST, str]]:
    if source.path in MAKES_NODES:
        return
    for node in source.nodes:
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in NODE_MAKERS:
            yield node, f"makes a node by {node.func.attr}: only {', '.join(MAKES_NODES)} do"


def breaches(source: Source) -> list[str]:
    """What a module does that it may not, each as `path:line what`, once for each line."""
    if source.room not in FLOOR_OF:
        return [f"{source.path}: give this room a floor in {Path(__file__).name}"]
    checks = (upward_imports, private_names, fx_names, metadata, made_nodes)
    found = [(node.lineno, what) for check in checks for node, what in check(source)]
    return [f"{source.path}:{line} {what}" for line, what in dict.fromkeys(found)]


@pytest.mark.parametrize("path", sorted(p.relative_to(PACKAGE).as_posix() for p in PACKAGE.rglob("*.py")))
def test_every_module_keeps_to_its_floor(path):
    assert breaches(Source(path, (PACKAGE / path).read_text())) == []


UP = "it is not on a floor below"

BAD = [
    ("ir/x.py", "from dbo_compile.passes.cut import cut", f"ir may not import dbo_compile.passes.cut.cut: {UP}"),
    ("ir/x.py", "import dbo_compile.backend", f"ir may not import dbo_compile.backend: {UP}"),
    ("ir/x.py", "import dbo_compile.backend as b", f"ir may not import dbo_compile.backend: {UP}"),
    ("rules/x.py", "from dbo_compile import graph as g", f"rules may not import dbo_compile.graph: {UP}"),
    ("errors.py", "from dbo_compile.config import Config", f"errors may not import dbo_compile.config.Config: {UP}"),
    ("passes/x.py", "from dbo_compile.runtime import a", f"passes may not import dbo_compile.runtime.a: {UP}"),
    ("passes/x.py", "import dbo_compile", f"passes may not import dbo_compile: {UP}"),
    ("passes/x.py", "from dbo_compile import Config", f"passes may not import dbo_compile.Config: {UP}"),
    ("backend.py", "def f():\n    from dbo_compile import cli", f"backend may not import dbo_compile.cli: {UP}"),
    ("passes/x.py", "from .cut import cut", "imports .cut.cut: imports are absolute"),
    ("passes/x.py", "from .. import graph", "imports ...graph: imports are absolute"),
    (
        "runtime/x.py",
        "from dbo_compile import graph",
        "runtime may not import dbo_compile.graph: programs play without a graph",
    ),
    (
        "runtime/x.py",
        "from dbo_compile.rules.view import view",
        "runtime may not import dbo_compile.rules.view.view: programs play without a graph",
    ),
    ("graph.py", "import torch._dynamo", "torch._dynamo is private to PyTorch: ask compat"),
    ("graph.py", "from torch._guards import tracing", "torch._guards is private to PyTorch: ask compat"),
    ("graph.py", "from torch import _ops", "torch._ops is private to PyTorch: ask compat"),
    ("graph.py", "import torch\ntorch._check(x > 3)", "torch._check is private to PyTorch: ask compat"),
    (
        "graph.py",
        "import torch.distributed as dist\ndist._functional_collectives",
        "torch.distributed._functional_collectives is private to PyTorch: ask compat",
    ),
    ("runtime/x.py", "from torch import fx", "runtime knows nothing of FX, and so not torch.fx"),
    ("runtime/x.py", "from torch.fx import Node", "runtime knows nothing of FX, and so not torch.fx.Node"),
    ("ir/x.py", "import torch\nx: torch.fx.Node", "ir knows nothing of FX, and so not torch.fx.Node"),
    ("passes/x.py", "node.meta['val']", "reads or writes the metadata of a node: ask graph"),
    ("passes/x.py", "graph.nodes[3].meta = {}", "reads or writes the metadata of a node: ask graph"),
    ("passes/x.py", "from torch.fx.node import Argument", "torch.fx.node.Argument: ask graph"),
    (
        "passes/analyze.py",
        "graph.call_function(add, (a, b))",
        "makes a node by call_function: only passes/emit.py, passes/code.py, passes/layout.py, passes/attend.py do",
    ),
]


@pytest.mark.parametrize(("path", "text", "what"), BAD)
def test_a_breach_is_found_and_named(path, text, what):
    where = f"{path}:{text.count(chr(10)) + 1} "
    assert where + what in breaches(Source(path, text))


GOOD = [
    ("compat/dynamo.py", "import torch._dynamo\nfrom torch._guards import tracing"),
    ("ir/tokens.py", "from torch import fx\nplaces: fx.Node"),
    ("ir/x.py", "import torch\nfrom dbo_compile.errors import DboError\nfrom dbo_compile.ir.program import Run"),
    ("rules/x.py", "import torch\ntorch.ops._c10d_functional.wait_tensor.default\ntorch.__version__"),
    ("runtime/x.py", "from dbo_compile import compat\nfrom dbo_compile.config import Config\nself._lanes"),
    ("graph.py", "node.meta['val']"),
    ("passes/emit.py", "graph.call_function(add, (a, b))"),
    ("backend.py", "import dbo_compile.passes.cut\nfrom dbo_compile import capture, compat"),
]


@pytest.mark.parametrize(("path", "text"), GOOD)
def test_what_is_allowed_is_not_found(path, text):
    assert breaches(Source(path, text)) == []


def test_a_room_that_has_no_floor_is_found():
    assert breaches(Source("attic/x.py", "")) == ["attic/x.py: give this room a floor in test_layers.py"]


def test_a_planted_module_is_found(tmp_path):
    planted = tmp_path / "ir" / "planted.py"
    planted.parent.mkdir()
    planted.write_text('"""Planted."""\n\nfrom dbo_compile.backend import dbo\n')
    source = Source(planted.relative_to(tmp_path).as_posix(), planted.read_text())
    assert breaches(source) == [f"ir/planted.py:3 ir may not import dbo_compile.backend.dbo: {UP}"]
