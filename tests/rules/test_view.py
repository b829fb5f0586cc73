from __future__ import annotations

import itertools
import math

import pytest
import sympy
import torch

from dbo_compile.errors import CannotSplit
from dbo_compile.ir.tokens import TOKENS as T
from dbo_compile.ir.tokens import Local, Number, Shared, Split
from tests.rules.truth import NUM_TOKENS, PARTS, Along, ask, claim, count, local, shared, tokens

aten = torch.ops.aten

S, U = (sympy.Symbol(name, integer=True, positive=True) for name in "su")
OWN = Number(U, Local(position=True))
ROWS = local(3 * T, 8, order="sort")
BLOCKS = Local("3 blocks of all tokens")
PERM = local(3 * T, order="sort", position=True, inverse=True)


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        (lambda: ask(aten.view.default, tokens(T, 5, 8), [count(5 * T), 8]), Split(0)),
        (lambda: ask(aten.view.default, tokens(5 * T, 8), [count(T), 5, 2, 4]), Split(0)),
        (lambda: ask(aten.view.default, tokens(T, S, 8), [-1, 8]), Split(0)),
        (lambda: ask(aten.view.default, tokens(S * T, 8), [count(T), Number(S, Shared()), 8]), Split(0)),
        (lambda: ask(aten.view.default, tokens(3, T, 8), [1, 3, count(T), -1]), Split(2)),
        (lambda: ask(aten.view.default, tokens(3, T, 8), [3, count(8 * T)]), Split(1)),
        (lambda: ask(aten.view.default, tokens(2 * T, position=True), [count(2 * T), 1]), Split(0, position=True)),
        (lambda: ask(aten.view.default, tokens(2 * T, position=True), [count(T), 2]), Split(0)),
        (lambda: ask(aten.view.default, PERM, [count(3 * T), 1]), PERM.place),
        (lambda: ask(aten.view.default, ROWS, [-1, 2, 4]), ROWS.place),
        (lambda: ask(aten.view.default, PERM, [count(T), 3]), Local(position=True)),
        (lambda: ask(aten.view.default, local(U, 8), [3, -1, 8]), Local()),
        (lambda: ask(aten.flatten.using_ints, tokens(3, T, 5, 8), 1, 2), Split(1)),
        (lambda: ask(aten.unflatten.int, tokens(3, 5 * T, 8), 1, [count(T), 5]), Split(1)),
        (lambda: ask(aten.expand.default, tokens(T, 1, 8), [5, -1, 3, 8]), Split(1)),
        (lambda: ask(aten.expand.default, tokens(T, 1, position=True), [count(T), 3]), Split(0, position=True)),
        (lambda: ask(aten.expand.default, shared(1, 8), [count(3 * T), 8]), Split(0)),
        (lambda: ask(aten.expand.default, shared(8), [3, count(T), -1]), Split(1)),
        (lambda: ask(aten.expand.default, shared(1, 8), [OWN, 8]), Local()),
        (lambda: ask(aten.expand.default, local(3 * T, 1, order="sort"), [-1, 8]), Local("sort")),
        (lambda: ask(aten.expand.default, local(1, 8, order="sort"), [6, 8]), Local()),
        (lambda: ask(aten.view.default, tokens(3, T, 8), [count(3 * T), 8]), BLOCKS),
        (lambda: ask(aten.view.default, tokens(1, 3, 5 * T), [-1]), BLOCKS),
        (lambda: ask(aten.view.default, local(3 * T, 8, order=BLOCKS.order), [3, count(T), 8]), Split(1)),
        (lambda: ask(aten.view.default, local(15 * T, 8, order=BLOCKS.order), [1, 3, -1, 5, 8]), Local()),
        (lambda: ask(aten.view.default, local(15 * T, 8, order=BLOCKS.order), [1, 3, -1, 8]), Split(2)),
        (lambda: ask(aten.view.default, local(6 * T, order=BLOCKS.order), [2, -1]), Local()),
        (lambda: ask(aten.repeat.default, tokens(5 * T, 8), [3, 1]), BLOCKS),
        (lambda: ask(aten.repeat.default, tokens(3, T), [2, 5, 1]), Split(2)),
        (lambda: ask(aten.repeat.default, shared(3, 8), [count(T), 1]), Split(0)),
        (lambda: ask(aten.repeat.default, ROWS, [1, 2]), Local("sort")),
        (lambda: ask(aten.repeat.default, ROWS, [2, 1]), Local()),
        (lambda: ask(aten.repeat_interleave.self_int, tokens(3, T), 5, 1), Split(1)),
        (lambda: ask(aten.repeat_interleave.self_int, tokens(T, position=True), 5), Split(0)),
        (lambda: ask(aten.repeat_interleave.self_int, tokens(T, 3, position=True), 5, 1), Split(0, position=True)),
        (lambda: ask(aten.permute.default, tokens(T, 3, 8), [2, 0, 1]), Split(1)),
        (lambda: ask(aten.permute.default, tokens(3, 8, T), [-2, -1, -3]), Split(1)),
        (lambda: ask(aten.permute.default, local(3 * T, 5, 8, order="sort"), [0, 2, 1]), Local("sort")),
        (lambda: ask(aten.permute.default, local(3 * T, 5, 8, order="sort"), [2, 0, 1]), Local()),
        (lambda: ask(aten.transpose.int, tokens(3, T, 5, 8), -3, 3), Split(3)),
        (lambda: ask(aten.t.default, tokens(T, 8)), Split(1)),
        (lambda: ask(aten.t.default, PERM), PERM.place),
        (lambda: ask(aten.movedim.int, tokens(3, T, 5, 8), 3, 0), Split(2)),
        (lambda: ask(aten.movedim.intlist, tokens(3, T, 5, 8), [1, 0], [3, 1]), Split(3)),
        (lambda: ask(aten.unsqueeze.default, tokens(3, T, 8), 1), Split(2)),
        (lambda: ask(aten.unsqueeze.default, tokens(3, T, 8), -1), Split(1)),
        (lambda: ask(aten.unsqueeze.default, PERM, -1), PERM.place),
        (lambda: ask(aten.unsqueeze.default, PERM, 0), Local(position=True)),
        (lambda: ask(aten.squeeze.dim, tokens(1, T, 8), 0), Split(0)),
        (lambda: ask(aten.squeeze.dims, tokens(1, T, 1, 8), [2, 3]), Split(1)),
        (lambda: ask(aten.squeeze.default, tokens(1, 3 * T, 1)), Split(0)),
        (lambda: ask(aten.view_as_complex.default, tokens(3, T, 8, 2)), Split(1)),
        (lambda: ask(aten.view_as_real.default, tokens(3, T)), Split(1)),
        (lambda: ask(aten.diagonal.default, tokens(5, T, 3), 1, 0, 2), Split(0)),
        (lambda: ask(aten.unfold.default, tokens(T, 9, 8), 1, 4, 2), Split(0)),
        (lambda: ask(aten.view.dtype, tokens(3, T), torch.int32), Split(1)),
        (lambda: ask(aten.view.dtype, tokens(T, 8), torch.bfloat16), Split(0)),
    ],
)
def test_tokens_follow(place, expected):
    assert place() == expected


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda: ask(aten.view.default, tokens(3, T, position=True), [count(3 * T)]), "merges or cuts the token dim 1"),
        (lambda: ask(aten.view.default, tokens(S, T), [-1]), "merges or cuts the token dim 1"),
        (lambda: ask(aten.view.default, tokens(T, 8), [2, -1]), "merges or cuts the token dim 0"),
        (lambda: ask(aten.view.default, tokens(2 * T, 8), [2, count(T), 8]), "merges or cuts the token dim 0"),
        (lambda: ask(aten.view.default, tokens(3 * T), [3, count(T)]), "merges or cuts the token dim 0"),
        (lambda: ask(aten.view.default, tokens(T, T, dim=0), [count(T), 1, count(T)]), "is not the token dim a size"),
        (lambda: ask(aten.view.default, shared(T, 8), [count(T), 2, 4]), "is not the token dim a size"),
        (lambda: ask(aten.view.default, tokens(T, 8), [OWN, 8]), "is not the token dim a size"),
        (lambda: ask(aten.expand.default, tokens(T, 1), [count(T), count(T)]), "is not the token dim a size"),
        (lambda: ask(aten.expand.default, shared(T, 1), [count(T), 8]), "is not the token dim a size"),
        (lambda: ask(aten.expand.default, shared(1, 1), [count(T), count(T)]), "no single dim"),
        (lambda: ask(aten.repeat.default, tokens(T, position=True), [3]), "repeats the token dim 0 as a whole"),
        (lambda: ask(aten.repeat.default, tokens(T, 8), [3, 2]), "repeats the token dim 0 as a whole"),
        (lambda: ask(aten.repeat.default, tokens(T, 8), [1, count(T)]), "is not the token dim a size"),
        (lambda: ask(aten.repeat.default, shared(T, 8), [count(T), 1]), "is not the token dim a size"),
        (lambda: ask(aten.repeat_interleave.self_int, tokens(3, T), 5), "flattens dims before the token dim 1"),
        (lambda: ask(aten.repeat_interleave.self_int, shared(3), count(T)), "computes with the number of tokens"),
        (lambda: ask(aten.squeeze.default, tokens(T, 1)), "drops dim 0 of size T where that is 1"),
        (lambda: ask(aten.squeeze.dim, local(U, 1), 0), "drops dim 0 of size u where that is 1"),
        (lambda: ask(aten.diagonal.default, tokens(T, 8)), "takes some of the tokens, which are in dim 0"),
        (lambda: ask(aten.unfold.default, tokens(T, 8), 0, 4, 2), "takes some of the tokens, which are in dim 0"),
        (lambda: ask(aten.view.dtype, tokens(3, T), torch.int64), "takes some of the tokens, which are in dim 1"),
    ],
)
def test_says_why_not(call, reason):
    with pytest.raises(CannotSplit, match=reason):
        call()


