from __future__ import annotations

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from dbo_compile import reports
from dbo_compile.errors import CannotSplit
from dbo_compile.ir.tokens import TOKENS as T
from dbo_compile.ir.tokens import Function, Ruling, Split
from dbo_compile.report import new_reports
from dbo_compile.rules.registry import rule_of
from tests.rules.truth import count, local, shared, tokens

Q, KV = tokens(T, 6, 40, 8), tokens(T, 2, 40, 8)
SCORES, ALL = Function(frozenset({0, 2, 3, 4})), Function(frozenset(range(5)))
POSITIONS = Function(frozenset({2, 3}))
BLOCKS = (shared(1, 1, 2), shared(1, 1, 2, 2))
RULE = rule_of(torch.ops.higher_order.flex_attention)


def ask(q=Q, k=KV, v=KV, score_mod=SCORES, blocks=BLOCKS, mask_mod=POSITIONS, length=40, score_buffers=(), buffers=()):
    return RULE(q, k, v, score_mod, (length, length, *blocks, None, 128, mask_mod), 0.5, {}, score_buffers, buffers)


@pytest.mark.parametrize(
    "blocks", [BLOCKS, (tokens(T, 1, 2), tokens(T, 1, 2, 2))], ids=["one for all", "one for each"]
)
def test_sequences_are_split(blocks):
    assert ask(blocks=blocks, score_buffers=[shared(6)], buffers=[shared(40)]) == Ruling((Split(0),) * 3)


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        ({"k": shared(1, 2, 40, 8), "v": shared(1, 2, 40, 8)}, "do not all have a token in each row"),
        ({"k": tokens(2 * T, 2, 40, 8), "v": tokens(2 * T, 2, 40, 8)}, "do not all have a token in each row"),
        ({"score_mod": ALL}, "its score_mod asks for the number of a sequence"),
        ({"mask_mod": ALL}, "its mask_mod asks for the number of a sequence"),
        ({"score_buffers": [tokens(T)]}, "its score_mod reads rows of tokens"),
        ({"buffers": [shared(T)]}, "its mask_mod reads rows of tokens"),
        ({"blocks": (shared(T, 1, 2), shared(T, 1, 2, 2))}, "has no row for each sequence, nor one for all"),
        ({"blocks": (tokens(1, T, 2), tokens(1, T, 2, 2))}, "has no row for each sequence, nor one for all"),
        ({"length": count(T)}, "it computes with the number of tokens"),
    ],
)
def test_says_why_not(args, reason):
    with pytest.raises(CannotSplit, match=reason):
        ask(**args)


ROWS = tokens(1, 6, T, 8, dim=2)
ALL_BLOCKS = (shared(1, 1, T // 128), shared(1, 1, T // 128, T // 128))


def ask_rows(k=ROWS, length=None, **more):
    length = count(T) if length is None else length
    return ask(**{"q": ROWS, "k": k, "v": k, "blocks": ALL_BLOCKS, "length": length, **more})


@pytest.mark.parametrize(
    "args",
    [
        {},
        {"score_mod": ALL, "mask_mod": ALL},  # the number of the sequence is that of the step
        {"buffers": [tokens(T), shared(T), shared(7)], "score_buffers": [tokens(T)]},
        {"blocks": (shared(1, 1, 1), shared(1, 1, 1, 1)), "length": 1},  # no block mask was given
        {"buffers": [count(T)]},  # and not read
    ],
)
def test_rows_attend_to_those_of_all(args):
    assert ask_rows(**args) == Ruling((Split(2),) * 3, whole=(1, 2, 7, 8))


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        ({"k": tokens(1, 6, 2 * T, 8, dim=2)}, "do not all have a token in each row"),
        ({"k": shared(1, 6, T, 8)}, "do not all have a token in each row"),
        ({"length": 512}, "made for a fixed number of tokens"),
        ({"blocks": (tokens(1, 1, T, dim=2), tokens(1, 1, T, T, dim=2))}, "not made for all tokens"),
        ({"buffers": [local(9)]}, "its mask_mod reads values that each microbatch has its own of"),
        ({"score_buffers": [local(9)]}, "its score_mod reads values that each microbatch has its own of"),
        ({"buffers": [count(T)], "mask_mod": ALL}, "its mask_mod computes with the number of tokens"),
    ],
)
def test_says_why_rows_are_not_split(args, reason):
    with pytest.raises(CannotSplit, match=reason):
        ask_rows(**args)


def causal(b, h, q, k):
    return q >= k


def from_sequence_to_sequence(b, h, q, k):
    return q >= k - b


@pytest.mark.parametrize(("mask", "num_sequences"), [(causal, None), (from_sequence_to_sequence, 1)])
def test_it_is_right_whether_it_is_split_or_not(mask, num_sequences):
    """A function that asks for the number of a sequence would get that in the microbatch."""

    def fn(x, slopes):
        q, k, v = x.sin().chunk(3, -1)
        length = x.shape[2]
        blocks = create_block_mask(mask, len(x) if num_sequences else None, None, length, length, device="cpu")
        return flex_attention(q, k, v, lambda s, b, h, i, j: s + slopes[h] * (i - j), blocks)

    before, x, slopes = reports(), torch.randn(5, 2, 140, 6, dtype=torch.float64), torch.rand(2).double()
    options = {"split": "always", "inner": "eager", "token_dims": {"x": 0}}
    with torch.no_grad():
        got = torch.compile(fn, backend="dbo", options=options, fullgraph=True)(x, slopes)
        torch.testing.assert_close(got, fn(x, slopes), rtol=0, atol=1e-12)
    (report,) = new_reports(before)
    assert report.calls_split == 1
    assert any("flex_attention" in op for op in report.barriers) is (mask is not causal)
