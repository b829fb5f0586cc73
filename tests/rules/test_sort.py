from __future__ import annotations

import pytest
import sympy
import torch

from dbo_compile.errors import CannotSplit
from dbo_compile.ir.tokens import FRESH, Local, Ruling, Split
from dbo_compile.ir.tokens import TOKENS as T
from dbo_compile.rules import RULES
from tests.rules.truth import NUM_TOKENS, Along, ask, claim, count, local, shared, tokens

aten = torch.ops.aten

INT = torch.int64
U = sympy.Symbol("u", integer=True, nonnegative=True)
X = torch.randn(3, NUM_TOKENS, 5, dtype=torch.float64)
BOTH = (Split(1), Split(1))
NUMBERED = Local(position=True)
SORTS = "it sorts values of many tokens"
PERM = local(3 * T, dtype=INT, order="by_expert", position=True)
INVERSE = local(3 * T, dtype=INT, order="by_expert", position=True, inverse=True)


@pytest.mark.parametrize(
    ("op", "args", "expected"),
    [
        (aten.sort.default, (), BOTH),
        (aten.sort.default, (0, True), BOTH),
        (aten.sort.default, (1,), f"{SORTS} that are no integers"),
        (aten.argsort.default, (-3,), Split(1)),
        (aten.msort.default, (), Split(1)),
        (aten.topk.default, (2,), BOTH),
        (aten.topk.default, (2, 0, False), BOTH),
        (aten.topk.default, (2, -2), "it takes the largest among many tokens"),
        (aten.cumsum.default, (0,), Split(1)),
        (aten.cumsum.default, (1,), "it adds up values of many tokens that are no integers"),
        (aten.cumprod.default, (-1,), Split(1)),
        (aten.cumprod.default, (1,), "it runs over many tokens"),
        (aten.logcumsumexp.default, (2,), Split(1)),
        (aten.cummax.default, (0,), BOTH),
        (aten.cummin.default, (-2,), "it runs over many tokens"),
    ],
)
def test_tokens_stay_where_an_op_runs_along_another_dim(op, args, expected):
    assert claim(op, X, *args) == expected


def test_keyword_arguments_count_too():
    assert claim(aten.sort.stable, X, stable=True, dim=0, descending=True) == BOTH
    assert claim(aten.argsort.stable, X, stable=True, dim=2) == Split(1)
    assert claim(aten.cumsum.default, X, 0, dtype=torch.float32) == Split(1)


def test_a_value_sorted_along_another_dim_keeps_the_row_numbers_of_all_tokens():
    numbers = torch.arange(NUM_TOKENS).view(-1, 1).expand(-1, 2)
    assert claim(aten.sort.default, Along(numbers, 0, position=True)) == (Split(0), Split(0))
    assert RULES[aten.sort.default](tokens(T, 2, position=True, dtype=INT)) == Ruling((Split(0), Split(0)))


B = torch.tensor([-1.0, 0.1, 0.5], dtype=torch.float64)
SORTED = torch.sort(X, -1)[0]


