"""The policies: what they order, and that what they order overlaps."""

from __future__ import annotations

import time

import pytest

from dbo_compile.ir.schedule import Lane, Segment, Step
from dbo_compile.ir.verify import verify_schedule
from dbo_compile.passes.order import POLICIES, order
from tests.ir.moe import comm, compute, moe, moe_schedule

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
