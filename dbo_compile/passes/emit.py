"""Emit: program to an FX graph again, the rewritten graph that dumps show and whose generated code runs.

One call per instruction. Segments are attributes of the module, called by name; everything else is a method of `lanes`,
the first argument, which knows the device: `lanes.switch_to_comm()`, `lanes.record('e3', 'compute')`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from dbo_compile import graph as g
from dbo_compile.ir.memory import bases
from dbo_compile.ir.program import Begin, End, Free, Instr, Join, Program, Record, Reg, Rows, Run, Slice, Wait, lane_of
from dbo_compile.ir.schedule import Lane, Step


def emit(program: Program, fns: Mapping[str, Callable[..., Any]], results: Sequence[Any]) -> fx.GraphModule:
    """The program as a module whose `forward(lanes, *args)` returns a tuple.

    `fns` has what to call for each code; `results` is what the caller gets: the values that the program ends with, by
    name and in their order, and constants. `steps` of the module tells which step a call of a segment plays, by the
    name of its node.
    """
    emitter = _Emitter(program)
    for instr in program.instrs:
        emitter.add(instr)
    emitter.end(results)
    root = torch.nn.Module()
    for name, fn in fns.items():
        object.__setattr__(root, name, fn)
    module = fx.GraphModule(root, emitter.graph, "Program")
    object.__setattr__(module, "steps", emitter.steps)
    return module


class _Emitter:
    def __init__(self, program: Program) -> None:
        self.program = program
        self.graph = fx.Graph()
        self.lanes = g.add_input(self.graph, "lanes")
        self.lane = Lane.COMPUTE
        self.regs: dict[Reg, fx.Node] = {}
        self.live: dict[Reg, None] = {}
        self.steps: dict[str, Step] = {}
        self.written = _written_memory(program)

    def add(self, instr: Instr) -> None:
        match instr:
            case Begin():
                for reg in instr.regs:
                    self._set(reg, g.add_input(self.graph, _name(reg)))
            case Rows():
                self._set_all(instr.outs, self._call("rows", instr.microbatch))
            case Slice() | Join() | Run():
                self._switch(lane_of(instr))
                self._make(instr)
            case Record() | Wait():
                method = "record" if isinstance(instr, Record) else "wait"
                self._call(method, instr.event, instr.lane.value, name=method)
            case Free():
                self._call("free", *(self.regs[r] for r in instr.regs), name="free")
                for reg in instr.regs:
                    del self.live[reg]
            case End():
                self._switch(Lane.COMPUTE)

    def _make(self, instr: Slice | Join | Run) -> None:
        match instr:
            case Slice(src, dim, microbatch, out):
                how = "view" if out in self.written else "slice"
                self._set(out, self._call(how, self.regs[src], dim, microbatch, name=_name(out)))
            case Join(srcs, dim, out):
                self._set(out, self._call("join", [self.regs[r] for r in srcs], dim, name=_name(out)))
            case Run():
                self._run(instr)

    def end(self, results: Sequence[Any]) -> None:
        """Keep to the end what the program has not freed, then return."""
        kept = [self.regs[r] for r in self.live if self.regs[r].op != "placeholder"]
        if kept:
            self._call("free", *kept, name="free")
        regs = iter(next(i.ins for i in self.program.instrs if isinstance(i, End)))
        self.graph.output(tuple(self.regs[next(regs)] if isinstance(r, str) else r for r in results))

    def _run(self, run: Run) -> None:
        segment = self.program.segments[run.segment]
        first = (self.lanes,) if run.lane is Lane.COMM else ()
        step = Step(run.segment, run.microbatch)
        args = (*first, *(self.regs[r] for r in run.ins))
        made = self.graph.create_node("call_module", segment.code, args, {}, _name(str(step)))
        self.steps[made.name] = step
        self._set_all(run.outs, made)

    def _switch(self, lane: Lane) -> None:
        if lane is not self.lane:
            self.lane = lane
            self._call(f"switch_to_{lane.value}", name=f"switch_to_{lane.value}")

    def _call(self, method: str, *args: Any, name: str | None = None) -> fx.Node:
        return self.graph.create_node("call_method", method, (self.lanes, *args), {}, name)

    def _set_all(self, regs: Sequence[Reg], made: fx.Node) -> None:
        for i, reg in enumerate(regs):
            self._set(reg, self.graph.create_node("call_function", operator.getitem, (made, i), {}, _name(reg)))

    def _set(self, reg: Reg, node: fx.Node) -> None:
        self.regs[reg] = node
        self.live[reg] = None


def _written_memory(program: Program) -> set[Reg]:
    """The registers, of any name, that share memory which some segment writes in place."""
    base = {reg: of for i in program.instrs for reg, of in bases(i, program.segments)}

    def root(reg: Reg) -> Reg:
        while reg in base:
            reg = base[reg]
        return reg

    roots = {root(w) for i in program.instrs if isinstance(i, Run) for w in i.writes}
    return roots | {reg for reg in base if root(reg) in roots}


def _name(reg: str) -> str:
    return reg.replace("#", "_")
