"""Which step must come before which: the events between the lanes of a program, and its caches, as pairs of steps."""

from __future__ import annotations

from dataclasses import dataclass

from dbo_compile.ir.program import Program, Record, Run, Wait
from dbo_compile.ir.schedule import Lane, Step


@dataclass(frozen=True, slots=True)
class Handover:
    """`reader` starts after `maker`."""

    maker: Step
    reader: Step

    def __str__(self) -> str:
        return f"{self.maker} -> {self.reader}"


def handovers(program: Program) -> tuple[Handover, ...]:
    """Each wait of `program` for its other lane, in its order: from the last step before the event to the first step
    that waits."""
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


def carried(program: Program) -> tuple[Handover, ...]:
    """Where a request has tokens in two microbatches: from the step that writes the first ones to a cache, to that of
    the next microbatch, which attends to them. One lane plays both, so there is no event."""
    writers = [s.name for s in program.segments.values() if s.paged and s.per_microbatch and program.straddles]
    microbatches = range(program.num_microbatches)
    return tuple(Handover(Step(s, m), Step(s, m + 1)) for s in writers for m in microbatches[:-1])
