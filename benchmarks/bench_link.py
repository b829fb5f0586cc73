"""Overlap on a real link: Qwen3-MoE with expert parallelism on two ranks, joined by a link of a given rate.

    python -m benchmarks.bench_link [--ratios 0.25 0.5 1 2 4] [--tokens 512] [--quick | --wide] [--write]

Each rank runs in a network namespace of its own, with one thread; `link.sh` joins them by a veth pair that a token
bucket shapes; that needs root. Rates are chosen so that communication alone takes so many times what computing alone
takes. All variants run the same model with the same exchange (exact splits), in turn, on the same inputs, and must give
the same logits. See `baselines` for what users would pick instead.

One gloo all-to-all alone may fill only half of a TCP link (both directions share what one collective does in turn), and
two in flight fill it: so `Inductor, halves` sends every exchange as two concurrent halves of the columns, which is what
somebody would do who tunes the unsplit model.

`--wide` takes layers of a size that is served. They compute more for each byte that they send, so a link that is as
slow beside them takes less of the cores that it shares with the ranks.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from benchmarks.baselines import OVERLAP_SCHEDULING, TwoThreads
from benchmarks.link import agreed, joined, set_rate, start_ranks, why_no_link
from benchmarks.results import Table, Timing, alternating, options, publish
from dbo_compile import compat, reports
from dbo_compile.integrations import expert_parallel as exchange
from dbo_compile.integrations.transformers import expert_parallel

LENGTH = 32
REFERENCE_MBIT = 1000.0
CLOSE = 2e-4
"""Of logits in float32 that are at most about 1: parts of a batch take another path through a product."""
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
SMALL = CONFIG | {"vocab_size": 128, "hidden_size": 128, "num_hidden_layers": 2, "moe_intermediate_size": 128}
WIDE = CONFIG | {
    "hidden_size": 2048,
    "moe_intermediate_size": 768,
    "num_hidden_layers": 2,
    "num_attention_heads": 32,
    "head_dim": 128,
    "num_experts": 32,
    "num_experts_per_tok": 8,
}
"""Layers of Qwen3-30B-A3B as published, but for 32 experts instead of 128."""
Variants = dict[str, Callable[[torch.Tensor], Any]]


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.25, 0.5, 1.0, 2.0, 4.0])
    parser.add_argument("--tokens", type=int, help="tokens a rank and step; 512, or 256 of wide layers")
    parser.add_argument("--wide", action="store_true", help="two layers as wide as those of Qwen3-30B-A3B")
    parser.add_argument("--rank", type=int, help="of this process; set by the benchmark itself")
    args = parser.parse_args()
    if args.rank is None:
        if why := why_no_link():
            print(f"skipped: {why}")
            return
        sys.exit(start_ranks("benchmarks.bench_link", sys.argv[1:], link=True))
    config, tokens, repeats = (SMALL, 128, 3) if args.quick else (WIDE, 256, 9) if args.wide else (CONFIG, 512, 15)
    tokens = args.tokens or tokens
    with joined(args.rank), torch.no_grad(), compat.host_reads_in_graph():
        tables = measured(config, tokens, args.ratios, repeats)
        if args.rank == 0:
            name, title = ("link-wide", ", wide layers") if args.wide else ("link", "")
            title = f"Overlap on a real link{title}"
            publish(name, title, tables, about=about(config, tokens), write=args.write, by="link")


def about(config: dict[str, Any], num_tokens: int) -> str:
    return (
        f"Qwen3-MoE, {config['num_hidden_layers']} layers, hidden size {config['hidden_size']}, two ranks, "
        f"{num_tokens} tokens a rank and step. Medians in turn, ± half the distance of the quartiles. `compute`: the "
        "step of Inductor with the exchange left out. `comm`: the exchanges of a step one after the other, each whole "
        "or as two concurrent halves, whichever is faster. Hidden: (compute + comm - step) / min(compute, comm), the "
        "share of what can be hidden; below 0 where the step costs more than both. Both ranks, the threads of gloo and "
        "the link share the cores of one machine, so copying takes time from computing."
    )


def measured(config: dict[str, Any], num_tokens: int, ratios: list[float], repeats: int) -> list[Table]:
    torch._dynamo.config.recompile_limit = 64
    torch.manual_seed(100 + dist.get_rank())
    ids = torch.randint(0, config["vocab_size"], (num_tokens // LENGTH, LENGTH))
    variants = make_variants(config)
    off = check_equal(variants, ids)
    unexchanged = partial(in_place_of_exchange, torch.compile(make_model(config), fullgraph=True))
    unexchanged(ids)
    compute = agreed(alternating({"": partial(unexchanged, ids)}, repeats, before=dist.barrier)[""].median)
    sizes = sizes_sent(make_model(config), ids)
    set_rate(REFERENCE_MBIT)
    reference = comm_seconds(sizes, repeats)
    rows: list[tuple[object, ...]] = []
    for ratio in ratios:
        mbit = REFERENCE_MBIT * reference / (ratio * compute)
        set_rate(mbit)
        comm = comm_seconds(sizes, repeats)
        took = alternating({n: partial(fn, ids) for n, fn in variants.items()}, repeats, before=dist.barrier)
        rows += [
            (f"{mbit:.0f} Mbit/s", f"{comm / compute:.2f}", name, *cells(t, took["Inductor"], compute, comm))
            for name, t in took.items()
        ]
    columns = ("link", "comm / compute", "variant", "step ms", "/ Inductor", "hidden", "/ max(compute, comm)")
    checked = Table(("variant", "furthest logit from eager"), [(n, f"{d:.1e}") for n, d in off.items()], title="Equal")
    note = f"compute {compute * 1e3:.1f} ms; {reports()[-1].calls_split} calls of dbo were split."
    return [Table(columns, rows, title="Steps", note=note), checked]


def cells(took: Timing, inductor: Timing, compute: float, comm: float) -> tuple[str, ...]:
    """Step, ratio to Inductor, hidden share of what could be hidden, ratio to what no order of work can beat."""
    hidden = (compute + comm - took.median) / min(compute, comm)
    ratio, distance = took.median / inductor.median, took.median / max(compute, comm)
    return took.ms(), f"{ratio:.2f}", f"{hidden:.0%}", f"{distance:.2f}"


# -- variants ---------------------------------------------------------------------------------------------------------


def make_variants(config: dict[str, Any]) -> Variants:
    """Each with the same weights and the same rows to exchange."""
    model = make_model(config)
    yielding = torch.compile(logits_of(make_model(config, "two_threads")), fullgraph=True)
    return {
        "eager": model,
        "Inductor": torch.compile(model, fullgraph=True),
        "Inductor, halves": partial(in_halves, torch.compile(model, fullgraph=True)),
        "Inductor, overlap scheduling": torch.compile(model, fullgraph=True, options=OVERLAP_SCHEDULING),
        "by hand": torch.compile(make_model(config, "by_hand"), fullgraph=True),
        "by hand, overlap scheduling": torch.compile(
            make_model(config, "by_hand"), fullgraph=True, options=OVERLAP_SCHEDULING
        ),
        "two threads": TwoThreads(yielding),
        "two threads, at counts too": TwoThreads(yielding, at_counts=True),
        "dbo": torch.compile(model, backend="dbo", options={"split": "always"}, fullgraph=True),
    }


def make_model(config: dict[str, Any], ep_implementation: str = "dbo") -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(Qwen3MoeConfig(**config)).eval()
    return expert_parallel(model, ep_implementation=ep_implementation)


def logits_of(model: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    def logits(ids: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = model(ids).logits
        return made

    return logits


def check_equal(variants: Variants, ids: torch.Tensor) -> dict[str, float]:
    """Warm all variants up, and return how far the logits of each are from those of eager."""
    want = as_logits(variants["eager"](ids))
    off: dict[str, float] = {}
    for name, fn in variants.items():
        got = [as_logits(fn(ids)) for _ in range(3)]
        off[name] = max((x - want).abs().max().item() for x in got)
        if off[name] > CLOSE:
            raise AssertionError(f"{name} is {off[name]:.1e} from eager: no baseline, but another model")
    return off


def as_logits(out: Any) -> torch.Tensor:
    logits: torch.Tensor = out if isinstance(out, torch.Tensor) else out.logits
    return logits


# -- the exchange in other ways ---------------------------------------------------------------------------------------


def exchanged_by(start: Callable[..., Any], wait: Callable[..., Any], fn: Callable[..., Any], ids: torch.Tensor) -> Any:
    """Call `fn` while every exchange goes by these two; Dynamo guards on them, so each pair gets code of its own."""
    before = exchange._start, exchange._wait
    exchange._start, exchange._wait = start, wait
    try:
        return fn(ids)
    finally:
        exchange._start, exchange._wait = before


_start, _wait = exchange._start, exchange._wait


def _start_halves(tensor: torch.Tensor, *args: Any) -> Any:
    halves = tensor.chunk(2, 1) if tensor.ndim == 2 else [tensor]
    return [_start(half, *args) for half in halves]


def _wait_halves(pending: Any) -> torch.Tensor:
    return torch.cat([_wait(p) for p in pending], -1)


def in_halves(fn: Callable[..., Any], ids: torch.Tensor) -> Any:
    """Every exchange of rows goes as two collectives, each with half of the columns."""
    return exchanged_by(_start_halves, _wait_halves, fn, ids)


def _stays(tensor: torch.Tensor, *_: Any) -> torch.Tensor:
    return tensor.clone()


def _is_there(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def in_place_of_exchange(fn: Callable[..., Any], ids: torch.Tensor) -> Any:
    """Every exchange hands back what it was given: as many rows as come on average."""
    return exchanged_by(_stays, _is_there, fn, ids)


Sent = tuple[torch.Tensor, list[int], list[int]]


def sizes_sent(model: Any, ids: torch.Tensor) -> list[Sent]:
    """What each exchange of a step sends, and the sizes of the pieces."""
    sent: list[Sent] = []

    def start(tensor: torch.Tensor, group: Any, receive_sizes: Any, send_sizes: Any) -> Any:
        sent.append((tensor.contiguous(), list(receive_sizes), list(send_sizes)))
        return _start(tensor, group, receive_sizes, send_sizes)

    exchanged_by(start, _wait, model, ids)
    return sent


def comm_seconds(sent: list[Sent], repeats: int) -> float:
    """What the exchanges of a step take, one after the other, with nothing else to do: the faster of two ways.

    Each goes in one piece, or as two concurrent halves of its columns: those fill more of the link, and variants that
    overlap have two exchanges under way as well.
    """
    ways = {"whole": [[one] for one in sent], "halves": [in_columns(*one) for one in sent]}
    plays = {way: partial(exchange_all, exchanges) for way, exchanges in ways.items()}
    for play in plays.values():
        play()
    return min(agreed(t.median) for t in alternating(plays, repeats, before=dist.barrier).values())


def in_columns(rows: torch.Tensor, receive_sizes: list[int], send_sizes: list[int]) -> list[Sent]:
    """An exchange of rows as two, each of half of the columns; one of counts as it is."""
    halves = rows.chunk(2, 1) if rows.ndim == 2 else [rows]
    return [(half.contiguous(), receive_sizes, send_sizes) for half in halves]


def exchange_all(exchanges: list[list[Sent]]) -> None:
    """One after the other, those of one list at a time."""
    for together in exchanges:
        under_way = []
        for rows, receive_sizes, send_sizes in together:
            out = rows.new_empty(sum(receive_sizes), *rows.shape[1:])
            under_way.append(dist.all_to_all_single(out, rows, receive_sizes, send_sizes, async_op=True))
        for work in under_way:
            work.wait()


if __name__ == "__main__":
    main()
