"""What the runtime plays: a flat list of instructions over named registers. Knows nothing of FX."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dbo_compile.ir.schedule import Lane, Segment

Reg = str
SIZES = re.compile(r"\[[^]]*\]")


@dataclass(frozen=True, slots=True)
class Begin:
    """The caller's arguments, there before anything runs. Behind them, (value, microbatch) for each that is given to
    every microbatch by itself."""

    outs: tuple[Reg, ...]
    given: tuple[tuple[str, int], ...] = ()

    @property
    def regs(self) -> tuple[Reg, ...]:
        return (*self.outs, *(f"{value}#{microbatch}" for value, microbatch in self.given))

    def __str__(self) -> str:
        return f"{'':8}begin {' '.join(self.regs)}"


@dataclass(frozen=True, slots=True)
class Rows:
    """outs = how many tokens `microbatch` has, and how many lie before them; all of them and 0 for None."""

    microbatch: int | None
    outs: tuple[Reg, Reg]

    def __str__(self) -> str:
        return f"{'':8}{', '.join(self.outs)} = rows({'' if self.microbatch is None else self.microbatch})"


@dataclass(frozen=True, slots=True)
class Slice:
    """out = a view of the rows of `src` that belong to `microbatch`."""

    src: Reg
    dim: int
    microbatch: int
    out: Reg

    def __str__(self) -> str:
        return f"{'compute':8}{self.out} = slice({self.src}, dim={self.dim}, microbatch={self.microbatch})"


@dataclass(frozen=True, slots=True)
class Join:
    """out = the rows of all microbatches, one after the other."""

    srcs: tuple[Reg, ...]
    dim: int
    out: Reg

    def __str__(self) -> str:
        return f"{'compute':8}{self.out} = join({', '.join(self.srcs)}, dim={self.dim})"


@dataclass(frozen=True, slots=True)
class Run:
    """Play a segment. `writes` are the registers among `ins` that it changes in place."""

    lane: Lane
    segment: str
    microbatch: int | None
    ins: tuple[Reg, ...]
    outs: tuple[Reg, ...]
    writes: tuple[Reg, ...] = ()

    def __str__(self) -> str:
        name = self.segment if self.microbatch is None else f"{self.segment}#{self.microbatch}"
        writes = f"  writes {', '.join(self.writes)}" if self.writes else ""
        return f"{self.lane.value:8}{', '.join(self.outs) or '_'} = {name}({', '.join(self.ins)}){writes}"


@dataclass(frozen=True, slots=True)
class Record:
    lane: Lane
    event: str

    def __str__(self) -> str:
        return f"{self.lane.value:8}record {self.event}"


@dataclass(frozen=True, slots=True)
class Wait:
    lane: Lane
    event: str

    def __str__(self) -> str:
        return f"{self.lane.value:8}wait {self.event}"


@dataclass(frozen=True, slots=True)
class Free:
    """Nothing reads these registers any more: their memory may be used again by the lane that made them."""

    regs: tuple[Reg, ...]

    def __str__(self) -> str:
        return f"{'':8}free {' '.join(self.regs)}"


@dataclass(frozen=True, slots=True)
class End:
    """The caller's results, read on the compute lane."""

    ins: tuple[Reg, ...]

    def __str__(self) -> str:
        return f"{'':8}end {' '.join(self.ins)}"


Instr = Begin | Rows | Slice | Join | Run | Record | Wait | Free | End


def lane_of(instr: Instr) -> Lane:
    """The lane an instruction is issued on; slicing and joining happen on the compute lane."""
    return instr.lane if isinstance(instr, Run | Record | Wait) else Lane.COMPUTE


def reads(instr: Instr) -> tuple[Reg, ...]:
    match instr:
        case Run() | End():
            return instr.ins
        case Slice():
            return (instr.src,)
        case Join():
            return instr.srcs
        case Begin() | Rows() | Record() | Wait() | Free():
            return ()


def makes(instr: Instr) -> tuple[Reg, ...]:
    """The registers that exist from this instruction on."""
    match instr:
        case Begin():
            return instr.regs
        case Rows() | Run():
            return instr.outs
        case Slice() | Join():
            return (instr.out,)
        case End() | Record() | Wait() | Free():
            return ()


@dataclass(frozen=True, slots=True)
class Program:
    """`instrs` over the `segments` that they play; `segments` are in the order of the graph.

    With `straddles`, a request may have tokens in two microbatches: the second reads what the first one writes.
    """

    instrs: tuple[Instr, ...]
    segments: Mapping[str, Segment]
    num_microbatches: int
    straddles: bool = True

    def __str__(self) -> str:
        return "\n".join(map(str, self.instrs))

    def marked(self, at: int) -> str:
        """The program as text with instruction `at` marked, for errors."""
        return "\n".join(f"{i:4} {instr}{'   <-- HERE' if i == at else ''}" for i, instr in enumerate(self.instrs))

    @property
    def fingerprint(self) -> str:
        """A hash of all that ranks must share: which collectives are played, in which order.

        What a rank computes in between is its own affair: it may have been traced for other sizes.
        """
        played = [i for i in self.instrs if isinstance(i, Run) and i.lane is Lane.COMM]
        segments = [(self.segments[run.segment], run.microbatch) for run in played]
        lines = [f"{s.name} {microbatch} {s.group} {s.payload}" for s, microbatch in segments]
        return _hash([str(self.num_microbatches), *lines])

    @property
    def graph(self) -> str:
        """A hash of the collectives in the order of the graph: what an unsplit step has in common on all ranks,
        whatever sizes each was traced for."""
        comm = (s for s in self.segments.values() if s.lane is Lane.COMM)
        return _hash([f"{s.group} {SIZES.sub('', s.payload)}" for s in comm])


def _hash(lines: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]
