"""The clock: what it says of small programs, and that the policies overlap on it."""

from __future__ import annotations

import pytest

from dbo_compile.ir.program import Program
from dbo_compile.ir.schedule import Lane, Schedule
from dbo_compile.ir.tokens import Shared, Split
from dbo_compile.passes.order import order
from dbo_compile.runtime.clock import Interval, Timeline, chart, hidden_text, simulate
from tests.ir.moe import comm, compute, moe_program, program_of

LAYER = (compute("attn", "x", "a"), comm("send", "a", "b"), compute("mlp", "b", "c"))
PLACES = {"x": Split(0), "a": Split(0), "b": Split(0), "c": Split(0)}
COSTS = {"attn": 2.0, "send": 3.0, "mlp": 1.0}


def played(text, segments=LAYER, places=PLACES, n=2):
    schedule = Schedule({s.name: s for s in segments}, (), n).with_steps(text)
    return program_of(schedule, places, ("x",), ())


def ticks(run):
    return COSTS.get(run.segment, 1.0)


def test_lanes_overlap_where_nothing_waits():
    timeline = simulate(played("attn#0 send#0 attn#1 send#1 mlp#0 mlp#1"), ticks)
    assert [str(i) for i in timeline.intervals] == [
        "compute 0..2 attn#0",
        "comm    2..5 send#0",
        "compute 2..4 attn#1",
        "comm    5..8 send#1",
        "compute 5..6 mlp#0",
        "compute 8..9 mlp#1",
    ]
    assert (timeline.makespan, timeline.busy(Lane.COMPUTE), timeline.busy(Lane.COMM), timeline.idle) == (9, 6, 6, 3)
    assert timeline.hidden_comm == pytest.approx(1 / 2)
    assert str(timeline) == "9 in all, compute busy 6, comm busy 6, 50% of comm hidden"


def test_one_microbatch_hides_nothing():
    timeline = simulate(played("attn#0 send#0 mlp#0", n=1), ticks)
    assert (timeline.makespan, timeline.hidden_comm, timeline.idle) == (6, 0, 3)


def test_without_communication_there_is_no_share_that_is_hidden():
    timeline = simulate(played("attn#0 attn#1", LAYER[:1]), ticks)
    assert (timeline.makespan, timeline.hidden_comm, timeline.idle) == (4, None, 0)
    assert str(timeline) == "4 in all, compute busy 4, comm busy 0, no communication"


@pytest.mark.parametrize(
    ("shares", "text"),
    [
        ({"predicted": 0.994, "measured": 0.0}, "communication hidden: 99% predicted, 0% measured"),
        ({"predicted": 0.5, "measured": None}, "communication hidden: 50% predicted"),
        ({"predicted": None, "measured": None}, "no communication"),
    ],
)
def test_the_hidden_share_is_told_where_there_is_one(shares, text):
    assert hidden_text(**shares) == text


def test_no_more_than_all_is_hidden_however_it_rounds():
    spans = [(0.01, 0.02), (0.02, 0.15)]
    compute = [Interval(Lane.COMPUTE, "work", m, *span) for m, span in enumerate(spans)]
    assert sum(i.end - i.start for i in compute) > 0.15 - 0.01
    assert Timeline((*compute, Interval(Lane.COMM, "send", 0, 0.01, 0.15))).hidden_comm <= 1


def test_an_empty_program_takes_no_time():
    timeline = simulate(Program((), {}, 2), ticks)
    assert (timeline, timeline.makespan, timeline.hidden_comm) == (Timeline(()), 0, None)
    assert chart(timeline, 5).splitlines()[:2] == ["compute .....", "comm    ....."]


def test_a_read_on_the_host_holds_up_what_is_issued_after_it():
    segments = (compute("attn", "x", "a"), comm("send", "a", "b"), compute("read", "b", "n", host=True),
                compute("free", "x", "f"), comm("recv", "x", "r"))  # fmt: skip
    places = PLACES | {"n": Split(0), "f": Split(0), "r": Split(0)}
    late = simulate(played("attn#0 send#0 read#0 recv#0 free#0", segments, places, n=1), ticks)
    soon = simulate(played("attn#0 send#0 free#0 recv#0 read#0", segments, places, n=1), ticks)
    assert [(i.segment, i.start) for i in late.intervals] == [
        ("attn", 0), ("send", 2), ("read", 5), ("recv", 6), ("free", 6),
    ]  # fmt: skip
    assert [(i.segment, i.start) for i in soon.intervals] == [
        ("attn", 0), ("send", 2), ("free", 2), ("recv", 5), ("read", 5),
    ]  # fmt: skip


def test_the_chart_shows_who_works_and_who_waits():
    timeline = simulate(played("attn#0 send#0 attn#1 send#1 mlp#0 mlp#1"), ticks)
    assert chart(timeline, 18).splitlines() == [
        "compute 00001111..00....11",
        "comm    ....000000111111..",
        "        0, 1, ... the microbatch at work, = all tokens, . waiting; a column is 0.5",
    ]


def test_the_chart_marks_work_on_all_tokens():
    timeline = Timeline((Interval(Lane.COMPUTE, "head", None, 1.0, 3.0), Interval(Lane.COMPUTE, "far", 11, 3.0, 4.0)))
    assert chart(timeline, 4).splitlines()[0] == "compute .==b"


def stack(num_layers):
    """Equal costs, half of them communication: what two lanes can carry without a gap."""
    segments = [s for i in range(num_layers) for s in (
        compute(f"attn{i}", f"h{i}", f"a{i}"), comm(f"dispatch{i}", f"a{i}", f"d{i}"),
        compute(f"experts{i}", f"d{i}", f"e{i}"), comm(f"combine{i}", f"e{i}", f"h{i + 1}"))]  # fmt: skip
    return {s.name: s for s in segments}


def stack_timeline(policy, num_layers=9, n=2):
    places = {f"{v}{i}": Split(0) for v in "hade" for i in range(num_layers + 1)} | {"w": Shared()}
    program = program_of(order(stack(num_layers), n, policy), places, ("h0",), (f"h{num_layers}",))
    return simulate(program, lambda _: 1.0)


@pytest.mark.parametrize("policy", ["list", "alternate"])
@pytest.mark.parametrize("n", [2, 3])
def test_a_steady_stack_keeps_both_lanes_busy(policy, n):
    timeline = stack_timeline(policy, n=n)
    start, end = 0.2 * timeline.makespan, 0.8 * timeline.makespan
    for lane in Lane:
        steady = [min(i.end, end) - max(i.start, start) for i in timeline.on(lane) if i.end > start and i.start < end]
        assert sum(steady) >= 0.9 * (end - start)


@pytest.mark.parametrize("policy", ["list", "alternate"])
def test_overlap_is_faster_than_the_reference(policy):
    # 9 layers x 2 microbatches x 2 segments on each lane = 36 ticks, and the first and the last have no company.
    assert stack_timeline(policy).makespan == 37
    assert stack_timeline(policy).hidden_comm == pytest.approx(35 / 36)
    assert stack_timeline("sequential").makespan >= 71


@pytest.mark.parametrize("policy", ["list", "alternate"])
def test_the_whole_model_hides_its_communication(policy):
    program = moe_program(5, policy=policy)

    def cost(run):
        return 0.05 if program.segments[run.segment].host else 1.0

    assert simulate(program, cost).hidden_comm > 0.95
