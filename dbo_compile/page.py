"""index.html of dumps: one page a graph, and one that links the graphs of all ranks. Self-contained, no network."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from math import isnan
from typing import Any

from dbo_compile.advice import advice
from dbo_compile.runtime.clock import hidden_text

STYLE = """
:root { color-scheme: light dark; --text: #222; --faint: #6b6b6b; --back: #fff; --line: #ddd; --link: #2458a6; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e4e4e4; --faint: #9a9a9a; --back: #16181c; --line: #3a3d44; --link: #8ab4f0; }
}
body { font: 14px/1.5 ui-sans-serif, system-ui, "DejaVu Sans", sans-serif; color: var(--text); background: var(--back);
  max-width: 1240px; margin: 0 auto; padding: 20px; }
h1 { font-size: 21px; margin: 0 0 4px; } h2 { font-size: 16px; margin: 28px 0 6px; }
a { color: var(--link); } .faint { color: var(--faint); } code, td.code { font-family: ui-monospace, monospace; }
.wide { overflow-x: auto; } .wide svg { max-width: 100%; height: auto; min-width: 900px; }
table { border-collapse: collapse; } td, th { text-align: left; padding: 3px 14px 3px 0; vertical-align: top;
  border-bottom: 1px solid var(--line); } th { font-weight: 600; } td.number { text-align: right;
  font-variant-numeric: tabular-nums; } td.code { font-size: 12.5px; overflow-wrap: break-word; }
"""
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src 'self' data:"


def graph_page(report: Mapping[str, Any], chart: str, files: Sequence[tuple[str, str]]) -> str:
    """The page of one graph. `report` is that of report.json, `chart` an SVG, `files` are names and what they hold."""
    split = "split" if report["split"] else "not split"
    title = f"Graph {report.get('graph', 0)} of rank {report.get('rank', 0)}: {split}"
    return _page(title, [f'<p class="faint">{escape(_facts(report))}</p>', *_graph(report, chart, files)])


def root_page(pages: Sequence[tuple[str, str]]) -> str:
    """The page of a whole dump: where the pages of the graphs are, and what each is."""
    rows = [f'<li><a href="{escape(at)}">{escape(at)}</a> {escape(what)}</li>' for at, what in pages]
    return _page("dbo-compile: dump", ["<ul>", *rows, "</ul>"])


def _page(title: str, body: Sequence[str]) -> str:
    return "\n".join([
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>",
        f"<h1>{escape(title)}</h1>",
        *body,
        "</body></html>",
    ])


def _facts(report: Mapping[str, Any]) -> str:
    facts = [f"{name} {version}" for name, version in report.get("versions", {}).items()]
    facts += [f"compile id {report['compile_id']}"] if report.get("compile_id") else []
    return ", ".join([*facts, *([f"program {report['fingerprint']}"] if report["split"] else [])])


def _graph(report: Mapping[str, Any], chart: str, files: Sequence[tuple[str, str]]) -> Iterator[str]:
    if report["split"]:
        yield f"<p>{escape(_summary(report))}</p>"
        yield f'<div class="wide">{chart}</div>'
    else:
        yield f"<p><b>{escape(report['reason'])}</b><br>{escape(advice(report['reason']))}</p>"
    barriers = [(b["op"], b["reason"], advice(b["reason"])) for b in report["barriers"]]
    yield from _table("Played once on all tokens", ("op and line", "because", "what to do"), barriers)
    trust = [(o["op"], o["assumes"]) for o in report["obligations"]]
    yield from _table("Taken on trust", ("op and line", "splitting assumes that"), trust)
    declined = [(reason, times, advice(reason)) for reason, times in report["calls"]["declined"].items()]
    yield from _table("Calls that were not split", ("reason", "calls", "what to do"), declined)
    cuts = [(f"microbatch {m}", part) for m, part in enumerate(report["cuts"]["last"])] if report["cuts"] else []
    yield from _table("The last step that was cut by its requests", ("", "has of it"), cuts)
    yield from _decisions(report["decisions"])
    yield from _segments(report["segments"])
    yield "<h2>Files</h2><table>"
    for name, what in files:
        yield f'<tr><td class="code"><a href="{escape(name)}">{escape(name)}</a></td><td>{escape(what)}</td></tr>'
    yield "</table>"


def _segments(segments: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    has_measured = any("measured_seconds" in s for s in segments)
    heads = ("segment", "lane", "times", "modelled ms", *(["measured ms"] if has_measured else []), "code of", "module")
    rows = []
    for s in segments:
        measured = [s["measured_seconds"] * 1e3] if has_measured else []
        rows.append((s["name"], s["lane"], s["times"], s["seconds"] * 1e3, *measured, s["code"], s["module"]))
    yield from _table("Segments", heads, rows)


def _summary(report: Mapping[str, Any]) -> str:
    calls = report["calls"]
    shares = {"predicted": report["predicted"]["hidden_comm"]}
    if measured := report.get("measured"):
        shares["measured"] = measured[-1]["hidden_comm"]
    return (
        f"{report['num_microbatches']} microbatches, {report['num_segments']} segments of which "
        f"{report['num_unique_segments']} differ, {report['num_comm_ops']} collectives. "
        f"{calls['split']} of {calls['total']} calls were split; {hidden_text(**shares)}."
    )


def _decisions(decisions: Mapping[str, Any]) -> Iterator[str]:
    variants = list(dict.fromkeys(v for made in decisions.values() for v in made["seconds"]))
    rows = [
        (size, made["chosen"], *(made["seconds"].get(v, float("nan")) * 1e3 for v in variants))
        for size, made in decisions.items()
    ]
    yield from _table("Decisions", ("tokens/elements", "played", *(f"{v}, ms" for v in variants)), rows)


def _table(title: str, heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> Iterator[str]:
    """A table, or nothing if it has no rows."""
    if not rows:
        return
    yield f"<h2>{title}</h2><div class=\"wide\"><table><tr>{''.join(f'<th>{head}</th>' for head in heads)}</tr>"
    for row in rows:
        yield f"<tr>{''.join(map(_cell, row))}</tr>"
    yield "</table></div>"


def _cell(value: Any) -> str:
    match value:
        case float() if isnan(value): return '<td class="number">\N{EN DASH}</td>'
        case float(): return f'<td class="number">{value:.3f}</td>'
        case int(): return f'<td class="number">{value}</td>'
        case _: return f'<td class="code">{escape(value)}</td>'
