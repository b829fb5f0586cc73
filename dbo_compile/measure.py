"""Measure: the lanes of real calls, as intervals on the same chart that the clock draws."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from dbo_compile.ir.schedule import Lane, Step
from dbo_compile.report import Report, reports
from dbo_compile.runtime.clock import Interval, Timeline
from dbo_compile.runtime.collectives import Pending
from dbo_compile.runtime.lanes import WorkLanes
from dbo_compile.runtime.steps import Around, around_steps

Player = Callable[[Callable[..., Any], Sequence[int], Sequence[Any]], tuple[Any, ...]]
Keep = Callable[[Sequence[int], Timeline], None]

DONE_WITHIN = 1.0
"""Seconds to wait for a finished collective to say so: its callback runs on another thread."""


@contextmanager
def measured() -> Generator[list[Timeline]]:
    """Time every call of every split graph inside the block: one `Timeline` a call, in seconds since its start.

    A collective lasts from its start until its process group says it is done; the next one on the lane begins where
    it ends. On an accelerator, what counts is when its streams begin and end a step. A measured call costs some
    microseconds a step more, and waits for the device at its end.
    """
    timelines: list[Timeline] = []
    with _players([r for r in reports() if r.engine], lambda _, timeline: timelines.append(timeline)):
        yield timelines


@contextmanager
def measured_each(graphs: Sequence[Report]) -> Generator[list[list[Timeline]]]:
    """Do what `measured` does, for these graphs, with a list for each of them."""
    timelines: list[list[Timeline]] = [[] for _ in graphs]
    with _players(graphs, lambda i, timeline: timelines[i].append(timeline)):
        yield timelines


@contextmanager
def _players(graphs: Sequence[Report], keep: Callable[[int, Timeline], None]) -> Generator[None]:
    engines = {i: r.engine for i, r in enumerate(graphs) if r.engine is not None}
    before = {i: engine.player for i, engine in engines.items()}
    for i, engine in engines.items():
        engine.player = timed(engine.player, lambda _, timeline, i=i: keep(i, timeline))  # type: ignore[misc]
    try:
        yield
    finally:
        for i, engine in engines.items():
            engine.player = before[i]


def timed(player: Player, keep: Keep) -> Player:
    """`player`, which also hands the rows and the timeline of each call to `keep`.

    A player that replays recordings has another one under it, which plays step by step: that one is timed.
    """
    player = getattr(player, "player", player)

    def play(module: Callable[..., Any], rows: Sequence[int], args: Sequence[Any]) -> tuple[Any, ...]:
        clocks: list[_Clock] = []

        def begin(lanes: Any) -> Around:
            clocks.append(_HostClock(lanes) if isinstance(lanes, WorkLanes) else _StreamClock())
            return clocks[-1].play

        results = player(around_steps(module, begin), rows, args)
        for clock in clocks:
            keep(rows, Timeline(tuple(clock.intervals())))
        return results

    return play


class _Clock(Protocol):
    def play(self, step: Step, fn: Callable[..., Any], args: tuple[Any, ...]) -> Any: ...
    def intervals(self) -> list[Interval]: ...


@dataclass(slots=True)
class _Span:
    """A stretch of time that may still be going on."""

    step: Step
    start: float
    end: float = field(default=float("inf"))


class _HostClock:
    """For lanes whose compute is done when a call returns, and whose communication says when it is."""

    def __init__(self, lanes: WorkLanes) -> None:
        self.lanes = lanes
        self.begun = time.perf_counter()
        self.spans: dict[Lane, list[_Span]] = {lane: [] for lane in Lane}

    def now(self) -> float:
        return time.perf_counter() - self.begun

    def play(self, step: Step, fn: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        is_comm = bool(args) and args[0] is self.lanes
        span = _Span(step, self.now())
        self.spans[Lane.COMM if is_comm else Lane.COMPUTE].append(span)
        before = len(self.lanes.started)
        result = fn(*args)
        if is_comm and len(self.lanes.started) > before:
            self._on_done(self.lanes.started[-1], span)
        else:
            span.end = self.now()
        return result

    def _on_done(self, pending: Pending, span: _Span) -> None:
        def done(*_: Any) -> None:
            span.end = self.now()

        if pending.work is None:
            done()
        else:
            pending.work.get_future().add_done_callback(done)

    def intervals(self) -> list[Interval]:
        comm = self.spans[Lane.COMM]
        deadline = time.perf_counter() + DONE_WITHIN
        while any(s.end == float("inf") for s in comm) and time.perf_counter() < deadline:
            time.sleep(0.0001)
        now = self.now()
        spans = [(lane, s.step, s.start, min(s.end, now)) for lane, on in self.spans.items() for s in on]
        return in_order(spans)


class _StreamClock:
    """For lanes that are streams: an event before and after each step, on the stream that is current."""

    def __init__(self) -> None:
        self.begun = _event()
        self.marks: list[tuple[Lane, Step, torch.Event, torch.Event]] = []

    def play(self, step: Step, fn: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        # A segment of the comm lane gets the lanes as its first argument, all others numbers and tensors.
        lane = Lane.COMM if args and hasattr(args[0], "issue") else Lane.COMPUTE
        start = _event()
        result = fn(*args)
        self.marks.append((lane, step, start, _event()))
        return result

    def intervals(self) -> list[Interval]:
        torch.accelerator.synchronize()
        return in_order([
            (lane, step, self.begun.elapsed_time(start) / 1e3, self.begun.elapsed_time(end) / 1e3)
            for lane, step, start, end in self.marks
        ])


def _event() -> torch.Event:
    event = torch.Event(enable_timing=True)
    event.record(torch.accelerator.current_stream())
    return event


def in_order(spans: Sequence[tuple[Lane, Step, float, float]]) -> list[Interval]:
    """The spans as intervals of which no two on a lane overlap: each begins where the one before it ends, or later."""
    at = dict.fromkeys(Lane, 0.0)
    intervals = []
    for lane, step, start, end in spans:
        at[lane], start = max(end, at[lane]), max(start, at[lane])
        intervals.append(Interval(lane, step.segment, step.microbatch, min(start, at[lane]), at[lane]))
    return intervals
