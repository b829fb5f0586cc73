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
    """All pairs of instructions that must be ordered by the lanes and are not; None if a register is not there."""
    instrs, segments, n = program.instrs, program.segments, program.num_microbatches
    before = happens_before(instrs)
    atoms, base, made, accesses, uses, found = {}, {}, {}, [], {}, []
    for at, instr in enumerate(instrs):
        if any(reg not in atoms for reg in reads(instr)):
            return None
        if isinstance(instr, Run):
            s = segments[instr.segment]
            for out, src in (s.aliases or {}).items():
                base[instr.outs[s.outputs.index(out)]] = instr.ins[s.inputs.index(src)]
        if isinstance(instr, Slice):
            base[instr.out] = instr.src
        for reg in makes(instr):
            atoms[reg] = atoms[base[reg]] if reg in base else {(reg, m) for m in range(n)}
            if isinstance(instr, Slice):
                atoms[reg] = {(root, m) for root, m in atoms[reg] if m == instr.microbatch}
        read = () if isinstance(instr, Slice) else reads(instr)
        written = [*(instr.writes if isinstance(instr, Run) else ()), *(reg for reg in makes(instr) if reg not in base)]
        found += [(made[reg], at) for reg in reads(instr) if reg in made and not before[at] >> made[reg] & 1]
        if not isinstance(instr, Begin | Rows):
            made.update(dict.fromkeys(makes(instr), at))
            accesses.append((at, set().union(*map(atoms.get, written)), set().union(*map(atoms.get, read))))
        for reg in {*reads(instr), *makes(instr)}:
            while reg is not None:
                uses.setdefault(reg, []).append(at)
                reg = base.get(reg)
    for i, (p, p_writes, p_reads) in enumerate(accesses):
        for q, q_writes, q_reads in accesses[i + 1 :]:
            if (p_writes & (q_writes | q_reads) or p_reads & q_writes) and not before[q] >> p & 1:
                found.append((p, q))
    owner = {reg: lane_of(instr) for instr in instrs for reg in makes(instr)}
    for at, instr in enumerate(instrs):
        for reg in instr.regs if isinstance(instr, Free) else ():
            known = [before[i] for i in range(at) if isinstance(instrs[i], Run | Slice | Join | Wait)
                     and lane_of(instrs[i]) is owner[reg]]  # fmt: skip
            begun = [i for i in uses[reg] if not isinstance(instrs[i], Begin)]
            found += [(u, at) for u in begun if not (known and known[-1] >> u & 1)]
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
        else:
            outs[value] = Memory(Shared(), n, 0) if isinstance(places[value], Shared) else Memory(places[value], 0, 0)
            outs[value].write("", None, hash((term, value))) if outs[value].shared else None
            outs[value].cells.setdefault(microbatch, hash((term, value)))
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
    for instr in program.instrs:
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
            case End():
                return [regs[reg].seen("", None) for reg in instr.ins]
