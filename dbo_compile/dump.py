"""Dump: every level of a graph as files that can be read on their own, in a folder of its rank and number.

Nothing here may break a run: what cannot be written is one warning.
"""

from __future__ import annotations

import atexit
import json
import platform
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from dbo_compile import compat
from dbo_compile.chart import svg
from dbo_compile.files import Folder
from dbo_compile.levels import Chart, Levels
from dbo_compile.log import rank, warn_once
from dbo_compile.measure import Player, timed
from dbo_compile.page import graph_page, root_page
from dbo_compile.report import Report, add_report, times
from dbo_compile.runnable import runnable
from dbo_compile.runtime.clock import Interval, Timeline
from dbo_compile.text import captured_text, placements_text, segments_text
from dbo_compile.trace import chrome_trace

CONSTANTS = "5_constants.pt"
MEASURED_CALLS = 3
"""So many split calls of a graph are timed where it is dumped, of which the last one is shown: the first warm up."""
WATCHED_CALLS = 12
"""After so many calls the graph is left alone, whether or not they were split."""
REPORT = "report.json"


def publish(report: Report, folder: str | None) -> None:
    """Make a report known: to `reports()`, to `TORCH_TRACE`, and to `folder`, if there is one to dump to."""
    add_report(report)
    if report.levels:
        levels = report.levels
        compat.trace_artifact("dbo_placements", "string", lambda: placements_text(levels))
        compat.trace_artifact("dbo_schedule", "string", lambda: str(levels.schedule))
        compat.trace_artifact("dbo_program", "string", lambda: str(levels.program))
    compat.trace_artifact("dbo_report", "json", lambda: json.dumps(report.to_dict()))
    if folder:
        _watches.append(_Watch(report, Folder(folder)))
        _watches[-1].start()


def finish_dumps() -> None:
    """Write what the calls so far have shown, of every graph that is dumped, and time and write no more of them."""
    while _watches:
        _watches.pop().finish()


_watches: list[_Watch] = []
atexit.register(finish_dumps)


@dataclass(frozen=True, slots=True)
class Call:
    """A call that was timed; `straddles` as far as a request may have had tokens in two microbatches."""

    num_tokens: int
    timeline: Timeline
    straddles: bool


@dataclass(frozen=True, slots=True)
class Written:
    """A file of a dump and, for the page that links it, what it holds."""

    name: str
    what: str
    content: str | bytes


class _Watch:
    """Dumps a graph, times its first calls, and in the end writes again what depends on them.

    Not after each call: the engine may be timing it to choose how to play.
    """

    def __init__(self, report: Report, root: Folder) -> None:
        self.report = report
        self.root = root
        self.rank = rank() or 0  # at exit, the process group may be gone
        self.compile_id = compat.compile_id()
        self.links: list[tuple[str, str]] = []
        self.written: Levels | None = None
        self.calls: list[Call] = []
        self.player: Player | None = None

    def start(self) -> None:
        self._write()
        if self.report.engine is not None:
            self.player = self.report.engine.player
            self.report.engine.player = timed(self.player, self._keep)

    def finish(self) -> None:
        """Leave the engine alone, and write what the calls showed."""
        if self.player is not None and self.report.engine is not None:
            self.report.engine.player, self.player = self.player, None
        self._write()

    def _keep(self, rows: Sequence[int], timeline: Timeline) -> None:
        if self.player is None:
            return
        straddles = self.report.cuts is None or self.report.cuts.last_straddles
        self.calls.append(Call(sum(rows), timeline, straddles))
        if len(self.calls) == WATCHED_CALLS or sum(map(_is_split, self.calls)) == MEASURED_CALLS:
            self.finish()

    def _write(self) -> None:
        try:
            with compat.without_fake_tensors():
                self._write_all()
        except Exception as error:  # to see less of a run is no reason to break it
            warn_once(str(self.root.path), "cannot dump to %s: %s", self.root.path, error)

    def _write_all(self) -> None:
        levels: list[Written] = []
        if not self.links or self.report.levels is not self.written:  # the gate may have had it compiled again
            levels = _levels(self.report)
            self.links, self.written = [(file.name, file.what) for file in levels], self.report.levels
        facts = {"rank": self.rank, "graph": self.report.number, "compile_id": self.compile_id}
        under = f"rank{self.rank}/graph{self.report.number}"
        for file in [*levels, *_results(self.report, self.calls, facts, self.links)]:
            self.root.write(f"{under}/{file.name}", file.content)
        _write_index(self.root)


