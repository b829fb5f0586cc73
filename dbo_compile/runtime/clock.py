"""Plays a program on a clock instead of a device: what overlaps, and for how long, without running anything."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from string import ascii_lowercase, digits

from dbo_compile.ir.program import Program, Record, Run, Wait
from dbo_compile.ir.schedule import Lane, Segment, Step


@dataclass(frozen=True, slots=True)
class Interval:
    """One segment on its lane from `start` to `end`, in whatever unit the costs are."""

    lane: Lane
    segment: str
    microbatch: int | None
    start: float
    end: float

    def __str__(self) -> str:
        return f"{self.lane.value:8}{self.start:g}..{self.end:g} {Step(self.segment, self.microbatch)}"


@dataclass(frozen=True, slots=True)
class Timeline:
    """What ran when; the intervals of a lane are in order and do not overlap."""

    intervals: tuple[Interval, ...]

    @property
    def makespan(self) -> float:
        return max((i.end for i in self.intervals), default=0.0)

    @property
    def idle(self) -> float:
        """How long the compute lane stands still."""
        return self.makespan - self.busy(Lane.COMPUTE)

    @property
    def hidden_comm(self) -> float | None:
        """The share of the time spent communicating that passes while the compute lane computes; None of no time."""
        hidden, compute = 0.0, self.on(Lane.COMPUTE)
        at = 0
        for comm in self.on(Lane.COMM):
            while at < len(compute) and compute[at].end <= comm.start:
                at += 1
            for i in compute[at:]:
                if i.start >= comm.end:
                    break
                hidden += min(i.end, comm.end) - max(i.start, comm.start)
        total = self.busy(Lane.COMM)
        return min(1.0, hidden / total) if total else None  # sums in another order may round to more

    def on(self, lane: Lane) -> tuple[Interval, ...]:
        return tuple(i for i in self.intervals if i.lane is lane)

    def busy(self, lane: Lane) -> float:
        return sum(i.end - i.start for i in self.on(lane))

    def __str__(self) -> str:
        busy = ", ".join(f"{lane.value} busy {self.busy(lane):g}" for lane in Lane)
        share = self.hidden_comm
        hidden = "no communication" if share is None else f"{share:.0%} of comm hidden"
        return f"{self.makespan:g} in all, {busy}, {hidden}"


def hidden_text(**shares: float | None) -> str:
    """The hidden share of communication by how it is known: `communication hidden: 99% predicted, 80% measured`."""
    known = [f"{share:.0%} {how}" for how, share in shares.items() if share is not None]
    return f"communication hidden: {', '.join(known)}" if known else "no communication"


def simulate(program: Program, cost: Callable[[Run], float]) -> Timeline:
    """Play `program` as an accelerator would: a host thread issues at no cost, each lane works off what it is issued.

    A segment that reads data on the host holds up the issuing of everything after it. Slices and joins are free.
    """
    clock = _Clock(program.segments)
    for instr in program.instrs:
        match instr:
            case Run():
                clock.run(instr, cost(instr))
            case Record():
                clock.events[instr.event] = clock.now(instr.lane)
            case Wait():
                clock.lanes[instr.lane] = max(clock.now(instr.lane), clock.events[instr.event])
            case _:
                pass
    return Timeline(tuple(clock.intervals))


class _Clock:
    def __init__(self, segments: Mapping[str, Segment]) -> None:
        self.segments = segments
        self.host = 0.0
        self.lanes = dict.fromkeys(Lane, 0.0)
        self.events: dict[str, float] = {}
        self.intervals: list[Interval] = []

    def now(self, lane: Lane) -> float:
        """When an instruction issued now would start on `lane`."""
        return max(self.lanes[lane], self.host)

    def run(self, instr: Run, cost: float) -> None:
        start = self.now(instr.lane)
        end = self.lanes[instr.lane] = start + cost
        self.intervals.append(Interval(instr.lane, instr.segment, instr.microbatch, start, end))
        if self.segments[instr.segment].host:
            self.host = end


def chart(timeline: Timeline, width: int = 100) -> str:
    """The lanes as two rows of text, `width` columns for the whole time: who works in the middle of each column."""
    tick = timeline.makespan / width
    rows = [f"{lane.value:8}{_row(timeline.on(lane), tick, width)}" for lane in Lane]
    legend = f"{'':8}0, 1, ... the microbatch at work, = all tokens, . waiting; a column is {tick:.3g}"
    return "\n".join([*rows, legend])


def _row(intervals: tuple[Interval, ...], tick: float, width: int) -> str:
    row, at = [], 0
    for column in range(width):
        middle = (column + 0.5) * tick
        while at < len(intervals) and intervals[at].end <= middle:
            at += 1
        row.append(_mark(intervals[at]) if at < len(intervals) and intervals[at].start <= middle else ".")
    return "".join(row)


def _mark(interval: Interval) -> str:
    names = digits + ascii_lowercase
    return "=" if interval.microbatch is None else names[interval.microbatch % len(names)]
