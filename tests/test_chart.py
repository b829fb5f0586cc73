"""The lane chart: every step is drawn once, nothing lies outside or on something else, and any viewer can read it."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import cache
from itertools import combinations, pairwise
from xml.etree import ElementTree

import pytest

from dbo_compile.chart import summary, svg
from dbo_compile.ir.schedule import Lane, Step
from dbo_compile.ir.waits import Handover, handovers
from dbo_compile.levels import Chart
from dbo_compile.runtime.clock import Interval, Timeline, simulate
from tests.ir.moe import moe_program

SVG = "{http://www.w3.org/2000/svg}"
COSTS = {
    "attn": 3e-3, "counts": 3e-4, "sizes": 5e-5, "dispatch": 2e-3, "shared": 1.5e-3, "experts": 2.2e-3,
    "combine": 2.1e-3, "add": 2e-4, "head": 5e-3,
}  # fmt: skip


@cache
def moe_chart(num_layers, title="a <b> & more"):
    program = moe_program(num_layers)
    timeline = simulate(program, lambda run: COSTS[run.segment.rstrip("0123456789")])
    return Chart(title, timeline, handovers(program), {name: f"model.{name}" for name in program.segments})


def drawn(charts, theme="auto"):
    return ElementTree.fromstring(svg(charts, theme))


def elements(root, tag, cls):
    return [e for e in root.iter(f"{SVG}{tag}") if cls in e.get("class", "").split()]


def boxes(root, cls):
    """Left, top, right and bottom of the rectangles of a class."""
    found = []
    for rect in elements(root, "rect", cls):
        x, y, width, height = (float(rect.get(name)) for name in ("x", "y", "width", "height"))
        found.append((x, y, x + width, y + height))
    return found


def titles(root, cls):
    """What hovering the elements of a class shows."""
    return [g.find(f"{SVG}title").text for g in root.iter(f"{SVG}g") if cls in g[0].get("class").split()]


def test_each_step_is_a_bar_that_names_it_its_module_and_its_time():
    chart = moe_chart(1)
    told = titles(drawn([chart]), "step")
    steps = [i for lane in Lane for i in chart.timeline.on(lane)]
    assert [t.split(":")[0] for t in told] == [str(Step(i.segment, i.microbatch)) for i in steps]
    assert told[0] == "attn0#0: 3 ms, from 0 ms to 3 ms\nmodel.attn0"


@pytest.mark.parametrize("num_layers", [1, 2, 32])
def test_bars_lie_side_by_side_on_their_lanes(num_layers):
    root = drawn([moe_chart(num_layers), moe_chart(num_layers)])
    width, height = (float(v) for v in root.get("viewBox").split()[2:])
    bars = sorted(boxes(root, "step"), key=lambda b: (b[1], b[0]))
    assert all(0 <= left < right <= width and 0 < top < bottom <= height for left, top, right, bottom in bars)
    for a, b in pairwise(bars):
        assert a[1] != b[1] or a[2] <= b[0] + 0.6  # the least width of a bar that can be seen
    lanes = {(top, bottom) for _, top, _, bottom in boxes(root, "lane")}
    assert {(top, bottom) for _, top, _, bottom in bars} <= lanes


@pytest.mark.parametrize("num_layers", [1, 2, 32])
def test_labels_lie_inside_their_bars(num_layers):
    root = drawn([moe_chart(num_layers)])
    bars = boxes(root, "step")
    labels = [(float(t.get("x")), float(t.get("y")), t.text) for t in elements(root, "text", "name")]
    assert labels
    for x, y, text in labels:
        (bar,) = [b for b in bars if b[0] <= x <= b[2] and b[1] <= y <= b[3]]
        assert x + 6.9 * len(text) <= bar[2]
    for (x0, y0, text), (x1, y1, _) in combinations(sorted(labels), 2):
        assert y0 != y1 or x0 + 6.9 * len(text) <= x1


def test_a_long_timeline_goes_on_in_further_lines():
    few, many = (len({y for _, y, _, _ in boxes(drawn([moe_chart(n)]), "lane")}) // 2 for n in (2, 32))
    assert (few, many) == (1, 9)


def test_waiting_is_hatched_and_says_for_what():
    timeline = Timeline((
        Interval(Lane.COMPUTE, "attn", 0, 0.0, 1e-3),
        Interval(Lane.COMM, "send", 0, 1e-3, 3e-3),
        Interval(Lane.COMPUTE, "mlp", 0, 3e-3, 4e-3),
    ))
    program = moe_program(1)
    assert titles(drawn([Chart("", timeline)]), "wait") == ["waits 2 ms", "waits 1 ms", "waits 1 ms"]
    told = titles(drawn([moe_chart(1)]), "wait")
    makers = {str(h.maker) for h in handovers(program)}
    assert any(text.partition(" for ")[2] in makers for text in told)


def test_arrows_lead_from_the_end_of_a_step_to_the_start_of_one_on_the_other_lane():
    chart = moe_chart(2)
    root = drawn([chart])
    bars = boxes(root, "step")
    arrows = [e for e in elements(root, "path", "event") if "L" in e.get("d")]
    assert len(arrows) == len(chart.handovers)
    for arrow in arrows:
        x0, y0, x1, y1 = map(float, re.findall(r"[\d.]+", arrow.get("d")))
        assert x0 <= x1 + 0.02
        assert any(abs(b[2] - x0) < 0.7 and y0 in (b[1], b[3]) for b in bars)
        assert any(abs(b[0] - x1) < 0.7 and y1 in (b[1], b[3]) for b in bars)


def with_arcs(num_layers):
    carried = [Handover(Step(f"attn{i}", 0), Step(f"attn{i}", 1)) for i in range(num_layers)]
    return replace(moe_chart(num_layers), carried=tuple(carried))


def test_arcs_lead_from_the_middle_of_a_step_to_that_of_the_next_microbatch():
    root = drawn([with_arcs(2)])
    middles = {((left + right) / 2, top) for left, top, right, _ in boxes(root, "step")}
    _, *arcs = elements(root, "path", "carry")  # the first is in the legend
    assert len(arcs) == 2
    for arc in arcs:
        x, y, width = map(float, re.fullmatch(r"M([\d.]+) ([\d.]+)c0 -11 ([\d.]+) .*", arc.get("d")).groups())
        assert all(any(abs(m - end) < 0.1 and top == y for m, top in middles) for end in (x, x + width))


def test_no_arc_is_lost_where_a_timeline_goes_on_in_a_next_line():
    chart = with_arcs(32)
    assert set(titles(drawn([chart]), "carry")) == {f"{c}: the cache of a request in both" for c in chart.carried}


@pytest.mark.parametrize("theme", ["light", "dark", "auto"])
def test_a_chart_needs_nothing_from_elsewhere(theme):
    text = svg([moe_chart(1)], theme)
    assert re.findall(r"https?://[^\"]+", text) == ["http://www.w3.org/2000/svg"]
    assert "var(" not in text
    assert ("prefers-color-scheme" in text) == (theme == "auto")


@pytest.mark.parametrize(
    "intervals",
    [
        (),
        (Interval(Lane.COMM, "a", None, 0.0, 0.0),),
        tuple(Interval(Lane.COMPUTE, "a", m, m, m + 1.0) for m in range(11)),
        (Interval(Lane.COMPUTE, "a", 0, 0.0, 1e9), Interval(Lane.COMM, "<&>", 1, 1e-9, 2e-9)),
    ],
    ids=["empty", "no_time", "many_microbatches", "any_scale"],
)
def test_the_chart_of_any_timeline_is_well_formed(intervals):
    assert len(boxes(drawn([Chart("a <chart>", Timeline(intervals))]), "step")) == len(intervals)
    drawn([])


def test_long_times_are_written_out():
    timeline = Timeline((Interval(Lane.COMPUTE, "a", 0, 0.0, 12.3456), Interval(Lane.COMM, "b", 0, 0.5, 1.4995)))
    assert summary(timeline) == "12346 ms, compute busy 12346, comm busy 1000, 100% of communication hidden"
    assert titles(drawn([Chart("", timeline)]), "step")[0] == "a#0: 12346 ms, from 0 ms to 12346 ms"


def test_all_tokens_and_each_microbatch_have_a_colour_in_the_legend():
    timeline = Timeline(tuple(Interval(Lane.COMPUTE, "a", m, i, i + 1.0) for i, m in enumerate((1, None, 0))))
    texts = [t.text for t in drawn([Chart("", timeline)]).iter(f"{SVG}text")]
    assert texts[:5] == ["microbatch 0", "microbatch 1", "all tokens", "waiting", "must come first"]
