"""Which registers share memory, and what an instruction must happen after because of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from dbo_compile.ir.program import Begin, End, Instr, Join, Reg, Rows, Run, Slice, lane_of, makes, reads
from dbo_compile.ir.schedule import Lane, Segment


@dataclass(frozen=True, slots=True)
class Region:
    """The memory of a register: that of `root`, or the rows of it that slicing `src` along `dim` gives a microbatch."""

    root: Reg
    src: Reg = ""
    dim: int = 0
    microbatch: int | None = None

    def overlaps(self, other: Region) -> bool:
        apart = self.microbatch is not None and other.microbatch is not None and self.microbatch != other.microbatch
        return self.root == other.root and not (apart and (self.src, self.dim) == (other.src, other.dim))


Accesses = dict[Reg, dict[Region, dict[Lane, int]]]
"""For each root and each part of it, the last access on each lane."""


@dataclass(frozen=True, slots=True)
class After:
    """An instruction must happen after instruction `at` of `lane`, because it does `why` ("reads x")."""

    lane: Lane
    at: int
    why: str


def bases(instr: Instr, segments: Mapping[str, Segment]) -> Iterator[tuple[Reg, Reg]]:
    """(register, the register whose memory it may share), for what `instr` makes."""
    match instr:
        case Slice():
            yield instr.out, instr.src
        case Run():
            segment = segments[instr.segment]
            for value, base in (segment.aliases or {}).items():
                yield instr.outs[segment.outputs.index(value)], instr.ins[segment.inputs.index(base)]
        case _:
            pass


def last_uses(instrs: Sequence[Instr], segments: Mapping[str, Segment]) -> dict[Reg, dict[Lane, int]]:
    """For each register and lane, the last instruction that makes or uses its memory, under whichever name."""
    uses: dict[Reg, dict[Lane, int]] = {}
    base: dict[Reg, Reg] = {}
    for at, instr in enumerate(instrs):
        base.update(bases(instr, segments))
        for reg in (*makes(instr), *reads(instr)):
            last = uses.setdefault(reg, {})
            if not isinstance(instr, Begin | Rows):  # what they make is there before either lane begins
                last[lane_of(instr)] = at
    for reg in reversed(uses):  # in the order of making, so what shares memory comes after what it is shared with
        if reg in base:
            over = uses[base[reg]]
            over.update({lane: max(at, over.get(lane, at)) for lane, at in uses[reg].items()})
    return uses


class History:
    """Who has made, read and written what so far. Only the last access of each lane counts: a lane is in order."""

    def __init__(self, segments: Mapping[str, Segment]) -> None:
        self.segments = segments
        self.made: dict[Reg, tuple[Lane, int]] = {}
        self.region: dict[Reg, Region] = {}
        self.last: dict[Lane, int] = {}
        self._accesses: Accesses = {}
        self._writes: Accesses = {}

    def before(self, instr: Instr) -> Iterator[After]:
        """What `instr` must happen after. The caller's arguments and numbers of rows are there before anything."""
        for reg in dict.fromkeys(reads(instr)):
            if reg in self.made:
                yield After(*self.made[reg], f"reads {reg}")
            if not isinstance(instr, Slice):  # a view touches no data
                yield from self._conflicts(reg, self._writes, "reads")
        if isinstance(instr, Run):
            for reg in instr.writes:
                yield from self._conflicts(reg, self._accesses, "overwrites")
        if isinstance(instr, End):
            yield from (After(lane, at, "ends the program") for lane, at in self.last.items())

    def add(self, instr: Instr, at: int) -> None:
        if not isinstance(instr, Run | Slice | Join | Begin | Rows | End):
            return
        shared = dict(bases(instr, self.segments))
        for reg in makes(instr):
            self.region[reg] = self._region(instr, reg, shared.get(reg))
        if isinstance(instr, Run | Slice | Join):
            self.last[lane_of(instr)] = at
            self.made.update(dict.fromkeys(makes(instr), (lane_of(instr), at)))
        if isinstance(instr, Run | Join):
            self._note(self._accesses, reads(instr), lane_of(instr), at)
        if isinstance(instr, Run):
            self._note(self._writes, instr.writes, instr.lane, at)

    def _region(self, instr: Instr, reg: Reg, base: Reg | None) -> Region:
        if base is None:
            return Region(reg)
        region = self.region[base]
        if isinstance(instr, Slice) and region.microbatch is None:
            return Region(region.root, base, instr.dim, instr.microbatch)
        return region

    def _conflicts(self, reg: Reg, table: Accesses, what: str) -> Iterator[After]:
        mine = self.region[reg]
        for region, last in table.get(mine.root, {}).items():
            if mine.overlaps(region):
                yield from (After(lane, at, f"{what} {reg}") for lane, at in last.items())

    def _note(self, table: Accesses, regs: Iterable[Reg], lane: Lane, at: int) -> None:
        for reg in regs:
            region = self.region[reg]
            table.setdefault(region.root, {}).setdefault(region, {})[lane] = at
