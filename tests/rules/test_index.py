from __future__ import annotations

import pytest
import sympy
import torch

from dbo_compile.errors import CannotSplit
from dbo_compile.ir.tokens import TOKENS as T
from dbo_compile.ir.tokens import Local, Ruling, Split
from dbo_compile.rules import RULES
from dbo_compile.rules.rows import RETURNED
from tests.rules.flow import Flow, Rows
from tests.rules.truth import NUM_TOKENS, PARTS, Along, Whole, ask, claim, local, shared, tokens

aten = torch.ops.aten

INT, BOOL = torch.int64, torch.bool
U = sympy.Symbol("u", integer=True, nonnegative=True)
NUMBERED = Local(position=True)
HIDDEN = tokens(T, 4)
ROWS = local(3 * T, 4, order="by_expert")
COUNTS = local(5, position=True, dtype=INT)
PERM = local(3 * T, dtype=INT, order="by_expert", position=True)
INVERSE = local(3 * T, dtype=INT, order="by_expert", position=True, inverse=True)
ANYWHERE = "may belong to another microbatch"
MIXES = "it mixes rows in the order of the tokens with rows in an order of their own"

TABLE = torch.randn(5, 6, 3, dtype=torch.float64)
X = torch.randn(5, NUM_TOKENS, 3, 2, dtype=torch.float64)


def numbers(*shape, below):
    return torch.randint(below, shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("source", "indices", "expected"),
    [
        (TABLE, [numbers(NUM_TOKENS, below=5)], Split(0)),
        (TABLE, [numbers(2, NUM_TOKENS, below=5)], Split(1)),
        (TABLE, [None, numbers(2, NUM_TOKENS, below=6)], Split(2)),
        (TABLE, [numbers(NUM_TOKENS, below=5), numbers(NUM_TOKENS, below=6)], Split(0)),
        (TABLE, [numbers(NUM_TOKENS, 1, below=5), numbers(2, below=6)], Split(0)),
        (TABLE, [numbers(NUM_TOKENS, below=5), None, numbers(NUM_TOKENS, below=3)], Split(0)),
        (TABLE, [None, numbers(NUM_TOKENS, below=6), numbers(1, below=3)], Split(1)),
        (X[:, :4], [None, numbers(2, NUM_TOKENS, below=4), None, numbers(2, NUM_TOKENS, below=2)], Split(1)),
        (TABLE, [numbers(2, 1, below=5), None, numbers(2, NUM_TOKENS, below=3)], Split(1)),
        (TABLE, [numbers(NUM_TOKENS, below=5), Whole(numbers(NUM_TOKENS, below=6))], "size T in the token dim 0"),
        (TABLE, [numbers(NUM_TOKENS, 1, below=5), numbers(NUM_TOKENS, below=6)], "carry tokens in different dims"),
        (TABLE, [numbers(NUM_TOKENS, below=5), numbers(3 * NUM_TOKENS, below=6)], "different numbers of rows"),
        (Whole(torch.randn(NUM_TOKENS, 3)), [Along(torch.arange(NUM_TOKENS), 0, position=True)], Split(0)),
        (X, [numbers(4, below=5)], Split(1)),
        (X, [numbers(4, 2, below=5)], Split(2)),
        (X, [None, None, numbers(4, 2, below=3)], Split(1)),
        (X, [None, None, numbers(below=3)], Split(1)),
        (X, [numbers(4, below=5), None, numbers(4, below=3)], Split(1)),
        (X, [None, None, numbers(4, 9, below=3), numbers(9, below=2)], Split(1)),
        (X, [numbers(NUM_TOKENS, below=5)], "its numbers carry tokens, and so does dim 1 of what it reads"),
        (X, [None, numbers(NUM_TOKENS, below=7)], f"it reads rows of the token dim 1 that {ANYWHERE}"),
        (X, [None, numbers(4, below=7)], f"it reads rows of the token dim 1 that {ANYWHERE}"),
    ],
)
def test_tokens_follow_advanced_indexing(source, indices, expected):
    place = claim(aten.index.Tensor, source, indices)
    assert place == expected if isinstance(expected, Split) else expected in place


