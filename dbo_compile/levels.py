"""The levels of one graph side by side, for everything that shows or describes them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from dbo_compile import origin
from dbo_compile.ir.program import Program, Run
from dbo_compile.ir.schedule import Schedule
from dbo_compile.ir.tokens import TokenMap
from dbo_compile.ir.waits import Handover, carried, handovers
from dbo_compile.passes.outline import Outline
from dbo_compile.runtime.clock import Timeline, simulate


@dataclass(frozen=True, slots=True)
class Chart:
    """One timeline to draw, in seconds. `handovers` become arrows between lanes, `carried` arcs on one lane; `paths`
    has the module path of each segment."""

    title: str
    timeline: Timeline
    handovers: tuple[Handover, ...] = ()
    paths: Mapping[str, str] = field(default_factory=dict)
    carried: tuple[Handover, ...] = ()


@dataclass(frozen=True, slots=True)
class Levels:
    """What every pass made of one graph, from the ATen graph to the module whose generated code runs.

    `num_rows` is how many rows of tokens the call that was traced had, `cost` the modelled seconds of its runs.
    """

    graph: fx.Graph
    tokens: TokenMap
    outline: Outline
    schedule: Schedule
    program: Program
    module: fx.GraphModule
    num_rows: int
    cost: Callable[[Run], float]

    @property
    def timeline(self) -> Timeline:
        """A call like the one that was traced, on a clock with modelled costs."""
        return simulate(self.program, self.cost)

    @property
    def predicted(self) -> Chart:
        title = f"predicted, {self.num_rows} tokens, by modelled costs"
        return self.chart(title, self.timeline, straddles=True)

    def chart(self, title: str, timeline: Timeline, *, straddles: bool) -> Chart:
        """A timeline of the program; `straddles` if a request may have had tokens in two microbatches."""
        arcs = carried(self.program) if straddles else ()
        return Chart(title, timeline, handovers(self.program), self.paths, arcs)

    @property
    def paths(self) -> dict[str, str]:
        """The module that most ops of each segment come from, by segment; "" for none."""
        counts = {name: Counter(map(origin.module_path, group.nodes)) for name, group in self.outline.groups.items()}
        return {name: next((path for path, _ in count.most_common() if path), "") for name, count in counts.items()}

    @property
    def segment_rows(self) -> list[dict[str, Any]]:
        """The segments as plain data, in the order of the graph; `seconds` is the modelled cost of one step."""
        seconds, paths = {i.segment: i.end - i.start for i in self.timeline.intervals}, self.paths
        return [
            {
                "name": s.name,
                "lane": s.lane.value,
                "code": s.code,
                "module": paths[s.name],
                "host": s.host,
                "times": self.program.num_microbatches if s.per_microbatch else 1,
                "seconds": seconds[s.name],
                "inputs": list(s.inputs),
                "outputs": list(s.outputs),
            }
            for s in self.outline.segments.values()
        ]
