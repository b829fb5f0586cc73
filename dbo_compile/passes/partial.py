"""Partial split: segments whose parts cost more than they hide are played once, on all rows, between split neighbours.

A product of few rows reads its weights once for each microbatch. Takes segments and costs, returns segments of which
some are not played per microbatch any more; never changes what a segment computes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from dbo_compile.errors import InvalidSchedule
from dbo_compile.ir.schedule import ROWS, START, Lane, Segment
from dbo_compile.ir.tokens import Placement, Shared, Split

LEAST_GAIN = 0.005
"""The share of the whole by which joining a code must shorten it: joins and slices cost a little too."""


def join_costly(
    segments: Mapping[str, Segment],
    places: Mapping[str, Placement],
    extra: Mapping[str, float],
    makespan: Callable[[Mapping[str, Segment]], float],
) -> Mapping[str, Segment]:
    """Join the codes, one after the other, that shorten the whole; `extra` is what splitting each of them costs more.

    `makespan` tells how long given segments take, with all that overlaps. Raises what it raises for `segments`.
    """
    found, shortest = segments, makespan(segments)
    for code in sorted(extra, key=lambda code: -extra[code]):
        same = [s for s in segments.values() if s.code == code]
        if extra[code] <= 0 or not all(_can_be_joined(s, places) for s in same):
            continue
        joined = {s.name: replace(s, per_microbatch=False) for s in same}
        trial = {name: joined.get(name, s) for name, s in found.items()}
        try:
            length = makespan(trial)
        except InvalidSchedule:
            continue
        if length < (1 - LEAST_GAIN) * shortest:
            found, shortest = trial, length
    return found


def _can_be_joined(segment: Segment, places: Mapping[str, Placement]) -> bool:
    """Whether rows go in and come out that can be joined and sliced, and nothing else is changed."""
    values = [v for v in (*segment.inputs, *segment.outputs) if v not in (ROWS, START)]
    more = segment.host or segment.writes or segment.prefix or segment.whole
    plain = segment.lane is Lane.COMPUTE and segment.per_microbatch and not more
    return plain and all(isinstance(places.get(v), Split | Shared) for v in values)
