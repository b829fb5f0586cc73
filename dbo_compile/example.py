"""A small mixture-of-experts model in plain PyTorch, its experts sharded over the process group: what the documentation
follows through every level, and what the commands look at that were given no model."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn

from dbo_compile.integrations.expert_parallel import exchange_static

HIDDEN, INNER, NUM_EXPERTS, TOP_K = 64, 32, 8, 2
NUM_TOKENS = 96


class Experts(nn.Module):
    """This rank's experts, on the rows that came for them; cells without a row have one past the last expert."""

    def __init__(self, num_local: int) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(num_local, HIDDEN, INNER) / HIDDEN**0.5)
        self.down = nn.Parameter(torch.randn(num_local, INNER, HIDDEN) / INNER**0.5)

    def forward(self, rows: torch.Tensor, expert: torch.Tensor) -> torch.Tensor:
        expert = expert.clamp(max=len(self.up) - 1)
        inner = torch.bmm(rows.unsqueeze(1), self.up[expert]).relu()
        return torch.bmm(inner, self.down[expert]).squeeze(1)


class Layer(nn.Module):
    """A router, experts on all ranks, and an expert that all tokens share."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.group = group
        self.norm = nn.LayerNorm(HIDDEN)
        self.router = nn.Linear(HIDDEN, NUM_EXPERTS, bias=False)
        self.shared = nn.Sequential(nn.Linear(HIDDEN, 4 * HIDDEN), nn.SiLU(), nn.Linear(4 * HIDDEN, HIDDEN))
        self.experts = Experts(NUM_EXPERTS // dist.get_world_size(group))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = self.norm(x)
        weights, chosen = self.router(rows).softmax(-1).topk(TOP_K)
        routed = exchange_static(rows, chosen, weights, self.experts, num_experts=NUM_EXPERTS, group=self.group)
        shared: torch.Tensor = self.shared(rows)
        return x + routed + shared


class Model(nn.Module):
    def __init__(self, num_layers: int, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(group) for _ in range(num_layers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def moe(num_layers: int = 2) -> tuple[nn.Module, tuple[torch.Tensor]]:
    """The model, with other experts on each rank, and the arguments of a call. Needs a process group."""
    torch.manual_seed(0)
    group = dist.group.WORLD
    assert group is not None, "there is no process group: call torch.distributed.init_process_group first"
    return Model(num_layers, group).eval(), (torch.randn(NUM_TOKENS, HIDDEN),)