@pytest.mark.parametrize(
    ("op", "args", "expected"),
    [
        (aten.bucketize.Tensor, (X, B), Split(1)),
        (aten.searchsorted.Tensor, (B, X), Split(1)),
        (aten.searchsorted.Tensor, (SORTED, X), Split(1)),
        (aten.searchsorted.Tensor, (SORTED[0, :, 0].sort()[0], X), "it searches what other tokens hold"),
        (aten.searchsorted.Tensor, (SORTED, X.mT.contiguous().mT[:, :, :2]), Split(1)),
        (aten.searchsorted.Scalar, (B.expand(NUM_TOKENS, 3).contiguous(), 0.3), "it searches what other tokens hold"),
        (aten.bucketize.Tensor, (torch.arange(NUM_TOKENS), torch.tensor([2, 4])), Split(0)),
    ],
)
def test_tokens_stay_where_their_own_values_are_searched(op, args, expected):
    assert claim(op, *args) == expected


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        (lambda: ask(aten.sort.default, tokens(3 * T, dtype=INT)), (Local(FRESH), Local(FRESH, position=True))),
        (lambda: ask(aten.argsort.stable, tokens(T, dtype=torch.bool), stable=True), Local(FRESH, position=True)),
        (lambda: ask(aten.msort.default, tokens(3 * T, dtype=INT)), Local(FRESH)),
        (lambda: ask(aten.sort.default, tokens(T, 5, dtype=INT), 0), (Local(), NUMBERED)),
        (lambda: ask(aten.argsort.default, PERM), INVERSE.place),
        (lambda: ask(aten.sort.default, PERM), (NUMBERED, INVERSE.place)),
        (lambda: ask(aten.argsort.default, PERM, -1, True), NUMBERED),
        (lambda: ask(aten.argsort.default, INVERSE), NUMBERED),
        (lambda: ask(aten.argsort.default, local(3 * T, dtype=INT, position=True)), NUMBERED),
        (lambda: ask(aten.argsort.default, local(U, dtype=INT, order="nonzero", position=True)), NUMBERED),
        (lambda: ask(aten.sort.default, local(3 * T, dtype=INT, order="by_expert")), (Local(), NUMBERED)),
        (lambda: ask(aten.sort.default, local(5, position=True, dtype=INT)), (NUMBERED, NUMBERED)),
        (lambda: ask(aten.sort.default, local(U, 4, order="by_expert")), (Local("by_expert"), Local("by_expert"))),
        (lambda: ask(aten.topk.default, local(U, 4, order="by_expert"), 2), (Local("by_expert"), Local("by_expert"))),
        (lambda: ask(aten.cumsum.default, tokens(T, 5, dtype=INT), 0), NUMBERED),
        (lambda: ask(aten.cumsum.default, local(U, dtype=torch.bool, order="by_expert"), 0), NUMBERED),
        (lambda: ask(aten.cumsum.default, local(5, position=True), 0), NUMBERED),
        (lambda: ask(aten.cumsum.default, local(U, 4, order="by_expert"), 1), Local("by_expert")),
        (lambda: ask(aten.searchsorted.Tensor, local(5, position=True), shared(9, dtype=INT)), NUMBERED),
        (lambda: ask(aten.searchsorted.Tensor, local(5, position=True), local(U, dtype=INT)), NUMBERED),
        (lambda: ask(aten.searchsorted.Scalar, local(5, position=True), 3), NUMBERED),
        (lambda: ask(aten.bucketize.Tensor, local(U, 2, order="by_expert"), shared(9)), Local("by_expert")),
    ],
)
def test_sorting_and_adding_up_integers_gives_rows_of_a_microbatch_s_own(place, expected):
    assert place() == expected


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda: ask(aten.sort.default, local(U)), SORTS),
        (lambda: ask(aten.argsort.default, tokens(T)), SORTS),
        (lambda: ask(aten.topk.default, tokens(T, dtype=INT), 2), "it takes the largest among many tokens"),
        (lambda: ask(aten.topk.default, tokens(T, 5), count(T)), "it computes with the number of tokens"),
        (lambda: ask(aten.cumsum.default, local(U), 0), "it adds up values of many tokens"),
        (lambda: ask(aten.cumprod.default, tokens(T, dtype=INT), 0), "it runs over many tokens"),
        (lambda: ask(aten.bucketize.Tensor, local(5, position=True), shared(2)), "positions or counts of rows"),
        (lambda: ask(aten.searchsorted.Tensor, tokens(T, 5), shared(T, 2)), "it searches what other tokens hold"),
        (lambda: ask(aten.searchsorted.Tensor, shared(T, 5), tokens(T, 2)), "it searches what other tokens hold"),
        (
            lambda: ask(aten.searchsorted.Tensor, shared(5), tokens(T), sorter=shared(5, dtype=INT)),
            "it reads what it searches by the numbers of rows",
        ),
    ],
)
def test_what_needs_all_tokens_is_refused(call, reason):
    with pytest.raises(CannotSplit, match=reason):
        call()


def test_row_numbers_that_are_searched_for_are_those_inside_the_microbatch():
    rows = tokens(3 * T, position=True, dtype=INT)
    offsets = local(5, position=True, dtype=INT)
    assert RULES[aten.searchsorted.Tensor](offsets, rows) == Ruling(NUMBERED, local_positions=True)
    assert RULES[aten.searchsorted.Tensor](shared(5), rows) == Ruling(Split(0))
