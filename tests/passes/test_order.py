"""The policies: what they order, and that what they order overlaps."""

from __future__ import annotations

import time

import pytest

from dbo_compile.ir.schedule import Lane, Segment, Step
from dbo_compile.ir.tokens import Split
from dbo_compile.ir.verify import verify_schedule
from dbo_compile.passes.order import POLICIES, order
from dbo_compile.runtime.clock import simulate
from tests.ir.moe import comm, compute, moe, moe_schedule, program_of

LAYER = {s.name: s for s in (compute("attn", "x", "a"), comm("send", "a", "b"), compute("mlp", "b", "c"))}


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ("sequential", "attn#0 send#0 mlp#0 attn#1 send#1 mlp#1"),
        ("alternate", "attn#0 send#0 attn#1 send#1 mlp#0 mlp#1"),
        ("list", "attn#0 send#0 attn#1 send#1 mlp#0 mlp#1"),
    ],
)
def test_each_policy_orders_one_layer(policy, expected):
    assert str(order(LAYER, 2, policy)) == expected


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("num_microbatches", [1, 2, 3, 4])
def test_every_policy_gives_valid_schedules_and_always_the_same(policy, num_microbatches):
    schedule = moe_schedule(3, num_microbatches, policy)
    verify_schedule(schedule)
    assert moe_schedule(3, num_microbatches, policy) == schedule


def test_an_unknown_policy_is_refused():
    with pytest.raises(ValueError, match="no policy 'fast'; there are list, alternate, sequential"):
        order(LAYER, 2, "fast")


def test_sequential_plays_block_by_block():
    once = Segment("norm", Lane.COMPUTE, ("c",), ("n",), per_microbatch=False)
    segments = LAYER | {"norm": once, "tail": compute("tail", "n", "t")}
    assert str(order(segments, 2, "sequential")) == "attn#0 send#0 mlp#0 attn#1 send#1 mlp#1 norm tail#0 tail#1"


def test_alternate_switches_at_the_first_result_it_needs_and_then_takes_all():
    segments = (comm("one", "x", "a"), comm("two", "x", "b"), compute("f", "x", "u"), compute("g", "a b u", "v"),
                compute("h", "b v", "w"))  # fmt: skip
    schedule = order({s.name: s for s in segments}, 3, "alternate")
    assert str(schedule) == "one#0 two#0 f#0 one#1 two#1 f#1 one#2 two#2 f#2 g#0 h#0 g#1 h#1 g#2 h#2"


def test_list_puts_the_longest_way_first():
    segments = (
        compute("short", "x", "s"),
        compute("long", "x", "l"),
        comm("send", "l", "b"),
        compute("end", "b s", ""),
    )
    assert str(order({s.name: s for s in segments}, 1)) == "long#0 send#0 short#0 end#0"


def test_list_follows_the_costs():
    segments = (compute("attn", "x", "a"), comm("send", "a", "b"), compute("filler", "a", "f"), compute("mlp", "b", ""))
    named = {s.name: s for s in segments}
    long = order(named, 2, cost=lambda step: 5.0 if step.segment == "filler" else 1.0)
    short = order(named, 2, cost=lambda step: 0.5 if step.segment == "filler" else 1.0)
    assert str(long) == "attn#0 send#0 attn#1 send#1 filler#0 filler#1 mlp#0 mlp#1"
    assert str(short) == "attn#0 send#0 attn#1 send#1 mlp#0 mlp#1 filler#0 filler#1"


def counting(lane):
    sizes = Segment("sizes", lane, ("c",), ("n",), per_microbatch=True, host=True)
    return {
        "attn": compute("attn", "x", "a"),
        "counts": comm("counts", "a", "c"),
        "sizes": sizes,
        "send": comm("send", "a n", "b"),
    }


@pytest.mark.parametrize("policy", ["list", "alternate"])
@pytest.mark.parametrize("lane", Lane)
def test_ready_compute_is_issued_before_a_read_on_the_host_that_would_block(policy, lane):
    schedule = order(counting(lane), 2, policy)
    assert str(schedule).startswith("attn#0 counts#0 attn#1 counts#1 sizes#0 ")


def test_list_issues_a_read_on_the_comm_lane_after_the_compute_that_starts_before_it():
    segments = counting(Lane.COMM) | {f"f{i}": compute(f"f{i}", "x", f"y{i}") for i in range(3)}
    assert str(order(segments, 1)) == "attn#0 counts#0 f0#0 f1#0 sizes#0 send#0 f2#0"


def test_list_counts_rows_before_a_long_stretch_of_the_other_microbatch():
    layer = (compute("attn", "x", "a"), comm("counts", "a", "c"), compute("sum", "c", "m"), comm("send", "a m", "b"))
    segments = {s.name: s for s in layer}
    soon, late = {"counts": 0.05, "sum": 0.01}, {"counts": 0.7, "sum": 0.01}
    assert str(order(segments, 2, cost=lambda step: soon.get(step.segment, 1.0))) == (
        "attn#0 counts#0 sum#0 send#0 attn#1 counts#1 sum#1 send#1"
    )
    assert str(order(segments, 2, cost=lambda step: late.get(step.segment, 1.0))) == (
        "attn#0 counts#0 attn#1 counts#1 sum#0 send#0 sum#1 send#1"
    )


