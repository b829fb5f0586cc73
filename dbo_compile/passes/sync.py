"""Make the lanes wait for each other, and free what nothing reads any more: the whole truth about lanes.

Takes instructions without Record, Wait and Free and puts those in; never changes their order. An event is recorded
right after what it stands for and waited on right before what needs it: anywhere else overlap would be lost.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush

from dbo_compile.ir.memory import History, last_uses
from dbo_compile.ir.program import Free, Instr, Join, Record, Reg, Rows, Run, Slice, Wait, lane_of, makes
from dbo_compile.ir.schedule import Lane, Segment, Step

OTHER = {Lane.COMPUTE: Lane.COMM, Lane.COMM: Lane.COMPUTE}


def sync(instrs: Sequence[Instr], segments: Mapping[str, Segment]) -> tuple[Instr, ...]:
    """`instrs` with every Record, Wait and Free that they need to be safe on two lanes."""
    waits = _waits(instrs, segments)
    events = {at: _event(instrs[at]) for at in waits.values()}
    lifetimes = _Lifetimes(instrs, segments)
    out: list[Instr] = []
    for at, instr in enumerate(instrs):
        lane = lane_of(instr)
        if at in waits:
            out.append(Wait(lane, events[waits[at]]))
            out.extend(lifetimes.wait(lane, waits[at]))
        out.append(instr)
        if at in events:
            out.append(Record(lane, events[at]))
        out.extend(lifetimes.play(at))
    return tuple(out)


def _waits(instrs: Sequence[Instr], segments: Mapping[str, Segment]) -> dict[int, int]:
    """For each instruction that must wait, the one on the other lane it waits for: the last that it must be after."""
    history = History(segments)
    seen = dict.fromkeys(Lane, -1)
    waits: dict[int, int] = {}
    for at, instr in enumerate(instrs):
        lane = lane_of(instr)
        last = max((after.at for after in history.before(instr) if after.lane is not lane), default=-1)
        if last > seen[lane]:
            waits[at] = seen[lane] = last
        history.add(instr, at)
    return waits


def _event(instr: Instr) -> str:
    match instr:
        case Run():
            return str(Step(instr.segment, instr.microbatch))
        case Slice():
            return f"slice:{instr.out}"
        case Join():
            return f"join:{instr.out}"
        case _:
            raise AssertionError(f"{instr} happens on no lane")


@dataclass(frozen=True, slots=True)
class _Use:
    """The lane that made a register, and the last use of its memory on the other one."""

    owner: Lane
    other: int


class _Lifetimes:
    """Tells when the lane that made a register has waited for its last reader."""

    def __init__(self, instrs: Sequence[Instr], segments: Mapping[str, Segment]) -> None:
        self.seen = dict.fromkeys(Lane, -1)
        self.use: dict[Reg, _Use] = {}
        self.ending: dict[int, list[Reg]] = {}
        self.waiting: dict[Lane, list[tuple[int, int, Reg]]] = {lane: [] for lane in Lane}
        owner = {r: lane_of(i) for i in instrs if not isinstance(i, Rows) for r in makes(i)}
        for reg, last in last_uses(instrs, segments).items():
            if reg in owner and last.get(owner[reg], 0) < len(instrs) - 1:
                self.use[reg] = _Use(owner[reg], last.get(OTHER[owner[reg]], -1))
                self.ending.setdefault(last.get(owner[reg], 0), []).append(reg)

    def wait(self, lane: Lane, at: int) -> Iterator[Free]:
        """What may be freed when `lane` has waited for instruction `at` of the other lane."""
        self.seen[lane] = at
        done: list[Reg] = []
        while self.waiting[lane] and self.waiting[lane][0][0] <= at:
            done.append(heappop(self.waiting[lane])[2])
        if done:
            yield Free(tuple(done))

    def play(self, at: int) -> Iterator[Free]:
        """What may be freed right after instruction `at`."""
        done: list[Reg] = []
        for reg in self.ending.get(at, ()):
            use = self.use[reg]
            if use.other <= self.seen[use.owner]:
                done.append(reg)
            else:
                heappush(self.waiting[use.owner], (use.other, at, reg))
        if done:
            yield Free(tuple(done))
