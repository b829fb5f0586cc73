"""The rewritten graph as a Python file that runs: the code of every segment, the program, and `run(rows, *args)`."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import fx

from dbo_compile import graph as g
from dbo_compile.axes import Axis
from dbo_compile.levels import Levels
from dbo_compile.runtime.given import RequestInputs

HEADER = '''"""The rewritten graph: {segments} segments of which {codes} differ, {microbatches} microbatches.

`run(rows, *args)` plays it on the ops that PyTorch has, not on those that Inductor made of them. `rows` has the number
of tokens of each microbatch, e.g. {rows}; `args` are, in this order:
{args}
A model that communicates needs its process groups; ops that are not PyTorch's own need the module that registers them.
"""

from pathlib import Path

{imports}
from dbo_compile.runtime.lanes import WorkLanes
{constants}'''
CONSTANTS = '''
constants = torch.load(Path(__file__).with_name("{name}"), weights_only=True)
'''
FOOTER = '''


def run(rows, *args):
    with WorkLanes(rows) as lanes:
        return Program().forward(lanes, *args)
'''
FOOTER_WITH_REQUESTS = '''


requests = RequestInputs(
    axes={axes},
    numbers={numbers},
    sizes={sizes},
)


def run(rows, *args):
    given = requests.given(args, requests.read(args, sum(rows)), rows)
    with WorkLanes(rows) as lanes:
        return Program().forward(lanes, *args, *given)
'''


@dataclass(frozen=True, slots=True)
class Runnable:
    """The text of the file, and the tensors that its code holds, as a file that it reads; b"" if it holds none."""

    text: str
    constants: bytes


def runnable(levels: Levels, requests: RequestInputs | None, constants_name: str) -> Runnable:
    """The rewritten graph of `levels`; the file of constants lies beside it and is called `constants_name`. Where the
    graph is told of `requests`, the file makes of them what each microbatch is told."""
    writer = _Writer()
    segments = levels.outline.segments.values()
    codes = [
        f"# {', '.join(s.name for s in segments if s.code == name)}\n{writer.code(f'Code_{name}', code.module)}"
        for name, code in levels.outline.codes.items()
    ]
    program = writer.program(levels)
    footer = writer.footer(requests)
    n = levels.program.num_microbatches
    header = HEADER.format(
        segments=len(levels.outline.segments),
        codes=len(levels.outline.codes),
        microbatches=n,
        rows=list(range(n + 2, 2, -1)),
        args="\n".join(f"    {line}" for line in _inputs(levels.graph)),
        imports="\n".join(sorted({"import torch", *writer.imports_of([*codes, program, footer])})),
        constants=CONSTANTS.format(name=constants_name) if writer.constants else "",
    )
    return Runnable("\n\n\n".join([header, *codes, program]) + footer, _saved(writer.constants))


def _inputs(graph: fx.Graph) -> Iterator[str]:
    for node in g.inputs(graph):
        val = g.value(node)
        sizes = f"{str(val.dtype).removeprefix('torch.')}{list(val.shape)}" if isinstance(val, torch.Tensor) else val
        yield f"{node.name}: {sizes}"


def _saved(constants: Mapping[str, torch.Tensor]) -> bytes:
    if not constants:
        return b""
    file = io.BytesIO()
    torch.save(dict(constants), file)
    return file.getvalue()


class _Writer:
    def __init__(self) -> None:
        self.imports: dict[str, str] = {}
        self.constants: dict[str, torch.Tensor] = {}

    def code(self, name: str, module: fx.GraphModule) -> str:
        """A class with the forward of `module`; what that holds are attributes of the class."""
        attributes, inner = [], []
        for target in dict.fromkeys(str(n.target) for n in module.graph.nodes if n.op == "get_attr"):
            held = getattr(module, target)
            if isinstance(held, fx.GraphModule):
                inner.append(self.code(f"{name}_{target}", held))
                attributes.append(f"    {target} = {name}_{target}().forward")
            else:
                key = f"{name}.{target}"
                self.constants[key] = held.detach()
                attributes.append(f"    {target} = constants[{key!r}]")
        return "\n\n".join([*inner, "\n".join([f"class {name}:", *attributes, *self._forward(module)])])

    def program(self, levels: Levels) -> str:
        attributes = [f"    {name} = Code_{name}().forward" for name in levels.outline.codes]
        return "\n".join(["class Program:", *attributes, *self._forward(levels.module)])

    def footer(self, requests: RequestInputs | None) -> str:
        if requests is None:
            return FOOTER
        self.imports["RequestInputs"] = _import("RequestInputs", RequestInputs)
        axes = "".join(f"\n        {name!r}: ({i}, {self._axis(axis)})," for name, (i, axis) in requests.axes.items())
        numbers, sizes = dict(requests.numbers), dict(requests.sizes)
        return FOOTER_WITH_REQUESTS.format(axes=f"{{{axes}\n    }}", numbers=numbers, sizes=sizes)

    def _axis(self, axis: Axis) -> str:
        """What makes an axis, as text; a function of the user's that has no name to import it by is left out."""
        if not callable(axis):
            name = type(axis).__name__
            self.imports[name] = _import(name, type(axis))
            return repr(axis)
        name = getattr(axis, "__qualname__", "<object>")
        if not name.isidentifier() or axis.__module__ == "__main__":
            return f"None  # put {name} of token_dims here\n       "
        self.imports[name] = _import(name, axis)
        return name

    def imports_of(self, texts: Sequence[str]) -> list[str]:
        """The statements for those names that some text has: generated code may use more than it does."""
        used = {word for text in texts for word in re.findall(r"\w+", text)}
        return [statement for name, statement in self.imports.items() if name in used]

    def _forward(self, module: fx.GraphModule) -> list[str]:
        code = module.graph.python_code("self")
        for name, value in code.globals.items():
            self.imports[name] = _import(name, value)
        lines = code.src.strip().splitlines()
        return ["", *(f"    {line}".rstrip() for line in lines)]


def _import(name: str, value: Any) -> str:
    """The statement that gives a name of generated code the value that it has there."""
    if isinstance(value, ModuleType):
        return f"import {value.__name__}" if name == value.__name__ else f"import {value.__name__} as {name}"
    if isinstance(value, float):
        return f"{name} = float({str(value)!r})"
    home, _, own = f"{value.__module__}.{value.__qualname__}".rpartition(".")
    return f"{name} = type(None)" if value is type(None) else f"from {home} import {own} as {name}"
