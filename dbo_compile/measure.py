"""Measure: the lanes of real calls, as intervals on the same chart that the clock draws."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import fx

from dbo_compile.ir.schedule import Lane, Step
from dbo_compile.report import reports
from dbo_compile.runtime.clock import Interval, Timeline
from dbo_compile.runtime.collectives import Pending
from dbo_compile.runtime.engine import played
from dbo_compile.runtime.lanes import WorkLanes


@contextmanager
def measured() -> Generator[list[Timeline]]:
    """Time every call of every split graph inside the block: one `Timeline` a call, in seconds since its start.

    A collective lasts from its start until its process group says it is done; the next one on the lane begins where
    it ends. Measured calls run through an interpreter and cost some microseconds a step more.
    """
    timelines: list[Timeline] = []
    engines = [r.engine for r in reports() if r.engine is not None]
    for engine in engines:
        engine.player = partial(_timed, timelines)
    try:
        yield timelines
    finally:
        for engine in engines:
            engine.player = played


def _timed(timelines: list[Timeline], module: Any, rows: Sequence[int], args: Sequence[Any]) -> tuple[Any, ...]:
    with _TimedLanes(rows) as lanes:
        results: tuple[Any, ...] = _Interpreter(module, lanes).run(lanes, *args)
    timelines.append(lanes.timeline())
    return results


@dataclass(slots=True)
class _Span:
    """A stretch of time that may still be going on."""

    step: Step
    start: float
    end: float = field(default=float("inf"))


class _TimedLanes(WorkLanes):
    def __init__(self, rows: Sequence[int]) -> None:
        super().__init__(rows)
        self.begun = time.perf_counter()
        self.step = Step("")
        self.compute: list[_Span] = []
        self.comm: list[_Span] = []

    def now(self) -> float:
        return time.perf_counter() - self.begun

    def issue(self, op: Any, *args: Any, **kwargs: Any) -> Any:
        span = _Span(self.step, self.now())
        self.comm.append(span)
        result = super().issue(op, *args, **kwargs)
        self._on_done(self.started[-1], span)
        return result

    def _on_done(self, pending: Pending, span: _Span) -> None:
        def done(*_: Any) -> None:
            span.end = self.now()

        if pending.work is None:
            done()
        else:
            pending.work.get_future().add_done_callback(done)

    def timeline(self) -> Timeline:
        deadline = time.perf_counter() + 1.0  # the callback of a finished collective runs on another thread
        while any(s.end == float("inf") for s in self.comm) and time.perf_counter() < deadline:
            time.sleep(0.0001)
        intervals = [Interval(Lane.COMPUTE, s.step.segment, s.step.microbatch, s.start, s.end) for s in self.compute]
        at = 0.0
        for s in self.comm:
            start, end = max(s.start, at), max(s.end, at)
            intervals.append(Interval(Lane.COMM, s.step.segment, s.step.microbatch, min(start, end), end))
            at = end
        return Timeline(tuple(intervals))


class _Interpreter(fx.Interpreter):
    """Runs an emitted program call by call, so that each segment can be timed by its name."""

    def __init__(self, module: fx.GraphModule, lanes: _TimedLanes) -> None:
        super().__init__(module)
        self.lanes = lanes
        self.steps: dict[str, Step] = module.steps  # type: ignore[assignment]

    def run_node(self, n: fx.Node) -> Any:
        if n.op != "call_module":
            return super().run_node(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        self.lanes.step = self.steps[n.name]
        fn: Callable[..., Any] = getattr(self.module, str(n.target))
        if args and args[0] is self.lanes:  # a collective: timed from its start to its end, elsewhere
            return fn(*args, **kwargs)
        span = _Span(self.lanes.step, self.lanes.now())
        result = fn(*args, **kwargs)
        span.end = self.lanes.now()
        self.lanes.compute.append(span)
        return result
