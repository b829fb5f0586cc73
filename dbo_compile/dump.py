"""Dump: every level of a split graph as files that can be read on their own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dbo_compile.chart import svg
from dbo_compile.passes.cost import NUM_ROWS
from dbo_compile.report import Levels
from dbo_compile.runtime.clock import Timeline
from dbo_compile.text import placements_text, segments_text


def dump(levels: Levels, folder: Path, measured: Sequence[Timeline] = ()) -> list[Path]:
    """Write the levels of one graph into `folder`, and the lane chart of what was predicted and `measured`."""
    folder.mkdir(parents=True, exist_ok=True)
    predicted = f"predicted for {NUM_ROWS} rows, modelled costs"
    charts = [(predicted, levels.timeline), *(("measured", timeline) for timeline in measured)]
    texts = {
        "1_placements.txt": placements_text(levels),
        "2_segments.txt": segments_text(levels),
        "3_schedule.txt": str(levels.schedule),
        "4_program.txt": str(levels.program),
        "5_graph.py": levels.module.print_readable(print_output=False),
        **{f"6_code_{name}.py": code.module.code for name, code in levels.outline.codes.items()},
        "lanes.svg": svg(charts),
    }
    for name, text in texts.items():
        (folder / name).write_text(text + "\n", encoding="utf-8")
    return [folder / name for name in texts]
