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

U = sympy.Symbol("u", integer=True, nonnegative=True)
X = torch.randn(3, NUM_TOKENS, 5, 2, dtype=torch.float64)
INT = torch.int64
OVER_TOKENS = "it reduces over the token dim 1"
OVER_ROWS = "it reduces over rows of many tokens"


@pytest.mark.parametrize(
    ("op", "args", "expected"),
    [
        (aten.sum.dim_IntList, ([0],), Split(0)),
        (aten.sum.dim_IntList, ([0, 2],), Split(0)),
        (aten.sum.dim_IntList, ([-1, 0], True), Split(1)),
        (aten.sum.dim_IntList, ([-2],), Split(1)),
        (aten.sum.dim_IntList, ([1],), OVER_TOKENS),
        (aten.sum.dim_IntList, ([-3],), OVER_TOKENS),
        (aten.sum.dim_IntList, ([],), OVER_TOKENS),
        (aten.sum.dim_IntList, (None,), OVER_TOKENS),
        (aten.sum.default, (), OVER_TOKENS),
        (aten.nansum.default, ([0],), Split(0)),
        (aten.mean.dim, ([0, 3],), Split(0)),
        (aten.mean.default, (), OVER_TOKENS),
        (aten.amax.default, ([2],), Split(1)),
        (aten.amin.default, ([0], True), Split(1)),
        (aten.amax.default, (), OVER_TOKENS),
        (aten.max.default, (), OVER_TOKENS),
        (aten.max.dim, (0,), (Split(0), Split(0))),
        (aten.min.dim, (-1, True), (Split(1), Split(1))),
        (aten.min.dim, (1,), OVER_TOKENS),
        (aten.median.dim, (0,), (Split(0), Split(0))),
        (aten.nanmedian.dim, (1,), OVER_TOKENS),
        (aten.mode.default, (), (Split(1), Split(1))),
        (aten.kthvalue.default, (2, 0), (Split(0), Split(0))),
        (aten.kthvalue.default, (2, 1), OVER_TOKENS),
        (aten.argmax.default, (0,), Split(0)),
        (aten.argmin.default, (2, True), Split(1)),
        (aten.argmax.default, (), OVER_TOKENS),
        (aten.any.dim, (0,), Split(0)),
        (aten.all.dims, ([0, 2],), Split(0)),
        (aten.any.dims, ([],), Split(1)),
        (aten.any.dims, (None,), OVER_TOKENS),
        (aten.prod.dim_int, (3,), Split(1)),
        (aten.prod.default, (), OVER_TOKENS),
        (aten.std.correction, ([0],), Split(0)),
        (aten.var.correction, (), OVER_TOKENS),
        (aten.var.dim, ([0, -1], False, True), Split(1)),
        (aten.std.default, (False,), OVER_TOKENS),
        (aten.var_mean.correction, ([-1, -2],), (Split(1), Split(1))),
        (aten.std_mean.dim, ([0], True), (Split(0), Split(0))),
        (aten.var_mean.default, (), OVER_TOKENS),
        (aten.linalg_vector_norm.default, (2, [0]), Split(0)),
        (aten.linalg_vector_norm.default, (), OVER_TOKENS),
        (aten.norm.ScalarOpt_dim, (2, [-1], True), Split(1)),
        (aten.norm.Scalar, (3,), OVER_TOKENS),
        (aten.logsumexp.default, ([0],), Split(0)),
        (aten.count_nonzero.default, (0,), Split(0)),
        (aten.count_nonzero.dim_IntList, ([0, 2],), Split(0)),
    ],
)
def test_tokens_follow_a_reduction_of_other_dims(op, args, expected):
    assert claim(op, X, *args) == expected


def test_keyword_arguments_count_too():
    assert claim(aten.aminmax.default, X, dim=0) == (Split(0), Split(0))
    assert claim(aten.std.correction, X, [0], correction=0, keepdim=True) == Split(1)
    assert claim(aten.sum.dim_IntList, X, [0], dtype=torch.float32) == Split(0)


def test_row_numbers_summed_over_another_dim_are_no_row_numbers():
    numbers = torch.arange(NUM_TOKENS).view(-1, 1).expand(-1, 2)
    assert claim(aten.sum.dim_IntList, Along(numbers, 0, position=True), [1]) == Split(0)
    assert RULES[aten.any.dims](tokens(T, 2, position=True, dtype=INT), []) == Ruling(Split(0))


