"""Traces for Perfetto, and what is measured: lanes never overlap themselves, and shares come from intervals."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch import nn
from torch.profiler import ProfilerActivity, profile

from dbo_compile import compat, reports
from dbo_compile.ir.schedule import Lane, Step
from dbo_compile.ir.waits import Handover, carried, handovers
from dbo_compile.levels import Chart
from dbo_compile.measure import in_order, measured, measured_each, timed
from dbo_compile.runtime.clock import Interval, Timeline
from dbo_compile.runtime.steps import around_steps, ranged
from dbo_compile.trace import chrome_trace
from tests.ir.moe import moe_program
from tests.tensors import values

EAGER = {"inner": "eager", "split": "always"}


pytestmark = pytest.mark.usefixtures("group")


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.shared, self.down = (nn.Linear(5, 5) for _ in range(3))

    def forward(self, x):
        return self.down(funcol.all_reduce(self.up(x), "sum", dist.group.WORLD)) + self.shared(x)


@pytest.fixture
def compiled():
    torch._dynamo.reset()
    model = torch.compile(nn.Sequential(Layer(), Layer()).double(), backend="dbo", options=EAGER, fullgraph=True)
    with torch.no_grad():
        model(values(9, 5))
        yield model


# -- which step waits for which -----------------------------------------------------------------------------------


def test_handovers_are_the_waits_of_a_program():
    found = [str(h) for h in handovers(moe_program(1))]
    first = ["attn0#0 -> counts0#0", "attn0#1 -> counts0#1", "counts0#0 -> sizes0#0", "sizes0#0 -> dispatch0#0"]
    assert found[:4] == first
    program = moe_program(3)
    lanes = {s.name: s.lane for s in program.segments.values()}
    assert all(lanes[h.maker.segment] is not lanes[h.reader.segment] for h in handovers(program))


def test_a_request_in_two_microbatches_leads_from_one_to_the_next_on_the_lane():
    program = moe_program(1, num_microbatches=3)
    paged = program.segments | {"attn0": replace(program.segments["attn0"], paged=("kv0",))}
    assert [str(h) for h in carried(replace(program, segments=paged))] == ["attn0#0 -> attn0#1", "attn0#1 -> attn0#2"]
    assert carried(replace(program, segments=paged, straddles=False)) == ()
    assert carried(program) == ()


# -- traces -------------------------------------------------------------------------------------------------------

TIMELINE = Timeline((
    Interval(Lane.COMPUTE, "attn", 0, 0.0, 2e-3),
    Interval(Lane.COMM, "send", 0, 2e-3, 5e-3),
    Interval(Lane.COMPUTE, "head", None, 5e-3, 6e-3),
))


def test_a_trace_has_a_process_for_each_chart_and_a_thread_for_each_lane():
    arrows = (Handover(Step("attn", 0), Step("send", 0)), Handover(Step("gone", 0), Step("send", 0)))
    charts = [Chart("predicted", TIMELINE, arrows, {"attn": "layers.0.attn"}), Chart("measured", TIMELINE)]
    events = json.loads(chrome_trace(charts, rank=3))["traceEvents"]
    named = [e for e in events if e["name"] in ("process_name", "thread_name")]
    assert [(e["pid"], e.get("tid"), e["args"]["name"]) for e in named] == [
        (3000, None, "rank 3, predicted"),
        (3000, 1, "compute"),
        (3000, 2, "comm"),
        (3001, None, "rank 3, measured"),
        (3001, 1, "compute"),
        (3001, 2, "comm"),
    ]
    steps = [(e["name"], e["tid"], e["ts"], e["dur"], e["args"]["module"]) for e in events if e["ph"] == "X"]
    assert steps[:3] == [
        ("attn#0", 1, 0, 2000, "layers.0.attn"),
        ("send#0", 2, 2000, 3000, ""),
        ("head", 1, 5000, 1000, ""),
    ]
    assert [(e["ph"], e["tid"], e["ts"]) for e in events if e["ph"] in "sf"] == [("s", 1, 2000), ("f", 2, 2000)]


# -- measuring ----------------------------------------------------------------------------------------------------


def test_measured_has_a_timeline_for_each_call_with_every_step_in_order(compiled):
    with measured() as timelines:
        for n in (9, 4):
            torch.testing.assert_close(compiled(values(n, 5)), compiled._orig_mod(values(n, 5)), rtol=0, atol=1e-12)
    compiled(values(9, 5))
    assert len(timelines) == 2
    steps = [str(s) for s in reports()[-1].levels.schedule.steps]
    for timeline in timelines:
        assert sorted(f"{i.segment}#{i.microbatch}" for i in timeline.intervals) == sorted(steps)
        for lane in Lane:
            on = timeline.on(lane)
            assert all(i.start <= i.end for i in on)
            assert all(a.end <= b.start for a, b in pairwise(on))


def test_measured_calls_are_those_of_the_block_also_when_one_fails(compiled):
    with pytest.raises(ZeroDivisionError), measured() as timelines:  # ruff: ignore[pytest-raises-with-multiple-statements]
        compiled(values(7, 5))
        raise ZeroDivisionError
    compiled(values(9, 5))
    assert len(timelines) == 1


def test_blocks_may_lie_inside_each_other(compiled):
    with measured() as outer, measured() as inner:
        compiled(values(7, 5))
    compiled(values(9, 5))
    assert (len(outer), len(inner)) == (1, 1)
    assert [i.segment for i in outer[0].intervals] == [i.segment for i in inner[0].intervals]


def test_each_graph_has_timelines_of_its_own(compiled):
    other = torch.compile(Layer().double(), backend="dbo", options=EAGER, fullgraph=True)
    other(values(9, 5))
    with measured_each(reports()[-2:]) as (first, second):
        compiled(values(7, 5))
        other(values(7, 5))
        other(values(7, 5))
    assert (len(first), len(second)) == (1, 2)


def test_spans_of_a_lane_that_overlap_become_intervals_that_do_not():
    spans = [
        (Lane.COMM, Step("a", 0), 1.0, 4.0),
        (Lane.COMM, Step("b", 0), 2.0, 3.0),  # ended before the one it was queued behind
        (Lane.COMPUTE, Step("x", 0), 0.0, 2.5),
        (Lane.COMM, Step("c", 0), 3.5, 6.0),
    ]
    made = ["comm    1..4 a#0", "comm    4..4 b#0", "compute 0..2.5 x#0", "comm    4..6 c#0"]
    assert [str(i) for i in in_order(spans)] == made


@pytest.mark.parametrize(
    ("compute", "comm", "share"),
    [
        ([(0, 4)], [(1, 3)], 1.0),
        ([(0, 1), (3, 4)], [(1, 3)], 0.0),
        ([(0, 2)], [(1, 5)], 1 / 4),
        ([(0, 2), (3, 4), (6, 9)], [(1, 5), (7, 8)], (1 + 1 + 1) / 5),
        ([(0, 2)], [], None),
        ([], [(0, 2)], 0.0),
    ],
)
def test_the_hidden_share_is_that_of_the_intervals(compute, comm, share):
    lanes = [(Lane.COMPUTE, compute), (Lane.COMM, comm)]
    timeline = Timeline(tuple(Interval(lane, "s", i, *span) for lane, spans in lanes for i, span in enumerate(spans)))
    assert timeline.hidden_comm == pytest.approx(share)


class Slow:
    """A module that has been emitted, of two steps, whose second is a collective that takes its time."""

    def __init__(self):
        self.steps = {"a_0": Step("a", 0), "b_0": Step("b", 0)}

    @staticmethod
    def a(x):
        return x + 1

    @staticmethod
    def b(lanes, x):
        return lanes.issue(torch.ops._c10d_functional.all_reduce.default, x, "sum", "0")

    def forward(self, lanes, x):
        made = self.a(x)
        return self.b(lanes, made)


def test_a_timed_player_plays_what_it_is_given():
    engine_player = reports_player()
    kept = []
    player = timed(engine_player, lambda rows, timeline: kept.append((rows, timeline)))
    assert torch.equal(player(Slow(), (3,), (torch.ones(3),)), torch.full((3,), 2.0))
    ((rows, timeline),) = kept
    assert rows == (3,)
    assert [(i.lane, i.segment) for i in timeline.intervals] == [(Lane.COMPUTE, "a"), (Lane.COMM, "b")]


def reports_player():
    torch._dynamo.reset()
    fn = torch.compile(Layer().double(), backend="dbo", options=EAGER)
    with torch.no_grad():
        fn(values(9, 5))
    return reports()[-1].engine.player


# -- something around steps ---------------------------------------------------------------------------------------


def test_what_is_around_steps_nests_and_leaves_the_module_alone():
    said = []

    def around(name):
        def play(step, fn, args):
            said.append(f"{name} {step}")
            return fn(*args)

        return play

    class Lanes:
        def issue(self, op, x, *_):
            return x

    wrapped = around_steps(around_steps(Slow(), lambda _: around("inner")), lambda _: around("outer"))
    assert torch.equal(wrapped(Lanes(), torch.zeros(3)), torch.ones(3))
    assert said == ["outer a#0", "inner a#0", "outer b#0", "inner b#0"]
    assert torch.equal(Slow().forward(Lanes(), torch.zeros(3)), torch.ones(3))
    assert len(said) == 4


def test_a_profiler_sees_each_step_by_its_name(compiled):
    assert not compat.is_profiling()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        assert compat.is_profiling()
        compiled(values(9, 5))
    names = [e.name for e in sorted(profiler.events(), key=lambda e: e.time_range.start) if e.name.startswith("dbo/")]
    assert names == [f"dbo/{step}" for step in reports()[-1].levels.schedule.steps]


def test_without_a_profiler_the_module_itself_is_played():
    module = Slow()
    assert ranged(module) is module


# -- TORCH_TRACE --------------------------------------------------------------------------------------------------


def test_tlparse_gets_the_levels_under_the_compile_id(caplog):
    torch._dynamo.reset()
    with caplog.at_level(logging.DEBUG, "torch.__trace"), torch.no_grad():
        torch.compile(Layer().double(), backend="dbo", options=EAGER)(values(9, 5))
    found = {r.metadata["artifact"]["name"]: r for r in caplog.records if "artifact" in getattr(r, "metadata", {})}
    levels = reports()[-1].levels
    for name, text in {"dbo_schedule": str(levels.schedule), "dbo_program": str(levels.program)}.items():
        assert found[name].payload == text
        assert found[name].metadata["frame_id"] is not None
    assert json.loads(found["dbo_report"].payload)["split"]
    assert "Split(0)" in found["dbo_placements"].payload
