"""Partial split: which segments are joined when their parts cost more than they hide."""

from __future__ import annotations

import pytest

from dbo_compile.errors import InvalidSchedule
from dbo_compile.ir.program import Program
from dbo_compile.ir.proof import verify_program
from dbo_compile.ir.schedule import Lane, Segment
from dbo_compile.ir.tokens import Local, Shared, Split
from dbo_compile.passes.lower import lower
from dbo_compile.passes.order import order
from dbo_compile.passes.partial import join_costly
from dbo_compile.passes.sync import sync
from dbo_compile.runtime.clock import simulate


def compute(name, ins, outs, **options):
    return Segment(name, Lane.COMPUTE, tuple(ins), tuple(outs), per_microbatch=True, code=name, **options)


def comm(name, ins, outs):
    return Segment(name, Lane.COMM, tuple(ins), tuple(outs), per_microbatch=True, code=name, group="0")


def layer(head="head"):
    """A head that reads many weights, before and after it an exchange."""
    made = [
        compute("attn", ["x"], ["a"]),
        comm("send", ["a"], ["b"]),
        compute("mlp", ["b"], ["c"]),
        comm("back", ["c"], ["d"]),
        compute(head, ["d"], ["y"]),
    ]
    return {s.name: s for s in made}


def places(segments, **other):
    values = {v for s in segments.values() for v in (*s.inputs, *s.outputs)}
    return dict.fromkeys(values, Split(0)) | other


def joined(segments, costs, where):
    """The segments that are played once, and the makespan before and after; costs are of a part and of the whole."""

    def cost(step):
        part, whole = costs[segments[step.segment].code]
        return whole if step.microbatch is None else part

    def makespan(parts):
        schedule = order(parts, 2, cost=cost)
        program = Program(sync(lower(schedule, where, ["x"], ["y"]), parts), parts, 2)
        verify_program(program)
        return simulate(program, cost).makespan

    extra = {code: 2 * part - whole for code, (part, whole) in costs.items()}
    found = join_costly(segments, where, extra, makespan)
    return [s.name for s in found.values() if not s.per_microbatch], makespan(segments), makespan(found)


EVEN = {"attn": (4, 8), "send": (4, 8), "mlp": (4, 8), "back": (4, 8), "head": (4, 8)}


def test_nothing_is_joined_where_parts_cost_half():
    names, before, after = joined(layer(), EVEN, places(layer()))
    assert (names, before) == ([], after)


def test_what_costs_as_much_for_a_part_as_for_all_is_joined_at_the_end():
    names, before, after = joined(layer(), EVEN | {"head": (9, 10)}, places(layer()))
    assert names == ["head"]
    assert after < before


def test_a_segment_that_hides_more_than_its_parts_cost_stays_split():
    names, _, _ = joined(layer(), EVEN | {"mlp": (4.5, 8)}, places(layer()))
    assert names == []


@pytest.mark.parametrize(
    "case", ["local rows", "written in place", "read on the host", "communicates", "needed before it is made"]
)
def test_what_cannot_be_joined_is_left_alone(case):
    segments, costs = layer(), EVEN | {"head": (9, 10)}
    where = places(segments)
    if case == "local rows":
        where = places(segments, d=Local())
    elif case == "written in place":
        segments["head"] = compute("head", ["d", "cache"], ["y"], writes=("cache",))
        where = places(segments)
    elif case == "read on the host":
        segments["head"] = compute("head", ["d"], ["y"], host=True)
    elif case == "communicates":
        segments["head"] = comm("head", ["d"], ["y"])
    found = join_costly(segments, where, {"head": 8.0}, lambda parts: shorter_if_joined(parts, case))
    assert found == segments
    assert costs["head"] == (9, 10)


def shorter_if_joined(segments, case):
    if case == "needed before it is made" and not segments["head"].per_microbatch:
        raise InvalidSchedule("d cannot be joined")
    return 10.0 if segments["head"].per_microbatch else 5.0


def test_what_all_tokens_share_may_be_read_by_what_is_joined():
    segments = layer()
    segments["head"] = compute("head", ["d", "weight"], ["y"])
    where = places(segments, weight=Shared())
    found = join_costly(segments, where, {"head": 8.0}, lambda parts: shorter_if_joined(parts, ""))
    assert [s.name for s in found.values() if not s.per_microbatch] == ["head"]
