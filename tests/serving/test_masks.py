"""Flat tokens of many requests, told apart by a mask: an input, or made of what says which request a token is of."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from dbo_compile import reports
from dbo_compile.axes import CuSeqlens
from dbo_compile.report import new_reports

HEADS, SIZE = 2, 3
STEPS = [(4, 4), (3, 9, 1), (6, 5), (17,)]
"""Requests of so many tokens; the first step can be cut between two requests, the others cannot."""


def ids_of(lengths):
    return torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))


class Model(nn.Module):
    """`attention(T, info)` makes a function of queries, keys and values, each [1, heads, T, size]."""

    def __init__(self, attention) -> None:
        super().__init__()
        self.attention = attention
        self.qkv = nn.ModuleList(nn.Linear(HEADS * SIZE, 3 * HEADS * SIZE).double() for _ in range(2))

    def forward(self, x: torch.Tensor, info) -> torch.Tensor:
        attend = self.attention(len(x), info)
        for qkv in self.qkv:
            q, k, v = qkv(x).view(1, len(x), 3 * HEADS, SIZE).transpose(1, 2).chunk(3, 1)
            x = x + attend(q, k, v).transpose(1, 2).flatten(2)[0].tanh()
        return x


def with_mask(make):
    """Attention with the mask that `make` makes."""

    def attention(num_tokens, info):
        mask = make(num_tokens, info)
        return lambda q, k, v: nn.functional.scaled_dot_product_attention(q, k, v, mask)

    return attention


def same_request(num_tokens, ids):
    return ids[:, None] == ids


def earlier_in_request(num_tokens, ids):
    rows = torch.arange(num_tokens)
    return same_request(num_tokens, ids) & (rows[:, None] >= rows)


def from_bounds(num_tokens, cu_seqlens):
    rows = torch.arange(num_tokens)
    return earlier_in_request(num_tokens, torch.searchsorted(cu_seqlens, rows, right=True))


def given(num_tokens, mask):
    return mask


def causal_mask(lengths):
    return earlier_in_request(sum(lengths), ids_of(lengths))


def bounds(lengths):
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0)


def played(model, info, token_dims=None, *, steps=STEPS, inner="eager", atol=1e-12):
    """The reports of the graphs that play all steps, after comparing what they give with eager."""
    before = reports()
    options = {"split": "always", "inner": inner, "min_tokens": 2, "token_dims": token_dims}
    run = torch.compile(model, backend="dbo", options=options, fullgraph=True)
    with torch.no_grad():
        for lengths in steps:
            x = torch.randn(sum(lengths), HEADS * SIZE, dtype=model.qkv[0].weight.dtype)
            torch.testing.assert_close(run(x, info(lengths)), model(x, info(lengths)), rtol=0, atol=atol)
    return new_reports(before)


@pytest.mark.parametrize(
    ("make", "info", "token_dims", "waits"),
    [
        (same_request, ids_of, None, True),
        (earlier_in_request, ids_of, None, False),
        (from_bounds, bounds, {"x": 0, "info": CuSeqlens()}, False),
        (given, causal_mask, None, True),
        (given, lambda lengths: causal_mask(lengths)[None, None], {"x": 0}, True),
        (given, lambda lengths: torch.where(causal_mask(lengths), 0.0, -torch.inf).double(), {"x": 0}, True),
    ],
    ids=["ids, both ways", "ids", "bounds", "mask", "mask of four dims", "mask that is added"],
)
def test_every_step_is_split_and_right(make, info, token_dims, waits):
    """A mask that is not known to be causal has a microbatch wait for the keys of the next one."""
    found = played(Model(with_mask(make)), info, token_dims)
    assert sum(r.calls_split for r in found) == len(STEPS)
    assert [(len(r.levels.tokens.wholes), len(r.levels.tokens.prefixes)) for r in found] == (
        [(2, 0) if waits else (0, 2)] * len(found)
    )
    assert not any("attention" in op for r in found for op in r.barriers)


def with_blocks(make):
    """FlexAttention with the block mask that `make` makes."""

    def attention(num_tokens, info):
        blocks = make(num_tokens, info)
        return lambda q, k, v: flex_attention(q, k, v, block_mask=blocks)

    return attention


def blocks_of(num_tokens, ids):
    def mask(b, h, q, k):
        return (ids[q] == ids[k]) & (q >= k)

    return create_block_mask(mask, None, None, num_tokens, num_tokens, device="cpu")


def with_scores(num_tokens, ids):
    def score(s, b, h, q, k):
        return torch.where((ids[q] == ids[k]) & (q >= k), s, -torch.inf)

    return lambda q, k, v: flex_attention(q, k, v, score)


BLOCK_STEPS = [(100, 200, 60), (300, 13), (4, 5, 6), (127, 1), (129, 130), (500, 1)]
"""Cut at the border of a block of 128 queries and inside of one, and less than a block."""


@pytest.mark.parametrize(
    ("attention", "info", "num_unsplit"),
    [
        (with_blocks(blocks_of), ids_of, 0),
        (with_scores, ids_of, 0),
        (with_blocks(given), lambda lengths: blocks_of(sum(lengths), ids_of(lengths)), 1),
    ],
    ids=["made of ids", "function of ids", "input"],
)
def test_flex_attention_over_flat_tokens_is_split_and_right(attention, info, num_unsplit):
    """A block mask that is an input holds the number of tokens, which is fixed in the first call."""
    found = played(Model(attention), info, steps=BLOCK_STEPS)
    assert sum(r.calls_split for r in found) == len(BLOCK_STEPS) - num_unsplit
    assert not any("flex_attention" in op for r in found if r.split for op in r.barriers)
    codes = [{s.code for s in r.levels.outline.segments.values() if s.whole} for r in found if r.split]
    assert [len(c) for c in codes] == [1] * len(codes)  # one for all layers


@pytest.mark.slow
def test_flex_attention_of_a_microbatch_is_compiled():
    found = played(Model(with_blocks(blocks_of)).float(), ids_of, steps=BLOCK_STEPS[:2], inner="inductor", atol=1e-5)
    assert sum(r.calls_split for r in found) == 2
