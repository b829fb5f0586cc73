"""The gate: which differences are rounding, and what is left of state after it has judged."""

from __future__ import annotations

import pytest
import torch

from dbo_compile.runtime.agree import Agreement
from dbo_compile.runtime.cuts import Cut
from dbo_compile.runtime.gate import Difference, Trial, difference
from dbo_compile.runtime.rows import Guards
from dbo_compile.runtime.signature import Signature, TokenInput
from dbo_compile.runtime.ways import Programs, Ways, Whole

X = torch.arange(1.0, 36.0, dtype=torch.float64).reshape(7, 5)


def off_by(amount, *rows):
    other = X.clone()
    other[list(rows), 3] += amount
    return other


@pytest.mark.parametrize(
    ("got", "want", "bad"),
    [
        (X.clone(), X, (0, 7)),
        (off_by(1e-6), X, (0, 7)),
        (off_by(1e-3, 2, 5), X, (2, 7)),
        (off_by(float("nan"), 1), X, (1, 7)),
        (off_by(float("nan"), 1), off_by(float("nan"), 1), (0, 7)),
        (off_by(float("inf"), 1), off_by(float("inf"), 1), (0, 7)),
        (off_by(1e-3, 2).float(), X.float(), (0, 7)),  # float32 rounds sooner
        (off_by(1e-3, 2).float(), X, (7, 7)),
        (X[:6], X, (7, 7)),
        (X[:, 2] > 8, X[:, 2] > 3, (1, 7)),
        (X.long(), X.long() + 1, (7, 7)),
        (X[:0], X[:0], (0, 0)),
        (torch.tensor(3), torch.tensor(3), (0, 1)),
        (X.reshape(7, 5, 1).expand(7, 5, 3), X.reshape(7, 5, 1).expand(7, 5, 3), (0, 35)),
        (8, 8, (0, 1)),
        (8, 9, (1, 1)),
        (None, None, (0, 1)),
    ],
)
def test_rows_that_differ_are_counted(got, want, bad):
    found = difference([got], [want])
    assert (*found.bad_rows, *found.num_rows) == bad


@pytest.mark.parametrize(
    ("bad", "usual", "beyond"),
    [
        ((0, 0), (0, 0), None),
        ((0, 1), (0, 0), 1),
        ((2, 4), (1, 2), None),
        ((3, 4), (1, 2), 0),
        ((30, 0), (26, 0), 0),  # whoever sees so much of padding mixes tokens
        ((0, 0), (40, 40), None),
    ],
)
def test_more_rows_than_rounding_explains(bad, usual, beyond):
    assert Difference(bad, (100, 100)).beyond(Difference(usual, (100, 100))) == beyond


def ways(split, *, written=(), unpaddable=""):
    """A graph that adds 1 to what it writes in place and doubles its input, with a split program of one's own."""

    def unsplit(_lanes, x, *state):
        for s in state:
            s.add_(1)
        return (2 * x,)

    programs = Programs({1: unsplit, 2: split}, Guards((), ()), "5" * 16)
    signature = Signature((TokenInput(0, 0, "x"),), written=written, output_dims=(0,), unpaddable=unpaddable)
    return Ways(programs, Whole(lambda *_: ()), signature, Agreement(None, timeout_s=1.0))


def judged(split, *state, **options):
    found = ways(split, written=tuple(range(1, 1 + len(state))), **options)
    trial = Trial(found, Agreement(None, timeout_s=1.0), 7, [X, *state])
    fault = trial.fault(Cut((4, 3)))
    trial.close()
    return fault, trial


def right(_lanes, x, *state):
    for s in state:
        s.add_(1)
    return (2 * x,)


def wrong(_lanes, x, *state):
    for s in state:
        s.add_(5)
    return (2 * x - x.mean(0),)


def test_equal_plays_hand_out_the_split_one_with_its_state():
    state = torch.zeros(3)
    fault, trial = judged(right, state)
    assert fault == ""
    assert torch.equal(trial.results[0], 2 * X)
    assert torch.equal(state, torch.ones(3))


def test_unequal_plays_hand_out_the_unsplit_one_with_its_state():
    state = torch.zeros(3)
    fault, trial = judged(wrong, state)
    assert fault == "result 0 of the graph, in 7 of 7 rows"
    assert torch.equal(trial.results[0], 2 * X)
    assert torch.equal(state, torch.ones(3))


def test_state_that_differs_is_a_fault_of_its_own():
    def writes_twice(_lanes, x, state):
        state.add_(2)
        return (2 * x,)

    fault, _ = judged(writes_twice, state := torch.zeros(3), unpaddable="it is not asked")
    assert fault == "what it writes in place, in 3 of 3 rows"
    assert torch.equal(state, torch.ones(3))


def test_a_result_that_lies_in_state_is_kept_apart():
    def unsplit(_lanes, x, state):
        return (state.add_(x),)

    found = ways(unsplit, written=(1,))
    found.programs = Programs({1: unsplit, 2: unsplit}, Guards((), ()), "5" * 16)
    trial = Trial(found, Agreement(None, timeout_s=1.0), 7, [X, state := torch.zeros_like(X)])
    assert trial.fault(Cut((4, 3))) == ""
    trial.close()
    assert torch.equal(state, X)


def test_what_another_rank_found_counts_here():
    class Two(Agreement):
        def share(self, values):
            return [tuple(values), (1,)]

    trial = Trial(ways(right), Two(None, timeout_s=1.0), 7, [X])
    assert trial.fault(Cut((4, 3))) == "a result on another rank"
