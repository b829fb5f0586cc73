"""A mixture-of-experts transformer of the serving shape in plain PyTorch: flat tokens, a paged cache, opaque attention.

Every row is computed by ops that no other row has a part in, so results are bitwise the same however rows are batched.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from itertools import accumulate

import torch
import torch.distributed as dist
from torch import nn

from dbo_compile.axes import CuSeqlens, MaxSeqlen, Requests, SeqLens, Tokens
from dbo_compile.integrations.expert_parallel import exchange_exact
from dbo_compile.rules.requests import register_attention_op

VOCAB, HIDDEN, EXPERTS, BLOCK, NUM_BLOCKS = 31, 6, 5, 4, 300
AXES = {
    "input_ids": Tokens(0),
    "positions": Tokens(0),
    "slots": Tokens(0),
    "cu_seqlens": CuSeqlens(),
    "seq_lens": SeqLens(),
    "block_table": Requests(0),
    "longest": MaxSeqlen(),
}


@torch.library.custom_op("dbo_test::paged_attention", mutates_args=("k_cache", "v_cache"))
def paged_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots: torch.Tensor,
    cu_seqlens: torch.Tensor,
    seq_lens: torch.Tensor,
    block_table: torch.Tensor,
) -> torch.Tensor:
    """Write keys and values to their slots, then let each token attend to its request up to itself."""
    k_cache.view(-1, HIDDEN)[slots] = k
    v_cache.view(-1, HIDDEN)[slots] = v
    out = torch.zeros_like(q)
    bounds = cu_seqlens.tolist()
    assert len(bounds) - 1 == len(seq_lens) == len(block_table), "metadata of different microbatches"
    assert bounds[-1] <= len(q), "metadata of other tokens"
    for r, keys in enumerate(seq_lens.tolist()):
        keys_of, values_of = (c[block_table[r].long()].view(-1, HIDDEN) for c in (k_cache, v_cache))
        for i, row in enumerate(range(bounds[r], bounds[r + 1])):
            seen = keys - (bounds[r + 1] - bounds[r]) + i + 1
            weights = (q[row] * keys_of[:seen]).sum(-1).softmax(-1)
            out[row] = (weights[:, None] * values_of[:seen]).sum(0)
    return out


@paged_attention.register_fake
def _(q, *_):
    return torch.empty_like(q)


register_attention_op(
    torch.ops.dbo_test.paged_attention.default,
    tokens=["q", "k", "v", "slots"],
    requests=["cu_seqlens", "seq_lens", "block_table"],
    caches=["k_cache", "v_cache"],
)


@dataclass
class Metadata:
    """What an engine hands over beside the tokens, as one argument."""

    slots: torch.Tensor
    cu_seqlens: torch.Tensor
    seq_lens: torch.Tensor
    block_table: torch.Tensor
    longest: torch.Tensor


def times(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """`x @ w`, each row by itself."""
    return (x.unsqueeze(-1) * w).sum(-2)


class Layer(nn.Module):
    def __init__(self, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.group = group
        self.qkv = nn.Parameter(torch.randn(HIDDEN, 3 * HIDDEN))
        self.out = nn.Parameter(torch.randn(HIDDEN, HIDDEN))
        self.router = nn.Parameter(torch.randn(HIDDEN, EXPERTS))
        self.experts = nn.Parameter(torch.randn(EXPERTS, HIDDEN, HIDDEN))
        self.register_buffer("k_cache", torch.zeros(NUM_BLOCKS, BLOCK, HIDDEN))
        self.register_buffer("v_cache", torch.zeros(NUM_BLOCKS, BLOCK, HIDDEN))

    def forward(self, x: torch.Tensor, m: Metadata) -> torch.Tensor:
        q, k, v = times(x.tanh(), self.qkv).chunk(3, -1)
        attended = torch.ops.dbo_test.paged_attention(
            q, k, v, self.k_cache, self.v_cache, m.slots, m.cu_seqlens, m.seq_lens, m.block_table
        )
        x = x + times(attended, self.out)
        weights, chosen = times(x, self.router).softmax(-1).topk(2, -1)
        return x + exchange_exact(x, chosen, weights, self._run, num_experts=EXPERTS, group=self.group)

    def _run(self, rows: torch.Tensor, expert: torch.Tensor) -> torch.Tensor:
        return (rows.unsqueeze(-1) * self.experts[expert]).sum(-2).tanh()


class Model(nn.Module):
    def __init__(self, group: dist.ProcessGroup, num_layers: int = 2) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, HIDDEN)
        self.layers = nn.ModuleList(Layer(group) for _ in range(num_layers))
        self.head = nn.Parameter(torch.randn(HIDDEN, VOCAB))

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor, metadata: Metadata) -> torch.Tensor:
        x = self.embed(input_ids) + (positions.double() * 0.1).sin()[:, None]
        for layer in self.layers:
            x = layer(x, metadata)
        return times(x, self.head)


@dataclass
class Request:
    """A request of which `cached` tokens have been played, with blocks of its own."""

    tokens: list[int]
    blocks: list[int]
    cached: int = 0

    def slot(self, position: int) -> int:
        return self.blocks[position // BLOCK] * BLOCK + position % BLOCK


@dataclass
class Pages:
    """Hands out blocks of the cache, in no order."""

    free: list[int] = field(default_factory=lambda: torch.randperm(NUM_BLOCKS).tolist())

    def request(self, tokens: list[int]) -> Request:
        return Request(tokens, [self.free.pop() for _ in range(-(-len(tokens) // BLOCK))])


def step_of(work: list[tuple[Request, int]]) -> tuple[torch.Tensor, torch.Tensor, Metadata]:
    """The arguments of a step that plays so many further tokens of each request."""
    at = [(r, p) for r, n in work for p in range(r.cached, r.cached + n)]
    most = max(len(r.blocks) for r, _ in work)
    metadata = Metadata(
        slots=torch.tensor([r.slot(p) for r, p in at]),
        cu_seqlens=torch.tensor([0, *accumulate(n for _, n in work)], dtype=torch.int32),
        seq_lens=torch.tensor([r.cached + n for r, n in work]),
        block_table=torch.tensor([[*r.blocks, *[r.blocks[0]] * (most - len(r.blocks))] for r, _ in work]),
        longest=torch.tensor(max(n for _, n in work)),
    )
    ids, positions = torch.tensor([r.tokens[p] for r, p in at]), torch.tensor([p for _, p in at])
    return ids, positions, metadata


def caches(model: Model) -> list[torch.Tensor]:
    return [cache for layer in model.layers for cache in (layer.k_cache, layer.v_cache)]


METADATA = [f.name for f in fields(Metadata)]
