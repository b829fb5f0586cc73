"""A graph for people: what was split, what was not and why, in a terminal of 100 columns, or as HTML."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from html import escape
from textwrap import wrap

from dbo_compile.advice import advice
from dbo_compile.chart import summary, svg
from dbo_compile.ir.schedule import Segment
from dbo_compile.levels import Levels
from dbo_compile.report import Report
from dbo_compile.runtime.clock import Timeline, chart, hidden_text
from dbo_compile.runtime.cuts import CutSteps

WIDTH = 100
MOST_STEPS_LINES = 12
MOST_ROWS = 24


def overview(index: int, report: Report, measured: Timeline | None) -> str:
    """All that is worth knowing at a glance; `measured` is a call that was timed, if there is one."""
    return "\n".join(_lines(index, report, measured))


def overview_html(index: int, report: Report, measured: Timeline | None) -> str:
    """The same for a notebook, with the lane chart as a picture."""
    text = escape(overview(index, report, measured))
    return f'<pre style="overflow-x: auto">{text}</pre>\n{_picture(report, measured)}'


def _lines(index: int, report: Report, measured: Timeline | None) -> Iterator[str]:
    if (levels := report.levels) is None:
        yield from _paragraph(f"graph {index}: not split: {report.reason}", 4)
        yield from _paragraph(f"what to do: {advice(report.reason)}", 4, indent=4)
        return
    yield from _paragraph(f"graph {index}: {_headline(report)}", 4)
    taken = measured.hidden_comm if measured and _is_split(measured) else None
    yield f"    {hidden_text(predicted=levels.timeline.hidden_comm, measured=taken)}"
    yield from _reasons("barriers (played once on all tokens)", report.barriers)
    yield from _pairs("taken on trust (checked by dbo_compile.verify)", report.obligations)
    declined = {f"{reason}: {times}": reason for reason, times in report.decline_counts.items()}
    yield from _reasons("calls that were not split", declined, says_why=False)
    yield from _pairs("what is played, by tokens", {str(size): str(made) for size, made in report.decisions.items()})
    if report.cuts and report.cuts.last:
        yield from _requests(report.cuts)
    yield from ["", "segments", *_segments(levels)]
    yield from ["", "schedule", *_steps(levels)]
    yield from ["", f"lanes (predicted, {levels.num_rows} tokens)", *_lanes(levels.timeline)]
    if measured:
        yield from ["", f"lanes (measured{'' if _is_split(measured) else ', not split'})", *_lanes(measured)]
    yield from ["", f"program {report.fingerprint}: {len(levels.program.instrs)} instructions, see .program"]
    yield 'every level as files, with pictures: with dbo_compile.debug("folder"): ...'


def _headline(report: Report) -> str:
    return (
        f"split in {report.num_microbatches} microbatches, {report.num_segments} segments of which "
        f"{report.num_unique_segments} differ, {report.num_comm_ops} collectives, {len(report.barriers)} barriers"
    )


def _is_split(timeline: Timeline) -> bool:
    return any(i.microbatch is not None for i in timeline.intervals)


def _reasons(title: str, why: Mapping[str, str], *, says_why: bool = True) -> Iterator[str]:
    """What was not split, why, and what to do; advice that several have in common comes once, after the last."""
    if not why:
        return
    yield from ["", title]
    for i, (what, reason) in enumerate(why.items()):
        yield from _paragraph(f"{what}: {reason}" if says_why else what, 8, indent=4)
        if advice(reason) not in map(advice, list(why.values())[i + 1 :]):
            yield from _paragraph(f"-> {advice(reason)}", 11, indent=8)


def _pairs(title: str, rows: Mapping[str, str]) -> Iterator[str]:
    if rows:
        yield from ["", title]
        for key, value in rows.items():
            yield from _paragraph(f"{key}: {value}", 8, indent=4)


def _requests(cuts: CutSteps) -> Iterator[str]:
    yield from ["", "steps cut by their requests"]
    steps = cuts.whole + cuts.straddling
    yield f"    {steps}, of which {cuts.straddling} with a request in two microbatches; the last one:"
    yield from (f"    microbatch {m}: {part}" for m, part in enumerate(cuts.last))


def _paragraph(text: str, hanging: int, *, indent: int = 0) -> list[str]:
    return wrap(text, WIDTH, initial_indent=" " * indent, subsequent_indent=" " * hanging, break_on_hyphens=False)


def _segments(levels: Levels) -> Iterator[str]:
    """One line a code: how often it is played, how long it takes by the model, which segments it is the code of."""
    seconds = {i.segment: i.end - i.start for i in levels.timeline.intervals}
    users: dict[str, list[Segment]] = {}
    for segment in levels.outline.segments.values():
        users.setdefault(segment.code, []).append(segment)
    for code, segments in list(users.items())[:MOST_ROWS]:
        times = sum(levels.program.num_microbatches if s.per_microbatch else 1 for s in segments)
        lane = "host" if segments[0].host else segments[0].lane.value
        others = f" and {len(segments) - 1} like it" if len(segments) > 1 else ""
        yield f"    {lane:8}{f'x{times}':6}{seconds[code] * 1e3:10.3f} ms  {code}{others}"[:WIDTH]
    if len(users) > MOST_ROWS:
        yield f"    and {len(users) - MOST_ROWS} more"


def _steps(levels: Levels) -> list[str]:
    lines = _paragraph(str(levels.schedule), 4, indent=4)
    more = len(" ".join(lines[MOST_STEPS_LINES:]).split())
    return lines[:MOST_STEPS_LINES] + ([f"    and {more} more steps"] if more else [])


def _lanes(timeline: Timeline) -> list[str]:
    drawn = chart(timeline, WIDTH - 12).splitlines()[:-1]
    legend = "0, 1: the microbatch at work, =: all tokens, .: waiting"
    return [f"    {line}" for line in [*drawn, legend, summary(timeline)]]


def _picture(report: Report, measured: Timeline | None) -> str:
    if (levels := report.levels) is None:
        return ""
    charts = [levels.predicted]
    if measured:
        straddles = report.cuts is None or report.cuts.last_straddles
        charts.append(levels.chart("measured", measured, straddles=straddles))
    return f'<div style="overflow-x: auto">{svg(charts)}</div>'
