"""What a program means and whether it races, found by brute force and without the code under test."""

from __future__ import annotations

from copy import copy

from dbo_compile.ir.program import Begin, End, Free, Join, Record, Rows, Run, Slice, Wait, lane_of, makes, reads
from dbo_compile.ir.schedule import ROWS, START
from dbo_compile.ir.tokens import Shared, Split


def happens_before(instrs):
    """For each instruction the set (as bits) of those that happen before it, or are it."""
    before, last, records = [], {}, {}
    for at, instr in enumerate(instrs):
        bits = 1 << at
        if isinstance(instr, Run | Slice | Join | End | Record | Wait):
            bits |= last.get(lane_of(instr), 0)
        if isinstance(instr, Wait):
            bits |= records.get(instr.event, 0)
        if isinstance(instr, Run | Slice | Join | End | Record | Wait):
            last[lane_of(instr)] = bits
        if isinstance(instr, Record):
            records[instr.event] = bits
        before.append(bits)
    return before


def races(program):
    """All pairs of instructions that must be ordered by the lanes and are not."""
    before, base = happens_before(program.instrs), bases(program)
    pairs = [*conflicts(program, base), *made_and_read(program)]
    return [(p, q) for p, q in pairs if not before[q] >> p & 1] + early_frees(program, base, before)


def bases(program):
    """For each register that may share the memory of another one, that one."""
    base = {}
    for instr in program.instrs:
        if isinstance(instr, Run):
            s = program.segments[instr.segment]
            for out, src in (s.aliases or {}).items():
                base[instr.outs[s.outputs.index(out)]] = instr.ins[s.inputs.index(src)]
        if isinstance(instr, Slice):
            base[instr.out] = instr.src
    return base


def made_and_read(program):
    made = {reg: at for at, i in enumerate(program.instrs) if isinstance(i, Run | Slice | Join) for reg in makes(i)}
    return [(made[reg], at) for at, instr in enumerate(program.instrs) for reg in reads(instr) if reg in made]


def conflicts(program, base):
    """Pairs of which one writes what the other reads or writes; memory is a set of (root, microbatch)."""
    atoms, accesses = {}, []
    for at, instr in enumerate(program.instrs):
        for reg in makes(instr):
            atoms[reg] = atoms[base[reg]] if reg in base else {(reg, m) for m in range(program.num_microbatches)}
            if isinstance(instr, Slice):
                atoms[reg] = {(root, m) for root, m in atoms[reg] if m == instr.microbatch}
        if isinstance(instr, Run | Join | End):
            written = [*getattr(instr, "writes", ()), *(reg for reg in makes(instr) if reg not in base)]
            sets = [set().union(*map(atoms.get, regs)) for regs in (written, reads(instr))]
            accesses.append((at, *sets))
    return [
        (p, q)
        for i, (p, p_writes, p_reads) in enumerate(accesses)
        for q, q_writes, q_reads in accesses[i + 1 :]
        if p_writes & (q_writes | q_reads) or p_reads & q_writes
    ]


def early_frees(program, base, before):
    """(use, free) for each use of a register or an alias of it that the lane of its maker has not waited for."""
    instrs, uses = program.instrs, {}
    for at, instr in enumerate(instrs):
        for reg in {*reads(instr), *makes(instr)} if not isinstance(instr, Begin | Rows) else ():
            while reg is not None:
                uses.setdefault(reg, set()).add(at)
                reg = base.get(reg)
    owner = {reg: lane_of(instr) for instr in instrs for reg in makes(instr)}
    known, found = {}, []
    for at, instr in enumerate(instrs):
        if isinstance(instr, Run | Slice | Join | Wait):
            known[lane_of(instr)] = before[at]
        for reg in instr.regs if isinstance(instr, Free) else ():
            found += [(use, at) for use in uses.get(reg, ()) if not known.get(owner[reg], 0) >> use & 1]
    return found


class Memory:
    """Symbolic contents: one term per microbatch, or for shared memory one per (segment, microbatch) that wrote it."""

    def __init__(self, place, n, term):
        self.shared = isinstance(place, Shared)
        self.part = None
        self.cells = {("", None): term} if self.shared else {m: hash((term, m)) for m in range(n)}

    def slice(self, microbatch):
        view = copy(self)
        view.part = microbatch
        return view

    def seen(self, segment, microbatch):
        """Shared state that a microbatch wrote is seen by itself, and by the next ones of the same segment."""
        if microbatch is None:
            return sorted(self.cells.items(), key=str)
        assert self.part in (None, microbatch), "reads the rows of another microbatch"
        if not self.shared:
            return self.cells[microbatch]
        return sorted(
            (item for item in self.cells.items() if item[0][1] in (None, microbatch) or item[0][0] == segment), key=str
        )

    def write(self, segment, microbatch, term):
        if microbatch is None:
            cells = {("", None): term} if self.shared else {m: hash((term, m)) for m in self.cells}
            self.cells.clear()
            self.cells.update(cells)
        else:
            self.cells[(segment, microbatch) if self.shared else microbatch] = term


def play(segment, microbatch, ins, places, n):
    """Play a segment on memories, per input value; gives the memories of the outputs."""
    term = hash((segment.name, tuple((v, str(ins[v].seen(segment.name, microbatch))) for v in segment.inputs)))
    for value in segment.writes:
        ins[value].write(segment.name, microbatch, hash((term, "writes", value)))
    outs = {}
    for value in segment.outputs:
        if (base := (segment.aliases or {}).get(value)) is not None:
            outs[value] = ins[base]
        elif microbatch is None:
            outs[value] = Memory(places[value], n, hash((term, value)))
        else:  # rows of this microbatch alone; what is shared is made once
            outs[value] = Memory(places[value], 0, 0)
            outs[value].cells[microbatch] = hash((term, value))
    return outs


def reference(segments, places, inputs, outputs, n):
    """What the segments mean: each played for all microbatches before the next one, in the order of the graph."""
    values = {v: Memory(places[v], n, hash(v)) for v in inputs} | numbers(n)
    for s in segments.values():
        if s.per_microbatch:
            for m in range(n):
                for value, memory in play(s, m, values, places, n).items():
                    if value in values and memory is not values[value]:
                        values[value].cells.update(memory.cells)
                    values.setdefault(value, memory)
        else:
            values.update(play(s, None, values, places, n))
    return [values[v].seen("", None) for v in outputs]


def numbers(n):
    return {name: Memory(Split(0), n, name) for name in (ROWS, START)}


def evaluate(program, places):
    """What a program computes when its instructions are played one after the other."""
    segments, n = program.segments, program.num_microbatches
    regs = {}
    for instr in program.instrs[:-1]:
        match instr:
            case Begin():
                regs.update({v: Memory(places[v], n, hash(v)) for v in instr.outs})
            case Slice():
                regs[instr.out] = regs[instr.src].slice(instr.microbatch)
            case Rows():
                regs.update(zip(instr.outs, (m.slice(instr.microbatch) for m in numbers(n).values()), strict=True))
            case Join():
                joined = Memory(places[instr.out.split("@")[0]], n, 0)
                joined.cells = {m: regs[reg].cells[m] for m, reg in enumerate(instr.srcs)}
                regs[instr.out] = joined
            case Run():
                s = segments[instr.segment]
                microbatch = 0 if n == 1 and s.per_microbatch else instr.microbatch
                outs = play(s, microbatch, dict(zip(s.inputs, map(regs.get, instr.ins), strict=True)), places, n)
                regs.update(zip(instr.outs, map(outs.get, s.outputs), strict=True))
    return [regs[reg].seen("", None) for reg in reads(program.instrs[-1])]
