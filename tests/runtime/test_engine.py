"""The engine: how many rows each microbatch gets, what is played where none will do, what an error leaves behind."""

from __future__ import annotations

import pytest
import sympy
import torch
from torch.utils._sympy.functions import FloorDiv, Mod

from dbo_compile.errors import NotSplit
from dbo_compile.ir.tokens import TOKENS
from dbo_compile.runtime import engine as engine_module
from dbo_compile.runtime.engine import MOST_SHIFT, Engine, TokenInput
from dbo_compile.runtime.lanes import WorkLanes

LENGTH = sympy.Symbol("s7", integer=True, positive=True)


def engine(*guards, n=2, min_tokens=2, least_rows=1, inputs=("x",), symbols=None):
    """An engine whose programs tell the rows they were played with; `whole` says so."""
    return Engine(
        {m: lambda lanes, *_: (lanes.num_rows,) for m in (1, n)},
        guards,
        [TokenInput(i, 0, name) for i, name in enumerate(inputs)],
        symbols or {},
        lambda *_: ("whole",),
        num_microbatches=n,
        min_tokens=min_tokens,
        least_rows=least_rows,
    )


def multiple_of(k):
    return sympy.Eq(Mod(TOKENS, k), 0)


@pytest.mark.parametrize(
    ("n", "tokens", "rows"),
    [
        (1, 9, (9,)),
        (2, 9, (5, 4)),
        (2, 8, (4, 4)),
        (2, 2, (1, 1)),
        (3, 10, (4, 4, 2)),
        (3, 4, (1, 1, 2)),
        (4, 9, (2, 2, 2, 3)),
        (4, 13, (4, 4, 4, 1)),
    ],
)
def test_rows_are_as_even_as_can_be(n, tokens, rows):
    assert engine(n=n).rows_of(tokens) == rows


@pytest.mark.parametrize(
    ("n", "tokens", "rows"), [(2, 40, (16, 24)), (2, 16, (8, 8)), (3, 32, (8, 8, 16)), (3, 24, (8, 8, 8))]
)
def test_rows_keep_every_guard(n, tokens, rows):
    assert engine(multiple_of(8), n=n).rows_of(tokens) == rows


def test_a_guard_may_speak_of_another_symbol_of_the_call():
    found = engine(sympy.Eq(Mod(TOKENS * LENGTH, 6), 0), symbols={LENGTH: 1})
    assert found.rows_of(18, 5) == (6, 12)
    assert found.rows_of(18, 2) == (9, 9)
    assert found(torch.ones(18, 2), 5) == ((6, 12),)


def test_a_guard_that_divides_by_no_rows_does_not_hold():
    found = engine(sympy.Eq(Mod(TOKENS, FloorDiv(TOKENS, 4)), 0))
    assert found.rows_of(9) == (5, 4)
    with pytest.raises(NotSplit, match="no split of 4 tokens"):
        found.rows_of(4)


@pytest.mark.parametrize(
    ("guards", "options", "tokens", "reason"),
    [
        ((), {"min_tokens": 10}, 9, "9 tokens are fewer than min_tokens=10"),
        ((), {"n": 3, "min_tokens": 1}, 2, "2 tokens do not make 3 microbatches of at least 1"),
        ((), {"least_rows": 2}, 3, "3 tokens do not make 2 microbatches of at least 2"),
        # half of 9 tokens, rounded down, would keep it
        ((multiple_of(4),), {}, 9, r"no split of 9 tokens keeps what the graph was compiled for: Eq\(Mod\(T, 4\), 0\)"),
        ((multiple_of(2), multiple_of(16)), {}, 18, r"Mod\(T, 2\)"),
        ((multiple_of(4 * MOST_SHIFT),), {}, 12 * MOST_SHIFT, "no split of"),
    ],
)  # fmt: skip
def test_a_size_that_is_not_split_has_a_reason(guards, options, tokens, reason):
    with pytest.raises(NotSplit, match=reason):
        engine(*guards, **options).rows_of(tokens)


def test_a_split_point_is_looked_for_as_far_as_said():
    assert engine(multiple_of(MOST_SHIFT)).rows_of(3 * MOST_SHIFT) == (MOST_SHIFT, 2 * MOST_SHIFT)


def test_calls_are_counted_with_their_reasons():
    found = engine(min_tokens=5)
    played = [found(torch.ones(tokens, 2)) for tokens in (9, 4, 7, 4, 3)]
    assert played == [((5, 4),), ((4,),), ((4, 3),), ((4,),), ((3,),)]
    assert (found.calls.total, found.calls.split) == (5, 2)
    assert found.calls.declined == {
        "4 tokens are fewer than min_tokens=5": 2,
        "3 tokens are fewer than min_tokens=5": 1,
    }


def test_inputs_that_differ_in_their_tokens_are_played_as_traced_whatever_their_names():
    found = engine(inputs=("xs", "xs"))
    assert found(torch.ones(9, 2), torch.ones(9)) == ((5, 4),)
    assert found(torch.ones(9, 2), torch.ones(7)) == ("whole",)
    assert found.calls.declined == {
        "its token inputs differ in their number of tokens (xs: 9, xs: 7); see token_dims": 1
    }


def test_a_size_that_no_code_was_compiled_for_is_played_as_traced():
    found = engine(sympy.Le(TOKENS, 10))
    assert found(torch.ones(19, 2)) == ((10, 9),)
    assert found(torch.ones(21, 2)) == ("whole",)
    assert found(torch.ones(21, 2)) == ("whole",)
    assert found.calls.declined == {"no split of 21 tokens keeps what the graph was compiled for: T <= 10": 2}


def test_an_error_in_a_program_passes_through_after_its_collectives_were_finished(monkeypatch):
    made = []

    class Noted(WorkLanes):
        def __init__(self, rows):
            super().__init__(rows)
            made.append(self)

        def finish(self):
            self.events["finished"] = 1

    def broken(_lanes, *_args):
        raise KeyError("mine")

    monkeypatch.setattr(engine_module, "WorkLanes", Noted)
    found = engine()
    found.programs = {2: broken}
    with pytest.raises(KeyError, match="mine"):
        found(torch.ones(9, 2))
    assert [lanes.events for lanes in made] == [{"finished": 1}]
