from __future__ import annotations

import sys

import pytest
import sympy
import torch

from dbo_compile.errors import CannotSplit
from dbo_compile.ir.tokens import TOKENS as T
from dbo_compile.ir.tokens import Local, Number, Ruling, Split
from dbo_compile.rules import RULES
from tests.rules.truth import Along, ask, claim, count, local, shared, tokens

aten = torch.ops.aten
int64 = torch.int64

S, U = (sympy.Symbol(name, integer=True, positive=True) for name in "su")
OWN = Number(U, Local(position=True))
ROWS = local(3 * T, 8, order="sort")
COUNTS = local(9, dtype=int64, position=True)
IDS = local(3 * T, dtype=int64, order="sort")


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        (lambda: ask(aten.slice.Tensor, tokens(3, T, 8), 2, 1, 5), Split(1)),
        (lambda: ask(aten.slice.Tensor, tokens(3, T, 8), 1, 0, sys.maxsize), Split(1)),
        (lambda: ask(aten.slice.Tensor, tokens(3, 2 * T, 8), -2, None, count(2 * T)), Split(1)),
        (lambda: ask(aten.slice.Tensor, tokens(T, 8, position=True), 1, 3), Split(0, position=True)),
        (lambda: ask(aten.slice.Tensor, ROWS, 1, 4, 8), Local("sort")),
        (lambda: ask(aten.slice.Tensor, ROWS, 0, 0, sys.maxsize), Local("sort")),
        (lambda: ask(aten.slice.Tensor, ROWS, 0, 0, OWN), Local()),
        (lambda: ask(aten.slice.Tensor, COUNTS, 0, 0, -1), Local(position=True)),
        (lambda: ask(aten.slice.Tensor, IDS, 0, 1), Local(position=True)),
        (lambda: ask(aten.slice.Tensor, shared(64, 8), 0, 0, OWN), Local()),
        (lambda: ask(aten.narrow.default, tokens(T, 8), 1, 2, 5), Split(0)),
        (lambda: ask(aten.narrow.default, tokens(T, 8), 0, 0, count(T)), Split(0)),
        (lambda: ask(aten.select.int, tokens(3, T, 8), 0, 2), Split(0)),
        (lambda: ask(aten.select.int, tokens(3, T, 8), -1, 2), Split(1)),
        (lambda: ask(aten.select.int, IDS, 0, -1), Local(position=True)),
        (lambda: ask(aten.select.int, ROWS, 1, 5), Local("sort")),
        (lambda: ask(aten.unbind.int, tokens(3, T, 8)), (Split(0),) * 3),
        (lambda: ask(aten.split.Tensor, tokens(T, 8), 3, -1), (Split(0),) * 3),
        (lambda: ask(aten.chunk.default, tokens(T, 9), 4, 1), (Split(0),) * 3),
        (lambda: ask(aten.split_with_sizes.default, tokens(8, T), [3, 5], 0), (Split(1),) * 2),
        (lambda: ask(aten.split_with_sizes.default, ROWS, [OWN, OWN], 0), (Local(),) * 2),
        (lambda: ask(aten.split.Tensor, ROWS, 4, 1), (Local("sort"),) * 2),
        (lambda: ask(aten.cat.default, [tokens(3, T), tokens(5, T)]), Split(1)),
        (lambda: ask(aten.cat.default, [shared(0), tokens(3, T), tokens(5, T)]), Split(1)),
        (lambda: ask(aten.cat.default, [ROWS, local(3 * T, 1, order="sort")], -1), Local("sort")),
        (lambda: ask(aten.cat.default, [ROWS, local(3 * T, 1, order="other")], -1), Local()),
        (lambda: ask(aten.cat.default, [ROWS, ROWS], 0), Local()),
        (lambda: ask(aten.cat.default, [shared(1, dtype=int64), COUNTS]), Local(position=True)),
        (lambda: ask(aten.stack.default, [tokens(3, T), tokens(3, T)], -1), Split(1)),
        (lambda: ask(aten.stack.default, [tokens(3, T), tokens(3, T)], 1), Split(2)),
        (lambda: ask(aten.stack.default, [ROWS, ROWS], 1), Local("sort")),
        (lambda: ask(aten.stack.default, [ROWS, ROWS]), Local()),
        (lambda: ask(aten.slice_scatter.default, tokens(T, 8), tokens(T, 3), 1, 2, 5), Split(0)),
        (lambda: ask(aten.slice_scatter.default, tokens(T, 8), tokens(T, 8), 0, 0, sys.maxsize), Split(0)),
        (lambda: ask(aten.slice_scatter.default, shared(9), COUNTS, 0, 1), Local(position=True)),
        (lambda: ask(aten.select_scatter.default, tokens(3, T, 8), tokens(T, 8), 0, 1), Split(1)),
        (lambda: ask(aten.select_scatter.default, tokens(T, 8), shared(), 1, 5), Split(0)),
        (lambda: ask(aten.constant_pad_nd.default, tokens(3, T, 8), [1, 2, 0, 0, 5, 0]), Split(1)),
        (lambda: ask(aten.constant_pad_nd.default, tokens(T, 8, position=True), [1, 2]), Split(0)),
        (lambda: ask(aten.constant_pad_nd.default, ROWS, [0, 3]), Local("sort")),
        (lambda: ask(aten.constant_pad_nd.default, ROWS, [0, 0, 0, OWN]), Local()),
        (lambda: ask(aten.flip.default, tokens(3, T, 8), [0, -1]), Split(1)),
        (lambda: ask(aten.roll.default, tokens(3, T, 8), [2, 5], [0, 2]), Split(1)),
        (lambda: ask(aten.flip.default, ROWS, [1]), Local("sort")),
        (lambda: ask(aten.flip.default, IDS, [0]), Local(position=True)),
        (lambda: ask(aten.roll.default, IDS, [1], [0]), Local(position=True)),
        (lambda: ask(aten.constant_pad_nd.default, IDS, [1, -1]), Local(position=True)),
        (lambda: ask(aten.slice_scatter.default, IDS, shared(5, dtype=int64), 0, 0, 5), Local(position=True)),
    ],
)
def test_tokens_follow(place, expected):
    assert place() == expected


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda: ask(aten.slice.Tensor, tokens(3, T, 8), 1, 0, 5), "takes some of the tokens, which are in dim 1"),
        (lambda: ask(aten.slice.Tensor, tokens(3, T, 8), 1, 0, sys.maxsize, 2), "takes some of the tokens"),
        (lambda: ask(aten.slice.Tensor, tokens(3, T, 8), 1, 1), "takes some of the tokens"),
        (lambda: ask(aten.slice.Tensor, tokens(T, 8), 0, 0, count(T - 1)), "takes as many rows as there are tokens"),
        (lambda: ask(aten.slice.Tensor, tokens(T, T, dim=0), 1, 0, count(T)), "takes as many rows as there are tokens"),
        (lambda: ask(aten.slice.Tensor, shared(64, 8), 0, 0, count(T)), "takes as many rows as there are tokens"),
        (lambda: ask(aten.slice.Tensor, shared(T, 8), 0, 0, count(T)), "takes as many rows as there are tokens"),
        (lambda: ask(aten.slice.Tensor, ROWS, 0, 0, 5), "takes rows of a microbatch by their position"),
        (lambda: ask(aten.narrow.default, tokens(T, 8), 0, 1, 3), "takes some of the tokens"),
        (lambda: ask(aten.select.int, tokens(3, T, 8), 1, -1), "takes some of the tokens"),
        (lambda: ask(aten.select.int, shared(3, 8), 0, count(T)), "takes as many rows as there are tokens"),
        (lambda: ask(aten.select.int, ROWS, 0, -1), "takes rows of a microbatch by their position"),
        (lambda: ask(aten.unbind.int, tokens(T, 8)), "takes some of the tokens"),
        (lambda: ask(aten.split.Tensor, tokens(T, 8), 4, 0), "takes some of the tokens"),
        (lambda: ask(aten.split.Tensor, tokens(T, S), 4, 1), "into how many pieces is not known"),
        (lambda: ask(aten.chunk.default, tokens(T, 8), 2), "into how many pieces is not known"),
        (lambda: ask(aten.split_with_sizes.default, tokens(T, 8), [count(T), 3], 1), "takes as many rows"),
        (lambda: ask(aten.cat.default, [tokens(T, 8), tokens(T, 8)]), "one after the other along the token dim 0"),
        (lambda: ask(aten.cat.default, [tokens(T, 8), shared(T, 3)], 1), "without tokens has size T in the token dim"),
        (lambda: ask(aten.cat.default, [tokens(T, 8), tokens(T, 8)], 0), "one after the other along the token dim 0"),
        (lambda: ask(aten.cat.default, [ROWS, shared(3 * T, 1)], 1), "mixes a value of all tokens"),
        (lambda: ask(aten.stack.default, [tokens(T, 8), shared(T, 8)]), "without tokens has size T"),
        (lambda: ask(aten.slice_scatter.default, tokens(T, 8), tokens(2 * T, 8), 0, 3), "some of the tokens"),
        (lambda: ask(aten.slice_scatter.default, shared(T, 8), tokens(T, 3), 1, 5), "without tokens has size T"),
        (lambda: ask(aten.slice_scatter.default, tokens(T, 8), tokens(T, 3), 1, count(T)), "number of tokens"),
        (lambda: ask(aten.slice_scatter.default, ROWS, local(5, 8), 0, 0, 5), "over rows of a microbatch"),
        (lambda: ask(aten.select_scatter.default, tokens(T, 8), shared(8), 0, 3), "writes over some of the tokens"),
        (lambda: ask(aten.select_scatter.default, shared(T, 8), tokens(T), 1, 3), "without tokens has size T"),
        (lambda: ask(aten.constant_pad_nd.default, tokens(3, T, 8), [0, 0, 1, 0]), "pads the token dim 1"),
        (lambda: ask(aten.constant_pad_nd.default, tokens(T, 8), [0, count(T)]), "number of tokens"),
        (lambda: ask(aten.constant_pad_nd.default, tokens(T, 8), [0, 2], count(T)), "number of tokens"),
        (lambda: ask(aten.flip.default, tokens(3, T), [-1]), "along the token dim 1"),
        (lambda: ask(aten.flip.default, ROWS, [0]), "by their position"),
        (lambda: ask(aten.roll.default, tokens(3, T), [2]), "along the token dim 1"),
        (lambda: ask(aten.as_strided.default, tokens(T, 8), [count(T), 4], [8, 2]), "addresses memory by strides"),
    ],
)
def test_says_why_not(call, reason):
    with pytest.raises(CannotSplit, match=reason):
        call()