def _is_split(call: Call) -> bool:
    return any(i.microbatch is not None for i in call.timeline.intervals)


def _levels(report: Report) -> list[Written]:
    """What is known of a graph as soon as it is compiled."""
    files = [] if report.captured is None else [
        Written("0_dynamo.py", "the graph that Dynamo captured", captured_text(report.captured))
    ]  # fmt: skip
    if (levels := report.levels) is None:
        return files
    code = runnable(levels, report.engine.signature.requests if report.engine else None, CONSTANTS)
    files += [
        Written("1_placements.txt", "the ATen graph: where tokens are, barriers and why", placements_text(levels)),
        Written("2_segments.txt", "the stretches that stay on one lane", segments_text(levels)),
        Written("3_schedule.txt", "the order of the steps", f"{levels.schedule}\n"),
        Written("4_program.txt", "what is played: registers, events, memory", f"{levels.program}\n"),
        Written("5_graph.py", "the rewritten graph, as Python that runs", code.text),
        *([Written(CONSTANTS, "the constants in it", code.constants)] if code.constants else []),
        *_generated(levels),
    ]
    return files


def _generated(levels: Levels) -> Iterator[Written]:
    for name in levels.outline.codes:
        if path := compat.generated_file(getattr(levels.module, name)):
            yield Written(f"6_inductor/{name}.py", f"what Inductor made of {name}", Path(path).read_bytes())


def _results(
    report: Report, calls: Sequence[Call], facts: dict[str, Any], links: Sequence[tuple[str, str]]
) -> list[Written]:
    """What changes with the calls, split ones if there are any: charts, the report, the page."""
    calls = list(filter(_is_split, calls)) or calls
    data = {**report.to_dict(), "measured": [times(call.timeline) for call in calls], **facts}
    data["versions"] = _versions()
    for segment in data["segments"] if calls else ():
        segment["measured_seconds"] = _mean([i for i in calls[-1].timeline.intervals if i.segment == segment["name"]])
    charts = _charts(report.levels, calls) if report.levels else []
    lanes = svg(charts)
    trace = chrome_trace(charts, facts["rank"])
    files = [Written(REPORT, "all of this page for programs", json.dumps(data, indent=1))]
    if charts:
        files.append(Written("lanes.svg", "the lane chart", lanes))
        files.append(Written("trace.json", "the lanes for ui.perfetto.dev or chrome://tracing", trace))
    page = graph_page(data, lanes, [*links, *((file.name, file.what) for file in files)])
    return [*files, Written("index.html", "this page", page)]


def _mean(intervals: Sequence[Interval]) -> float:
    return sum(i.end - i.start for i in intervals) / max(1, len(intervals))


def _charts(levels: Levels, calls: Sequence[Call]) -> list[Chart]:
    """The prediction, and the last call."""
    charts = [levels.predicted]
    for call in calls[-1:]:
        title = f"measured, {call.num_tokens} tokens{'' if _is_split(call) else ', not split'}"
        charts.append(levels.chart(title, call.timeline, straddles=call.straddles))
    return charts


def _versions() -> dict[str, str]:
    try:
        own = version("dbo-compile")
    except PackageNotFoundError:  # a checkout that is not installed
        own = "unknown"
    return {"dbo_compile": own, "torch": torch.__version__, "python": platform.python_version()}


def _write_index(root: Folder) -> None:
    """Link every graph of every rank. Other ranks may do so at the same time: who finds more than it wrote, repeats."""
    linked: list[tuple[str, str]] | None = None
    while linked != (found := [*_graphs(root.path), *_bytecode(root.path)]):
        root.write("index.html", root_page(found))
        linked = found


def _graphs(root: Path) -> Iterator[tuple[str, str]]:
    for path in sorted(root.glob(f"rank*/graph*/{REPORT}"), key=lambda p: [len(part) for part in p.parts] + [p]):
        report = json.loads(path.read_text(encoding="utf-8"))
        calls = f"{report['calls']['split']} of {report['calls']['total']} calls were split"
        what = f"{report['num_segments']} segments, {calls}" if report["split"] else f"not split: {report['reason']}"
        yield path.parent.relative_to(root).joinpath("index.html").as_posix(), what


def _bytecode(root: Path) -> Iterator[tuple[str, str]]:
    for path in sorted(root.glob("rank*/bytecode/full_code_for_*.py")):
        yield path.relative_to(root).as_posix(), "decompiled bytecode and guards, by depyf"
