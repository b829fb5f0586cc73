"""How every benchmark measures, and what it leaves: medians over alternating repeats, Markdown tables, result files."""

from __future__ import annotations

import argparse
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parents[1] / "docs" / "results"


@dataclass(frozen=True, slots=True)
class Timing:
    """The seconds of one call: the median of the repeats, and half of what lies between their quartiles."""

    median: float
    noise: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Timing:
        if len(seconds) == 1:
            return cls(seconds[0], 0.0)
        low, median, high = statistics.quantiles(seconds, n=4, method="inclusive")
        return cls(median, (high - low) / 2)

    def ms(self, digits: int = 1) -> str:
        return f"{self.median * 1e3:.{digits}f} ±{self.noise * 1e3:.{digits}f}"

    def us(self) -> str:
        return f"{self.median * 1e6:.1f} ±{self.noise * 1e6:.1f}"


def alternating(
    calls: Mapping[str, Callable[[], Any]], repeats: int, *, before: Callable[[], Any] = lambda: None
) -> dict[str, Timing]:
    """Time each call `repeats` times, in turn, so that a drift of the machine hits all alike.

    Each round has an order of its own, so that none always follows the same one: a shuffled one, the same on all ranks.
    `before` is called before each, off the clock; ranks meet there.
    """
    taken: dict[str, list[float]] = {name: [] for name in calls}
    orders = random.Random(0)
    for _ in range(repeats):
        for name in orders.sample(list(calls), len(calls)):
            before()
            start = time.perf_counter()
            calls[name]()
            taken[name].append(time.perf_counter() - start)
    return {name: Timing.of(seconds) for name, seconds in taken.items()}


@dataclass(frozen=True, slots=True)
class Table:
    """A Markdown table; a cell is text, or a number that is shown as it is."""

    columns: Sequence[str]
    rows: Sequence[Sequence[object]]
    title: str = ""
    note: str = ""

    def __str__(self) -> str:
        lines = [f"| {' | '.join(self.columns)} |", "|" + "---|" * len(self.columns)]
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(f"{len(row)} cells {row} for {len(self.columns)} columns {self.columns}")
            lines.append(f"| {' | '.join(map(str, row))} |")
        above = [f"## {self.title}", ""] if self.title else []
        below = ["", self.note] if self.note else []
        return "\n".join([*above, *lines, *below])


def options(doc: str | None) -> argparse.ArgumentParser:
    """The command line of a benchmark, with what all of them have."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes and few repeats: to see that it runs")
    parser.add_argument("--write", action="store_true", help="also write docs/results/<name>.md")
    return parser


def publish(name: str, title: str, tables: Sequence[Table], *, about: str, write: bool, by: str = "") -> None:
    """Print the tables with the command that made them; with `write`, leave them in docs/results/<name>.md too.

    `by` is the benchmark, where it is not the one called `name`.
    """
    text = "\n\n".join([f"# {title}", _made_by(by or name), about, *map(str, tables)])
    print(text, flush=True)
    if write:
        RESULTS.mkdir(parents=True, exist_ok=True)
        (RESULTS / f"{name}.md").write_text(text + "\n")


def _made_by(name: str) -> str:
    flags = " ".join(f for f in sys.argv[1:] if f != "--write").split("--rank")[0]  # which comes last, from `link`
    command = f"python -m benchmarks.bench_{name} {flags}".rstrip()
    versions = f"torch {torch.__version__}, Python {platform.python_version()}, {platform.machine()}"
    return f"{datetime.now(UTC):%Y-%m-%d}, {versions}, {torch.get_num_threads()} threads a process. `{command}`"
