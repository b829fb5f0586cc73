"""One suite for every device that plays programs: the clock, the CPU's lanes, and streams on a device that takes notes.

Each device tells of every step it played which others were surely over when it began.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import pytest

from dbo_compile.ir.program import Run
from dbo_compile.ir.schedule import Lane
from dbo_compile.passes.emit import emit
from dbo_compile.runtime import lanes as lanes_module
from dbo_compile.runtime import streams as streams_module
from dbo_compile.runtime.clock import simulate
from dbo_compile.runtime.collectives import Pending
from dbo_compile.runtime.lanes import WorkLanes
from dbo_compile.runtime.streams import StreamPlayer
from tests.ir.moe import moe_program
from tests.ir.oracle import happens_before
from tests.runtime.fake_device import FakeDevice


def emitted(program, compute: Callable[[str], None]):
    """The module of a program over names: a segment on the compute lane calls `compute`, a collective is issued."""

    def segment(s):
        def run(*args):
            args[0].issue(s.name) if s.lane is Lane.COMM else compute(s.name)
            return s.outputs

        return run

    segments = {name: replace(s, code=name) for name, s in program.segments.items()}
    fns = {name: segment(s) for name, s in segments.items()}
    return emit(replace(program, segments=segments), fns, program.instrs[-1].ins)


class Names:
    """Lanes whose registers are names; `note` is told what is freed."""

    def note(self, what):
        pass

    def slice(self, x, dim, microbatch):
        return f"{x}#{microbatch}"

    def view(self, x, dim, microbatch):
        return f"{x}#{microbatch}"

    def join(self, pieces, dim):
        return pieces[0].split("#")[0]

    def free(self, *regs):
        self.note(("free", len(regs)))


def rows_of(program):
    return [5, 4, 3][: program.num_microbatches]


def on_streams(program, monkeypatch):
    device = play_on_fake(program, monkeypatch)[0]
    runs = device.launched
    return [
        {p for p, (stream, number, _) in enumerate(runs) if before.get(stream, 0) >= number} for _, _, before in runs
    ]


def play_on_fake(program, monkeypatch):
    """The device that took the notes, and the player."""
    device = FakeDevice()

    class Lanes(Names, streams_module.StreamLanes):
        def note(self, what):
            device.note(what)

    monkeypatch.setattr(streams_module, "StreamLanes", Lanes)
    monkeypatch.setattr(streams_module, "play", device.launch)
    player = StreamPlayer(device)
    player(emitted(program, device.launch), rows_of(program), list(program.instrs[0].outs))
    assert [name for what, name, *_ in device.notes if what == "run"] == played_names(program)
    return device, player


def on_cpu(program, monkeypatch):
    """A step on the compute lane is over when the next one begins; a collective when it has been waited for."""
    begun, over = [], []
    names = []

    class Work:
        def __init__(self, step):
            self.step = step

        def wait(self):
            over.append(self.step)

    def begin(name):
        names.append(name)
        begun.append(set(over))
        return len(begun) - 1

    class Lanes(Names, WorkLanes):
        pass

    monkeypatch.setattr(lanes_module, "start", lambda name: Pending(object(), Work(begin(name))))
    with Lanes(rows_of(program)) as lanes:
        emitted(program, lambda name: over.append(begin(name)))(lanes, *program.instrs[0].outs)
    assert names == played_names(program)
    # a process group works off what it is given in order
    comm = [at for at, run in enumerate(runs_of(program)) if run.lane is Lane.COMM]
    return [begun[at] | {p for p in comm if p < at and at in comm} for at in range(len(begun))]


def on_clock(program, _monkeypatch):
    """What is over whatever the steps cost, of a few hundred costs."""
    draw, always = random.Random(5), None
    for _ in range(200):
        costs = [draw.choice([0.01, 1.0, 30.0]) for _ in runs_of(program)]
        it = iter(costs)
        intervals = simulate(program, lambda _run, it=it: next(it)).intervals
        over = [{p for p, i in enumerate(intervals) if i.end <= q.start} for q in intervals]
        always = over if always is None else [a & b for a, b in zip(always, over, strict=True)]
    return always


def runs_of(program):
    return [i for i in program.instrs if isinstance(i, Run)]


def played_names(program):
    return [run.segment for run in runs_of(program)]


def proven(program):
    """For each step those that come before it, as the program says."""
    before = happens_before(program.instrs)
    at = [i for i, instr in enumerate(program.instrs) if isinstance(instr, Run)]
    return [{p for p, i in enumerate(at) if i != j and before[j] >> i & 1} for j in at]


DEVICES = {"clock": on_clock, "cpu": on_cpu, "streams": on_streams}
PROGRAMS = [(policy, n) for policy in ("list", "alternate", "sequential") for n in (1, 2, 3)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("policy", "n"), PROGRAMS)
def test_a_step_begins_when_all_is_over_that_the_program_puts_before_it(device, policy, n, monkeypatch):
    program = moe_program(3, n, policy)
    over = DEVICES[device](program, monkeypatch)
    missing = [want - have for want, have in zip(proven(program), over, strict=True)]
    assert missing == [set()] * len(over)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("policy", ["list", "alternate"])
def test_every_layer_computes_under_communication(device, policy, monkeypatch):
    program = moe_program(3, 2, policy)
    over, runs = DEVICES[device](program, monkeypatch), runs_of(program)
    under_way = {
        (runs[p].segment, run.segment)
        for q, run in enumerate(runs)
        for p in range(q)
        if run.lane is Lane.COMPUTE and runs[p].lane is Lane.COMM and p not in over[q]
    }
    hidden = {comm for comm, _ in under_way}
    assert {f"{name}{layer}" for name in ("dispatch", "combine") for layer in range(3)} <= hidden


@pytest.mark.parametrize(("policy", "n"), PROGRAMS)
def test_streams_order_nothing_that_the_program_leaves_open(policy, n, monkeypatch):
    program = moe_program(3, n, policy)
    assert on_streams(program, monkeypatch) == proven(program)
