"""Arguments that every microbatch has its own value of: from the analysis to the emitted program."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dbo_compile.errors import InvalidProgram
from dbo_compile.ir.program import Begin, Program, Run
from dbo_compile.ir.proof import verify_program
from dbo_compile.ir.schedule import Lane, Schedule, Segment
from dbo_compile.ir.tokens import Given, Shared, Split
from dbo_compile.passes.emit import emit
from dbo_compile.passes.lower import lower
from dbo_compile.passes.sync import sync
from dbo_compile.runtime.lanes import WorkLanes
from tests.ir.moe import compute

ATTEND = compute("attend", "x bounds", "y")
TAIL = Segment("tail", Lane.COMPUTE, ("y", "bounds"), ("z",), per_microbatch=False)
PLACES = {"x": Split(0), "bounds": Given(), "y": Split(0), "z": Shared()}


def program(steps, n, segments=(ATTEND, TAIL)):
    schedule = Schedule({s.name: s for s in segments}, (), n).with_steps(steps)
    instrs = lower(schedule, PLACES, ["x", "bounds"], ["z"])
    made = Program(sync(instrs, schedule.segments), schedule.segments, n)
    verify_program(made)
    return made


def lines(made):
    return [" ".join(str(i).split()) for i in made.instrs if isinstance(i, Begin | Run)]


def test_microbatches_read_their_own_value_and_what_is_played_once_the_whole_one():
    assert lines(program("attend#0 attend#1 tail", 2)) == [
        "begin x bounds bounds#0 bounds#1",
        "compute y#0 = attend#0(x#0, bounds#0)",
        "compute y#1 = attend#1(x#1, bounds#1)",
        "compute z = tail(y, bounds)",
    ]


def test_the_unsplit_program_reads_the_whole_one():
    assert lines(program("attend tail", 1)) == [
        "begin x bounds",
        "compute y = attend(x, bounds)",
        "compute z = tail(y, bounds)",
    ]


def test_values_of_microbatches_are_arguments_behind_the_others():
    fns = {"": lambda *args: (args[0] * args[1],)}
    module = emit(program("attend#0 attend#1 tail", 2), fns, ["z"])
    x = torch.arange(5.0)
    with WorkLanes((2, 3)) as lanes:
        (z,) = module(lanes, x, torch.tensor(2.0), torch.tensor(10.0), torch.tensor(100.0))
    assert z.tolist() == [0.0, 20.0, 400.0, 600.0, 800.0]


@pytest.mark.parametrize(
    ("instr", "change", "reason"),
    [
        (Run, {"ins": ("x#0", "bounds#1")}, "reads bounds#1, which is not bounds for microbatch 0"),
        (Run, {"ins": ("x#0", "bounds")}, "reads bounds, which is not bounds for microbatch 0"),
        (Begin, {"given": (("bounds", 0), ("bounds", 1), ("bounds", 2))}, "is given bounds#2, for no microbatch"),
        (Begin, {"given": (("bounds", 0),)}, "reads bounds#1, which nothing before it makes"),
    ],
)
def test_the_proof_refuses_another_microbatch_s_value(instr, change, reason):
    made = program("attend#0 attend#1 tail", 2)
    at = next(i for i, found in enumerate(made.instrs) if isinstance(found, instr))
    broken = (*made.instrs[:at], replace(made.instrs[at], **change), *made.instrs[at + 1 :])
    with pytest.raises(InvalidProgram, match=reason):
        verify_program(replace(made, instrs=broken))