def test_local_rows_beside_those_of_tokens_are_taken_to_be_theirs():
    ruling = RULES[aten.cat.default]([tokens(T, 8), local(T, 3)], 1)
    assert ruling == Ruling(Split(0), assumes="the rows it combines with tokens are in the order of those tokens")


R = torch.rand


@pytest.mark.parametrize(
    "call",
    [
        *((aten.slice.Tensor, R(2, 7, 9), dim, 0, sys.maxsize) for dim in range(-3, 3)),
        (aten.slice.Tensor, R(2, 7, 9), 2, 1, 8, 2),
        (aten.slice.Tensor, R(2, 14, 9), 1, 0, 14),
        (aten.narrow.default, R(2, 14, 9), 1, 0, 14),
        (aten.narrow.default, R(2, 14, 9), -1, 3, 5),
        (aten.select.int, R(2, 7, 9), 0, 1),
        (aten.select.int, R(2, 7, 9), -1, 5),
        (aten.unbind.int, R(2, 7, 3), -1),
        *((aten.split.Tensor, R(7, 9), size, 1) for size in (1, 2, 4, 9, 11)),
        *((aten.chunk.default, R(7, 9), chunks, 1) for chunks in (1, 2, 4, 6, 9)),
        (aten.split_with_sizes.default, R(9, 7), [1, 5, 3]),
        *((aten.cat.default, [R(2, 7, 3), R(2, 7, 3)], dim) for dim in (0, 2, -1, -3)),
        (aten.cat.default, [R(0), R(2, 14), R(3, 14)], 0),
        (aten.cat.default, [Along(torch.arange(7).view(7, 1), 0, position=True), torch.zeros(7, 3, dtype=int64)], 1),
        *((aten.stack.default, [R(2, 7, 3), R(2, 7, 3)], dim) for dim in range(-4, 4)),
        (aten.slice_scatter.default, R(7, 9), R(7, 3), 1, 2, 5),
        (aten.slice_scatter.default, R(7, 9), R(7, 9), 0, 0, sys.maxsize),
        (aten.select_scatter.default, R(3, 7, 9), R(7, 9), 0, 1),
        (aten.select_scatter.default, R(7, 9), R(7), 1, 5),
        (aten.constant_pad_nd.default, R(3, 7, 9), [1, 2, 0, 0, 5, 0], 0.5),
        *((aten.flip.default, R(3, 7, 9), list(dims)) for dims in ((0,), (2, 0), (-1,))),
        (aten.roll.default, R(3, 7, 9), [2, 5], [0, 2]),
    ],
    ids=lambda call: f"{call[0]}{[a for a in call[1:] if isinstance(a, int)]}",
)
def test_the_claim_is_true(call):
    assert not isinstance(claim(*call), str)
