"""Memory: the most that a step has allocated at any time, split against unsplit.

    python -m benchmarks.bench_memory [--tokens 512 2048] [--quick] [--write]

Qwen3-MoE with expert parallelism over a group of one rank, whose exchange has as many rows as that of any number of
ranks. What counts is what the CPU allocator hands out and takes back during a warm call, as PyTorch's profiler sees
it: activations, results and copies for the exchange; weights and inputs are there before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import _create_work_from_future
from torch.futures import Future
from torch.profiler import ProfilerActivity, profile

from benchmarks.bench_link import CONFIG, LENGTH, SMALL, make_model
from benchmarks.results import Table, options, publish
from dbo_compile import compat

MIB = 2**20
SPLIT = {"split": "always", "gate": "never"}
WAYS: dict[str, dict[str, Any]] = {
    "eager": {},
    "Inductor": {"backend": "inductor"},
    "dbo, never split": {"backend": "dbo", "options": {"split": "never"}},
    "dbo, segments, not split": {"backend": "dbo", "options": SPLIT | {"min_tokens": 2**20}},
    "dbo, 2 microbatches": {"backend": "dbo", "options": SPLIT},
    "dbo, 2 microbatches, alternate": {"backend": "dbo", "options": SPLIT | {"policy": "alternate"}},
    "dbo, 2 microbatches, sequential": {"backend": "dbo", "options": SPLIT | {"policy": "sequential"}},
    "dbo, 4 microbatches": {"backend": "dbo", "options": SPLIT | {"num_microbatches": 4}},
}


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--tokens", type=int, nargs="+")
    args = parser.parse_args()
    torch.set_num_threads(1)
    sizes = args.tokens or ([256] if args.quick else [512, 2048])
    config = SMALL if args.quick else CONFIG
    ways = {name: WAYS[name] for name in (list(WAYS)[:5] if args.quick else WAYS)}
    dist.Backend.register_backend("alone", lambda _store, rank, size, _timeout: Alone(rank, size), devices=["cpu"])
    dist.init_process_group("alone", store=dist.HashStore(), rank=0, world_size=1)
    with torch.no_grad(), compat.host_reads_in_graph():
        rows = [row for num_tokens in sizes for row in measured(config, ways, num_tokens)]
    dist.destroy_process_group()
    about = (
        f"{config['num_hidden_layers']} layers, hidden size {config['hidden_size']}, float32. Counted, not timed. "
        "`dbo, never split` is Inductor's whole graph; `segments, not split` plays the segments on all rows."
    )
    columns = ("tokens", "way", "peak MiB", "/ Inductor")
    publish("memory", "Peak memory of a step", [Table(columns, rows)], about=about, write=args.write)


class Alone(dist.ProcessGroup):
    """The group of one rank, at once: a thread of gloo would let go of what was exchanged only when it comes to it."""

    def alltoall_base(self, out: torch.Tensor, x: torch.Tensor, *_: Sequence[int] | object) -> dist.Work:
        out.copy_(x)
        done: Future[Any] = Future()
        done.set_result(None)
        work: dist.Work = _create_work_from_future(done)
        return work

    @property
    def group_name(self) -> str:
        return dist.distributed_c10d._world.pg_names[self]

    def getBackendName(self) -> str:
        return "alone"


def measured(config: dict[str, Any], ways: dict[str, dict[str, Any]], num_tokens: int) -> list[tuple[object, ...]]:
    torch.manual_seed(0)
    ids = torch.randint(0, config["vocab_size"], (num_tokens // LENGTH, LENGTH))
    peaks = {}
    for name, how in ways.items():
        torch._dynamo.reset()
        model = make_model(config)
        peaks[name] = peak_bytes(torch.compile(model, fullgraph=True, **how) if how else model, ids)
    return [(num_tokens, n, f"{p / MIB:.1f}", f"{p / peaks['Inductor']:.2f}") for n, p in peaks.items()]


def peak_bytes(fn: Callable[..., Any], *args: Any) -> int:
    """The most bytes that the CPU allocator had given out at one time during a warm call, beyond those before it."""
    for _ in range(2):
        fn(*args)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        result = fn(*args)
    del result  # lived to the end of the call, so it counts
    events = recorded.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    return highest(num_bytes for _, num_bytes in changes)


def highest(changes: Iterable[int]) -> int:
    """The highest running sum."""
    total = peak = 0
    for change in changes:
        total += change
        peak = max(peak, total)
    return peak


if __name__ == "__main__":
    main()
