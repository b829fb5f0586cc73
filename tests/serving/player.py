"""Compiles a model with request metadata, level by level, and plays it: what the backend does, with nothing around."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from dbo_compile import capture, compat
from dbo_compile import graph as g
from dbo_compile.axes import Axis, Tokens, is_given
from dbo_compile.errors import NotSplit
from dbo_compile.ir.program import Program
from dbo_compile.ir.proof import verify_program
from dbo_compile.ir.schedule import Schedule
from dbo_compile.ir.verify import verify_schedule
from dbo_compile.passes.analyze import analyze
from dbo_compile.passes.cut import cut, unsplit_writes
from dbo_compile.passes.emit import emit
from dbo_compile.passes.given import fixed_sizes, given_numbers, number_sources, placement_of
from dbo_compile.passes.lower import lower
from dbo_compile.passes.order import order
from dbo_compile.passes.outline import outline
from dbo_compile.passes.sync import sync
from dbo_compile.runtime.given import RequestInputs
from dbo_compile.runtime.lanes import WorkLanes
from dbo_compile.runtime.requests import candidates, straddles


@dataclass
class Player:
    """A backend. `rows` fixes how the next calls are split; `graphs` has all that were compiled so far."""

    axes: dict[str, Axis]
    rows: tuple[int, ...] | None = None
    graphs: list[Graph] = field(default_factory=list)
    played: list[tuple[int, ...]] = field(default_factory=list)
    args: Any = None
    why: NotSplit | None = None

    def __call__(self, gm: Any, example_inputs: Any) -> Any:
        named = zip(map(capture._short_name, g.inputs(gm.graph)), example_inputs, strict=True)
        axes = {i: (name, self.axes[name]) for i, (name, x) in enumerate(named)
                if name in self.axes and isinstance(x, torch.Tensor)}  # fmt: skip

        def compile_aten(aten: Any, _: Any) -> Any:
            try:
                graph = Graph(aten, axes)
            except NotSplit as why:
                self.why = why
                return aten.forward
            self.graphs.append(graph)
            return lambda *args: self.play(graph, args)

        return compat.to_aten(gm, example_inputs, compile_aten)

    def check(self, fn: Any, *args: Any) -> None:
        """Raise why a call is not split."""
        fn(*args)
        if self.why is not None:
            raise self.why

    def play(self, graph: Graph, args: Any) -> Any:
        self.args, num_tokens = args, graph.num_tokens(args)
        table = graph.inputs.read(args, num_tokens)
        found = [self.rows] if self.rows else [*candidates(table, 2, whole=bool(graph.placed.whole_requests))]
        rows = found[0] if found else (num_tokens,)
        self.played.append(rows)
        return graph.play(rows, args, straddles=straddles(table, rows))


class Graph:
    """Every level of an ATen graph; `axes` has the name and the axis of arguments of the Dynamo graph."""

    def __init__(self, gm: Any, axes: dict[int, tuple[str, Axis]]) -> None:
        compat.reinplace(gm)
        nodes = g.inputs(gm.graph)
        position = compat.argument_positions(nodes)
        axes = {position[i]: named for i, named in axes.items() if i in position}
        self.token_dims = {i: axis.dim % g.value(nodes[i]).ndim for i, (_, axis) in axes.items()
                           if isinstance(axis, Tokens)}  # fmt: skip
        symbols = dict.fromkeys(g.expression(g.value(nodes[i]).shape[d]) for i, d in self.token_dims.items())
        if not all(s.is_Symbol for s in symbols):
            raise NotSplit(capture.SPECIALISED)
        given = {nodes[i]: placement_of(axis) for i, (_, axis) in axes.items() if is_given(axis)}
        numbers = number_sources(gm.graph, given, given_numbers(gm.graph, given, symbols))
        by_name = {name: (i, axis) for i, (name, axis) in axes.items()}
        self.inputs = RequestInputs(by_name, numbers, fixed_sizes(gm.graph, given))
        self.placed = analyze(gm.graph, {nodes[i]: d for i, d in self.token_dims.items()}, symbols, {}, given)
        self.segments = outline(gm, cut(gm.graph, self.placed), self.placed, symbols)
        self.fns = {name: code.module.forward for name, code in self.segments.codes.items()}
        ways = [(1, True), *((n, straddles) for n in (2, 3) for straddles in (True, False))]
        self.programs = {way: self.program(self.schedule(*way), straddles=way[1]) for way in ways}
        self.modules = {way: emit(p, self.fns, self.segments.outputs) for way, p in self.programs.items()}

    def num_tokens(self, args: Any) -> int:
        return next(args[i].shape[dim] for i, dim in self.token_dims.items())

    def play(self, rows: tuple[int, ...], args: Any, *, straddles: bool) -> Any:
        n = len(rows)
        more = self.inputs.given(args, self.inputs.read(args, sum(rows)), rows) if n > 1 else ()
        with WorkLanes(rows) as lanes:
            return self.modules[n, n == 1 or straddles](lanes, *args, *more)

    def schedule(self, n: int, straddles: bool = True, policy: str = "list") -> Schedule:
        threaded = {name for name, group in self.segments.groups.items()
                    if unsplit_writes(group, self.placed, straddles=straddles)}  # fmt: skip
        schedule = order(self.segments.segments, n, policy, threaded=frozenset(threaded))
        verify_schedule(schedule)
        return schedule

    def program(self, schedule: Schedule, *, straddles: bool = True) -> Program:
        results = [name for name in self.segments.outputs if isinstance(name, str)]
        instrs = lower(schedule, self.segments.places, self.segments.inputs, results)
        segments = self.segments.segments
        program = Program(sync(instrs, segments), segments, schedule.num_microbatches, straddles)
        verify_program(program)
        return program


def symbolic(*dims: tuple[torch.Tensor, int]) -> None:
    """Ask Dynamo for symbols, each its own."""
    for tensor, dim in dims:
        torch._dynamo.mark_dynamic(tensor, dim)
