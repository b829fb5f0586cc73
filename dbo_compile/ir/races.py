"""Proves that the two lanes of a program neither race, nor hang, nor wait for more than they must.

Each lane has a clock: for both lanes, the last instruction known to have happened before. A wait merges the clock that
its event recorded; whatever an instruction must happen after has to be on its lane's clock.
"""

from __future__ import annotations

from dbo_compile.errors import InvalidProgram
from dbo_compile.ir.memory import History, last_uses
from dbo_compile.ir.program import Begin, End, Free, Instr, Program, Record, Rows, Run, Wait, lane_of, makes
from dbo_compile.ir.schedule import Lane, Step

Clock = dict[Lane, int]


class Races:
    """Every instruction happens after what it must, also on the other lane, and waits for nothing else."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.history = History(program.segments)
        self.last_uses = last_uses(program.instrs, program.segments)
        self.owner = {reg: lane_of(instr) for instr in program.instrs for reg in makes(instr)}
        self.clocks: dict[Lane, Clock] = {lane: dict.fromkeys(Lane, -1) for lane in Lane}
        self.events: dict[str, tuple[Lane, Clock]] = {}
        self.waiting: dict[Lane, list[int]] = {lane: [] for lane in Lane}

    def check(self, at: int, instr: Instr) -> None:
        match instr:
            case Record():
                self._record(instr)
            case Wait():
                self._wait(instr)
            case Free():
                self._free(instr)
            case Begin() | Rows():
                self.history.add(instr, at)
            case _:
                self._play(at, instr)

    def _record(self, instr: Record) -> None:
        if instr.event in self.events:
            raise InvalidProgram("records an event that has been recorded before; expected each event once")
        self.events[instr.event] = (instr.lane, dict(self.clocks[instr.lane]))

    def _wait(self, instr: Wait) -> None:
        if instr.event not in self.events:
            raise InvalidProgram("waits for an event that nothing before it records; expected the record first")
        lane, clock = self.events[instr.event]
        mine = self.clocks[instr.lane]
        if clock[lane] > mine[lane]:
            self.waiting[instr.lane].append(clock[lane])
        mine.update({lane: max(at, mine[lane]) for lane, at in clock.items()})

    def _free(self, instr: Free) -> None:
        for reg in instr.regs:
            owner = self.owner[reg]
            for lane, at in self.last_uses[reg].items():
                if at > self.clocks[owner][lane]:
                    raise InvalidProgram(
                        f"frees {reg}, which `{self._name(at)}` may still use; "
                        f"expected it after the {owner.value} lane, which made {reg}, has waited for that"
                    )

    def _play(self, at: int, instr: Instr) -> None:
        lane = lane_of(instr)
        needed = list(self.history.before(instr))
        for after in needed:
            if after.at > self.clocks[lane][after.lane]:
                raise InvalidProgram(
                    f"{after.why} without waiting for `{self._name(after.at)}` on the {after.lane.value} lane; "
                    "expected a record right after that, and a wait right before this"
                )
        self._refuse_needless_waits(lane, {after.at for after in needed})
        if isinstance(instr, End):
            for other in Lane:
                self._refuse_needless_waits(other, set())
        self.clocks[lane][lane] = at
        self.history.add(instr, at)

    def _refuse_needless_waits(self, lane: Lane, needed: set[int]) -> None:
        for at in self.waiting[lane]:
            if at not in needed:
                name = self._name(at)
                raise InvalidProgram(f"waits for `{name}`, which nothing it reads depends on: overlap is lost")
        self.waiting[lane].clear()

    def _name(self, at: int) -> str:
        instr = self.program.instrs[at]
        return str(Step(instr.segment, instr.microbatch)) if isinstance(instr, Run) else str(instr).strip()