ROWS = local(3 * T, 4, order="sort")
COUNTS = local(5, position=True, dtype=INT)
NUMBERED = Local(position=True)


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        (lambda: ask(aten.sum.default, tokens(T, 3, dtype=INT)), NUMBERED),
        (lambda: ask(aten.sum.dim_IntList, tokens(T, 5, dtype=INT), [0]), NUMBERED),
        (lambda: ask(aten.sum.dim_IntList, tokens(T, 5, dtype=torch.bool), [0], dtype=torch.float32), NUMBERED),
        (lambda: ask(aten.count_nonzero.default, tokens(T, 5, dtype=torch.bool)), NUMBERED),
        (lambda: ask(aten.amax.default, tokens(T, 5, dtype=INT), [0]), NUMBERED),
        (lambda: ask(aten.any.default, tokens(T, dtype=torch.bool)), NUMBERED),
        (lambda: ask(aten.all.dims, tokens(T, dtype=torch.bool), [0]), NUMBERED),
        (lambda: ask(aten.aminmax.default, tokens(T, 5, dtype=INT), dim=0), (NUMBERED, NUMBERED)),
        (lambda: ask(aten.sum.default, COUNTS), NUMBERED),
        (lambda: ask(aten.mean.dim, local(5, position=True), [0]), NUMBERED),
        (lambda: ask(aten.argmax.default, COUNTS), NUMBERED),
        (lambda: ask(aten.sum.dim_IntList, local(2, 5, position=True, dtype=INT), [0]), NUMBERED),
        (lambda: ask(aten.sum.dim_IntList, local(U, dtype=INT), [0]), NUMBERED),
        (lambda: ask(aten.mean.dim, ROWS, [-1], True), Local("sort")),
        (lambda: ask(aten.max.dim, ROWS, 1), (Local("sort"), Local("sort"))),
        (lambda: ask(aten.sum.dim_IntList, local(4, 3 * T, 2, order="sort"), [0]), Local()),
        (lambda: ask(aten.sum.dim_IntList, local(U, 4, order="sort", position=True, dtype=INT), [1]), NUMBERED),
        (lambda: ask(aten.sum.dim_IntList, local(), [0]), Local()),
        (lambda: ask(aten.histc.default, tokens(3 * T, dtype=INT), 5, 0, 4), NUMBERED),
        (lambda: ask(aten.histc.default, local(3 * T, order="sort"), 5, 0, 4), NUMBERED),
        (lambda: ask(aten.bincount.default, tokens(3 * T, dtype=INT), None, 5), NUMBERED),
        (lambda: ask(aten.bincount.default, local(U, dtype=INT), local(U, dtype=INT)), NUMBERED),
        (lambda: ask(aten._unique2.default, tokens(T, dtype=INT), True, True), (Local(), NUMBERED, NUMBERED)),
        (lambda: ask(aten.nonzero.default, tokens(5, T, dtype=torch.bool)), Local(FRESH, position=True)),
        (lambda: ask(aten.nonzero.default, local(U, dtype=torch.bool, order="sort")), NUMBERED),
        (lambda: ask(aten.nonzero_static.default, tokens(T, dtype=torch.bool), size=21), NUMBERED),
        (lambda: ask(aten.repeat_interleave.Tensor, COUNTS), Local()),
        (lambda: ask(aten.repeat_interleave.Tensor, local(U, dtype=INT)), NUMBERED),
        (lambda: ask(aten.repeat_interleave.self_Tensor, shared(5, 8), COUNTS, 0), Local()),
        (lambda: ask(aten.repeat_interleave.self_Tensor, COUNTS, COUNTS), NUMBERED),
        (lambda: ask(aten.one_hot.default, tokens(T, 3, dtype=INT), 5), Split(0)),
        (lambda: ask(aten.one_hot.default, local(3 * T, dtype=INT, order="sort"), 5), Local("sort")),
        (lambda: ask(aten.one_hot.default, COUNTS, 5), NUMBERED),
    ],
)
def test_counts_are_a_microbatch_s_own(place, expected):
    assert place() == expected


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda: ask(aten.mean.dim, tokens(T, 5), [0]), "it reduces over the token dim 0"),
        (lambda: ask(aten.argmax.default, tokens(T, dtype=INT)), "it reduces over the token dim 0"),
        (lambda: ask(aten.max.dim, tokens(T, 5, dtype=INT), 0), "it reduces over the token dim 0"),
        (lambda: ask(aten.prod.default, tokens(T, dtype=INT)), "it reduces over the token dim 0"),
        (lambda: ask(aten.median.default, tokens(T, dtype=INT)), "it reduces over the token dim 0"),
        (lambda: ask(aten.sum.dim_IntList, ROWS, [0]), OVER_ROWS),
        (lambda: ask(aten.amax.default, ROWS), OVER_ROWS),
        (lambda: ask(aten.mean.default, local(U, 4)), OVER_ROWS),
        (lambda: ask(aten.argmax.default, local(U, dtype=INT)), OVER_ROWS),
        (lambda: ask(aten.kthvalue.default, tokens(T, 5), count(T)), "it computes with the number of tokens"),
        (lambda: ask(aten.histc.default, tokens(T), 5), "the bounds of its bins"),
        (lambda: ask(aten.bincount.default, tokens(T, dtype=INT), tokens(T)), "it adds up weights of many tokens"),
        (lambda: ask(aten._unique2.default, tokens(T)), "it looks for equal rows"),
        (lambda: ask(aten.unique_consecutive.default, tokens(T, 2, dtype=INT), dim=0), "it looks for equal rows"),
        (lambda: ask(aten.nonzero.default, tokens(T)), "it numbers the rows of many tokens"),
        (lambda: ask(aten.nonzero.default, COUNTS), "it compares positions or counts of rows with zero"),
        (lambda: ask(aten.repeat_interleave.Tensor, tokens(T, dtype=INT)), "it repeats tokens a number of times"),
        (lambda: ask(aten.repeat_interleave.self_Tensor, tokens(T), COUNTS, 0), "it repeats tokens a number of times"),
        (
            lambda: ask(aten.repeat_interleave.self_Tensor, shared(T), local(U, dtype=INT), 0),
            "it repeats what all tokens share by counts for the rows of a microbatch",
        ),
        (lambda: ask(aten.one_hot.default, tokens(T, dtype=INT)), "the number of its classes is the largest"),
    ],
)
def test_what_needs_all_tokens_is_refused(call, reason):
    with pytest.raises(CannotSplit, match=reason):
        call()


def test_what_counts_row_numbers_counts_those_inside_the_microbatch():
    numbers = tokens(T, position=True, dtype=INT)
    assert RULES[aten.sum.default](numbers) == Ruling(NUMBERED, local_positions=True)
    assert RULES[aten.bincount.default](numbers) == Ruling(NUMBERED, local_positions=True)


def test_one_hot_rows_are_those_of_their_tokens():
    assert claim(aten.one_hot.default, torch.tensor([3, 0, 1, 1, 4, 2, 0]), 5) == Split(0)
