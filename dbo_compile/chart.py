"""The lane chart as SVG: rows are lanes, colours microbatches, hatching is waiting, arrows are events between lanes.

Hovering a step names it, its module and its time. A long timeline goes on in a next line, as music does, so that steps
stay wide enough to be told apart. The text form is `runtime.clock.chart`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from math import ceil

from dbo_compile.ir.schedule import Lane, Step
from dbo_compile.levels import Chart
from dbo_compile.runtime.clock import Interval, Timeline

WIDTH, LEFT, RIGHT = 1200, 76, 16
LEGEND, TITLE, LANE, GAP, AXIS = 36, 48, 30, 26, 30
CHAR = 6.9
"""No letter of a label is wider, in pixels, but a few capitals."""
STEPS_A_LINE = 36
MOST_LINES = 24
ARC = "c0 -11 {0} -11 {0} 0"
COLOURS = {
    "light": ("#3b6ea8", "#c8611a", "#2c7d3f", "#94386f", "#1f8a99", "#8f7a12", "#a83f50", "#4d7f66"),
    "dark": ("#6f9fd8", "#ef9a5c", "#67bd7b", "#d07fb1", "#5fc3d1", "#cdb84e", "#e08391", "#8ac0a5"),
}
PLAIN = {
    "light": {"back": "#ffffff", "text": "#222222", "faint": "#6b6b6b", "lane": "#f4f4f4", "once": "#707070"},
    "dark": {"back": "#16181c", "text": "#e4e4e4", "faint": "#9a9a9a", "lane": "#23262c", "once": "#a0a0a0"},
}

STYLE = """
.dbo text { font: 11px ui-sans-serif, system-ui, "DejaVu Sans", sans-serif; }
.dbo .title { font-size: 13px; font-weight: 600; }
.dbo .name { pointer-events: none; }
.dbo .wait { fill: url(#dbo-hatch); }
.dbo .hatch, .dbo .tick { stroke-width: .6; fill: none; }
.dbo .event { stroke-width: .8; opacity: .55; fill: none; marker-end: url(#dbo-head); }
.dbo .carry { stroke-width: 1.2; fill: none; marker-end: url(#dbo-head); }
.dbo .step { stroke-width: .6; }
"""
HATCH = (
    '<defs><pattern id="dbo-hatch" width="6" height="6" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">'
    '<path class="hatch" d="M0 0V6"/></pattern><marker id="dbo-head" viewBox="0 0 6 6" refX="6" refY="3" '
    'markerWidth="6" markerHeight="6" orient="auto"><path class="head" d="M0 0L6 3L0 6z"/></marker></defs>'
)


def svg(charts: Sequence[Chart], theme: str = "auto") -> str:
    """Charts under each other, each with a time axis of its own; `theme` is "light", "dark", or what the viewer has."""
    drawings = [_Drawing(chart) for chart in charts]
    height = LEGEND + sum(drawing.height for drawing in drawings)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" class="dbo" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" '
        f'height="{height}" role="img">',
        f"<style>{_palette(theme)}{STYLE}</style>",
        HATCH,
        f'<rect width="{WIDTH}" height="{height}" class="back"/>',
        *_legend(charts),
    ]
    top = LEGEND
    for drawing in drawings:
        parts += drawing.parts(top)
        top += drawing.height
    return "\n".join([*parts, "</svg>"])


def summary(timeline: Timeline) -> str:
    """One line of a timeline in seconds: `12.3 ms, compute busy 10.1, comm busy 4.0, 83% of communication hidden`."""
    busy = ", ".join(f"{lane.value} busy {_number(timeline.busy(lane) * 1e3, 3)}" for lane in Lane)
    share = timeline.hidden_comm
    hidden = "no communication" if share is None else f"{share:.0%} of communication hidden"
    return f"{_number(timeline.makespan * 1e3, 3)} ms, {busy}, {hidden}"


def _palette(theme: str) -> str:
    if theme != "auto":
        return _colours(theme)
    return f"{_colours('light')}\n@media (prefers-color-scheme: dark) {{\n{_colours('dark')}\n}}"


def _colours(theme: str) -> str:
    """As classes and not as variables, which not every viewer of SVG knows."""
    c = PLAIN[theme]
    fills = {"back": "back", "name": "back", "text": "text", "head": "text", "faint": "faint", "lane": "lane"}
    rules = [f".dbo {{ background: {c['back']}; }}"]  # of the window around it, where it is opened alone
    rules += [f".dbo .{name} {{ fill: {c[colour]}; }}" for name, colour in fills.items()]
    strokes = {"hatch": "faint", "tick": "faint", "event": "text", "carry": "text", "step": "back"}
    rules += [f".dbo .{name} {{ stroke: {c[colour]}; }}" for name, colour in strokes.items()]
    rules += [f".dbo .mb{i} {{ fill: {colour}; }}" for i, colour in enumerate(COLOURS[theme])]
    return "\n".join([*rules, f".dbo .once {{ fill: {c['once']}; }}"])


def _legend(charts: Sequence[Chart]) -> Iterator[str]:
    played = {i.microbatch for chart in charts for i in chart.timeline.intervals}
    entries = [(f"microbatch {m}", _paint(m)) for m in sorted(m for m in played if m is not None)]
    entries += [("all tokens", "once")] if None in played else []
    entries += [("waiting", "wait")]
    x = float(LEFT)
    for name, paint in entries:
        yield f'<rect class="{paint}" x="{x:.0f}" y="12" width="12" height="12"/>'
        yield f'<text class="text" x="{x + 17:.0f}" y="22">{name}</text>'
        x += 17 + CHAR * len(name) + 22
    yield f'<path class="event" d="M{x:.0f} 18h22"/><text class="text" x="{x + 28:.0f}" y="22">must come first</text>'
    if any(chart.carried for chart in charts):
        x += 28 + CHAR * len("must come first") + 22
        yield f'<path class="carry" d="M{x:.0f} 22{ARC.format(22)}"/>'
        yield f'<text class="text" x="{x + 32:.0f}" y="22">goes on with a request</text>'


def _paint(microbatch: int | None) -> str:
    return "once" if microbatch is None else f"mb{microbatch % len(COLOURS['light'])}"


class _Drawing:
    """A chart as lines of equal duration."""

    def __init__(self, chart: Chart) -> None:
        self.chart = chart
        most = max((len(chart.timeline.on(lane)) for lane in Lane), default=0)
        self.num_lines = min(max(1, ceil(most / STEPS_A_LINE)), MOST_LINES)
        self.duration = (chart.timeline.makespan or 1.0) / self.num_lines
        self.scale = (WIDTH - LEFT - RIGHT) / self.duration
        self.line_height = len(Lane) * LANE + (len(Lane) - 1) * GAP + AXIS
        self.height = TITLE + self.num_lines * self.line_height

    def parts(self, top: float) -> Iterator[str]:
        chart = self.chart
        yield f'<text class="title text" x="{LEFT}" y="{top + 18}">{escape(chart.title)}</text>'
        yield f'<text class="faint" x="{LEFT}" y="{top + 34}">{escape(summary(chart.timeline))}</text>'
        for line in range(self.num_lines):
            yield from self._line(line * self.duration, top + TITLE + line * self.line_height)

    def _line(self, begin: float, top: float) -> Iterator[str]:
        rows = {lane: top + i * (LANE + GAP) for i, lane in enumerate(Lane)}
        for lane, y in rows.items():
            yield f'<text class="text" x="8" y="{y + LANE / 2 + 4:.1f}">{lane.value}</text>'
            yield f'<rect class="lane" x="{LEFT}" y="{y}" width="{WIDTH - LEFT - RIGHT}" height="{LANE}"/>'
            for wait in _waits(self.chart, lane):
                yield from self._wait(wait, begin, y)
            for interval in self.chart.timeline.on(lane):
                yield from self._step(interval, begin, y)
        yield from self._events(begin, rows)
        yield from self._carried(begin, rows)
        yield from self._axis(begin, top + self.line_height - AXIS)

    def _span(self, start: float, end: float, begin: float) -> tuple[float, float] | None:
        """The part of a span that lies on the line from `begin` on: its place and width in pixels."""
        left, right = max(start, begin) - begin, min(end, begin + self.duration) - begin
        inside = right > left or (start == end and 0 <= left < self.duration)
        return (LEFT + left * self.scale, (right - left) * self.scale) if inside else None

    def _step(self, interval: Interval, begin: float, y: float) -> Iterator[str]:
        if (span := self._span(interval.start, interval.end, begin)) is None:
            return
        x, width = span
        width = max(width, 0.6)
        yield (
            f'<g><rect class="step {_paint(interval.microbatch)}" x="{x:.2f}" y="{y}" width="{width:.2f}" '
            f'height="{LANE}"/>'
            f"<title>{escape(_hover(interval, self.chart.paths))}</title></g>"
        )
        if label := _label(interval, width - 8):
            yield f'<text class="name" x="{x + 4:.2f}" y="{y + LANE / 2 + 4:.1f}">{escape(label)}</text>'

    def _wait(self, wait: _Wait, begin: float, y: float) -> Iterator[str]:
        if span := self._span(wait.start, wait.end, begin):
            x, width = span
            what = f"waits {_ms(wait.end - wait.start)}" + (f" for {wait.maker}" if wait.maker else "")
            rect = f'<rect class="wait" x="{x:.2f}" y="{y}" width="{width:.2f}" height="{LANE}"/>'
            yield f"<g>{rect}<title>{escape(what)}</title></g>"

    def _events(self, begin: float, rows: Mapping[Lane, float]) -> Iterator[str]:
        at = {Step(i.segment, i.microbatch): i for i in self.chart.timeline.intervals}
        for handover in self.chart.handovers:
            made, read = at.get(handover.maker), at.get(handover.reader)
            if made is None or read is None or not begin <= made.end <= read.start + 1e-12 <= begin + self.duration:
                continue
            down = rows[made.lane] < rows[read.lane]
            y0, y1 = (rows[made.lane] + LANE, rows[read.lane]) if down else (rows[made.lane], rows[read.lane] + LANE)
            x0, x1 = (LEFT + (t - begin) * self.scale for t in (made.end, read.start))
            arrow = f'<path class="event" d="M{x0:.2f} {y0}L{x1:.2f} {y1}"/>'
            yield f"<g>{arrow}<title>{escape(str(handover))}</title></g>"

    def _carried(self, begin: float, rows: Mapping[Lane, float]) -> Iterator[str]:
        at = {Step(i.segment, i.microbatch): i for i in self.chart.timeline.intervals}
        for carry in self.chart.carried:
            made, read = at.get(carry.maker), at.get(carry.reader)
            if made and read and (span := self._span(_middle(made), _middle(read), begin)):
                x, width = span
                arc = f'<path class="carry" d="M{x:.2f} {rows[made.lane]}{ARC.format(f"{width:.2f}")}"/>'
                yield f"<g>{arc}<title>{escape(str(carry))}: the cache of a request in both</title></g>"

    def _axis(self, begin: float, y: float) -> Iterator[str]:
        for tick in _ticks(begin, begin + self.duration):
            x = LEFT + (tick - begin) * self.scale
            yield f'<path class="tick" d="M{x:.2f} {y}v5"/>'
            yield f'<text class="faint" x="{min(x, WIDTH - RIGHT - 30):.2f}" y="{y + 17}">{_ms(tick)}</text>'


def _middle(interval: Interval) -> float:
    return (interval.start + interval.end) / 2


def _label(interval: Interval, width: float) -> str:
    """The name of a step, or what fits of it: `layers_0_self_attn#1`, `self_attn#1`, `self...`."""
    name, most = str(Step(interval.segment, interval.microbatch)), int(width / CHAR)
    inside = re.sub(r"^\w*?_\d+_(?=[A-Za-z])", "", name)  # where the layer is known by its neighbours
    cut = f"{inside[: most - 1]}\N{HORIZONTAL ELLIPSIS}" if most >= 4 else ""
    return next((label for label in (name, inside) if len(label) <= most), cut)


def _hover(interval: Interval, paths: Mapping[str, str]) -> str:
    step, path = Step(interval.segment, interval.microbatch), paths.get(interval.segment)
    spent = f"{_ms(interval.end - interval.start)}, from {_ms(interval.start)} to {_ms(interval.end)}"
    return f"{step}: {spent}" + (f"\n{path}" if path else "")


def _ms(seconds: float) -> str:
    return f"{_number(seconds * 1e3, 4)} ms"


def _number(value: float, digits: int) -> str:
    """So many digits, more where the number has them before its point: never `2.3e+03`."""
    text = f"{value:.{digits}g}"
    return f"{value:.0f}" if "e+" in text else text


@dataclass(frozen=True, slots=True)
class _Wait:
    start: float
    end: float
    maker: Step | None


def _waits(chart: Chart, lane: Lane) -> Iterator[_Wait]:
    """Where a lane stands still, and which step on the other lane its next one waits for, if that is known."""
    ends = {Step(i.segment, i.microbatch): i.end for i in chart.timeline.intervals}
    makers: dict[Step, Step] = {}
    for handover in chart.handovers:
        known = makers.get(handover.reader)
        if known is None or ends.get(handover.maker, 0.0) >= ends.get(known, 0.0):
            makers[handover.reader] = handover.maker
    at = 0.0
    for interval in chart.timeline.on(lane):
        if interval.start > at:
            yield _Wait(at, interval.start, makers.get(Step(interval.segment, interval.microbatch)))
        at = max(at, interval.end)
    if at < chart.timeline.makespan:
        yield _Wait(at, chart.timeline.makespan, None)


def _ticks(begin: float, end: float) -> Iterator[float]:
    """Eight round times at most, from `begin` on."""
    step = next(s for e in range(-12, 9) for s in (10.0**e, 2 * 10.0**e, 5 * 10.0**e) if (end - begin) / s <= 8)
    tick = ceil(begin / step - 1e-9) * step
    while tick < end:
        yield tick
        tick += step
