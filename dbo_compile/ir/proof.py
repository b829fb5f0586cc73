"""The verifier of programs: proves that one cannot race, hang, mix up microbatches or lose overlap, on plain data."""

from __future__ import annotations

from dbo_compile.errors import InvalidProgram
from dbo_compile.ir.memory import History
from dbo_compile.ir.needs import needed_steps, needs_of, steps_of
from dbo_compile.ir.program import Begin, End, Free, Instr, Join, Program, Reg, Rows, Run, Slice, makes, reads
from dbo_compile.ir.races import Races
from dbo_compile.ir.schedule import ROWS, START, Segment, Step


def verify_program(program: Program) -> None:
    """Raise `InvalidProgram`, with the place marked, unless every instruction of `program` is safe where it is."""
    for proof in (_Ends, _Contents, _Steps, Races):
        check = proof(program).check
        for at, instr in enumerate(program.instrs):
            try:
                check(at, instr)
            except InvalidProgram as reason:
                text = " ".join(str(instr).split())
                raise InvalidProgram(f"instruction {at}, `{text}`, {reason}\n{program.marked(at)}") from None


class _Ends:
    def __init__(self, program: Program) -> None:
        self.last = len(program.instrs) - 1

    def check(self, at: int, instr: Instr) -> None:
        if isinstance(instr, Begin) != (at == 0) or isinstance(instr, End) != (at == self.last):
            raise InvalidProgram("is out of place; expected one begin at the top, and one end at the bottom")


class _Contents:
    """Every register is made once, before it is read, and holds the value and the rows that its reader expects."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.holds: dict[Reg, tuple[str, int | None]] = {}
        self.freed: set[Reg] = set()
        self.split: set[str] = set()

    def check(self, at: int, instr: Instr) -> None:
        self._check_registers(instr)
        match instr:
            case Run():
                self._run(instr)
            case Slice():
                self._slice(instr)
            case Join():
                self._join(instr)
            case Begin():
                self._begin(instr)
            case Rows():
                self.holds.update(zip(instr.outs, ((n, instr.microbatch) for n in (ROWS, START)), strict=True))
            case Free():
                self.freed.update(instr.regs)
            case _:
                pass

    def _check_registers(self, instr: Instr) -> None:
        for reg in instr.regs if isinstance(instr, Free) else reads(instr):
            if reg not in self.holds:
                raise InvalidProgram(f"reads {reg}, which nothing before it makes")
            if reg in self.freed:
                raise InvalidProgram(f"reads {reg}, which has been freed")
        for reg in makes(instr):
            if reg in self.holds:
                raise InvalidProgram(f"makes {reg}, which has been made before; expected a new register")

    def _begin(self, begin: Begin) -> None:
        values = [*((reg, None) for reg in begin.outs), *begin.given]
        self.holds.update(zip(begin.regs, values, strict=True))
        self.split.update(value for value, _ in begin.given)
        if strangers := [reg for reg, (_, m) in self.holds.items() if m not in (None, *self._microbatches())]:
            raise InvalidProgram(f"is given {strangers[0]}, for no microbatch of this program")

    def _microbatches(self) -> range:
        return range(self.program.num_microbatches)

    def _run(self, run: Run) -> None:
        segment = self.program.segments.get(run.segment)
        if segment is None or run.lane is not segment.lane:
            raise InvalidProgram(f"is no segment of the {run.lane.value} lane; expected one of the program's segments")
        if (len(run.ins), len(run.outs)) != (len(segment.inputs), len(segment.outputs)):
            fit = f"({', '.join(segment.inputs)}) -> ({', '.join(segment.outputs)})"
            raise InvalidProgram(f"does not fit its segment; expected {fit}")
        values = dict(zip(segment.inputs, run.ins, strict=True))
        if tuple(values[v] for v in segment.writes) != run.writes:
            raise InvalidProgram(f"does not say what it writes; expected {', '.join(segment.writes) or 'nothing'}")
        for value, reg in values.items():
            if value in segment.prefix and run.microbatch is not None:
                self._check_prefix(value, reg, run.microbatch)
            elif value in segment.whole:
                self._check_whole(value, reg)
            elif self.holds[reg] not in self._expected(value, run.microbatch):
                raise InvalidProgram(f"reads {reg}, which is not {value} for {_whom(run.microbatch)}")
        self.holds.update({reg: (value, run.microbatch) for reg, value in zip(run.outs, segment.outputs, strict=True)})

    def _expected(self, value: str, microbatch: int | None) -> list[tuple[str, int | None]]:
        """A split value must have exactly the reader's rows; of a shared one any register does, of state the last."""
        if value in self.split:
            return [(value, microbatch)]
        return [(value, None), (value, self.program.num_microbatches - 1 if microbatch is None else microbatch)]

    def _check_prefix(self, value: str, reg: Reg, microbatch: int) -> None:
        last = microbatch == self.program.num_microbatches - 1
        expected = (value, 0) if not microbatch else (value, None) if last else (_up_to(value, microbatch), None)
        if self.holds[reg] != expected:
            raise InvalidProgram(f"reads {reg}, which is not {value} for microbatches 0 to {microbatch}")

    def _check_whole(self, value: str, reg: Reg) -> None:
        if self.holds[reg] != (value, None):
            raise InvalidProgram(f"reads {reg}, which is not {value} for all tokens")

    def _slice(self, instr: Slice) -> None:
        value, microbatch = self.holds[instr.src]
        if microbatch is not None or instr.microbatch not in range(self.program.num_microbatches):
            raise InvalidProgram("slices what is split already, or for no microbatch of this program")
        self.split.add(value)
        self.holds[instr.out] = (value, instr.microbatch)

    def _join(self, instr: Join) -> None:
        value, _ = self.holds[instr.srcs[0]]
        if [self.holds[reg] for reg in instr.srcs] != [(value, m) for m in range(len(instr.srcs))]:
            raise InvalidProgram(f"does not join {value} of all microbatches (or the first ones), each once, in order")
        self.split.add(value)
        is_whole = len(instr.srcs) == self.program.num_microbatches
        self.holds[instr.out] = (value if is_whole else _up_to(value, len(instr.srcs) - 1), None)