@pytest.mark.parametrize(
    ("op", "args", "expected"),
    [
        (aten.embedding.default, (TABLE[0], numbers(3, NUM_TOKENS, below=6)), Split(1)),
        (aten.index_select.default, (TABLE, -2, numbers(NUM_TOKENS, below=6)), Split(1)),
        (aten.index_select.default, (X, 2, numbers(4, below=3)), Split(1)),
        (aten.index_select.default, (X, 0, numbers(below=5)), Split(1)),
        (aten.index_select.default, (X, -3, numbers(4, below=7)), f"it reads rows of the token dim 1 that {ANYWHERE}"),
        (aten.take.default, (TABLE, numbers(2, NUM_TOKENS, below=90)), Split(1)),
        (aten.take.default, (X, numbers(4, below=90)), "it reads elements by numbers that count through all tokens"),
        (aten.gather.default, (X, 0, numbers(4, NUM_TOKENS, 2, 1, below=5)), Split(1)),
        (aten.gather.default, (X, -2, numbers(4, NUM_TOKENS, 9, 2, below=3)), Split(1)),
        (
            aten.gather.default,
            (X, 0, Whole(numbers(4, NUM_TOKENS, 2, 1, below=5))),
            "its numbers do not have the tokens",
        ),
        (
            aten.gather.default,
            (X, 1, numbers(4, NUM_TOKENS, 2, 1, below=7)),
            f"it reads rows of the token dim 1 that {ANYWHERE}",
        ),
        (aten.gather.default, (TABLE[0], 0, numbers(NUM_TOKENS, 2, below=6)), Split(0)),
        (
            aten.gather.default,
            (Whole(torch.randn(NUM_TOKENS, 5)), 1, numbers(NUM_TOKENS, 2, below=5)),
            "it reads a row of what all tokens share for each token, by its place among all tokens",
        ),
    ],
)
def test_tokens_follow_the_numbers_that_they_are_read_by(op, args, expected):
    place = claim(op, *args)
    assert place == expected if isinstance(expected, Split) else expected in place


@pytest.fixture(params=PARTS, ids=str)
def f(request):
    return Flow(request.param)


def test_rows_of_tokens_are_read_by_row_numbers_inside_the_microbatch(f):
    x = f.tokens(torch.randn(NUM_TOKENS, 5, 3))
    last = f.tokens(numbers(NUM_TOKENS, below=5))
    row = f(aten.arange.default, Rows())
    one = f(aten.view.default, row, [-1, 1])
    keys = f.shared(numbers(1, 4, below=5))
    reads = [
        f(aten.index.Tensor, x, [row]),
        f(aten.index.Tensor, x, [row, last]),
        f(aten.index.Tensor, x, [one, keys]),
        f(aten.index.Tensor, x, [one, None, f.shared(numbers(1, 4, below=3))]),
        f(aten.index.Tensor, f(aten.permute.default, x, [1, 0, 2]), [None, one]),
        f(aten.index.Tensor, f(aten.permute.default, x, [1, 0, 2]), [f.shared(numbers(2, 1, below=5)), row]),
        f(aten.index_select.default, x, 0, row),
        f(aten.gather.default, last, 0, row),
    ]
    assert [r.place for r in reads] == [Split(d) for d in (0, 0, 0, 0, 1, 1, 0, 0)]


