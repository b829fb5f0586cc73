"""Lowering: which registers, and where microbatches begin and end."""

from __future__ import annotations

import pytest

from dbo_compile.errors import InvalidSchedule
from dbo_compile.ir.schedule import ROWS, START, Lane, Schedule, Segment
from dbo_compile.ir.tokens import Count, Local, Shared, Split
from dbo_compile.passes.lower import lower
from tests.ir.moe import comm, compute


def once(name, inputs, outputs, lane=Lane.COMPUTE, **kw):
    return Segment(name, lane, tuple(inputs.split()), tuple(outputs.split()), per_microbatch=False, **kw)


def lowered(steps, segments, places, inputs="x", outputs="", n=2):
    schedule = Schedule({s.name: s for s in segments}, (), n).with_steps(steps)
    return [" ".join(str(i).split()) for i in lower(schedule, places, inputs.split(), outputs.split())]


def test_inputs_are_sliced_and_results_joined():
    segments = (compute("f", "x w", "y"),)
    places = {"x": Split(1), "w": Shared(), "y": Split(0)}
    assert lowered("f#0 f#1", segments, places, "x w", "y w") == [
        "begin x w",
        "compute x#0 = slice(x, dim=1, microbatch=0)",
        "compute x#1 = slice(x, dim=1, microbatch=1)",
        "compute y#0 = f#0(x#0, w)",
        "compute y#1 = f#1(x#1, w)",
        "compute y = join(y#0, y#1, dim=0)",
        "end y w",
    ]


def test_a_barrier_joins_before_and_slices_after():
    segments = (compute("f", "x", "y"), once("norm", "y", "z"), compute("g", "z y", "u"))
    places = {"x": Split(0), "y": Split(1), "z": Split(2), "u": Local()}
    assert lowered("f#1 f#0 norm g#1 g#0", segments, places) == [
        "begin x",
        "compute x#0 = slice(x, dim=0, microbatch=0)",
        "compute x#1 = slice(x, dim=0, microbatch=1)",
        "compute y#1 = f#1(x#1)",
        "compute y#0 = f#0(x#0)",
        "compute y = join(y#0, y#1, dim=1)",
        "compute z = norm(y)",
        "compute z#0 = slice(z, dim=2, microbatch=0)",
        "compute z#1 = slice(z, dim=2, microbatch=1)",
        "compute u#1 = g#1(z#1, y#1)",
        "compute u#0 = g#0(z#0, y#0)",
        "end",
    ]


def test_what_a_collective_made_for_all_tokens_is_sliced_where_it_is_read():
    segments = (once("gather", "x", "y", Lane.COMM), compute("f", "w", "v"), compute("g", "y v", "z"))
    places = {"x": Split(0), "y": Split(0), "w": Shared(), "v": Local(), "z": Local()}
    assert lowered("gather f#0 f#1 g#0 g#1", segments, places, "x w")[2:6] == [
        "compute v#0 = f#0(w)",
        "compute v#1 = f#1(w)",
        "compute y#0 = slice(y, dim=0, microbatch=0)",
        "compute z#0 = g#0(y#0, v#0)",
    ]


def test_numbers_of_rows_are_made_at_their_first_use():
    segments = (compute("f", f"{START} x", "y"), compute("g", f"y {ROWS} {START}", "z"), once("head", f"{ROWS} x", "u"))
    places = {"x": Shared(), "y": Local(), "z": Local(), "u": Shared()}
    assert lowered("f#0 f#1 g#0 g#1 head", segments, places) == [
        "begin x",
        "rows#0, start#0 = rows(0)",
        "compute y#0 = f#0(start#0, x)",
        "rows#1, start#1 = rows(1)",
        "compute y#1 = f#1(start#1, x)",
        "compute z#0 = g#0(y#0, rows#0, start#0)",
        "compute z#1 = g#1(y#1, rows#1, start#1)",
        "rows, start = rows()",
        "compute u = head(rows, x)",
        "end",
    ]


def test_one_microbatch_is_all_tokens():
    segments = (compute("f", f"x {ROWS}", "y"), comm("send", "y", "z"), once("head", "z", "u"))
    places = {"x": Split(0), "y": Local(), "z": Split(3), "u": Split(0)}
    assert lowered("f#0 send#0 head", segments, places, outputs="u z", n=1) == [
        "begin x",
        "rows, start = rows()",
        "compute y = f(x, rows)",
        "comm z = send(y)",
        "compute u = head(z)",
        "end u z",
    ]


def test_state_split_by_tokens_is_written_through_views():
    segments = (compute("f", "kv seen", "k", writes=("kv", "seen"), aliases={"k": "kv"}), once("head", "kv seen", "y"))
    places = {"kv": Split(2), "seen": Shared(), "k": Split(2), "y": Shared()}
    assert lowered("f#0 f#1 head", segments, places, "kv seen", "k") == [
        "begin kv seen",
        "compute kv#0 = slice(kv, dim=2, microbatch=0)",
        "compute kv#1 = slice(kv, dim=2, microbatch=1)",
        "compute k#0 = f#0(kv#0, seen) writes kv#0, seen",
        "compute k#1 = f#1(kv#1, seen) writes kv#1, seen",
        "compute y = head(kv, seen)",
        "compute k = join(k#0, k#1, dim=2)",
        "end k",
    ]


def test_shared_state_is_read_from_the_microbatch_that_wrote_it_last():
    segments = (compute("f", "seen", "s", writes=("seen",), aliases={"s": "seen"}), once("head", "s", "y"))
    places = {"seen": Shared(), "s": Shared(), "y": Shared()}
    assert lowered("f#0 f#1 f#2 head", segments, places, "seen", n=3)[-2:] == ["compute y = head(s#2)", "end"]


def test_a_value_written_after_it_was_joined_is_joined_again():
    segments = (
        compute("f", "x", "y"),
        once("early", "y", "e"),
        compute("add", "y", "", writes=("y",)),
        once("late", "y", "l"),
    )
    places = {"x": Split(0), "y": Split(0), "e": Shared(), "l": Shared()}
    assert lowered("f#0 f#1 early add#0 add#1 late", segments, places)[5:] == [
        "compute y = join(y#0, y#1, dim=0)",
        "compute e = early(y)",
        "compute _ = add#0(y#0) writes y#0",
        "compute _ = add#1(y#1) writes y#1",
        "compute y@1 = join(y#0, y#1, dim=0)",
        "compute l = late(y@1)",
        "end",
    ]


JOINED = (compute("f", "x", "y"), once("head", "y", "z")), "f#0 f#1 head"
SLICED = (once("f", "x", "y"), compute("g", "y", "z")), "f g#0 g#1"


@pytest.mark.parametrize(
    ("graph", "place", "reason"),
    [
        (JOINED, Local("sort"), r"y is Local\(order=sort\), so it cannot be joined"),
        (JOINED, Count(), "y is Count, so it cannot be joined"),
        (SLICED, Local(), r"y is Local\(\), so it cannot be split"),
        (SLICED, Count(), "y is Count, so it cannot be split"),
    ],
)
def test_what_cannot_be_joined_or_split_is_named(graph, place, reason):
    segments, steps = graph
    with pytest.raises(InvalidSchedule, match=reason):
        lowered(steps, segments, {"x": Shared(), "y": place, "z": Split(0)})


def test_writing_to_a_joined_copy_is_refused():
    segments = (compute("f", "x", "y"), once("add", "y", "", writes=("y",)))
    with pytest.raises(InvalidSchedule, match="add writes y in place, but gets it joined: a copy"):
        lowered("f#0 f#1 add", segments, {"x": Split(0), "y": Split(0)})
