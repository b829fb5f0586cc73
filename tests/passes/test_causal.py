"""What is known of a mask by how it is made: never more than what is true of it, for whatever inputs."""

from __future__ import annotations

import pytest
import torch

from dbo_compile.axes import Tokens
from tests.serving.player import Player, symbolic

attend = torch.nn.functional.scaled_dot_product_attention
INF = float("inf")


def numbers(x):
    rows = torch.arange(len(x))
    return rows[:, None], rows


def of_requests(x, ids, _):
    q, k = numbers(x)
    return (ids[:, None] == ids) & (q >= k)


def additive(x, ids, _):
    q, k = numbers(x)
    return torch.where((k <= q) & (ids == 1), 0.0, -INF).to(x.dtype)


def window(x, *_):
    q, k = numbers(x)
    return ((q - k >= 0) & (q - k < 4))[None, None].expand(1, 2, -1, -1)


def triangle(x, *_):
    return torch.ones(len(x), len(x), dtype=torch.bool).tril()


def both_ways(x, ids, _):
    return ids[:, None] == ids


def from_behind(x, *_):
    q, k = numbers(x)
    return q <= k


def turned(x, *_):
    q, k = numbers(x)
    return (q >= k).T


def of_positions(x, ids, positions):
    return (ids[:, None] == ids) & (positions[:, None] >= positions)


def turned_around(x, *_):
    q, k = numbers(x)
    return torch.where(q >= k, 0.0, -INF).to(torch.bool)


def only_smaller(x, *_):
    q, k = numbers(x)
    return torch.where(q >= k, 0.0, -2.0).to(x.dtype)


def scaled(x, *_):
    q, k = numbers(x)
    return torch.sub(q, k, alpha=0) >= 0


def one_or_the_other(x, ids, _):
    q, k = numbers(x)
    return (q >= k) | (ids == 1)


def one_row(x, ids, _):
    q, k = numbers(x)
    return ((q >= k) & (ids == 1))[5:6].expand(len(x), -1)


CAUSAL = [of_requests, additive, window, triangle]
NOT_KNOWN = [
    both_ways, from_behind, turned, of_positions, only_smaller, turned_around, scaled, one_or_the_other, one_row
]  # fmt: skip


@pytest.mark.parametrize("make", CAUSAL + NOT_KNOWN)
@pytest.mark.parametrize("rows", [(5, 8), (12, 1), (4, 6, 3)])
def test_attention_with_a_mask_is_split(make, rows):
    """Only where the mask is known to be causal does a microbatch not wait for keys of the next one."""

    def fn(x, ids, positions):
        q, k, v = x.exp().view(1, len(x), 2, -1).transpose(1, 2).chunk(3, -1)
        return attend(q, k, v, make(x, ids, positions)).transpose(1, 2).flatten(2)[0].cos()

    x, ids = torch.randn(13, 18, dtype=torch.float64), torch.tensor([0] * 4 + [1] * 6 + [2] * 3)
    positions = torch.cat([torch.arange(n) for n in (4, 6, 3)])
    player = Player(dict.fromkeys(["x", "ids", "positions"], Tokens(0)), rows=rows)
    symbolic((x, 0), (ids, 0), (positions, 0))
    with torch.no_grad():
        got = torch.compile(fn, backend=player, fullgraph=True)(x, ids, positions)
    torch.testing.assert_close(got, fn(x, ids, positions), rtol=0, atol=1e-12, equal_nan=True)
    (graph,) = player.graphs
    assert (len(graph.placed.prefixes), len(graph.placed.wholes)) == ((1, 0) if make in CAUSAL else (0, 1))
    assert not graph.placed.obligations
