"""What the engine costs a step: ranks that agree, a call that is dispatched, a step that is padded.

    python -m benchmarks.bench_engine [--quick] [--write]

Two ranks over loopback, one thread each. Agreement: the time from coming to a step until its plan is there, when both
come at once, and when the wish was announced ahead. Dispatch: what a call of a compiled graph takes besides its
segments, against the same function compiled by Inductor, whose time is subtracted from neither. Joins: what it costs to
lay the rows of both microbatches together, as before a segment that is played once, next to a product of those rows.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol

import dbo_compile
from benchmarks.link import joined, start_ranks
from benchmarks.results import Table, Timing, alternating, options, publish
from dbo_compile.config import Config
from dbo_compile.runtime.agree import Agreement
from dbo_compile.runtime.lanes import WorkLanes
from dbo_compile.runtime.plan import Limits, Wish

WIDTH = 64
JOINED = ((16, 512), (64, 512), (512, 512), (512, 2048), (2048, 2048))


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--rank", type=int, help="of this process; set by the benchmark itself")
    args = parser.parse_args()
    if args.rank is None:
        sys.exit(start_ranks("benchmarks.bench_engine", sys.argv[1:], link=False))
    steps = 200 if args.quick else 5000
    with joined(args.rank), torch.no_grad():
        tables = [agreement(steps), dispatch(max(20, steps // 25)), joins(max(20, steps // 50))]
        if args.rank == 0:
            publish("engine", "Host cost of the engine", tables, about=ABOUT, write=args.write)


ABOUT = "Medians, ± half the distance of the quartiles, of rank 0."


def agreement(steps: int) -> Table:
    """Microseconds of one agreement."""
    config = Config().fingerprint
    wish = Wish(64, 64, 64, True, False, False, "1" * 16, config)
    limits = Limits(2, 2, 2)
    meeting = Agreement(dist.group.WORLD, timeout_s=60.0)
    alone = Agreement(None, timeout_s=60.0)
    rows = [
        ("one rank", _timed(lambda: alone.agree(wish, limits), steps)),
        ("two ranks that come at once", _timed(lambda: meeting.agree(wish, limits), steps)),
        ("two ranks, announced 1 ms ahead", _timed_ahead(meeting, wish, limits, steps)),
        ("a plain all_reduce of 8 numbers", _timed(partial(dist.all_reduce, torch.zeros(8)), steps)),
    ]
    return Table(("agreement", "us a step"), [(name, t.us()) for name, t in rows], title="Agreement, CPU group")


def _timed(call: Callable[[], Any], steps: int) -> Timing:
    return alternating({"": call}, steps)[""]


def _timed_ahead(meeting: Agreement, wish: Wish, limits: Limits, steps: int) -> Timing:
    taken = []
    for _ in range(steps // 5):
        meeting.agree_ahead(wish)
        time.sleep(0.001)
        start = time.perf_counter()
        meeting.agree(wish, limits)
        taken.append(time.perf_counter() - start)
    return Timing.of(taken)


def dispatch(repeats: int) -> Table:
    """Microseconds of a call of a small graph with one collective."""

    def fn(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return x + funcol.all_reduce(x @ weight, "sum", dist.group.WORLD)

    weight = torch.randn(WIDTH, WIDTH)
    always = {"split": "always", "gate": "never"}
    unsplit = {**always, "min_tokens": 2**62}
    padded = dbo_compile.dbo(fn, token_dims={"x": 0}, pad_to=[32], **unsplit)
    variants = {
        "Inductor": _apart(fn, backend="inductor"),
        "dbo, unsplit": _apart(fn, backend="dbo", options=unsplit),
        "dbo, split": _apart(fn, backend="dbo", options=always),
        "dbo, unsplit, decorated, padded from 24 to 32 tokens": padded,
    }
    x = torch.randn(24, WIDTH)
    calls = {name: partial(call, x, weight) for name, call in variants.items()}
    for call in [*calls.values()] * 3:
        call()
    took = alternating(calls, repeats, before=dist.barrier)
    rows = [(name, t.us()) for name, t in took.items()]
    return Table(("a call", "us"), rows, title=f"Dispatch: 24 tokens of {WIDTH} numbers, one product, one all-reduce")


def joins(repeats: int) -> Table:
    """Microseconds of a join of two microbatches, and of a square product of all rows."""
    rows = []
    for num_tokens, width in JOINED:
        lanes = WorkLanes((num_tokens // 2, num_tokens - num_tokens // 2))
        pieces = [torch.randn(n, width) for n in lanes.num_rows]
        x, weight = torch.randn(num_tokens, width), torch.randn(width, width)
        took = alternating({"join": partial(lanes.join, pieces, 0), "product": partial(torch.mm, x, weight)}, repeats)
        share = took["join"].median / took["product"].median
        rows.append((num_tokens, width, took["join"].us(), took["product"].us(), f"{share:.1%}"))
    columns = ("tokens", "width", "join us", "product us", "join / product")
    return Table(columns, rows, title="Joins: rows of float32, one thread")


def _apart(fn: Callable[..., Any], **how: Any) -> Callable[..., Any]:
    """`fn` compiled by itself: Dynamo keeps what it has compiled by code."""
    own = type(fn)(fn.__code__.replace(), fn.__globals__, closure=fn.__closure__)
    compiled: Callable[..., Any] = torch.compile(own, fullgraph=True, **how)
    return compiled


if __name__ == "__main__":
    main()
