"""The fastest of four ways: `split="auto"` against Inductor on the whole graph, from 1 to 4096 tokens.

    python -m benchmarks.bench_sizes [--sizes 1 2 ...] [--ratios 0.25 1 4] [--quick] [--write]
    python -m benchmarks.bench_sizes --every [--ratios 1] [--write]

The model is that of `bench_link`, and so is the link, at several rates. Every call is of `size` sequences of one
token, so that each number of tokens can be had. The first calls of each size are dbo's trials and are not timed; both
variants are compiled with a symbolic number of tokens. Inductor is measured twice, so that one sees which ratios are
noise. Without root both ranks talk over loopback, whose rate is what it is.

`--every` takes every size from 1 to 512, on the small model; sizes that are decided together are tried once.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.bench_link import CONFIG, SMALL, comm_seconds, in_place_of_exchange, make_model, sizes_sent
from benchmarks.link import agreed, joined, set_rate, start_ranks, why_no_link
from benchmarks.results import Table, alternating, options, publish
from dbo_compile import compat, reports
from dbo_compile.runtime.padding import coarse
from dbo_compile.runtime.tune import Decision, Size

SIZES = tuple(2**i for i in range(13))
TYPICAL_SIZE = 512
"""The size for which a ratio of communication to compute is meant; smaller sizes have their own."""
MOST_TRIALS = 60
"""Calls after which dbo has decided: twelve of each of four ways at most, eight to measure costs, the gate."""
WARM_UP = 3
"""Calls of a size for which dbo has decided, before it is measured."""
LARGE, FEW_REPEATS = 1024, 9
"""From so many tokens on, steps take so long that they vary little."""
REFERENCE_MBIT = 1000.0


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--sizes", type=int, nargs="+")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.25, 1.0, 4.0])
    parser.add_argument("--every", action="store_true", help="every size from 1 to 512, on the small model")
    parser.add_argument("--rank", type=int, help="of this process; set by the benchmark itself")
    args = parser.parse_args()
    why = why_no_link()
    if args.rank is None:
        sys.exit(start_ranks("benchmarks.bench_sizes", sys.argv[1:], link=not why))
    sizes = range(1, 513) if args.every else args.sizes or ((1, 8, 64) if args.quick else SIZES)
    config = SMALL if args.quick or args.every else CONFIG
    with joined(args.rank), torch.no_grad(), compat.host_reads_in_graph():
        links = over_loopback() if why else over_links(config, args.ratios)
        repeats = 5 if args.quick else 7 if args.every else 25
        rows = [row for link in links for row in measured(config, sizes, link, repeats)]
        if args.rank == 0:
            about = f"Over loopback, since {why}. " if why else "Rates are such that communication takes so many times "
            about += "" if why else f"what computing takes at {TYPICAL_SIZE} tokens. "
            name, shown = ("every-size", most(rows)) if args.every else ("sizes", [each(rows)])
            tables = [summary(rows), *shown]
            publish(name, TITLES[args.every], tables, about=about + ABOUT, write=args.write, by="sizes")


ABOUT = (
    "Medians in turn, ± half the distance of the quartiles. `chosen` is what dbo's trials ended with; where it is "
    "`inductor`, both variants run the same code, and what is left of the ratio is the agreement of the ranks on each "
    "step, the un-padding, and noise."
)
Row = tuple[str, int, str, str, float, float, str]


TITLES = {False: "The fastest of four ways", True: "The fastest of four ways, every size"}
RATIO, AGAIN = 4, 5
COLUMNS = ("link", "tokens", "Inductor ms", "dbo ms", "dbo / Inductor", "Inductor again", "chosen (trials)")


def summary(rows: Sequence[Row]) -> Table:
    found = []
    for name, column in (("dbo", RATIO), ("Inductor again", AGAIN)):
        _, low, half, high, worst = quantiles([row[column] for row in rows])
        where = max(rows, key=lambda row: row[column])
        quarters = (f"{q:.3f}" for q in (low, half, high, worst))
        found.append((name, len(rows), *quarters, f"{where[1]} tokens, {where[0]}"))
    columns = ("to Inductor", "cases", "5 %", "half", "95 %", "worst", "where")
    return Table(columns, found, title="Worst and median")


def each(rows: Sequence[Row], title: str = "Each size") -> Table:
    return Table(COLUMNS, [(*row[:4], *(f"{r:.3f}" for r in row[RATIO:-1]), row[-1]) for row in rows], title=title)


def most(rows: Sequence[Row]) -> list[Table]:
    """By what was chosen, how the ratios are spread; and the worst ones."""
    by_choice: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        by_choice[row[-1].partition(" (")[0]].append(row[RATIO])
    spread = [(choice, len(found), *(f"{q:.3f}" for q in quantiles(found))) for choice, found in by_choice.items()]
    columns = ("played", "sizes", "least", "5 %", "half", "95 %", "most")
    worst = sorted(rows, key=lambda row: -row[RATIO])[:10]
    return [Table(columns, spread, title="dbo / Inductor by what is played"), each(worst, "The ten worst")]


def quantiles(values: Sequence[float]) -> list[float]:
    values = sorted(values)
    return [values[round(q * (len(values) - 1))] for q in (0.0, 0.05, 0.5, 0.95, 1.0)]


def over_loopback() -> Iterator[str]:
    yield "loopback"


def over_links(config: dict[str, Any], ratios: Sequence[float]) -> Iterator[str]:
    """Set each rate, one after the other."""
    model, ids = make_model(config), tokens(config, TYPICAL_SIZE)
    unexchanged = partial(in_place_of_exchange, torch.compile(model, fullgraph=True), ids)
    unexchanged()
    compute = agreed(alternating({"": unexchanged}, 5, before=dist.barrier)[""].median)
    sent = sizes_sent(model, ids)
    set_rate(REFERENCE_MBIT)
    comm = comm_seconds(sent, 5)
    for ratio in ratios:
        mbit = REFERENCE_MBIT * comm / (ratio * compute)
        set_rate(mbit)
        yield f"{mbit:.0f} Mbit/s, ratio {ratio:g}"


def measured(config: dict[str, Any], sizes: Sequence[int], link: str, repeats: int) -> Iterator[Row]:
    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit = 64
    model = make_model(config)
    variants = {
        "Inductor": torch.compile(model, fullgraph=True, dynamic=True),
        "dbo": torch.compile(model, backend="dbo", fullgraph=True),
    }
    for size in sorted(sizes, reverse=True):
        ids = tokens(config, size)
        calls = {name: partial(fn, ids) for name, fn in variants.items()}
        decide(calls["dbo"], size)
        for _ in range(WARM_UP):
            for call in calls.values():
                call()
        calls["again"] = calls["Inductor"]
        took = alternating(calls, min(repeats, FEW_REPEATS) if size >= LARGE else repeats, before=dist.barrier)
        inductor, dbo, again = (agreed(took[name].median) for name in calls)
        shown = took["Inductor"].ms(2), took["dbo"].ms(2)
        yield link, size, *shown, dbo / inductor, again / inductor, chosen(size)


def decide(call: Callable[[], Any], size: int) -> None:
    """Have dbo try a size until it has decided; one that it never splits it never decides."""
    for _ in range(MOST_TRIALS):
        call()
        if decision(size):
            return


def decision(size: int) -> Decision | None:
    """The decision for a size of one token a sequence; sizes that are padded alike have the same."""
    return reports()[-1].decisions.get(Size(coarse(size), coarse(size)))


def chosen(size: int) -> str:
    found = decision(size)
    return str(found) if found else "not split: " + (reports()[-1].reason or "see decline_counts")


def tokens(config: dict[str, Any], size: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 * size + dist.get_rank())
    return torch.randint(0, config["vocab_size"], (size, 1), generator=generator)


if __name__ == "__main__":
    main()
