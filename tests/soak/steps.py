"""What a rank does in a soak: plays steps, and counts what it holds."""

from __future__ import annotations

import gc
import random
from dataclasses import dataclass

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

import dbo_compile
from dbo_compile import reports
from dbo_compile.integrations.transformers import expert_parallel

SAMPLED, RECOMPILED = 50, 400
MOST_TOKENS = 33
CONFIG = Qwen3MoeConfig(
    vocab_size=61, hidden_size=24, intermediate_size=40, moe_intermediate_size=20, num_hidden_layers=2,
    num_attention_heads=3, num_key_value_heads=3, head_dim=8, num_experts=6, num_experts_per_tok=2, use_cache=False,
)  # fmt: skip


@dataclass(slots=True)
class Sample:
    """What a rank is like after some steps."""

    step: int
    off: float
    num_tensors: int
    num_bytes: int


@dataclass(slots=True)
class _Rank:
    """The state of this process: the models, and where it stands."""

    seed: int
    alone: torch.nn.Module
    model: torch.nn.Module
    calls: int = 0
    idle: int = 0
    split: int = 0
    """Calls that were split before the newest compilation, whose first graph has the number `first_graph`."""
    first_graph: int = 0


_ranks: list[_Rank] = []


def start(seed: int) -> None:
    torch._dynamo.config.recompile_limit = 64
    _ranks[:] = [_Rank(seed, make_model(), sharded())]


def make_model() -> torch.nn.Module:
    torch.manual_seed(0)
    model: torch.nn.Module = AutoModelForCausalLM.from_config(CONFIG).eval()
    return model


def sharded() -> torch.nn.Module:
    """The model on both ranks, decorated: they agree before each step, and a rank may be idle."""
    model = expert_parallel(make_model(), ep_implementation="dbo")
    options = {"pad_to": "auto", "inner": "eager", "split": "always"}
    decorated: torch.nn.Module = dbo_compile.dbo(model, token_dims={"input_ids": 0}, **options)
    return decorated


def play(first: int, last: int) -> list[Sample]:
    """Play these steps, and return what was sampled in them."""
    rank = _ranks[0]
    found: list[Sample] = []
    for step in range(first, last):
        if step and step % RECOMPILED == 0:
            rank.split, rank.first_graph = rank.split + newly_split(rank), reports()[-1].number + 1
            rank.model = sharded()
            torch._dynamo.reset()
        off = one_step(rank, step)
        if step % SAMPLED == 0:
            found.append(Sample(step, off, *counted()))
    return found


def one_step(rank: _Rank, step: int) -> float:
    """Play a step of sizes that all ranks know, and return how far this rank's result is from eager."""
    sizes = random.Random(f"{rank.seed} {step}")
    num_tokens = [sizes.randint(1, MOST_TOKENS) for _ in range(2)]
    if sizes.random() < 0.1 and step % RECOMPILED > 2:
        num_tokens[sizes.randrange(2)] = 0
    length = sizes.choice([1, 5])
    mine = num_tokens[dist.get_rank()]
    ids = torch.randint(0, CONFIG.vocab_size, (mine, length), generator=torch.Generator().manual_seed(step))
    with torch.no_grad():
        got = rank.model(input_ids=ids).logits
        rank.calls, rank.idle = rank.calls + 1, rank.idle + (mine == 0)
        if step % SAMPLED or not mine:
            return 0.0
        return float((got - rank.alone(input_ids=ids).logits).abs().max())


def counted() -> tuple[int, int]:
    """Live tensors (fake ones, of graphs that `reports` keeps, do not count), and the bytes that this process holds."""
    gc.collect()
    tensors = sum(type(x) in (torch.Tensor, torch.nn.Parameter) for x in gc.get_objects())
    with open("/proc/self/statm") as statm:
        pages = int(statm.read().split()[1])
    return tensors, pages * 4096


def summary() -> dict[str, int]:
    rank = _ranks[0]
    return {"calls": rank.calls, "idle": rank.idle, "split": rank.split + newly_split(rank)}


def newly_split(rank: _Rank) -> int:
    return sum(r.calls_split for r in reports() if r.number >= rank.first_graph)
