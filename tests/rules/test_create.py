from __future__ import annotations

import pytest
import sympy
import torch

from dbo_compile.errors import CannotSplit
from dbo_compile.ir.tokens import TOKENS as T
from dbo_compile.ir.tokens import Local, Number, Shared, Split
from tests.rules.truth import Along, ask, claim, count, local, shared, tokens

aten = torch.ops.aten
prims = torch.ops.prims

S, U = (sympy.Symbol(name, integer=True, positive=True) for name in "su")
OWN = Number(U, Local(position=True))


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        (lambda: ask(aten.zeros.default, [3, count(2 * T), 8]), Split(1)),
        (lambda: ask(aten.ones.default, [count(T * S)], dtype=torch.int64), Split(0)),
        (lambda: ask(aten.full.default, [count(T), 8], 1.5), Split(0)),
        (lambda: ask(aten.new_zeros.default, tokens(T, 8), [3, 8]), Shared()),
        (lambda: ask(aten.new_full.default, shared(3), [3, count(T)], 0), Split(1)),
        (lambda: ask(aten.empty_strided.default, [count(T), 8], [1, count(T)]), Split(0)),
        (lambda: ask(aten.empty.memory_format, [OWN, 8]), Local()),
        (lambda: ask(aten.zeros_like.default, tokens(T, position=True)), Split(0)),
        (lambda: ask(aten.full_like.default, tokens(3, T), 2.0), Split(1)),
        (lambda: ask(aten.empty_like.default, local(2 * T, order="sort", position=True, inverse=True)), Local()),
        (lambda: ask(aten.arange.default, count(3 * T), dtype=torch.int64), Split(0, position=True)),
        (lambda: ask(aten.arange.start, 0, count(T)), Split(0, position=True)),
        (lambda: ask(aten.arange.start_step, 0, count(T), 1), Split(0, position=True)),
        (lambda: ask(prims.iota.default, count(T), start=0, step=1, dtype=torch.int64), Split(0, position=True)),
        (lambda: ask(aten.arange.default, OWN), Local(position=True)),
        (lambda: ask(aten.tril.default, tokens(T, 8, 8), -1), Split(0)),
        (lambda: ask(aten.triu.default, local(3, 5, 5, order="sort")), Local("sort")),
        (lambda: ask(aten.triu.default, local(5, 5, order="sort")), Local()),
    ],
)
def test_sizes_say_where_the_tokens_are(place, expected):
    assert place() == expected


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda: ask(aten.zeros.default, [count(T), count(T)]), r"no single dim of \['T', 'T'\]"),
        (lambda: ask(aten.zeros.default, [count(T + 1)]), r"no single dim of \['T \+ 1'\]"),
        (lambda: ask(aten.zeros.default, [count(T**2)]), "no single dim"),
        (lambda: ask(aten.full.default, [3], count(T)), "computes with the number of tokens"),
        (lambda: ask(aten.full.default, [count(T)], OWN), "computes with the number of tokens"),
        (lambda: ask(aten.new_full.default, tokens(T), [3], count(T)), "computes with the number of tokens"),
        (lambda: ask(aten.full_like.default, tokens(T), count(T)), "computes with the number of tokens"),
        (lambda: ask(aten.scalar_tensor.default, count(T)), "computes with the number of tokens"),
        (lambda: ask(aten.eye.default, count(T)), "square of the number of tokens"),
        (lambda: ask(aten.arange.default, count(T - 1)), "makes T - 1 numbers"),
        (lambda: ask(aten.arange.start, 2, count(T)), "counts from 2 in steps of 1"),
        (lambda: ask(aten.arange.start, count(T), 9), "counts from T in steps of 1"),
        (lambda: ask(aten.arange.start, count(T), count(2 * T)), "counts from T in steps of 1"),
        (lambda: ask(aten.arange.start_step, 0, count(T), 2), "counts from 0 in steps of 2"),
        (lambda: ask(aten.arange.start_step, 0, 64, count(T)), "counts from 0 in steps of T"),
        (lambda: ask(aten.arange.default, count(T), dtype=torch.bfloat16), "cannot hold the number of every row"),
        (lambda: ask(aten.tril.default, tokens(5, T, 3)), "triangle of the token dim 1"),
        (lambda: ask(aten.tril.default, tokens(T, 5, 3), count(T)), "computes with the number of tokens"),
        (lambda: ask(aten.tril.default, local(U, 3)), "triangle of rows"),
    ],
)
def test_says_why_not(call, reason):
    with pytest.raises(CannotSplit, match=reason):
        call()


@pytest.mark.parametrize(
    "call",
    [
        (aten.zeros.default, [3, 14]),
        (aten.full.default, [21, 5], 1.5),
        (aten.new_ones.default, torch.rand(7, 3), [5, 3]),
        (aten.new_zeros.default, torch.rand(3), [5, 7]),
        (aten.full_like.default, torch.rand(3, 14), 2.0),
        (aten.zeros_like.default, Along(torch.arange(7), 0, position=True)),
        (aten.arange.default, 21),
        (aten.arange.start, 0, 14),
        (aten.arange.start_step, 0, 7, 1),
        (aten.tril.default, torch.rand(14, 5, 3), 1),
        (aten.triu.default, torch.rand(2, 7, 3, 5)),
    ],
    ids=str,
)
def test_the_claim_is_true(call):
    assert not isinstance(claim(*call), str)
