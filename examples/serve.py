"""A serving loop on two ranks: requests come and go on each of them by themselves, the experts are on both.

Each step plays what a rank has: a piece of the prompt of a new request, one more token of every other. A rank without
requests takes part all the same, as its experts are needed. Nothing of the model is edited, and nothing but the
decorator on `Server.step` is there for dual-batch overlap. Run by `make serve-demo`.

The loop is our own: that of transformers (`generate_batch`, 5.24) plays no step while a rank has no requests, and
cannot be asked to take part in one. The experts of that rank would be missing, and the others would wait for them.
"""

from __future__ import annotations

import os
import random
import statistics
import sys
import time
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from transformers import AttentionInterface, AutoModelForCausalLM, Qwen3MoeConfig

import dbo_compile
from dbo_compile.integrations.paged import paged_attention
from dbo_compile.integrations.transformers import expert_parallel
from dbo_compile.measure import measured

NUM_RANKS, NUM_STEPS, VOCAB = 2, 48, 512
PLACES, ROOM = 12, 32
"""Requests in the cache at a time, and tokens that each of them has room for; one row more is for padding."""
MOST_TOKENS = 40
"""Tokens of a step: prompts are played in pieces."""
ARRIVALS = {0: 3, 1: 1}
"""The most requests that come to each rank in a step; half as many do on average."""
QUIET = {1: range(24, 34)}
"""Steps in which nothing comes to a rank."""
LAYERS, KV_HEADS, HEAD_DIM = 3, 2, 16


@dataclass
class Request:
    """A prompt, and the tokens generated so far; `cached` of them have been played."""

    tokens: list[int]
    num_wanted: int
    place: int
    cached: int = 0
    generated: list[int] = field(default_factory=list)

    def slot(self, position: int) -> int:
        return self.place * ROOM + position


