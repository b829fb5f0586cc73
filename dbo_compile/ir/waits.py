"""Which step waits for which on the other lane: the events of a program, as pairs of steps."""

from __future__ import annotations

from dataclasses import dataclass

from dbo_compile.ir.program import Program, Record, Run, Wait
from dbo_compile.ir.schedule import Lane, Step


@dataclass(frozen=True, slots=True)
class Handover:
    """`reader` starts after `maker`, which is played on the other lane."""

    maker: Step
    reader: Step

    def __str__(self) -> str:
        return f"{self.maker} -> {self.reader}"


def handovers(program: Program) -> tuple[Handover, ...]:
    """Each wait of `program`, in its order: from the last step before the event to the first step that waits."""
    last: dict[Lane, Step] = {}
    makers: dict[str, Step] = {}
    waiting: dict[Lane, list[Step]] = {lane: [] for lane in Lane}
    found: list[Handover] = []
    for instr in program.instrs:
        match instr:
            case Run():
                last[instr.lane] = step = Step(instr.segment, instr.microbatch)
                found += [Handover(maker, step) for maker in waiting[instr.lane]]
                waiting[instr.lane].clear()
            case Record() if instr.lane in last:
                makers[instr.event] = last[instr.lane]
            case Wait() if instr.event in makers:
                waiting[instr.lane].append(makers[instr.event])
            case _:
                pass
    return tuple(found)
