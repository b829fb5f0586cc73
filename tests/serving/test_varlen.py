"""`torch.nn.attention.varlen` over flat tokens of many requests. It has no kernel for the CPU: here it gets one."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn.attention import varlen

from dbo_compile import reports
from dbo_compile.axes import CuSeqlens, Requests, SeqLens
from dbo_compile.report import new_reports
from dbo_compile.rules.requests import register_attention_op

HEADS, SIZE, PAGE = 2, 3, 4
CAUSAL, BOTH_WAYS = (-1, 0), (-1, -1)


def flash(q, k, v, cu_q, cu_k, max_q, max_k, dropout, is_causal, debug, *, scale=None, window_size_left=None,
          window_size_right=None, seqused_k=None, block_table=None, **_):  # fmt: skip
    """One request after the other; the last query sees the last key."""
    out, sums, bounds = torch.empty_like(q), q.new_empty(q.shape[1], len(q), dtype=torch.float32), cu_q.tolist()
    for r, (start, stop) in enumerate(pairwise(bounds)):
        rows = slice(*cu_k[r : r + 2].tolist()) if block_table is None else slice(int(seqused_k[r]))
        keys, values = (x[rows] if block_table is None else x[block_table[r]].flatten(0, 1)[rows] for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q[start:stop], keys) * (scale or q.shape[-1] ** -0.5)
        hidden = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1 + len(keys) - (stop - start))
        scores = scores.masked_fill(hidden, -torch.inf) if window_size_right == 0 else scores
        sums[:, start:stop] = scores.logsumexp(-1)
        out[start:stop] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), values)
    return out, sums, *(torch.empty(0, dtype=torch.uint64) for _ in range(3))


def flash_out(out, *args, **options):
    made, sums, *_ = flash(*args, **options)
    out.copy_(made)
    return sums


def varlen_attn_out(q, *args, **options):
    out = torch.empty_like(q)
    varlen.varlen_attn_out(out, q, *args, **options)
    return out


ATTEND = [varlen.varlen_attn, varlen_attn_out] if hasattr(varlen, "varlen_attn_out") else [varlen.varlen_attn]


@pytest.fixture(scope="module", autouse=True)
def _kernel():
    library = torch.library.Library("aten", "IMPL")
    library.impl("_flash_attention_forward", flash, "CPU")
    library.impl("_flash_attention_forward_no_dropout_inplace", flash_out, "CPU")
    yield
    library._destroy()


@torch.library.custom_op("dbo_test::write_pages", mutates_args=("caches",))
def write_pages(k: torch.Tensor, v: torch.Tensor, caches: torch.Tensor, slots: torch.Tensor) -> None:
    for cache, rows in zip(caches, (k, v), strict=True):
        cache.view(-1, HEADS, SIZE)[slots] = rows


register_attention_op(torch.ops.dbo_test.write_pages.default, tokens=["k", "v", "slots"], caches=["caches"])


class Model(nn.Module):
    """Two layers, whose keys and values are those of the step, or lie in pages."""

    def __init__(self, attend, window) -> None:
        super().__init__()
        self.attend = attend
        self.window = window
        self.qkv = nn.ModuleList(nn.Linear(HEADS * SIZE, 3 * HEADS * SIZE) for _ in range(2))
        self.register_buffer("caches", torch.zeros(2, 2, 30, PAGE, HEADS, SIZE))

    def forward(self, x, cu_seqlens, slots=None, seq_lens=None, block_table=None):
        for qkv, caches in zip(self.qkv, self.caches, strict=True):
            q, k, v = qkv(x).view(len(x), 3 * HEADS, SIZE).chunk(3, 1)
            if slots is None:
                y = self.attend(q, k, v, cu_seqlens, cu_seqlens, 64, 64, window_size=self.window)
            else:
                torch.ops.dbo_test.write_pages(k, v, caches, slots)
                y = self.attend(q, *caches, cu_seqlens, None, 64, 64, window_size=self.window,
                                seqused_k=seq_lens, block_table=block_table)  # fmt: skip
            x = x + y.flatten(1).tanh()
        return x


AXES = {"x": 0, "slots": 0, "cu_seqlens": CuSeqlens(), "seq_lens": SeqLens(), "block_table": Requests(0)}
STEPS = [(3, 7, 4), (6, 5), (2, 3, 5, 1)]


def step(lengths, paged):
    """Requests in pages of their own, with three tokens cached of each."""
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    x = torch.randn(sum(lengths), HEADS * SIZE, dtype=torch.float64)
    if not paged:
        return x, bounds
    table = torch.randperm(30)[: 3 * len(lengths)].view(-1, 3)
    slots = [int(table[r, p // PAGE]) * PAGE + p % PAGE for r, n in enumerate(lengths) for p in range(3, 3 + n)]
    return x, bounds, torch.tensor(slots), torch.tensor(lengths) + 3, table


@pytest.mark.parametrize("attend", ATTEND)
@pytest.mark.parametrize(
    ("paged", "window", "whole"), [(False, CAUSAL, True), (True, CAUSAL, False), (True, BOTH_WAYS, True)]
)
def test_every_step_is_split_and_right(attend, paged, window, whole):
    """A request is cut in two only where keys of its earlier tokens lie in pages, and later ones are hidden."""
    before, model = reports(), Model(attend, window).double().eval()
    plain = Model(attend, window).double().eval()
    plain.load_state_dict(model.state_dict())
    options = {"split": "always", "inner": "eager", "min_tokens": 2, "token_dims": AXES}
    run = torch.compile(model, backend="dbo", options=options, fullgraph=True)
    with torch.no_grad():
        for lengths in STEPS:
            args = step(lengths, paged)
            torch.testing.assert_close(run(*args), plain(*args), rtol=0, atol=1e-12)
            torch.testing.assert_close(model.caches, plain.caches, rtol=0, atol=1e-12)
    found = new_reports(before)
    assert sum(r.calls_split for r in found) == len(STEPS)
    assert [(bool(r.levels.tokens.whole_requests), r.barriers) for r in found] == [(whole, {})] * len(found)
