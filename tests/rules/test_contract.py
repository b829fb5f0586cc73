from __future__ import annotations

import pytest
import torch

from dbo_compile.errors import CannotSplit
from dbo_compile.ir.tokens import TOKENS as T
from dbo_compile.ir.tokens import Local, Split
from tests.rules.truth import Along, Whole, ask, claim, count, local, shared, tokens

aten = torch.ops.aten

ROWS = local(3 * T, 8, order="sort")
OFFSETS = local(5, dtype=torch.int32, position=True)
SOLVE = aten.linalg_solve_triangular.default
GROUPED = "transformers.grouped_mm_fallback.default"


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        (lambda: ask(aten.mm.default, tokens(T, 8), shared(8, 5)), Split(0)),
        (lambda: ask(aten.mm.default, shared(5, 8), tokens(8, T)), Split(1)),
        (lambda: ask(aten.mm.default, ROWS, shared(8, 5)), Local("sort")),
        (lambda: ask(aten.mm.default, shared(5, 8), local(8, 3 * T, order="sort")), Local()),
        (lambda: ask(aten.mm.default, ROWS, local(8, 5)), Local()),
        (lambda: ask(aten.mm.default, ROWS, local(8, 3 * T)), Local()),
        (lambda: ask(aten.mm.default, local(5, 8, position=True), shared(8, 3)), Local(position=True)),
        (lambda: ask(aten.bmm.default, tokens(T, 5, 8), tokens(T, 8, 3)), Split(0)),
        (lambda: ask(aten.bmm.default, tokens(5, T, 8), shared(5, 8, 3)), Split(1)),
        (lambda: ask(aten.bmm.default, shared(5, 3, 8), tokens(5, 8, T)), Split(2)),
        (lambda: ask(aten.bmm.default, local(5, 3, 8, order="sort"), shared(5, 8, 3)), Local()),
        (lambda: ask(aten.addmm.default, shared(5), tokens(T, 8), shared(8, 5)), Split(0)),
        (lambda: ask(aten.addmm.default, tokens(T, 5), tokens(T, 8), shared(8, 5), beta=2), Split(0)),
        (lambda: ask(aten.addmm.default, tokens(T, 1), shared(1, 8), shared(8, 5)), Split(0)),
        (lambda: ask(aten.addmm.default, shared(5), ROWS, shared(8, 5)), Local("sort")),
        (lambda: ask(aten.baddbmm.default, shared(3, 1, 5), tokens(3, T, 8), shared(3, 8, 5)), Split(1)),
        (lambda: ask(aten.addbmm.default, shared(1, 5), tokens(3, T, 8), shared(3, 8, 5)), Split(0)),
        (lambda: ask(aten.mv.default, tokens(T, 8), shared(8)), Split(0)),
        (lambda: ask(aten.addmv.default, shared(1), tokens(T, 8), shared(8)), Split(0)),
        (lambda: ask(aten.addr.default, shared(5), tokens(T), shared(5)), Split(0)),
        (lambda: ask(aten.linear.default, tokens(3, T, 8), shared(5, 8), shared(5)), Split(1)),
        (lambda: ask(aten.matmul.default, tokens(T, 3, 8), shared(8, 5)), Split(0)),
        (lambda: ask(aten.matmul.default, shared(5, 8), tokens(T, 8, 3)), Split(0)),
        (lambda: ask(aten.matmul.default, tokens(3, T, 2, 8), tokens(T, 8, 5)), Split(1)),
        (lambda: ask(aten.matmul.default, tokens(T, 8), shared(8)), Split(0)),
        (lambda: ask(aten.matmul.default, shared(8), local(8, 5, order="sort")), Local()),
        (lambda: ask(SOLVE, tokens(3, T, 5, 5), tokens(T, 5, 8), upper=True), Split(1)),
        (lambda: ask(SOLVE, shared(5, 5), tokens(T, 5, 8), upper=True), Split(0)),
        (lambda: ask(SOLVE, local(3 * T, 5, 5, order="sort"), shared(5, 8), upper=True), Local("sort")),
        (lambda: ask(aten._scaled_mm.default, tokens(T, 8), shared(8, 5), tokens(T, 1), shared(1, 5)), Split(0)),
        (lambda: ask(aten._scaled_mm.default, tokens(T, 8), shared(8, 5), shared(), shared(), shared(5)), Split(0)),
        (lambda: ask(aten._weight_int8pack_mm.default, ROWS, shared(5, 8), shared(5)), Local("sort")),
        (lambda: ask(aten._grouped_mm.default, ROWS, shared(5, 8, 3), OFFSETS), Local("sort")),
        (lambda: ask(GROUPED, ROWS, shared(5, 8, 3), offs=OFFSETS), Local("sort")),
        (lambda: ask(aten._grouped_mm.default, tokens(5, T, 8), shared(5, 8, 3)), Split(1)),
        (lambda: ask(aten.convolution.default, tokens(T, 8, 9), shared(5, 8, 3), None, [1], [0]), Split(0)),
        (lambda: ask(aten.convolution.default, local(3 * T, 8, 9, order="sort"), shared(5, 8, 3), None), Local("sort")),
    ],
)
def test_tokens_follow(place, expected):
    assert place() == expected


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda: ask(aten.mm.default, tokens(8, T), tokens(T, 8)), r"sums over the tokens \(k of mk,kn->mn\)"),
        (lambda: ask(aten.mm.default, tokens(8, T), shared(T, 5)), r"sums over the tokens \(k of mk,kn->mn\)"),
        (lambda: ask(aten.mm.default, tokens(T, 8), tokens(8, T)), "tokens in different dims of mk,kn->mn"),
        (lambda: ask(aten.bmm.default, tokens(T, 5, 8), shared(T, 8, 3)), "has the token dim .* but not the tokens"),
        (lambda: ask(aten.bmm.default, tokens(T, 5, 8), tokens(2 * T, 8, 3)), "has the token dim"),
        (lambda: ask(aten.dot.default, tokens(T), tokens(T)), "sums over the tokens"),
        (lambda: ask(aten.mm.default, local(8, 3 * T), shared(3 * T, 5)), "sums over rows of a microbatch"),
        (lambda: ask(aten.mm.default, local(8, 3 * T), local(3 * T, 5)), "sums over rows of a microbatch"),
        (lambda: ask(aten.mm.default, ROWS, tokens(8, T)), "multiplies tokens by rows of a microbatch"),
        (lambda: ask(aten.mm.default, ROWS, shared(8, T)), r"value \[8, T\] of all tokens by a microbatch's own"),
        (lambda: ask(aten.addmm.default, shared(T, 5), tokens(T, 8), shared(8, 5)), "without tokens has size T"),
        (lambda: ask(aten.addmm.default, tokens(T), tokens(T, 8), shared(8, T)), r"in different dims \[0, 1\]"),
        (lambda: ask(aten.addmm.default, shared(5), tokens(T, 8), shared(8, 5), alpha=count(T)), "number of tokens"),
        (lambda: ask(aten.addbmm.default, shared(5), tokens(T, 3, 8), tokens(T, 8, 5)), "sums over the tokens"),
        (lambda: ask(aten._scaled_mm.default, tokens(T, 8), shared(8, 5), shared(T, 1), shared(1, 5)), "has size T"),
        (lambda: ask(aten._weight_int8pack_mm.default, tokens(8, T), shared(5, 8), shared(5)), "sums over the tokens"),
        (lambda: ask(aten._grouped_mm.default, tokens(T, 8), shared(5, 8, 3), OFFSETS), "grouped over all tokens"),
        (lambda: ask(aten._grouped_mm.default, ROWS, shared(5, 8, 3), shared(5)), "either its rows or their groups"),
        (lambda: ask(aten._grouped_mm.default, shared(9, 8), shared(5, 8, 3), OFFSETS), "either its rows"),
        (lambda: ask(aten._grouped_mm.default, local(8, 3 * T), local(3 * T, 8), OFFSETS), "its weight carries tokens"),
        (lambda: ask(aten._grouped_mm.default, local(8, 3 * T), shared(3 * T, 8), OFFSETS), "sums over rows"),
        (lambda: ask(SOLVE, shared(5, 5), tokens(5, T), upper=True), "equations along the token dim 1"),
        (lambda: ask(SOLVE, shared(T, 5, 5), tokens(T, 5, 8), upper=True), "without tokens has size T"),
        (lambda: ask(SOLVE, shared(5, 5), local(5, 3 * T), upper=True), "equations along rows of a microbatch"),
        (lambda: ask(aten.convolution.default, tokens(3, 8, T), shared(5, 8, 3), None), "along the token dim 2"),
        (lambda: ask(aten.convolution.default, tokens(T, 9), shared(5, 8, 3), None), "along the token dim 0"),
        (lambda: ask(aten.convolution.default, shared(3, 8, 9), tokens(T, 8, 3), None), "its weight carries tokens"),
        (lambda: ask(aten.convolution.default, local(3, 8, 3 * T), shared(5, 8, 3), None), "adds up rows"),
    ],
)
def test_says_why_not(call, reason):
    with pytest.raises(CannotSplit, match=reason):
        call()


