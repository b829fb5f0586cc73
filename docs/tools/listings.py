"""Makes the listings and charts of docs/how-it-works.md, and the table of options, with the tool itself:

    python docs/tools/listings.py

A listing stands between `<!-- listing: name -->` and `<!-- end -->`; a test compares it with what is printed now.
"""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import torch
import torch.distributed as dist

from dbo_compile import reports
from dbo_compile.chart import svg
from dbo_compile.config import Config
from dbo_compile.example import moe
from dbo_compile.levels import Levels
from dbo_compile.runnable import runnable
from dbo_compile.runtime.clock import chart
from dbo_compile.text import placements_text, segments_text

DOCS = Path(__file__).parent.parent
PAGE = DOCS / "how-it-works.md"
OPTIONS = DOCS / "options.md"
TORCH = "2.13"
"""Names of nodes differ between versions of PyTorch; the listings are those of this one."""
LISTING = re.compile(r"(<!-- listing: (\w+) -->\n```\w+\n)(.*?)(```\n<!-- end -->)", re.DOTALL)


def levels_of(num_layers: int) -> Levels:
    """The levels of the example, traced and compiled here, in a process group of one rank if there is no other."""
    mine = not dist.is_initialized()
    if mine:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    torch._dynamo.reset()
    model, args = moe(num_layers)
    with torch.no_grad():
        torch.compile(model, backend="dbo", options={"inner": "eager"})(*args)
    if mine:
        dist.destroy_process_group()
    levels = reports()[-1].levels
    assert levels is not None, reports()[-1].reason
    return levels


def listings(levels: Levels) -> dict[str, str]:
    """The text of every listing, by name."""
    placements = [line for line in placements_text(levels).splitlines() if not line.endswith("argument")]
    graph = runnable(levels, None, "").text
    code = next(text for text in graph.split("\n\n\n") if text.startswith("# layers_0_experts\n"))
    program = graph.split("class Program:")[1].split("\n\n")[1]
    body = [line.removeprefix(" " * 8) for line in program.splitlines()[1:] if line.strip()]
    return {
        "placements": "\n".join(placements),
        "segments": segments_text(levels).rstrip(),
        "schedule": "\n".join(_wrapped(str(levels.schedule).split())),
        "program": str(levels.program),
        "code": "\n".join(code.splitlines()),
        "graph": "\n".join([*(re.sub(r";  .*", "", line) for line in body[:24]), "..."]),
        "lanes": "\n".join(chart(levels.timeline, 90).splitlines()[:-1]),
    }


def options() -> str:
    """The options as the rows of a table."""
    rows = [(f"`{o.name}`", f"`{o.default!r}`", _cell(o.metadata["help"])) for o in fields(Config)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def _wrapped(words: list[str]) -> list[str]:
    lines = [""]
    for word in words:
        if len(lines[-1]) + len(word) > 98:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return lines


def refreshed(page: str, made: dict[str, str]) -> str:
    """The page with every listing as it is made now."""
    return LISTING.sub(lambda m: f"{m[1]}{made[m[2]]}\n{m[4]}", page)


def charts(levels: Levels) -> dict[str, str]:
    """The lane chart in both themes, by file name."""
    return {f"lanes-{theme}.svg": svg([levels.predicted], theme) for theme in ("light", "dark")}


def with_options(page: str) -> str:
    """The page of the options with the table as it is made now."""
    head, rule, _ = page.partition("|---|---|---|\n")
    return f"{head}{rule}{options()}\n"


if __name__ == "__main__":
    OPTIONS.write_text(with_options(OPTIONS.read_text()))
    found = levels_of(1)
    PAGE.write_text(refreshed(PAGE.read_text(), listings(found)))
    for name, picture in charts(found).items():
        (DOCS / "images" / name).write_text(picture)
