"""Overlap on a real link: Qwen3-MoE with expert parallelism on two ranks, joined by a link of a given rate.

    python -m benchmarks.bench_link [--rates 2gbit 1gbit 500mbit] [--tokens 512]

Each rank runs in a network namespace of its own, with one thread; `link.sh` joins them by a veth pair that a token
bucket shapes; that needs root. All variants run the same model with the same exchange (exact splits), in turn, on the
same inputs; the table has medians, and ratios to Inductor.

One gloo all-to-all alone may fill only half of a TCP link (both directions share what one collective does in turn), and
two in flight fill it: so `Inductor, halves` sends every exchange as two concurrent halves of the columns, which is what
somebody would do who tunes the unsplit model.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from dbo_compile import compat
from dbo_compile.integrations import expert_parallel as exchange
from dbo_compile.integrations.transformers import expert_parallel
from dbo_compile.measure import measured

LINK = Path(__file__).with_name("link.sh")
REPEATS = 9
LENGTH = 32
CONFIG: dict[str, Any] = {
    "vocab_size": 1024,
    "hidden_size": 512,
    "intermediate_size": 512,
    "moe_intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "use_cache": False,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", nargs="+", default=["4gbit", "2gbit", "1gbit", "500mbit"])
    parser.add_argument("--tokens", type=int, default=512, help="tokens a rank and step")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank is not None:
        run_rank(args.rank, args.tokens, args.rates)
        return
    if os.geteuid() != 0:
        print("skipped: network namespaces need root")
        return
    subprocess.run([LINK, "down"], stderr=subprocess.DEVNULL, check=False)
    subprocess.run([LINK, "up", args.rates[0]], check=True)
    try:
        command = [sys.executable, "-m", "benchmarks.bench_link", *sys.argv[1:]]
        env = os.environ | {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "10.77.0.1", "MASTER_PORT": "29500"}
        ranks = [
            subprocess.Popen(
                ["ip", "netns", "exec", f"dbo{r}", *command, "--rank", str(r)],
                env=env | {"GLOO_SOCKET_IFNAME": f"veth-dbo{r}"},
            )
            for r in range(2)
        ]
        sys.exit(max(r.wait() for r in ranks))
    finally:
        subprocess.run([LINK, "down"], check=True)


def run_rank(rank: int, num_tokens: int, rates: list[str]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    torch.manual_seed(rank)
    ids = torch.randint(0, CONFIG["vocab_size"], (num_tokens // LENGTH, LENGTH))
    with torch.no_grad(), compat.host_reads_in_graph():
        variants = compiled_variants()
        for fn in variants.values():  # compile all of them before the clock runs
            fn(ids)
        if rank == 0:
            print(f"torch {torch.__version__}, {num_tokens} tokens a rank, {CONFIG['num_hidden_layers']} layers, ms\n")
            print(f"| link | {' | '.join(variants)} | dbo / Inductor | dbo / Inductor, halves | hidden |")
            print("|" + "---|" * (len(variants) + 4))
        for rate in rates:
            if rank == 0:
                subprocess.run([LINK, "rate", rate], check=True)
            row = medians({name: partial(fn, ids) for name, fn in variants.items()})
            with measured() as timelines:
                variants["dbo"](ids)
            ratios = [row["dbo"] / row[name] for name in ("Inductor", "Inductor, halves")]
            cells = [f"{s * 1e3:.0f}" for s in row.values()] + [f"{r:.2f}" for r in ratios]
            if rank == 0:
                print(f"| {rate} | {' | '.join(cells)} | {timelines[-1].hidden_comm:.0%} |", flush=True)
    dist.destroy_process_group()


def compiled_variants() -> dict[str, Callable[..., Any]]:
    """Each with the same weights; the exchange in halves is the same exchange, in two collectives at once."""
    model = make_model()
    halves = torch.compile(model, backend="inductor", fullgraph=True)
    return {
        "eager": model,
        "Inductor": torch.compile(model, backend="inductor", fullgraph=True),
        "Inductor, halves": partial(in_halves, halves),
        "dbo": torch.compile(model, backend="dbo", options={"split": "always"}, fullgraph=True),
    }


def make_model() -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(Qwen3MoeConfig(**CONFIG)).eval()
    return expert_parallel(model, ep_implementation="dbo")


def in_halves(fn: Callable[..., Any], ids: torch.Tensor) -> Any:
    """Call `fn` while every exchange of rows goes as two collectives, each with half of the columns."""
    start, wait = exchange._start, exchange._wait

    def start_both(tensor: torch.Tensor, *args: Any) -> Any:
        halves = tensor.chunk(2, 1) if tensor.ndim == 2 else [tensor]
        return [start(half, *args) for half in halves]

    def wait_both(pending: Any) -> torch.Tensor:
        return torch.cat([wait(p) for p in pending], -1)

    exchange._start, exchange._wait = start_both, wait_both
    try:
        return fn(ids)
    finally:
        exchange._start, exchange._wait = start, wait


def medians(variants: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Median seconds of each variant, called in turn, so that a drift of the machine hits all alike."""
    taken: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(REPEATS):
        for name, call in variants.items():
            dist.barrier()
            start = time.perf_counter()
            call()
            taken[name].append(time.perf_counter() - start)
    return {name: statistics.median(seconds) for name, seconds in taken.items()}


if __name__ == "__main__":
    main()
