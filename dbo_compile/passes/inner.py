"""Inner compile: each distinct code once, with a symbolic number of rows in a shape environment of its own."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx
from tqdm import tqdm

from dbo_compile import compat
from dbo_compile import graph as g
from dbo_compile.ir.tokens import TOKENS
from dbo_compile.passes.blocks import attend_in_blocks, compiled_attention
from dbo_compile.passes.code import Code, Numbers
from dbo_compile.passes.cut import Kind


@dataclass(frozen=True, slots=True)
class Compiled:
    """What to call for a code, and what its compiler assumed of the numbers it is called with."""

    fn: Callable[..., Any]
    guards: tuple[sympy.Expr, ...]


def compile_codes(
    codes: Mapping[str, Code], hints: Callable[[str], Mapping[sympy.Symbol, int]], *, inner: str
) -> dict[str, Compiled]:
    """Compile every code; `hints` gives, for the name of one, the value of each symbol in the call that was traced.

    Collectives and reads on the host are never compiled. A progress bar shows on a terminal.
    """
    done: dict[str, Compiled] = {}
    compute = [c for c in codes.values() if c.kind is Kind.COMPUTE and inner == "inductor"]
    with tqdm(total=len(compute), desc="dbo: compiling segments", disable=not sys.stderr.isatty(), leave=False) as bar:
        for name, code in codes.items():
            if code in compute:
                bar.set_postfix_str(name)
                done[name] = _inductor(code, hints(name))
                bar.update()
            else:
                done[name] = Compiled(_plain(code, inner), ())
    return done


def _plain(code: Code, inner: str) -> Callable[..., Any]:
    """What to call for a code that is played as it is; `torch.compile` knows best how to compile FlexAttention."""
    if inner != "inductor" or not code.module.graph.find_nodes(op="call_function", target=attend_in_blocks):
        return code.module.forward
    own = copy.deepcopy(code.module.graph)
    for node in own.find_nodes(op="call_function", target=attend_in_blocks):
        node.target = compiled_attention()
    return fx.GraphModule(code.module, own).forward


def _inductor(code: Code, hints: Mapping[sympy.Symbol, int]) -> Compiled:
    backed = {s: hints[s] for s in code.numbers if s in hints}
    shapes = compat.SegmentShapes(backed, [s for s in code.numbers if s not in hints])
    inputs = [
        *(shapes.number(s) for s in code.numbers),
        *(shapes.tensor(a.sizes, a.strides, a.like) for a in code.tensors),
    ]
    # Constants are shared: they cannot be copied.
    own = compat.lazy_module(code.module, copy.deepcopy(code.module.graph))
    fn = compat.segment_inductor(own, inputs, shapes)
    return Compiled(fn, tuple(g for g in shapes.guards() if g.has(TOKENS)))


def compile_whole(
    gm: fx.GraphModule, token_symbols: Sequence[sympy.Symbol], hints: Mapping[sympy.Symbol, int]
) -> Compiled:
    """The graph as it was traced, compiled in one piece, as the user would have it without us.

    `hints` has the value of `TOKENS`, which stands for each of `token_symbols`, and of every other symbol.
    """
    numbers = Numbers(gm.graph, token_symbols)
    shapes = compat.SegmentShapes(hints, [])
    placeholders = g.inputs(gm.graph)
    inputs = [
        shapes.number(numbers.expr(val)) if g.is_symbolic_number(node) else _fake(shapes, numbers, val)
        for node, val in zip(placeholders, map(g.value, placeholders), strict=True)
    ]
    own = compat.lazy_module(gm, copy.deepcopy(gm.graph))
    fn = compat.whole_inductor(own, inputs, shapes)
    return Compiled(fn, tuple(guard for guard in shapes.guards() if guard.has(TOKENS)))


def _fake(shapes: compat.SegmentShapes, numbers: Numbers, val: torch.Tensor) -> torch.Tensor:
    sizes, strides = ([numbers.expr(d) for d in dims] for dims in (val.shape, val.stride()))
    return shapes.tensor(sizes, strides, val)
