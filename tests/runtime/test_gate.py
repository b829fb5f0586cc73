"""The gate: which differences are rounding, and what is left of state after it has judged."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dbo_compile.runtime.agree import Agreement
from dbo_compile.runtime.cuts import Cut
from dbo_compile.runtime.gate import MOST_SLIGHT, Difference, Gate, Trial, bytes_of_trial, difference, free_bytes
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


@pytest.mark.parametrize(
    ("bad", "usual", "num_rows", "slight"),
    [
        (1, 0, 7, True),
        (2, 0, 7, False),
        (3, 1, 7, True),
        (4, 0, 400, True),
        (5, 0, 400, False),
        (7, 2, 300, True),
        (60, 30, 100, False),  # that is no rounding
    ],
)
def test_a_single_row_or_one_in_a_hundred_is_slight(bad, usual, num_rows, slight):
    off = Difference((0, bad), (num_rows, num_rows))
    assert off.is_slight(Difference((0, usual), (num_rows, num_rows))) == slight


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


# -- the gate -------------------------------------------------------------------------------------


class Program:
    """Doubles its input, wrongly in so many rows as `wrong` says for each call."""

    def __init__(self, *wrong):
        self.wrong = list(wrong)

    def __call__(self, _lanes, x, *state):
        for s in state:
            s.add_(1)
        result = 2 * x
        result[: self.wrong.pop(0) if self.wrong else 0] += 1
        return (result,)


def gated(split, num_calls, *, mode="first-call", recompile=lambda: None, **options):
    """Whether each call was played split, as long as the gate lets it, and the gate; each of them was right."""
    found = ways(split, **options)
    gate, plays = Gate(found, mode, recompile), []
    for _ in range(num_calls):
        before = len(split.wrong)
        if not gate.wants(7):
            break
        (result,) = gate.play(Cut((4, 3)), 7, [X], lambda: Cut((4, 3)), num_tokens=7)
        plays.append(before - len(split.wrong))
        assert torch.equal(result, 2 * X)
    return plays, gate


def test_one_row_by_chance_is_judged_again_and_the_graph_is_split_on():
    _, gate = gated(Program(1, 0, 0), 9)
    assert (gate.wants(7), gate.refuted) == (False, "")


def test_one_row_in_every_call_is_a_fault_and_was_never_handed_out():
    plays, gate = gated(Program(*[1] * 9), 9)
    assert len(plays) == MOST_SLIGHT + 1
    assert gate.refuted.startswith("splitting changed result 0 of the graph, in 1 of 7 rows")


def test_one_row_now_and_then_does_not_add_up():
    plays, gate = gated(Program(*[1, 0] * 9), 18, mode="every-call")
    assert (len(plays), gate.refuted) == (18, "")


def test_a_step_of_more_than_twice_the_tokens_is_judged_again():
    """A capacity that the first step does not reach changes nothing in it."""
    _, gate = gated(Program(), 1)
    assert [n for n in (1, 7, 14, 15, 99) if gate.wants(n)] == [15, 99]
    gate.play(Cut((4, 3)), 7, [X], lambda: Cut((4, 3)), num_tokens=40)  # another rank has 40
    assert [n for n in (15, 80, 81) if gate.wants(n)] == [81]
    _, gate = gated(Program(), 0, mode="never")
    assert not gate.wants(99)


def test_two_rows_of_seven_are_a_fault_at_once():
    plays, gate = gated(Program(2), 9)
    assert len(plays) == 1
    assert "in 2 of 7 rows" in gate.refuted


def test_what_may_be_chance_is_not_compiled_again():
    asked = []
    gated(Program(1), 9, recompile=lambda: asked.append(1))
    assert asked == []
    gated(Program(2), 9, recompile=lambda: asked.append(1))
    assert asked == [1]


def test_the_yardstick_has_twice_the_rows():
    """Half the rows take another path through a product than all of them, and so do twice as many."""
    played = []

    def unsplit(_lanes, x):
        played.append(len(x))
        return (2 * x,)

    found = ways(Program(1))
    found.programs = replace(found.programs, modules={1: unsplit, 2: Program(1)})
    Trial(found, Agreement(None, timeout_s=1.0), 7, [X]).fault(Cut((4, 3)))
    assert played == [7, 14]


@pytest.mark.parametrize(("gib", "judges"), [(100, True), (110, False)])
def test_without_room_for_copies_nothing_is_judged_on_any_rank(gib, judges, monkeypatch, caplog):
    class Two(Agreement):
        def share(self, values):
            return [tuple(values), (gib * 2**30, 105 * 2**30)[: len(values)] if len(values) > 1 else (0,)]

    split = Program(0)
    found = ways(split)
    found.agreement = Two(None, timeout_s=1.0)
    gate = Gate(found, "first-call", lambda: None)
    with caplog.at_level("WARNING", "dbo_compile"):
        gate.play(Cut((4, 3)), 7, [X], Cut, num_tokens=7)
    assert not gate.wants(7)
    assert [r.message.split(":")[0] for r in caplog.records] == (
        [] if judges else ["the gate is left out, and nothing proves that splitting is right here"]
    )
    assert judges or "take 110.0 GiB, and 105.0 GiB may be taken on rank 1" in caplog.text


def test_what_a_trial_takes_is_counted_before():
    signature = Signature((TokenInput(0, 0, "x"),), written=(1,), output_dims=(0,))
    state = torch.zeros(1000, dtype=torch.float64)
    assert bytes_of_trial(signature, 7, [X, state]) == 3 * 8000 + 2 * X.nbytes
    assert bytes_of_trial(replace(signature, unpaddable="why"), 7, [X, state]) == 3 * 8000


def test_memory_that_nobody_knows_of_is_enough():
    assert free_bytes([X, 7]) > 2**50