def _up_to(value: str, microbatch: int) -> str:
    """The name of what the microbatches up to one have of a value; no value has it."""
    return f"{value} up to {microbatch}"


def _whom(microbatch: int | None) -> str:
    return "all tokens" if microbatch is None else f"microbatch {microbatch}"


class _Steps:
    """Every step once, in an order that the graph allows; state that is not split is written microbatch 0 first."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.needs = needs_of(program.segments, program.num_microbatches)
        self.expected = {step: None for segment in program.segments.values() for step in self._all(segment)}
        self.played: set[Step] = set()
        self.history = History(program.segments)
        self.joins: dict[Reg, tuple[int, Join]] = {}
        self.wrote: dict[tuple[str, Reg], int] = {}

    def check(self, at: int, instr: Instr) -> None:
        self._check_copies(instr)
        self.history.add(instr, at)
        if isinstance(instr, Join):
            self.joins[instr.out] = (at, instr)
        if isinstance(instr, Run):
            self._run(instr)
        if isinstance(instr, End):
            for step in self.expected:
                if step not in self.played:
                    raise InvalidProgram(f"comes before {step} is played; expected every step once")

    def _check_copies(self, instr: Instr) -> None:
        for at, join in (self.joins[reg] for reg in reads(instr) if reg in self.joins):
            for after in self.history.before(join):
                if after.at > at:
                    raise InvalidProgram(f"reads {join.out}, joined before its rows were written; expected a new join")

    def _run(self, run: Run) -> None:
        step = Step(run.segment, run.microbatch)
        if step not in self.expected:
            steps = " ".join(map(str, self._all(self.program.segments[run.segment])))
            raise InvalidProgram(f"plays {step}; expected {steps}")
        if step in self.played:
            raise InvalidProgram(f"plays {step} a second time; expected every step once")
        self.played.add(step)
        for name, why in self.needs[run.segment].items():
            for needed in self._needed(self.program.segments[name], step):
                if needed not in self.played:
                    raise InvalidProgram(f"comes before {needed}; expected it after that: {why}")
        self._check_threaded(run)

    def _check_threaded(self, run: Run) -> None:
        segment = self.program.segments[run.segment]
        apart = () if self.program.straddles else segment.paged  # no request is in two microbatches
        writes = [reg for value, reg in zip(segment.writes, run.writes, strict=True) if value not in apart]
        for region in (self.history.region[reg] for reg in writes):
            if run.microbatch is not None and region.microbatch is None:
                last = self.wrote.get((run.segment, region.root), -1)
                if last > run.microbatch:
                    raise InvalidProgram(f"writes {region.root} after microbatch {last}; expected microbatch 0 first")
                self.wrote[run.segment, region.root] = run.microbatch

    def _all(self, segment: Segment) -> tuple[Step, ...]:
        n = self.program.num_microbatches
        return steps_of(segment, n) if n > 1 else (Step(segment.name),)

    def _needed(self, needed: Segment, step: Step) -> tuple[Step, ...]:
        n = self.program.num_microbatches
        reader = self.program.segments[step.segment]
        return needed_steps(needed, step, n, reader) if n > 1 else (Step(needed.name),)
