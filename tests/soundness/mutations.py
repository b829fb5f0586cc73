"""Slips in a program or schedule that lose a wait, a record, memory or the order of collectives."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

from dbo_compile.errors import InvalidProgram, InvalidSchedule
from dbo_compile.ir.program import Free, Instr, Program, Record, Reg, Wait, reads
from dbo_compile.ir.proof import verify_program
from dbo_compile.ir.schedule import Schedule
from dbo_compile.ir.verify import verify_schedule


def accepted(program: Program, schedule: Schedule) -> tuple[int, list[str]]:
    """How many slips were tried, and those that the verifiers let pass."""
    let_pass, tried = [], 0
    for what, instrs in slips(program):
        tried += 1
        try:
            verify_program(replace(program, instrs=tuple(instrs)))
            let_pass.append(what)
        except InvalidProgram:
            pass
    for what, swapped in swaps(schedule):
        tried += 1
        try:
            verify_schedule(swapped)
            let_pass.append(what)
        except InvalidSchedule:
            pass
    return tried, let_pass


def slips(program: Program) -> Iterator[tuple[str, list[Instr]]]:
    """Every wait and record dropped, every register freed before its last reader."""
    instrs = list(program.instrs)
    for at, instr in enumerate(instrs):
        if isinstance(instr, Wait | Record):
            yield f"dropped: {instr}", instrs[:at] + instrs[at + 1 :]
        if isinstance(instr, Free):
            for reg in instr.regs:
                yield from _freed_early(instrs, at, reg)


def _freed_early(instrs: list[Instr], at: int, reg: Reg) -> Iterator[tuple[str, list[Instr]]]:
    readers = [i for i in range(at) if not isinstance(instrs[i], Free) and reg in reads(instrs[i])]
    if readers:
        freed = instrs[at]
        assert isinstance(freed, Free)
        others = [Free(tuple(r for r in freed.regs if r != reg))] if len(freed.regs) > 1 else []
        changed = [*instrs[:at], *others, *instrs[at + 1 :]]
        changed.insert(readers[-1], Free((reg,)))
        yield f"freed before its last reader: {reg}", changed


def swaps(schedule: Schedule) -> Iterator[tuple[str, Schedule]]:
    """Every two collectives of a process group that follow each other for one microbatch, swapped there."""
    groups = {name: s.group for name, s in schedule.segments.items() if s.group}
    for microbatch in range(schedule.num_microbatches):
        own = [s for s in schedule.steps if s.microbatch == microbatch and s.segment in groups]
        for first, second in pairwise(own):
            if groups[first.segment] == groups[second.segment]:
                swap = {first: second, second: first}
                steps = tuple(swap.get(s, s) for s in schedule.steps)
                yield f"swapped: {first}, {second}", replace(schedule, steps=steps)
