"""Schedule to instructions: name the registers, slice where a microbatch begins, join where it ends.

Takes a valid schedule and the placement of every value. Decides nothing about lanes, waits or lifetimes: `sync` does.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from dbo_compile.errors import InvalidSchedule
from dbo_compile.ir.program import Begin, End, Instr, Join, Reg, Rows, Run, Slice, makes
from dbo_compile.ir.schedule import ROWS, START, Lane, Schedule, Segment
from dbo_compile.ir.tokens import Given, Placement, Shared, Split


def lower(
    schedule: Schedule, places: Mapping[str, Placement], inputs: Sequence[str], outputs: Sequence[str]
) -> tuple[Instr, ...]:
    """The instructions that play `schedule` on the values `inputs` and hand back the values `outputs`.

    The register of value `x` is `x` for all tokens, `x#1` for microbatch 1. With one microbatch nothing is split: all
    registers are for all tokens. Raises `InvalidSchedule` where a value would have to be split or joined that cannot.
    Arguments that are `Given` are read for all tokens and for each microbatch alike.
    """
    n = schedule.num_microbatches
    given = [(v, m) for v in inputs if isinstance(places[v], Given) for m in range(n) if n > 1]
    lowering = _Lowering(schedule, places)
    lowering.add(Begin(tuple(inputs), tuple(given)))
    lowering.slice_ahead(inputs)
    for step in schedule.steps:
        lowering.play(schedule.segments[step.segment], step.microbatch if schedule.num_microbatches > 1 else None)
    lowering.add(End(tuple(lowering.read(value, None) for value in outputs)))
    return tuple(lowering.instrs)


class _Lowering:
    """Turns steps into instructions, making slices, joins and numbers of rows where they are first needed."""

    def __init__(self, schedule: Schedule, places: Mapping[str, Placement]) -> None:
        self.places = places
        self.num_microbatches = schedule.num_microbatches
        self.instrs: list[Instr] = []
        self.made: set[Reg] = set()
        self.joined: dict[str, Reg] = {}
        self.num_joins: Counter[str] = Counter()
        self.root: dict[str, str] = {}
        parts = [s for s in schedule.segments.values() if s.per_microbatch and schedule.num_microbatches > 1]
        self.per_microbatch = {v for s in parts for v in s.outputs}
        self.sliced = {v for s in parts for v in s.inputs if v not in s.whole} - self.per_microbatch - {ROWS, START}

    def add(self, instr: Instr) -> None:
        self.instrs.append(instr)
        self.made.update(makes(instr))

    def play(self, segment: Segment, microbatch: int | None) -> None:
        ins = {value: self.read(value, None if value in segment.whole else microbatch)
               for value in segment.inputs if value not in segment.prefix}  # fmt: skip
        ins |= {value: self.read_prefix(value, microbatch) for value in segment.prefix}
        outs = tuple(v if microbatch is None else f"{v}#{microbatch}" for v in segment.outputs)
        writes = tuple(ins[v] for v in segment.writes)
        if lost := [v for v in segment.writes if ins[v] in self.joined.values()]:
            raise InvalidSchedule(f"{segment.name} writes {lost[0]} in place, but gets it joined: a copy")
        self.add(Run(segment.lane, segment.name, microbatch, tuple(ins[v] for v in segment.inputs), outs, writes))
        self.root.update({v: self._root(base) for v, base in (segment.aliases or {}).items()})
        written = {self._root(v) for v in segment.writes}
        self.joined = {v: reg for v, reg in self.joined.items() if self._root(v) not in written}
        if segment.lane is Lane.COMPUTE:
            self.slice_ahead(segment.outputs)

    def slice_ahead(self, values: Sequence[str]) -> None:
        """Slice right after the maker. Later, a collective that reads a slice would wait for the compute in between."""
        for value in values:
            if value in self.sliced and isinstance(self.places[value], Split):
                for m in range(self.num_microbatches):
                    self.read(value, m)

    def read(self, value: str, microbatch: int | None) -> Reg:
        """The register that holds `value` for `microbatch`, or for all tokens if None."""
        if value in (ROWS, START):
            return self._number(value, microbatch)
        match self.places[value], value in self.per_microbatch, microbatch:
            case (_, False, None) | (Shared(), False, _):
                return value
            case (_, True, int(m)) | (Given(), _, int(m)):
                return f"{value}#{m}"
            case Shared(), True, None:  # state that all microbatches have written, the last one last
                return f"{value}#{self.num_microbatches - 1}"
            case Split(dim), True, None:
                return self._join(value, dim)
            case Split(dim), False, int(m):
                return self._slice(value, dim, m)
            case place, _, _:
                way = "joined" if microbatch is None else "split"
                raise InvalidSchedule(f"{value} is {place}, so it cannot be {way}")
        raise AssertionError("all placements are covered")

    def read_prefix(self, value: str, microbatch: int | None) -> Reg:
        """The register that holds the rows of `value` of all microbatches up to one."""
        if not microbatch or microbatch == self.num_microbatches - 1:
            return self.read(value, microbatch if microbatch == 0 else None)
        reg = f"{value}@to{microbatch}"
        if reg not in self.made:
            place = self.places[value]
            assert isinstance(place, Split), f"{value} is {place}, so it has no rows of earlier microbatches"
            self.add(Join(tuple(self.read(value, m) for m in range(microbatch + 1)), place.dim, reg))
        return reg

    def _number(self, which: str, microbatch: int | None) -> Reg:
        rows, start = (n if microbatch is None else f"{n}#{microbatch}" for n in (ROWS, START))
        if rows not in self.made:
            self.add(Rows(microbatch, (rows, start)))
        return rows if which == ROWS else start

    def _join(self, value: str, dim: int) -> Reg:
        if value not in self.joined:
            again = self.num_joins[value]
            self.num_joins[value] += 1
            self.joined[value] = f"{value}@{again}" if again else value
            srcs = tuple(f"{value}#{m}" for m in range(self.num_microbatches))
            self.add(Join(srcs, dim, self.joined[value]))
        return self.joined[value]

    def _slice(self, value: str, dim: int, microbatch: int) -> Reg:
        reg = f"{value}#{microbatch}"
        if reg not in self.made:
            self.add(Slice(value, dim, microbatch, reg))
        return reg

    def _root(self, value: str) -> str:
        return self.root.get(value, value)
