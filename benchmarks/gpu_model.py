"""Layers like those of DeepSeek-V3 in plain PyTorch, as one rank of a large expert-parallel group plays them.

Hidden size, low-rank attention and number of heads are DeepSeek-V3's. This rank has `num_experts` experts, and as many
rows come to it as it sends. A token goes to 4 experts of twice the width, where DeepSeek-V3 has 8: the same work, and
about the traffic of 8 rows when half of them are in 8 bits. The exchange is `host_link`, see there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.host_link import host_link

Exchange = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Sizes:
    hidden: int = 7168
    num_heads: int = 128
    head_dim: int = 128
    q_rank: int = 1536
    kv_rank: int = 512
    num_experts: int = 8
    top_k: int = 4
    expert_width: int = 4096
    shared_width: int = 2048
    num_layers: int = 4
    cache_length: int = 1024


TINY = Sizes(
    hidden=32, num_heads=2, head_dim=16, q_rank=16, kv_rank=16, num_experts=4, top_k=2, expert_width=16,
    shared_width=16, num_layers=2, cache_length=8,
)  # fmt: skip


def _weight(*sizes: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(*sizes).normal_(std=sizes[-1] ** -0.5), requires_grad=False)


def norm(x: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(x, x.shape[-1:])


class Attention(nn.Module):
    """Multi-head latent attention without positions: queries and keys come from low-rank latents."""

    def __init__(self, s: Sizes) -> None:
        super().__init__()
        self.num_heads, self.head_dim = s.num_heads, s.head_dim
        inner = s.num_heads * s.head_dim
        self.q_down, self.q_up = _weight(s.q_rank, s.hidden), _weight(inner, s.q_rank)
        self.kv_down = _weight(s.kv_rank, s.hidden)
        self.k_up = _weight(s.num_heads, s.head_dim, s.kv_rank)
        self.v_up = _weight(s.num_heads, s.head_dim, s.kv_rank)
        self.out = _weight(s.hidden, inner)

    def heads(self, x: torch.Tensor) -> torch.Tensor:
        """Of [B, S, inner]: [B, heads, S, head_dim]."""
        return x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)

    def forward(self, x: torch.Tensor, cache: torch.Tensor | None = None) -> torch.Tensor:
        """`x` is [B, S, hidden]; with a `cache` of latents [B, L, kv_rank], S is 1 and attends to those."""
        q = F.linear(norm(F.linear(x, self.q_down)), self.q_up)
        if cache is not None:
            return F.linear(self.over_latents(q.squeeze(1), cache), self.out).unsqueeze(1)
        latent = norm(F.linear(x, self.kv_down))
        k, v = (self.heads(F.linear(latent, up.flatten(0, 1))) for up in (self.k_up, self.v_up))
        mixed = F.scaled_dot_product_attention(self.heads(q), k, v, is_causal=True)
        return F.linear(mixed.transpose(1, 2).flatten(2), self.out)

    def over_latents(self, q: torch.Tensor, cache: torch.Tensor) -> torch.Tensor:
        """Decode: the key projection is folded into the query, the value projection into the result."""
        q = q.view(-1, self.num_heads, self.head_dim)
        folded = torch.bmm(q.transpose(0, 1), self.k_up).transpose(0, 1)
        weights = (torch.bmm(folded, cache.transpose(1, 2)) * self.head_dim**-0.5).softmax(-1)
        mixed = torch.bmm(weights, cache).transpose(0, 1)
        return torch.bmm(mixed, self.v_up.transpose(1, 2)).transpose(0, 1).flatten(1)


class Experts(nn.Module):
    """A mixture whose experts' rows cross the link twice, and a shared expert beside it."""

    def __init__(self, s: Sizes) -> None:
        super().__init__()
        self.top_k, self.num_experts = s.top_k, s.num_experts
        self.gate = _weight(s.num_experts, s.hidden)
        self.up = nn.Parameter(_weight(s.num_experts, 2 * s.expert_width, s.hidden).transpose(1, 2), False)
        self.down = nn.Parameter(_weight(s.num_experts, s.hidden, s.expert_width).transpose(1, 2), False)
        self.shared_up, self.shared_down = _weight(2 * s.shared_width, s.hidden), _weight(s.hidden, s.shared_width)

    def forward(self, x: torch.Tensor, exchange: Exchange) -> torch.Tensor:
        """`x` is [T, hidden]."""
        weights, index = F.linear(x, self.gate).float().sigmoid().topk(self.top_k, dim=-1)
        routes = index.reshape(-1)
        order = torch.argsort(routes)
        counts = routes.new_zeros(self.num_experts).scatter_add(0, routes, torch.ones_like(routes))
        rows = exchange(x[order // self.top_k])
        rows = exchange(self.run(rows, counts.cumsum(0).int()))
        place = torch.empty_like(order)
        place[order] = torch.arange(order.size(0), device=order.device)
        rows = rows[place].view(-1, self.top_k, x.size(1))
        mixed = (rows * weights.unsqueeze(-1).to(x.dtype)).sum(1)
        return mixed + F.linear(gated(F.linear(x, self.shared_up)), self.shared_down)

    def run(self, rows: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        return F.grouped_mm(gated(F.grouped_mm(rows, self.up, offs=ends)), self.down, offs=ends)


def gated(x: torch.Tensor) -> torch.Tensor:
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up


class Layer(nn.Module):
    def __init__(self, s: Sizes) -> None:
        super().__init__()
        self.attention, self.experts = Attention(s), Experts(s)

    def forward(self, x: torch.Tensor, cache: torch.Tensor | None, exchange: Exchange) -> torch.Tensor:
        x = x + self.attention(norm(x), cache)
        return x + self.experts(norm(x).flatten(0, 1), exchange).view_as(x)


class Stack(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(sizes) for _ in range(sizes.num_layers))

    def forward(
        self, x: torch.Tensor, cache: torch.Tensor | None = None, *, exchange: Exchange = host_link
    ) -> torch.Tensor:
        """`x` is [B, S, hidden]: prefill; with `cache` [B, L, kv_rank], and S = 1: decode."""
        for layer in self.layers:
            x = layer(x, cache, exchange)
        return x


def make_stack(sizes: Sizes, device: str) -> Stack:
    torch.manual_seed(0)
    with torch.device(device):
        default = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            return Stack(sizes).eval()
        finally:
            torch.set_default_dtype(default)


def inputs(sizes: Sizes, phase: str, num_tokens: int, device: str, length: int = 512) -> tuple[torch.Tensor, ...]:
    """Of a prefill of sequences of `length`, or of a decode step of `num_tokens` requests."""
    generator = torch.Generator(device).manual_seed(num_tokens)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device, dtype=torch.bfloat16, generator=generator)

    if phase == "prefill":
        return (random(num_tokens // length, length, sizes.hidden),)
    return random(num_tokens, 1, sizes.hidden), random(num_tokens, sizes.cache_length, sizes.kv_rank)
