"""The verifier of schedules, and what it calls a need."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from dbo_compile.errors import InvalidSchedule
from dbo_compile.ir.needs import needs_of
from dbo_compile.ir.schedule import Lane, Schedule, Segment, Step
from dbo_compile.ir.verify import verify_schedule
from tests.ir.moe import comm, compute, moe_schedule

SEGMENTS = {
    s.name: s
    for s in (
        compute("attn", "x", "a"),
        comm("send", "a", "b"),
        compute("mlp", "b", "c"),
        Segment("head", Lane.COMPUTE, ("c",), ("y",), per_microbatch=False),
    )
}
SCHEDULE = Schedule(SEGMENTS, (), 2)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("attn#0 attn#1 send#0 mlp#1 send#1 mlp#0 head", "step 3: mlp#1 must come after send#1: it makes b"),
        ("attn#0 attn#1 send#0 send#1 mlp#0 head mlp#1", "step 5: head must come after mlp#1: it makes c"),
        ("attn#0 attn#1 send#0 send#1 mlp#0 mlp#1", "step 6: head is never played, expected once"),
        ("attn#0 attn#0 send#0 send#1 mlp#0 mlp#1 head", "step 1: attn#0 is played 2 times, expected once"),
        ("attn#0 attn#2 send#0 send#1 mlp#0 mlp#1 head", "step 1: attn#2 is not a step of this model"),
        ("attn send#0 send#1 mlp#0 mlp#1 head", "step 0: attn is not a step of this model"),
        ("attn#0 tail", "step 1: tail is not a step of this model"),
    ],
)
def test_a_wrong_schedule_is_refused_with_the_place(text, reason):
    at = int(re.findall(r"\d+", reason)[0])
    here = [*text.split(), ""][at]
    with pytest.raises(InvalidSchedule) as error:
        verify_schedule(SCHEDULE.with_steps(text))
    first, second = str(error.value).splitlines()
    assert first.startswith(reason)
    assert f">>>{here}<<<" in second


def test_right_schedules_pass():
    verify_schedule(SCHEDULE.with_steps("attn#1 send#1 attn#0 mlp#1 send#0 mlp#0 head"))
    verify_schedule(replace(SCHEDULE, num_microbatches=1).with_steps("attn#0 send#0 mlp#0 head"))


@pytest.mark.parametrize("at", range(1, 49))
def test_a_step_moved_before_all_others_is_refused(at):
    schedule = moe_schedule(3)
    steps = (schedule.steps[at], *schedule.steps[:at], *schedule.steps[at + 1 :])
    if schedule.steps[at] != Step("attn0", 1):
        with pytest.raises(InvalidSchedule, match=f"{schedule.steps[at]} must come after"):
            verify_schedule(replace(schedule, steps=steps))


def test_needs_follow_memory_through_aliases():
    segments = (
        compute("look", "x", "v", aliases={"v": "x"}),
        compute("read", "v", "r"),
        compute("write", "x", "w", writes=("x",)),
        compute("again", "v", "s"),
        compute("last", "r", "t", after=("again",)),
    )
    assert needs_of({s.name: s for s in segments}, 2) == {
        "look": {},
        "read": {"look": "it makes v"},
        "write": {
            "look": "it reads x before write overwrites it",
            "read": "it reads x before write overwrites it",
        },
        "again": {"look": "it makes v", "write": "it writes v in place"},
        "last": {"read": "it makes r", "again": "the graph has it first"},
    }


def test_needs_chain_the_collectives_of_each_group_and_all_of_an_unsplit_step():
    segments = (comm("a", "x", "y"), replace(comm("b", "x", "z"), group="tp"), comm("c", "x", "u"))
    assert needs_of({s.name: s for s in segments}, 2) == {
        "a": {},
        "b": {},
        "c": {"a": "the collectives of group ep are issued in the order of the graph"},
    }
    why = "the collectives of an unsplit step are issued in the order of the graph"
    assert needs_of({s.name: s for s in segments}, 1) == {"a": {}, "b": {"a": why}, "c": {"b": why}}