class Server(nn.Module):
    """A Qwen3-MoE and its cache: keys and values of each layer, a row for each token."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        config = Qwen3MoeConfig(
            vocab_size=VOCAB, hidden_size=64, intermediate_size=96, moe_intermediate_size=64, num_hidden_layers=LAYERS,
            num_attention_heads=4, num_key_value_heads=KV_HEADS, head_dim=HEAD_DIM, num_experts=8,
            num_experts_per_tok=2, use_cache=False, attn_implementation="paged_in_rows",
        )  # fmt: skip
        self.model: Any = AutoModelForCausalLM.from_config(config).eval()  # type: ignore[no-untyped-call]
        self.num_rows = PLACES * ROOM + 1
        self.register_buffer("cache", torch.zeros(LAYERS * 2 * self.num_rows, KV_HEADS, HEAD_DIM))

    def forward(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor, attention_mask: torch.Tensor, slots: torch.Tensor
    ) -> torch.Tensor:
        logits: torch.Tensor = self.model(
            input_ids=input_ids, position_ids=position_ids, attention_mask=attention_mask, slots=slots,
            rows=self.cache, num_rows=self.num_rows,
        ).logits  # fmt: skip
        return logits


def attention(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: torch.Tensor,
    *_: Any, scaling: float, slots: torch.Tensor, rows: torch.Tensor, num_rows: int, **__: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """What transformers calls in each layer: attention to the whole cache, as far as the mask allows."""
    keys = 2 * module.layer_idx * num_rows
    out = paged_attention(
        query, key, value, attention_mask, rows, slots, torch.arange(num_rows), keys, keys + num_rows, scaling
    )
    return out, None


AttentionInterface.register("paged_in_rows", attention)


def arguments(work: list[tuple[Request, int]], num_rows: int) -> dict[str, torch.Tensor]:
    """The arguments of a step that plays so many further tokens of each request."""
    at = [(r, p) for r, n in work for p in range(r.cached, r.cached + n)]
    mask = torch.full((1, 1, len(at), num_rows), torch.finfo(torch.float32).min)
    for row, (r, p) in enumerate(at):
        mask[0, 0, row, r.slot(0) : r.slot(p) + 1] = 0
    return {
        "input_ids": torch.tensor([[r.tokens[p] for r, p in at]], dtype=torch.int64),
        "position_ids": torch.tensor([[p for _, p in at]], dtype=torch.int64),
        "attention_mask": mask,
        "slots": torch.tensor([r.slot(p) for r, p in at], dtype=torch.int64),
    }


def a_row_of_padding(num_rows: int) -> dict[str, torch.Tensor]:
    """A step of one token that nobody has asked for: the other rank needs the experts of this one."""
    zero = torch.zeros(1, 1, dtype=torch.int64)
    mask = torch.zeros(1, 1, 1, num_rows)
    return {"input_ids": zero, "position_ids": zero, "attention_mask": mask, "slots": torch.tensor([num_rows - 1])}


def serve(rank: int, server: Server, *, is_compiled: bool) -> tuple[list[list[int]], int]:
    """The tokens generated for each request, and how many tokens were played."""
    rng = random.Random(rank)
    places, running, done, num_played = list(range(PLACES)), [], [], 0
    for step in range(NUM_STEPS):
        num_coming = 0 if step in QUIET.get(rank, ()) else max(step == 0, rng.randint(0, ARRIVALS[rank]))
        for _ in range(min(num_coming, len(places))):
            prompt = [rng.randrange(VOCAB) for _ in range(rng.randint(2, 20))]
            running.append(Request(prompt, rng.randint(2, 10), places.pop()))
        work, room = [], MOST_TOKENS
        for r in running:
            n = min(len(r.tokens) - r.cached, room)
            work += [(r, n)] if n else []
            room -= n
        if not work:
            if is_compiled:
                server.forward.idle_step()  # type: ignore[attr-defined]
            else:
                server(**a_row_of_padding(server.num_rows))
            continue
        logits = server(**arguments(work, server.num_rows))
        num_played += logits.shape[1]
        last = 0
        for r, n in work:
            last, r.cached = last + n, r.cached + n
            if r.cached == len(r.tokens):
                r.generated.append(int(logits[0, last - 1].argmax()))
                r.tokens.append(r.generated[-1])
        for r in [r for r in running if len(r.generated) == r.num_wanted]:
            running.remove(r)
            places.append(r.place)
            done.append(r.generated)
    return done, num_played


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def main(rank: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=NUM_RANKS)
    server = Server()
    expert_parallel(server.model)
    found: dict[str, tuple[list[list[int]], float]] = {}
    timelines: list[Any] = []
    with torch.no_grad():
        for name in ("eager", "compiling", "dbo"):
            if name == "compiling":
                dbo_compile.dbo(
                    server,
                    token_dims={"input_ids": 1, "position_ids": 1, "attention_mask": 2, "slots": 0},
                    pad_to="auto", pad_values={"slots": server.num_rows - 1}, split="always", min_tokens=4,
                    timeout_s=600.0,
                )  # fmt: skip
            server.cache.zero_()
            _barrier()
            start = time.perf_counter()
            with measured() if name == "dbo" else nullcontext([]) as timelines:
                tokens, num_played = serve(rank, server, is_compiled=name != "eager")
            _barrier()
            found[name] = tokens, num_played / (time.perf_counter() - start)
    for turn in range(NUM_RANKS):
        _barrier()
        if turn == rank:
            _show(rank, found, timelines)
    _barrier()
    dist.destroy_process_group()


def _show(rank: int, found: dict[str, tuple[list[list[int]], float]], timelines: list[Any]) -> None:
    say(f"\n--- rank {rank} " + "-" * 60)
    tokens = found["eager"][0]
    assert all(other == tokens for other, _ in found.values()), "other tokens than without compiling"
    say(f"{len(tokens)} requests, {sum(map(len, tokens))} tokens generated: the same as without compiling")
    say("tokens/s: " + ", ".join(f"{name} {found[name][1]:.0f}" for name in ("eager", "dbo")))
    graphs = dbo_compile.reports()
    say(f"graphs: {len(graphs)}; steps played: {sum(r.calls for r in graphs)}, "
        f"in two microbatches: {sum(r.calls_split for r in graphs)}")  # fmt: skip
    for why, count in sum((Counter(r.decline_counts) for r in graphs), Counter()).items():
        say(f"  {count} steps were not split: {why}")
    for r in graphs:
        assert r.split, r.reason
    hidden = [share for t in timelines if (share := t.hidden_comm) is not None]
    if hidden:
        say(f"hidden communication: {statistics.mean(hidden):.0%} of the time that it took, on average over steps")


def _barrier() -> None:
    dist.barrier()


if __name__ == "__main__":
    say(f"{NUM_STEPS} steps of a small Qwen3-MoE on {NUM_RANKS} gloo ranks; compiling takes a while ...")
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29531")
    mp.start_processes(main, (), NUM_RANKS, start_method="spawn")  # type: ignore[attr-defined,no-untyped-call]
