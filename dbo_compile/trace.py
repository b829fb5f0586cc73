"""Lanes as a Chrome trace: open the file in https://ui.perfetto.dev or chrome://tracing. One process a chart, one
thread a lane, an arrow for each event between lanes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from dbo_compile.ir.schedule import Lane, Step
from dbo_compile.levels import Chart
from dbo_compile.runtime.clock import Interval

MICROSECONDS = 1e6
THREADS = {lane: i + 1 for i, lane in enumerate(Lane)}


def chrome_trace(charts: Sequence[Chart], rank: int = 0) -> str:
    """The charts as JSON of the trace event format. Traces of several ranks may be put together: ids differ."""
    events = [event for i, chart in enumerate(charts) for event in _events(chart, f"rank {rank}", 1000 * rank + i)]
    return json.dumps({"displayTimeUnit": "ms", "traceEvents": events}, indent=1)


def _events(chart: Chart, rank: str, pid: int) -> Iterator[dict[str, Any]]:
    yield {"ph": "M", "name": "process_name", "pid": pid, "args": {"name": f"{rank}, {chart.title}"}}
    yield {"ph": "M", "name": "process_sort_index", "pid": pid, "args": {"sort_index": pid}}
    for lane, tid in THREADS.items():
        yield {"ph": "M", "name": "thread_name", "pid": pid, "tid": tid, "args": {"name": lane.value}}
        yield {"ph": "M", "name": "thread_sort_index", "pid": pid, "tid": tid, "args": {"sort_index": tid}}
    at = {Step(i.segment, i.microbatch): i for i in chart.timeline.intervals}
    for step, interval in at.items():
        args = {"segment": step.segment, "microbatch": step.microbatch, "module": chart.paths.get(step.segment, "")}
        duration = (interval.end - interval.start) * MICROSECONDS
        yield _at(interval, pid, interval.start) | {"ph": "X", "name": str(step), "dur": duration, "args": args}
    for number, handover in enumerate([*chart.handovers, *chart.carried]):
        if handover.maker in at and handover.reader in at:
            flow = {"name": str(handover), "cat": "event", "id": pid * 100_000 + number}
            made, read = at[handover.maker], at[handover.reader]
            yield _at(made, pid, made.end) | flow | {"ph": "s"}
            yield _at(read, pid, read.start) | flow | {"ph": "f", "bp": "e"}


def _at(interval: Interval, pid: int, seconds: float) -> dict[str, Any]:
    return {"pid": pid, "tid": THREADS[interval.lane], "ts": seconds * MICROSECONDS, "cat": interval.lane.value}
