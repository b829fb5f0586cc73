from __future__ import annotations

import pytest
import sympy
import torch

from dbo_compile.errors import CannotSplit
from dbo_compile.ir.tokens import TOKENS as T
from dbo_compile.ir.tokens import Local, Ruling, Split
from dbo_compile.rules import RULES
from dbo_compile.rules.rows import RETURNED
from dbo_compile.rules.scatter import FILLED, SHARED_BUFFER, WRITES_ALONG
from tests.rules.flow import Flow, Rows
from tests.rules.truth import NUM_TOKENS, PARTS, Along, Whole, ask, claim, local, shared, tokens

aten = torch.ops.aten

INT, BOOL = torch.int64, torch.bool
U = sympy.Symbol("u", integer=True, nonnegative=True)
NUMBERED = Local(position=True)
ROWS = local(3 * T, 4, order="by_expert")
PERM = local(3 * T, dtype=INT, order="by_expert", position=True)
INVERSE = local(3 * T, dtype=INT, order="by_expert", position=True, inverse=True)
SLOTS = local(3 * T, dtype=INT, position=True)
WIDE = local(3 * T, 4, dtype=INT, order="by_expert", position=True)
ANYWHERE = "it writes rows of the token dim {} that may belong to another microbatch"
ONE_BY_ONE = "it fills in values one after the other"

CACHE = torch.randn(NUM_TOKENS, 2, 5, 3, dtype=torch.float64)
NEW = torch.randn(NUM_TOKENS, 2, 4, 3, dtype=torch.float64)
AT = torch.tensor([3, 0, 4, 1])
GRID = torch.randn(3, NUM_TOKENS, 5, dtype=torch.float64)
PICKED = torch.randint(5, (3, NUM_TOKENS, 2), generator=torch.Generator().manual_seed(0))
MASK = torch.tensor([True, False, True, True, False, False, True])


@pytest.mark.parametrize(
    ("op", "args", "expected"),
    [
        (aten.index_put.default, (CACHE, [None, None, AT], NEW), Split(0)),
        (aten.index_put.default, (CACHE, [None, None, AT], NEW[:1, 0]), Split(0)),
        (aten.index_put.default, (CACHE, [None, None, AT], Whole(NEW)), "size T in the token dim 0"),
        (
            aten.index_put.default,
            (CACHE, [None, None, AT], torch.randn(4, NUM_TOKENS, 1, 1).double()),
            "carry tokens in different dims",
        ),
        (aten.index_put.default, (GRID, [AT % 3, None, AT], torch.randn(4, NUM_TOKENS).double(), True), Split(1)),
        (aten.index_put.default, (GRID, [None, AT], torch.tensor(0.0).double()), ANYWHERE.format(1)),
        (aten.index_put.default, (GRID, [PICKED[0, :, 0] % 3], torch.tensor(0.0).double()), "its numbers carry tokens"),
        (aten.index_put.default, (CACHE, [MASK], torch.tensor(0.0).double()), Split(0)),
        (aten.index_put.default, (GRID, [None, MASK], torch.randn(5).double()), Split(1)),
        (aten.index_put.default, (GRID, [None, Whole(MASK)], torch.randn(5).double()), "it picks by a mask"),
        (aten.index_put.default, (GRID, [None, MASK], torch.randn(4, 5).double()), ONE_BY_ONE),
        (aten.index_put_.default, (CACHE, [None, None, AT], NEW), Split(0)),
        (aten.index_copy.default, (CACHE, 2, AT, NEW), Split(0)),
        (aten.index_copy_.default, (CACHE, -2, AT, NEW), Split(0)),
        (aten.index_add.default, (CACHE, 2, AT, NEW), Split(0)),
        (aten.index_fill.int_Scalar, (CACHE, 2, AT, 0.5), Split(0)),
        (aten.index_fill.int_Tensor, (CACHE, 2, AT, torch.tensor(0.5).double()), Split(0)),
        (aten.index_fill.int_Scalar, (CACHE, 0, AT, 0.5), ANYWHERE.format(0)),
        (aten.index_reduce.default, (CACHE, 2, AT, NEW, "amax"), Split(0)),
        (aten.scatter.value, (GRID, 2, PICKED, 1.5), Split(1)),
        (aten.scatter.src, (GRID, -1, PICKED, torch.randn(3, NUM_TOKENS, 2).double()), Split(1)),
        (aten.scatter.src, (GRID, 2, PICKED, Whole(torch.randn(3, NUM_TOKENS, 2).double())), WRITES_ALONG),
        (aten.scatter.value, (GRID, 2, Whole(PICKED), 1.5), WRITES_ALONG),
        (aten.scatter.value, (GRID, 1, PICKED, 1.5), ANYWHERE.format(1)),
        (aten.scatter_add.default, (GRID, 2, PICKED, torch.randn(3, NUM_TOKENS, 2).double()), Split(1)),
        (aten.scatter_reduce.two, (GRID, 2, PICKED, torch.randn(3, NUM_TOKENS, 2).double(), "amax"), Split(1)),
        (aten.scatter_.value, (GRID, 2, PICKED, 1.5), Split(1)),
        (aten.masked_scatter.default, (CACHE, Along(CACHE > 0, 0), torch.randn(900).double()), ONE_BY_ONE),
        (aten.index_put.default, (torch.zeros(64, 3), [PICKED[0, :, 0]], torch.randn(NUM_TOKENS, 3)), SHARED_BUFFER),
        (aten.index_put_.default, (torch.zeros(64, 3), [PICKED[0, :, 0]], torch.randn(NUM_TOKENS, 3)), SHARED_BUFFER),
        (aten.scatter_add.default, (torch.zeros(64), 0, PICKED[0, :, 0], torch.randn(NUM_TOKENS)), SHARED_BUFFER),
    ],
)
def test_tokens_stay_where_what_is_written_is_beside_them(op, args, expected):
    place = claim(op, *args)
    assert place == expected if isinstance(expected, Split) else expected in place