def test_short_compute_that_feeds_no_collective_soon_goes_after_what_is_more_urgent():
    tail = (compute("tiny", "x", "t"), compute("end", "t", ""))
    segments = {s.name: s for s in (compute("attn", "x", "a"), comm("send", "a", "b"), compute("mlp", "b", "c"), *tail)}
    schedule = order(segments, 2, cost=lambda step: 0.01 if step.segment == "tiny" else 1.0)
    assert str(schedule).startswith("attn#0 send#0 attn#1 send#1 ")


def test_a_step_is_held_up_by_a_quarter_of_its_time_at_most():
    # Each count feeds a collective after 0.1, and all are ready at once: two and no more fit in a quarter of `long`.
    counts = {f"count{i}": compute(f"count{i}", "x", f"c{i}") for i in range(7)}
    sends = {f"send{i}": comm(f"send{i}", f"c{i}", f"s{i}") for i in range(7)}
    named = {"long": compute("long", "x", "l")} | counts | sends | {"end": compute("end", "l", "")}
    costs = dict.fromkeys(counts, 0.1) | {"end": 9.0}
    schedule = order(named, 1, cost=lambda step: costs.get(step.segment, 1.0))
    compute_steps = [s.segment for s in schedule.steps if named[s.segment].lane is Lane.COMPUTE]
    assert compute_steps[:4] == ["count0", "count1", "long", "count2"]


def test_compute_that_starts_while_a_read_waits_for_its_counts_is_issued_before_it():
    # The comm lane waits for `sizes` rather than start `other`, but `fill` starts first: `sizes` must not hold it up.
    sizes = Segment("sizes", Lane.COMM, ("m",), ("n",), per_microbatch=True, host=True)
    segments = (compute("attn", "x", "a"), comm("early", "a", "e"), compute("sum", "a", "m"), sizes,
                comm("other", "e", "o"), compute("mlp", "n e", "y"), compute("fill", "x", "f"))  # fmt: skip
    costs = {"early": 0.9, "sum": 0.95, "sizes": 0.1}
    named = {s.name: s for s in segments}
    schedule = order(named, 1, cost=lambda step: costs.get(step.segment, 1.0))
    assert str(schedule) == "attn#0 early#0 sum#0 fill#0 sizes#0 other#0 mlp#0"


EXACT = {"counts": 0.05, "sum": 0.01, "read": 0.01, "prep": 0.05}


def exact_layer(i, lane):
    """Expert parallelism that sends exactly the rows there are: counted, exchanged, read, and then sent."""
    read = Segment(f"read{i}", lane, (f"m{i}",), (f"n{i}",), per_microbatch=True, host=True)
    return (
        *(compute(f"attn{i}", f"h{i}", f"a{i}"), comm(f"counts{i}", f"a{i}", f"c{i}")),
        *(compute(f"sum{i}", f"c{i}", f"m{i}"), read, comm(f"dispatch{i}", f"a{i} n{i}", f"d{i}")),
        *(compute(f"prep{i}", f"d{i} n{i}", f"p{i}"), compute(f"experts{i}", f"p{i}", f"e{i}")),
        comm(f"combine{i}", f"e{i} n{i}", f"h{i + 1}"),
    )


@pytest.mark.parametrize("lane", Lane)
@pytest.mark.parametrize("n", [2, 3])
def test_exact_expert_parallelism_keeps_both_lanes_busy(n, lane):
    segments = {s.name: s for i in range(11) for s in exact_layer(i, lane)}
    schedule = order(segments, n, cost=lambda step: EXACT.get(step.segment.rstrip("0123456789"), 1.0))
    places = {v: Split(0) for s in segments.values() for v in (*s.inputs, *s.outputs)}
    program = program_of(schedule, places, ("h0",), ("h11",))
    timeline = simulate(program, lambda run: EXACT.get(run.segment.rstrip("0123456789"), 1.0))
    start, end = 0.2 * timeline.makespan, 0.8 * timeline.makespan
    for on in Lane:
        steady = [min(i.end, end) - max(i.start, start) for i in timeline.on(on) if i.end > start and i.start < end]
        assert sum(steady) >= 0.95 * (end - start)


def test_threaded_segments_play_microbatch_0_first():
    segments = {"f": compute("f", "x", "y"), "g": compute("g", "y", "z")}

    def cost(step):
        return 9.0 if step == Step("g", 2) else 1.0

    assert str(order(segments, 3, cost=cost)).startswith("f#2 ")
    steps = order(segments, 3, cost=cost, threaded=frozenset({"g"})).steps
    assert [s.microbatch for s in steps if s.segment == "g"] == [0, 1, 2]


def test_once_played_segments_come_after_all_microbatches():
    schedule = moe_schedule(1, 3)
    assert str(schedule).endswith("add0#2 head")


@pytest.mark.parametrize(("num_layers", "limit_s"), [(61, 0.2), (1250, 3.0)])
def test_ordering_is_near_linear(num_layers, limit_s):
    segments = moe(num_layers)
    start = time.process_time()
    schedule = order(segments, 2)
    assert time.process_time() - start < limit_s
    assert len(schedule.steps) == 16 * num_layers + 1


def test_ordering_is_near_linear_where_much_is_ready_at_once():
    width = 3001
    named = {f"f{i}": compute(f"f{i}", "x", f"y{i}") for i in range(width)}
    named |= {f"s{i}": comm(f"s{i}", f"y{i}", f"z{i}") for i in range(width)}
    start = time.process_time()
    order(named, 2, cost=lambda step: 0.01 if int(step.segment[1:]) % 2 else 1.0)
    assert time.process_time() - start < 5.0  # quadratic: half a minute
