"""The lane chart as SVG: rows are lanes, colours are microbatches, hover names the segment and its time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape

from dbo_compile.ir.schedule import Lane, Step
from dbo_compile.runtime.clock import Interval, Timeline

WIDTH, LABEL, ROW, GAP, TOP = 1200, 90, 34, 8, 34
COLOURS = ("#4477aa", "#ee7733", "#228833", "#aa3377", "#66ccee", "#ccbb44", "#bb5566", "#88ccaa")
STYLE = """
text { font: 12px system-ui, sans-serif; fill: #222; } .lane { fill: #f2f2f2; } .once { fill: #888; }
rect.step { stroke: #fff; stroke-width: .5; } .name { fill: #fff; font-size: 10px; pointer-events: none; }
@media (prefers-color-scheme: dark) {
  svg { background: #1b1b1b; } text { fill: #ddd; } .lane { fill: #2b2b2b; } rect.step { stroke: #1b1b1b; }
}
"""


def svg(charts: Sequence[tuple[str, Timeline]]) -> str:
    """Charts under each other, each with its title and a time axis of its own; times are seconds."""
    height = TOP + sum(_height() for _ in charts)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}">',
        f"<style>{STYLE}</style>",
        *_legend(charts),
    ]
    for i, (title, timeline) in enumerate(charts):
        parts += _chart(title, timeline, TOP + i * _height())
    return "\n".join([*parts, "</svg>"])


def _height() -> int:
    return 28 + len(Lane) * (ROW + GAP) + 16


def _legend(charts: Sequence[tuple[str, Timeline]]) -> Iterator[str]:
    played = {i.microbatch for _, timeline in charts for i in timeline.intervals}
    x = LABEL
    for m in sorted(m for m in played if m is not None):
        yield f'<rect x="{x}" y="8" width="12" height="12" fill="{COLOURS[m % len(COLOURS)]}"/>'
        yield f'<text x="{x + 18}" y="18">microbatch {m}</text>'
        x += 120
    if None in played:
        yield f'<rect x="{x}" y="8" width="12" height="12" class="once"/><text x="{x + 18}" y="18">all tokens</text>'


def _chart(title: str, timeline: Timeline, top: int) -> Iterator[str]:
    yield f'<text x="{LABEL}" y="{top + 18}" font-weight="bold">{escape(title)}: {_summary(timeline)}</text>'
    scale = (WIDTH - LABEL - 10) / (timeline.makespan or 1.0)
    for row, lane in enumerate(Lane):
        y = top + 28 + row * (ROW + GAP)
        yield f'<text x="8" y="{y + ROW / 2 + 4}">{lane.value}</text>'
        yield f'<rect class="lane" x="{LABEL}" y="{y}" width="{WIDTH - LABEL - 10}" height="{ROW}"/>'
        for interval in timeline.on(lane):
            yield from _bar(interval, y, scale)


def _summary(timeline: Timeline) -> str:
    busy = ", ".join(f"{lane.value} busy {timeline.busy(lane) * 1e3:.1f}" for lane in Lane)
    return f"{timeline.makespan * 1e3:.1f} ms in all, {busy}, {timeline.hidden_comm:.0%} of communication hidden"


def _bar(interval: Interval, y: int, scale: float) -> Iterator[str]:
    x, width = LABEL + interval.start * scale, max((interval.end - interval.start) * scale, 0.5)
    step = str(Step(interval.segment, interval.microbatch))
    m = interval.microbatch
    paint = 'class="step once"' if m is None else f'class="step" fill="{COLOURS[m % len(COLOURS)]}"'
    hover = f"{step}: {interval.start * 1e3:.3f} to {interval.end * 1e3:.3f} ms"
    yield f'<rect {paint} x="{x:.2f}" y="{y}" width="{width:.2f}" height="{ROW}"><title>{escape(hover)}</title></rect>'
    if width > 7 * len(step):
        yield f'<text class="name" x="{x + 4:.2f}" y="{y + ROW / 2 + 4}">{escape(step)}</text>'