@pytest.fixture(params=PARTS, ids=str)
def f(request):
    return Flow(request.param)


def test_rows_of_tokens_are_written_by_row_numbers_inside_the_microbatch(f):
    mask = f.tokens(torch.zeros(NUM_TOKENS, 5, dtype=torch.int64))
    row = f(aten.arange.default, Rows())
    one = f(aten.view.default, row, [-1, 1])
    picked, values = f.tokens(PICKED[0]), f.tokens(PICKED[1])
    writes = [
        f(aten.index_put.default, mask, [row, f.tokens(PICKED[0, :, 1])], f.shared(torch.tensor(8))),
        f(aten.index_put.default, mask, [one, picked], values),
        f(aten.index_put.default, f(aten.permute.default, mask, [1, 0]), [picked, one], values),
        f(aten.index_put.default, mask, [row], f.tokens(PICKED[1, :, :1])),
    ]
    assert [w.place for w in writes] == [Split(0), Split(0), Split(1), Split(0)]


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (
            lambda: RULES[aten.index_put.default](local(3 * T), [PERM], tokens(3 * T, position=True)),
            Ruling(INVERSE.place, local_positions=True),
        ),
        (
            lambda: RULES[aten.index_put_.default](local(3 * T), [PERM], tokens(3 * T, position=True)),
            Ruling(INVERSE.place, local_positions=True),
        ),
        (
            lambda: RULES[aten.scatter.src](tokens(3 * T), 0, PERM, tokens(3 * T, position=True)),
            Ruling(INVERSE.place, local_positions=True),
        ),
        (
            lambda: RULES[aten.index_copy.default](tokens(3 * T), 0, PERM, tokens(3 * T, position=True)),
            Ruling(INVERSE.place, local_positions=True),
        ),
        (
            lambda: RULES[aten.index_put.default](local(3 * T), [SLOTS], tokens(3 * T, position=True)),
            Ruling(NUMBERED, local_positions=True),
        ),
        (
            lambda: RULES[aten.index_put.default](tokens(5 * T, dtype=INT), [PERM], tokens(3 * T, position=True)),
            Ruling(NUMBERED, local_positions=True),
        ),
        (
            lambda: RULES[aten.index_put.default](local(3 * T, dtype=INT), [PERM], tokens(3 * T, position=True), True),
            Ruling(NUMBERED, local_positions=True),
        ),
        (lambda: RULES[aten.index_put.default](local(3 * T), [PERM], SLOTS), Ruling(NUMBERED)),
    ],
)
def test_row_numbers_written_by_a_permutation_are_its_inverse(call, expected):
    assert call() == expected


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda: RULES[aten.index_add.default](tokens(T, 4), 0, PERM, ROWS), Ruling(Split(0))),
        (lambda: RULES[aten.index_add_.default](tokens(T, 4), 0, PERM, ROWS), Ruling(Split(0))),
        (lambda: RULES[aten.index_add.default](tokens(T, 4), 0, PERM, local(U, 4)), Ruling(Split(0), RETURNED)),
        (lambda: RULES[aten.index_put.default](tokens(T, 4), [PERM], ROWS, True), Ruling(Split(0))),
        (lambda: RULES[aten.index_put.default](tokens(3 * T, 4), [PERM], ROWS), Ruling(Split(0))),
        (lambda: RULES[aten.index_put.default](local(3 * T, 4), [PERM], ROWS), Ruling(Split(0))),
        (lambda: RULES[aten.index_put.default](local(3 * T, 4), [PERM], local(3 * T, 4)), Ruling(Split(0), RETURNED)),
        (lambda: RULES[aten.index_put.default](local(3 * T, 4), [PERM], ROWS, True), Ruling(Local())),
        (lambda: RULES[aten.scatter_add.default](tokens(T, 4), 0, WIDE, ROWS), Ruling(Split(0))),
        (
            lambda: RULES[aten.scatter_reduce.two](tokens(T, 4), 0, WIDE, local(3 * T, 4), "sum"),
            Ruling(Split(0), RETURNED),
        ),
        (lambda: RULES[aten.index_add.default](tokens(2 * T, 4), 0, PERM, ROWS), Ruling(Local())),
        (lambda: RULES[aten.index_add.default](tokens(T, 4), 0, SLOTS, ROWS), Ruling(Local())),
        (lambda: RULES[aten.index_add.default](tokens(T, 4), 0, INVERSE, ROWS), Ruling(Local())),
        (lambda: RULES[aten.index_copy.default](tokens(T, 4), 0, PERM, ROWS), Ruling(Local())),
        (
            lambda: RULES[aten.masked_scatter.default](tokens(T, 4), tokens(T, 1, dtype=BOOL), local(U)),
            Ruling(Split(0), FILLED),
        ),
        (
            lambda: RULES[aten.index_put.default](tokens(T, 4), [tokens(T, dtype=BOOL)], local(U, 4)),
            Ruling(Split(0), FILLED),
        ),
    ],
)
def test_rows_written_to_where_they_were_are_tokens_again(call, expected):
    assert call() == expected


