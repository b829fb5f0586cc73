"""What became of each compiled graph of this process, for users to ask."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import fx

from dbo_compile import graph as g
from dbo_compile.ir.program import Program, Run
from dbo_compile.ir.schedule import Lane, Schedule
from dbo_compile.ir.tokens import TokenMap
from dbo_compile.passes.outline import Outline
from dbo_compile.runtime.clock import Timeline, simulate
from dbo_compile.runtime.engine import Engine


@dataclass(frozen=True, slots=True)
class Levels:
    """What every pass made of one graph, from the ATen graph to the module whose generated code runs."""

    graph: fx.Graph
    tokens: TokenMap
    outline: Outline
    schedule: Schedule
    program: Program
    module: fx.GraphModule
    cost: Callable[[Run], float]

    @property
    def timeline(self) -> Timeline:
        """The program on a clock with modelled costs."""
        return simulate(self.program, self.cost)


@dataclass(frozen=True, slots=True)
class Report:
    """One compiled graph. `calls`, `calls_split` and `decline_counts` go on counting.

    `reason` says why the graph as a whole is not split ("" if it is); `decline_counts` why single calls were not.
    """

    reason: str = ""
    levels: Levels | None = None
    engine: Engine | None = None

    @property
    def split(self) -> bool:
        return self.levels is not None

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
    def fingerprint(self) -> str:
        """What the ranks of a group must have in common; "" for a graph that is not split."""
        return self.levels.program.fingerprint if self.levels else ""

    @property
    def barriers(self) -> dict[str, str]:
        """The ops that are played once on all tokens: `name (user's line)` to the reason."""
        return _with_lines(self.levels.tokens.barriers) if self.levels else {}

    @property
    def obligations(self) -> dict[str, str]:
        """What splitting takes on trust: `name (user's line)` to the assumption."""
        return _with_lines(self.levels.tokens.obligations) if self.levels else {}

    @property
    def calls(self) -> int:
        return self.engine.calls.total if self.engine else 0

    @property
    def calls_split(self) -> int:
        return self.engine.calls.split if self.engine else 0

    @property
    def decline_counts(self) -> dict[str, int]:
        return dict(self.engine.calls.declined) if self.engine else {}


def _with_lines(why: Mapping[fx.Node, str]) -> dict[str, str]:
    return {f"{n.name} ({line})" if (line := g.source_line(n)) else n.name: reason for n, reason in why.items()}


_reports: list[Report] = []


def add_report(report: Report) -> None:
    _reports.append(report)


def reports() -> list[Report]:
    """One report per graph compiled by this process so far, in the order of compilation."""
    return list(_reports)
