"""Collectives of two ranks that are not there: the last dim of every tensor counts the ranks."""

from __future__ import annotations

from typing import Any

import torch

c10d = torch.ops._c10d_functional
RANKS = 2


def _all_reduce(x: torch.Tensor, *_: Any) -> torch.Tensor:
    return x.sum(-1, keepdim=True).expand_as(x).clone()


def _all_gather(x: torch.Tensor, *_: Any) -> torch.Tensor:
    return torch.stack([torch.cat(x.unbind(-1))] * RANKS, -1)


def _reduce_scatter(x: torch.Tensor, *_: Any) -> torch.Tensor:
    if len(x) % RANKS:
        raise ValueError(f"{len(x)} rows cannot be dealt out to {RANKS} ranks")
    return torch.stack(x.sum(-1).chunk(RANKS), -1)


def _all_to_all(x: torch.Tensor, outputs: list[int], inputs: list[int], *_: Any) -> torch.Tensor:
    """Every rank sends as many rows to each; so many from each arrive."""
    if sum(inputs) != len(x) or len({*inputs, *outputs}) != 1:
        raise ValueError(f"{len(x)} rows are not {inputs} and {outputs}")
    return torch.stack([torch.cat([rows.split(inputs)[to] for rows in x.unbind(-1)]) for to in range(RANKS)], -1)


SIMULATED = {
    c10d.all_reduce.default: _all_reduce,
    c10d.all_gather_into_tensor.default: _all_gather,
    c10d.reduce_scatter_tensor.default: _reduce_scatter,
    c10d.all_to_all_single.default: _all_to_all,
    c10d.wait_tensor.default: torch.clone,
}


def exchanges() -> list[tuple[Any, tuple[Any, ...]]]:
    """Calls of each collective: rows of tokens, tokens in another dim, single numbers of tokens."""
    random = torch.Generator().manual_seed(1)
    found: list[tuple[Any, tuple[Any, ...]]] = []
    for sizes in ((6, 5), (5, 3), (6,), (10, 7)):
        x = torch.randn(*sizes, RANKS, generator=random, dtype=torch.float64)
        found += [
            (c10d.all_reduce.default, (x, "sum", "g")),
            (c10d.all_gather_into_tensor.default, (x, RANKS, "g")),
            (c10d.wait_tensor.default, (x,)),
        ]
        if sizes[0] % RANKS == 0:
            rows = [sizes[0] // RANKS] * RANKS
            found.append((c10d.reduce_scatter_tensor.default, (x, "sum", RANKS, "g")))
            found.append((c10d.all_to_all_single.default, (x, rows, rows, "g")))
    return found