def r(*sizes):
    return torch.rand(sizes, dtype=torch.float64)


CONV = ([1], [1], [1], False, [0], 1)


@pytest.mark.parametrize(
    "call",
    [
        (aten.mm.default, r(7, 5), r(5, 3)),
        (aten.mm.default, r(5, 2), r(2, 14)),
        (aten.mm.default, Along(r(7, 5), 0), Whole(r(5, 7))),
        (aten.bmm.default, r(7, 5, 2), r(7, 2, 3)),
        (aten.bmm.default, r(3, 7, 2), r(3, 2, 5)),
        (aten.addmm.default, r(3), r(7, 5), r(5, 3)),
        (aten.addmm.default, r(7, 1), r(7, 5), r(5, 3)),
        (aten.baddbmm.default, r(3, 1, 5), r(3, 7, 2), r(3, 2, 5)),
        (aten.addbmm.default, r(1, 5), r(3, 7, 2), r(3, 2, 5)),
        (aten.mv.default, r(7, 5), r(5)),
        (aten.addmv.default, r(1), r(7, 5), r(5)),
        (aten.addr.default, r(5), r(7), r(5)),
        (aten.linear.default, r(3, 7, 5), r(2, 5), r(2)),
        (aten.matmul.default, r(7, 3, 5), r(5, 2)),
        (aten.matmul.default, r(5, 3), r(7, 3, 2)),
        (aten.matmul.default, r(3, 7, 2, 5), r(7, 5, 3)),
        (aten.matmul.default, r(7, 5), r(5)),
        (aten.convolution.default, r(7, 3, 9), r(5, 3, 2), r(5), *CONV),
    ],
    ids=lambda call: str(call[0]),
)
def test_the_claim_is_true(call):
    assert isinstance(claim(*call), Split)


def test_equations_are_solved_for_each_token():
    triangles = r(7, 5, 5) + 5 * torch.eye(5, dtype=torch.float64)
    assert claim(SOLVE, triangles.triu(), r(3, 7, 5, 2), upper=True) == Split(1)
    assert claim(SOLVE, triangles[0].triu(), r(7, 5, 2), upper=True) == Split(0)
