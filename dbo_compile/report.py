"""What became of each compiled graph of this process, for users to ask."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

from torch import fx

from dbo_compile import origin
from dbo_compile.compilation import Compilation
from dbo_compile.ir.schedule import Lane
from dbo_compile.levels import Levels
from dbo_compile.runtime.clock import Timeline
from dbo_compile.runtime.cuts import CutSteps
from dbo_compile.runtime.engine import Engine
from dbo_compile.runtime.tune import Decision, Size, decisions_text

SCHEMA_VERSION = 2


@dataclass(slots=True, eq=False, repr=False)
class Report:
    """One compiled graph. `calls`, `calls_split` and `decline_counts` go on counting.

    `captured` is the graph as Dynamo made it; `number` counts the graphs of this process. `reason` says why the graph
    as a whole is not split ("" if it is), `why` as far as it was known when it was compiled; `decline_counts` says why
    single calls were not.
    """

    why: str = ""
    compilation: Compilation | None = None
    engine: Engine | None = None
    captured: fx.Graph | None = None
    number: int = field(default_factory=count().__next__)

    @property
    def levels(self) -> Levels | None:
        """What every pass made of it, by now."""
        return self.compilation.levels if self.compilation else None

    @property
    def reason(self) -> str:
        """Why the graph as a whole is not split, or not any more."""
        return self.why or (self.engine.gate.refuted if self.engine else "")

    @property
    def split(self) -> bool:
        return self.levels is not None and not self.reason

    @property
    def decisions(self) -> dict[Size, Decision]:
        """What `split="auto"` found for each size: the times of each way to play it, and which one is played."""
        return dict(self.engine.decisions) if self.engine else {}

    @property
    def num_microbatches(self) -> int:
        return self.levels.program.num_microbatches if self.levels else 1

    @property
    def num_segments(self) -> int:
        return len(self.levels.outline.segments) if self.levels else 0

    @property
    def num_unique_segments(self) -> int:
        """Segments whose code differs: what is compiled."""
        return len(self.levels.outline.codes) if self.levels else 0

    @property
    def num_comm_ops(self) -> int:
        return sum(s.lane is Lane.COMM for s in self.levels.outline.segments.values()) if self.levels else 0

    @property
    def hidden_comm(self) -> float | None:
        """The share of communication that the clock predicts to lie under compute, 0 to 1; None where there is none, or
        the graph is not split."""
        return self.levels.timeline.hidden_comm if self.levels and self.split else None

    @property
    def fingerprint(self) -> str:
        """What the ranks of a group must have in common; "" for a graph that is not split."""
        return self.engine.fingerprint if self.engine else ""

    @property
    def barriers(self) -> dict[str, str]:
        """The ops that are played once on all tokens: `name (user's line)` to the reason."""
        return _with_lines(self.levels.tokens.barriers) if self.levels else {}

    @property
    def obligations(self) -> dict[str, str]:
        """What splitting takes on trust: `name (user's line)` to the assumption."""
        return _with_lines(self.levels.tokens.obligations) if self.levels else {}

    @property
    def unpaddable(self) -> str:
        """Why its steps are never padded; "" if they may be, or if it is not split and nobody knows."""
        return self.engine.signature.unpaddable if self.engine else ""

    @property
    def calls(self) -> int:
        return self.engine.calls.total if self.engine else 0

    @property
    def calls_split(self) -> int:
        return self.engine.calls.split if self.engine else 0

    @property
    def decline_counts(self) -> dict[str, int]:
        return dict(self.engine.calls.declined) if self.engine else {}

    @property
    def cuts(self) -> CutSteps | None:
        """How the steps so far were cut by their requests; None for a graph that is not told of requests."""
        return self.engine.calls.cuts if self.engine and self.engine.signature.requests else None

    def __repr__(self) -> str:
        """One line: `<Report 0: split in 2 microbatches, 13 segments, 5 of 9 calls were split>`, or why not."""
        what = f"not split: {' '.join(self.reason.split())}"
        if self.split:
            what = f"split in {self.num_microbatches} microbatches, {self.num_segments} segments, "
            what += f"{self.calls_split} of {self.calls} calls were split"
        return f"<Report {self.number}: {what}>"

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain data, in the form of `report.schema.json` in this package."""
        return {
            "version": SCHEMA_VERSION,
            "split": self.split,
            "reason": self.reason,
            "num_microbatches": self.num_microbatches,
            "num_segments": self.num_segments,
            "num_unique_segments": self.num_unique_segments,
            "num_comm_ops": self.num_comm_ops,
            "fingerprint": self.fingerprint,
            "barriers": [{"op": op, "reason": reason} for op, reason in self.barriers.items()],
            "obligations": [{"op": op, "assumes": assumed} for op, assumed in self.obligations.items()],
            "segments": self.levels.segment_rows if self.levels else [],
            "schedule": [str(step) for step in self.levels.schedule.steps] if self.levels else [],
            "predicted": times(self.levels.timeline) if self.levels else None,
            "calls": {"total": self.calls, "split": self.calls_split, "declined": self.decline_counts},
            "cuts": _cuts(self.cuts) if self.cuts else None,
            "decisions": {
                str(size): {"chosen": made.chosen, "seconds": dict(made.seconds)}
                for size, made in self.decisions.items()
            },
        }


def _cuts(cuts: CutSteps) -> dict[str, Any]:
    return {"whole": cuts.whole, "straddling": cuts.straddling, "last": cuts.last}


def _with_lines(why: Mapping[fx.Node, str]) -> dict[str, str]:
    return {f"{n.name} ({line})" if (line := origin.source_line(n)) else n.name: reason for n, reason in why.items()}


def times(timeline: Timeline) -> dict[str, float | None]:
    """A timeline in four numbers: seconds in all, seconds that each lane is busy, the hidden share of communication."""
    busy = {lane.value: timeline.busy(lane) for lane in Lane}
    return {"seconds": timeline.makespan, **busy, "hidden_comm": timeline.hidden_comm}


def save_decisions(path: str | os.PathLike[str]) -> None:
    """Write what `split="auto"` has found so far to a file for `load_decisions`: a restart then times nothing again.

    Every rank finds the same, so one file, written by one rank, serves all of them.
    """
    graphs = {r.engine.ways.programs.fingerprint: r.decisions for r in reports() if r.engine and r.decisions}
    Path(path).write_text(decisions_text(graphs))


MOST_GONE = 8
"""Of so many graphs that are gone there still is a report: a process that goes on compiling must not go on growing."""
_reports: list[Report] = []
_gone: deque[Report] = deque()


def add_report(report: Report) -> None:
    _reports.append(report)


def forget(report: Report) -> None:
    """Nothing plays the graph of this report any more: keep it as one of the last few of these."""
    _gone.append(report)
    if len(_gone) > MOST_GONE:
        _reports.remove(_gone.popleft())


def reports() -> list[Report]:
    """One report per graph that this process has compiled, in the order of compilation.

    Of graphs that are gone, with their model or by `torch._dynamo.reset()`, there are the last eight.
    """
    return list(_reports)


def new_reports(before: Sequence[Report]) -> list[Report]:
    """The reports that there were not `before`."""
    return [report for report in reports() if report not in before]