def test_numbers_that_are_read_by_an_arrangement_are_those_inside_the_microbatch(f):
    """`arange` arranged by a permutation is that permutation."""
    perm = f(aten.argsort.default, f.tokens(numbers(3 * NUM_TOKENS, below=5)))
    again = f(aten.index.Tensor, f(aten.arange.default, Rows(3)), [perm])
    assert again.place == perm.place
    assert [p.tolist() for p in again.parts] == [p.tolist() for p in perm.parts]


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        (lambda: ask(aten.index.Tensor, HIDDEN, [PERM]), Local("by_expert")),
        (lambda: ask(aten.index.Tensor, tokens(3 * T), [PERM]), Local("by_expert")),
        (lambda: ask(aten.index.Tensor, tokens(T, 3), [PERM, PERM]), Local("by_expert")),
        (lambda: ask(aten.index.Tensor, tokens(T, 3), [PERM, local(3 * T, dtype=INT)]), Local()),
        (lambda: ask(aten.index.Tensor, tokens(T, 3), [PERM, shared(dtype=INT)]), Local("by_expert")),
        (lambda: ask(aten.index.Tensor, tokens(2 * T, 4), [PERM]), Local()),
        (lambda: ask(aten.index.Tensor, tokens(4, T), [None, PERM]), Local()),
        (lambda: ask(aten.index.Tensor, HIDDEN, [INVERSE]), Local()),
        (lambda: ask(aten.index.Tensor, HIDDEN, [local(U, order="hits", position=True, dtype=INT)]), Local("hits")),
        (lambda: ask(aten.index.Tensor, tokens(T, dtype=INT), [PERM]), Local("by_expert")),
        (lambda: ask(aten.gather.default, HIDDEN, 0, local(3 * T, 4, order="s", position=True)), Local("s")),
        (lambda: ask(aten.index.Tensor, HIDDEN, [tokens(T, dtype=BOOL)]), Local()),
        (lambda: ask(aten.index.Tensor, tokens(5, T, 4), [None, tokens(T, dtype=BOOL)]), Local()),
        (lambda: ask(aten.masked_select.default, tokens(T, 3, dtype=INT), tokens(T, 1, dtype=BOOL)), Local()),
        (lambda: ask(aten.index.Tensor, shared(5, 4), [local(3 * T, order="by_expert")]), Local("by_expert")),
        (lambda: ask(aten.index.Tensor, shared(6, 5), [None, local(3 * T, order="by_expert")]), Local()),
        (lambda: ask(aten.gather.default, shared(5), 0, local(3 * T, order="by_expert")), Local("by_expert")),
        (lambda: ask(aten.index.Tensor, COUNTS, [shared(2, dtype=INT)]), NUMBERED),
        (lambda: ask(aten.index.Tensor, COUNTS, [tokens(T, 3, dtype=INT)]), NUMBERED),
        (lambda: ask(aten.gather.default, COUNTS, 0, tokens(3 * T, dtype=INT)), NUMBERED),
        (lambda: ask(aten.index.Tensor, COUNTS, [local(3 * T, order="by_expert")]), NUMBERED),
        (lambda: ask(aten.index.Tensor, ROWS, [None, shared(2, dtype=INT)]), Local("by_expert")),
        (lambda: ask(aten.index.Tensor, local(U, dtype=INT, order="by_expert"), [shared(2, dtype=INT)]), NUMBERED),
        (lambda: ask(aten.index.Tensor, local(U, 5, 6, 2, order="s"), [None, shared(2), None, shared(2)]), Local()),
        (lambda: ask(aten.index.Tensor, ROWS, [PERM]), Local()),
        (lambda: ask(aten.index.Tensor, local(U, 4), [local(U, dtype=INT, position=True)]), Local()),
        (lambda: ask(aten.index.Tensor, ROWS, [local(3 * T, dtype=BOOL)]), Local()),
        (lambda: ask(aten.gather.default, ROWS, 1, local(3 * T, 2, order="by_expert")), Local("by_expert")),
        (lambda: ask(aten.gather.default, ROWS, 1, local(3 * T, 2, order="else")), Local()),
        (lambda: ask(aten.gather.default, ROWS, 0, local(3 * T, 4, order="by_expert")), Local()),
        (
            lambda: ask(aten.index.Tensor, local(3 * T, dtype=INT, order="by_expert", position=True), [INVERSE]),
            NUMBERED,
        ),
        (lambda: ask(aten.index.Tensor, local(U, 4), [local(U, order="s", position=True, inverse=True)]), Local()),
    ],
)
def test_rows_of_a_microbatch_s_own_are_read(place, expected):
    assert place() == expected


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda: RULES[aten.index.Tensor](ROWS, [INVERSE]), Ruling(Split(0))),
        (lambda: RULES[aten.index_select.default](ROWS, 0, INVERSE), Ruling(Split(0))),
        (lambda: RULES[aten.index.Tensor](local(U, 4), [INVERSE]), Ruling(Split(0), RETURNED)),
        (lambda: RULES[aten.index.Tensor](local(5 * T, 4, order="by_expert"), [INVERSE]), Ruling(Split(0), RETURNED)),
        (
            lambda: RULES[aten.gather.default](
                ROWS, 0, local(3 * T, 4, order="by_expert", position=True, inverse=True)
            ),
            Ruling(Split(0)),
        ),
    ],
)
def test_the_inverse_of_an_arrangement_leads_rows_back_to_tokens(call, expected):
    assert call() == expected


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda: ask(aten.index.Tensor, HIDDEN, [local(3 * T, dtype=INT)]), ANYWHERE),
        (lambda: ask(aten.index.Tensor, HIDDEN, [tokens(3 * T, position=True, dtype=INT)]), ANYWHERE),
        (lambda: ask(aten.index.Tensor, tokens(3 * T), [tokens(T, position=True, dtype=INT)]), ANYWHERE),
        (lambda: ask(aten.gather.default, tokens(T, T, dim=0), 0, tokens(4, T, dim=1, position=True)), ANYWHERE),
        (lambda: ask(aten.gather.default, tokens(2 * T, 4), 1, tokens(T, 2)), "its numbers do not have the tokens"),
        (lambda: ask(aten.index.Tensor, tokens(T, T, dim=0), [None, tokens(T, dtype=BOOL)]), "it picks by a mask"),
        (lambda: ask(aten.index.Tensor, HIDDEN, [shared(2, dtype=BOOL)]), "it picks by a mask"),
        (lambda: ask(aten.index.Tensor, shared(T, 4), [tokens(T, dtype=BOOL)]), "it picks by a mask"),
        (lambda: ask(aten.index.Tensor, ROWS, [tokens(3 * T, dtype=BOOL)]), "it picks by a mask"),
        (lambda: ask(aten.index.Tensor, HIDDEN, [tokens(T, dtype=BOOL), shared(1)]), "by a mask and by numbers"),
        (lambda: ask(aten.masked_select.default, HIDDEN, tokens(T, 4, dtype=BOOL)), "it picks single elements"),
        (
            lambda: ask(aten.index.Tensor, tokens(T, T, dim=0), [tokens(T, position=True), tokens(T, position=True)]),
            "it uses row numbers for more than finding the rows of tokens",
        ),
        (lambda: ask(aten.index.Tensor, shared(64, 4), [PERM]), "by the row numbers of a microbatch"),
        (lambda: ask(aten.index.Tensor, shared(64, 4), [INVERSE]), "by the row numbers of a microbatch"),
        (lambda: ask(aten.index.Tensor, shared(64), [COUNTS]), "by the row numbers of a microbatch"),
        (lambda: ask(aten.embedding.default, shared(64, 4), COUNTS), "by the row numbers of a microbatch"),
        (lambda: ask(aten.index.Tensor, shared(6, 4), [local(U, dtype=INT), tokens(T, dtype=INT)]), MIXES),
        (lambda: ask(aten.index.Tensor, tokens(T, 4), [PERM, tokens(3 * T, dtype=INT)]), MIXES),
        (lambda: ask(aten.index.Tensor, ROWS, [PERM, tokens(3 * T, dtype=INT)]), MIXES),
        (lambda: ask(aten.gather.default, ROWS, 1, tokens(3 * T, 2, dtype=INT)), MIXES),
        (
            lambda: ask(aten.index.Tensor, ROWS, [shared(2, dtype=INT)]),
            "it takes rows of a microbatch by their position",
        ),
        (lambda: ask(aten.gather.default, ROWS, 0, shared(2, 4)), "it takes rows of a microbatch by their position"),
        (
            lambda: ask(aten.index.Tensor, local(3 * T, 4, order="by_rank"), [INVERSE]),
            "the rows were put in order by by_rank, but are put back by by_expert",
        ),
    ],
)
def test_reading_rows_that_may_be_anywhere_is_refused(call, reason):
    with pytest.raises(CannotSplit, match=reason):
        call()