def test_rows_picked_by_their_number_are_written_back_there():
    hits = local(U, dtype=INT, order="hits", position=True)
    done = local(U, 4, order="hits")
    assert RULES[aten.index_put.default](tokens(T, 4), [hits], done) == Ruling(Split(0))
    assert RULES[aten.index_add.default](tokens(T, 4), 0, hits, done) == Ruling(Split(0))


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        (lambda: ask(aten.index_put.default, shared(64, 4), [SLOTS], tokens(3 * T, 4)), Local()),
        (lambda: ask(aten.index_put.default, shared(64, 4), [SLOTS], ROWS), Local()),
        (lambda: ask(aten.index_copy.default, tokens(15 * T, 4), 0, SLOTS, ROWS), Local()),
        (lambda: ask(aten.index_copy.default, tokens(3 * T, 4), 0, INVERSE, tokens(3 * T, 4)), Local("by_expert")),
        (lambda: ask(aten.index_copy.default, tokens(3 * T, 4), 0, PERM, tokens(3 * T, 4)), Local()),
        (
            lambda: ask(aten.scatter_add.default, shared(5, dtype=INT), 0, tokens(3 * T), tokens(3 * T, dtype=INT)),
            NUMBERED,
        ),
        (lambda: ask(aten.scatter.value_reduce, shared(5, dtype=INT), 0, tokens(3 * T), 1, reduce="add"), NUMBERED),
        (lambda: ask(aten.index_add.default, shared(5, dtype=INT), 0, local(U), local(U, dtype=INT)), NUMBERED),
        (lambda: ask(aten.index_put.default, shared(5, dtype=INT), [shared(1)], local(position=True)), NUMBERED),
        (lambda: ask(aten.index_fill.int_Scalar, ROWS, 1, shared(2), 0), Local("by_expert")),
        (lambda: ask(aten.scatter.value, ROWS, 1, local(3 * T, 2, order="by_expert"), 1), Local("by_expert")),
        (lambda: ask(aten.scatter.value, ROWS, 1, local(3 * T, 2, order="by_rank"), 1), Local()),
        (
            lambda: ask(aten.index_put.default, ROWS, [local(3 * T, dtype=BOOL, order="by_expert")], shared()),
            Local("by_expert"),
        ),
        (lambda: ask(aten.index_put.default, ROWS, [local(3 * T, dtype=BOOL)], shared(1, 4)), Local()),
        (lambda: ask(aten.index_fill.int_Scalar, local(U, dtype=INT, order="by_expert"), 0, shared(2), 0), NUMBERED),
        (lambda: ask(aten.index_put.default, tokens(T, 4), [PERM], local(4), True), Local()),
        (lambda: ask(aten.index_put.default, tokens(T, 4), [PERM], local(1, 4), True), Local()),
        (lambda: ask(aten.index_add.default, tokens(T, position=True), 0, PERM, local(3 * T)), NUMBERED),
        (lambda: ask(aten.masked_scatter.default, ROWS, local(3 * T, 1, dtype=BOOL), local(U)), Local()),
    ],
)
def test_rows_are_arranged_in_a_buffer_of_a_microbatch_s_own(place, expected):
    assert place() == expected


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda: ask(aten.index_put_.default, shared(64, 4), [SLOTS], ROWS), SHARED_BUFFER),
        (
            lambda: ask(aten.scatter_add_.default, shared(5, dtype=INT), 0, tokens(T), tokens(T, dtype=INT)),
            SHARED_BUFFER,
        ),
        (lambda: ask(aten.index_add.default, shared(5, 4), 0, local(U), local(U, 4)), SHARED_BUFFER),
        (lambda: ask(aten.index_add.default, shared(5, 4), 0, SLOTS, ROWS), SHARED_BUFFER),
        (lambda: ask(aten.index_put.default, shared(5, 4), [local(U)], local(U, 4)), SHARED_BUFFER),
        (lambda: ask(aten.index_put.default, shared(5, 4), [shared(2)], tokens(T, 1, 4)), SHARED_BUFFER),
        (
            lambda: ask(aten.index_put_.default, tokens(15 * T, 4), [SLOTS], ROWS),
            r"it writes Local\(\) over Split\(0\)",
        ),
        (
            lambda: ask(aten.index_put.default, local(U, 4), [tokens(T)], shared(4)),
            "its numbers are those of single tokens",
        ),
        (
            lambda: ask(aten.index_put.default, ROWS, [shared(2)], shared(4)),
            "it writes over rows of a microbatch by their",
        ),
        (lambda: ask(aten.scatter.value, ROWS, 1, shared(2, 2), 1), "it writes over rows of a microbatch by their"),
        (lambda: ask(aten.index_put.default, tokens(T, 4), [local(U)], local(U, 4)), ANYWHERE.format(0)),
        (lambda: ask(aten.index_put.default, tokens(T, 4), [None, shared(2)], local(U, 2)), WRITES_ALONG),
        (
            lambda: ask(aten.index_put.default, tokens(2 * T, 4), [tokens(T, position=True)], shared(4)),
            ANYWHERE.format(0),
        ),
        (
            lambda: ask(aten.index_put.default, tokens(T), [tokens(T, position=True)], tokens(T, position=True)),
            "it uses row numbers for more than finding the rows of tokens",
        ),
        (
            lambda: ask(aten.index_add.default, tokens(T, 4), 0, PERM, local(3 * T, 4, order="by_rank")),
            "the rows were put in order by by_rank, but are put back by by_expert",
        ),
        (lambda: ask(aten.masked_scatter.default, tokens(T, 4), tokens(T, 4, dtype=BOOL), shared(9)), ONE_BY_ONE),
        (lambda: ask(aten.index_put.default, tokens(5, T), [tokens(5, T, dtype=BOOL)], local(U)), ONE_BY_ONE),
        (lambda: ask(aten.index_put.default, tokens(T, 4), [tokens(T, dtype=BOOL)], local(4)), ONE_BY_ONE),
        (lambda: ask(aten.masked_scatter.default, tokens(5, T), tokens(5, T, dtype=BOOL), local(U)), ONE_BY_ONE),
        (lambda: ask(aten.index_put.default, tokens(T, 4), [tokens(T, dtype=BOOL)], tokens(T, 4)), ONE_BY_ONE),
        (
            lambda: ask(aten.index_put.default, tokens(T, 4), [tokens(T, dtype=BOOL), shared(1)], shared()),
            "by a mask and",
        ),
    ],
)
def test_writing_what_other_microbatches_share_is_refused(call, reason):
    with pytest.raises(CannotSplit, match=reason):
        call()