def factorizations(number, max_dims):
    if max_dims == 1:
        return [(number,)]
    divisors = [d for d in range(1, number + 1) if number % d == 0]
    return [(d, *rest) for d in divisors for rest in factorizations(number // d, max_dims - 1)]


def has_token_dim(x, dim, new):
    """Whether a view keeps tokens apart, found by trying: rows of the parts are rows of the whole in one dim."""
    k = x.shape[dim] // NUM_TOKENS
    for d, size in enumerate(new):
        parts = list(x.split([k * n for n in PARTS[2]], dim))
        shapes = [(*new[:d], size // NUM_TOKENS * n, *new[d + 1 :]) for n in PARTS[2]]
        if size % NUM_TOKENS == 0 and all(math.prod(s) == p.numel() for s, p in zip(shapes, parts, strict=True)):
            viewed = torch.cat([p.reshape(s) for s, p in zip(shapes, parts, strict=True)], d)
            if viewed.equal(x.reshape(new)):
                return True
    return False


@pytest.mark.parametrize(
    "sizes", [*itertools.permutations((7, 2, 3)), (14, 3), (3, 14), (2, 21), (42,), (1, 7, 6), (6, 1, 7)], ids=str
)
def test_a_view_splits_exactly_where_it_keeps_tokens_apart(sizes):
    x = torch.arange(42.0).view(sizes)
    (dim,) = [d for d, size in enumerate(sizes) if size % NUM_TOKENS == 0]
    for new in factorizations(42, 4):
        assert isinstance(claim(aten.view.default, x, list(new)), Split) == has_token_dim(x, dim, new), new
    for at, new in itertools.product(range(3), factorizations(42, 3)):
        inferred = [-1 if d == at else size for d, size in enumerate(new)]
        assert isinstance(claim(aten.view.default, x, inferred), Split) == has_token_dim(x, dim, new), inferred


R = torch.rand


@pytest.mark.parametrize(
    "call",
    [
        (aten.view.default, Along(torch.arange(14), 0, position=True), [14, 1]),
        (aten.flatten.using_ints, R(3, 7, 5, 2), 1, 2),
        (aten.unflatten.int, R(3, 14, 5), 1, [7, 2]),
        (aten.expand.default, R(7, 1, 3), [5, -1, 2, 3]),
        (aten.expand.default, R(1, 3), [14, 3]),
        (aten.expand.default, R(3), [14, 3]),
        (aten.expand.default, Along(torch.arange(14).view(14, 1), 0, position=True), [14, 3]),
        (aten.repeat.default, R(3, 7), [2, 5, 1]),
        (aten.repeat.default, R(3, 2), [14, 1]),
        (aten.repeat.default, R(3, 2), [2, 1, 7]),
        (aten.repeat_interleave.self_int, R(3, 7), 5, 1),
        (aten.repeat_interleave.self_int, R(7, 3), 2),
        (aten.repeat_interleave.self_int, R(7, 3), 2, 1),
        *((aten.permute.default, R(2, 7, 3, 5), list(order)) for order in itertools.permutations(range(4))),
        *((aten.transpose.int, R(2, 7, 3), *dims) for dims in itertools.product(range(-3, 3), repeat=2)),
        *((aten.movedim.int, R(2, 7, 3, 5), *dims) for dims in itertools.product(range(-4, 4), repeat=2)),
        *((aten.movedim.intlist, R(2, 7, 3, 5), [1, -1], list(to)) for to in itertools.permutations(range(4), 2)),
        *((aten.unsqueeze.default, R(2, 7, 3), dim) for dim in range(-4, 4)),
        *((aten.squeeze.dim, R(1, 7, 1, 3), dim) for dim in (0, 2, 3, -1, -2, -4)),
        (aten.squeeze.dims, R(1, 7, 1, 3), [0, 2]),
        (aten.squeeze.default, R(1, 14, 1, 3)),
        (aten.view_as_complex.default, R(3, 7, 5, 2)),
        (aten.view_as_real.default, torch.randn(3, 7, dtype=torch.complex64)),
        (aten.diagonal.default, R(5, 7, 3), 1, 0, 2),
        (aten.diagonal.default, R(5, 3, 7), -2),
        (aten.unfold.default, R(7, 9, 3), 1, 4, 2),
        (aten.view.dtype, R(3, 7), torch.int32),
        (aten.view.dtype, R(7, 8), torch.int64),
        (aten.view.dtype, R(7, 3), torch.int16),
    ],
    ids=lambda call: f"{call[0]}{[*call[2:]]}",
)
def test_the_claim_is_true(call):
    assert isinstance(claim(*call), Split)
