"""Tuning: what is timed, what is kept, what ranks have in common, what a file brings back."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from dbo_compile.runtime import tune
from dbo_compile.runtime.tune import (
    MORE_TRIALS,
    MOST_UNSTEADY,
    TRIALS,
    Decision,
    Size,
    Tuner,
    decisions_text,
    fastest,
    known_decisions,
    load_decisions,
)

SIZE, OTHER = Size(8, 512), Size(9, 7)
WAYS = ["split", "unsplit", "inductor"]
EXACT = dict.fromkeys(WAYS, 0.0)


def alone(values):
    return [tuple(values)]


def tuned(tuner, seconds, size=SIZE):
    """Play until the size is decided; the ways in the order in which they were timed."""
    order = []
    while (found := tuner.way(size, list(seconds)))[1]:
        order.append(found[0])
        cold = 100.0 if order.count(found[0]) == 1 else 1.0
        tuner.took(size, found[0], cold * seconds[found[0]], {})
    return order


@pytest.mark.parametrize(
    ("seconds", "way"),
    [
        ({"split": 0.8, "unsplit": 1.0, "inductor": 0.9}, "split"),
        ({"split": 0.8999, "unsplit": 1.0, "inductor": 0.9}, "inductor"),  # within noise
        ({"split": 0.88, "unsplit": 1.0, "inductor": 0.9}, "inductor"),
        ({"split": 1.0, "unsplit": 0.88, "inductor": 0.9}, "inductor"),
        ({"split": 0.81, "unsplit": 0.8, "inductor": 0.9}, "unsplit"),
        ({"split": 0.8, "unsplit": 0.7, "inductor": 0.9}, "unsplit"),
        ({"split": 0.8, "refined": 0.7, "unsplit": 1.0}, "refined"),
        ({"split": 0.7, "refined": 0.8, "unsplit": 1.0}, "split"),
        ({"split": 0.8}, "split"),
        ({"split": 0.8, "unsplit": 1.0}, "split"),
    ],
)
def test_a_way_must_be_clearly_faster_than_what_users_had_before(seconds, way):
    assert fastest(seconds, {}) == way


@pytest.mark.parametrize(("noise", "way"), [(0.05, "split"), (0.06, "inductor")])
def test_a_way_must_be_faster_by_more_than_noise_leaves_open(noise, way):
    assert fastest({"split": 0.92, "unsplit": 0.99, "inductor": 1.0}, {"split": noise, "inductor": noise}) == way


def test_noise_of_trials_is_agreed_and_kept():
    def share(values):
        return [tuple(values), (*values[:2], 0, 10**9)]

    tuner = Tuner(share, {})
    noisy = {"split": [9.0, 0.6, 0.8, 1.0, 1.2], "unsplit": [9.0, 2.0, 2.0, 2.0, 2.0]}
    while (found := tuner.way(SIZE, list(noisy)))[1]:
        tuner.took(SIZE, found[0], noisy[found[0]].pop(0), {})
    assert tuner.decisions[SIZE].errors == pytest.approx({"split": 0.3 / 0.9 / 2, "unsplit": 1.0})
    assert tuner.decisions[SIZE].chosen == "unsplit"


def test_ways_take_turns_and_the_cold_first_time_does_not_count():
    tuner = Tuner(alone, {})
    order = tuned(tuner, {"split": 0.3, "unsplit": 0.5, "inductor": 0.4})
    assert order == WAYS * TRIALS  # none is close to the fastest, so there are no more
    assert tuner.decisions == {SIZE: Decision({"split": 0.3, "unsplit": 0.5, "inductor": 0.4}, "split", {}, EXACT)}
    assert tuner.way(SIZE, WAYS) == ("split", False)
    assert str(tuner.decisions[SIZE]) == "split (split 300.00 ms, unsplit 500.00 ms, inductor 400.00 ms)"


def test_times_of_warm_ups_and_captures_do_not_count():
    """As on a device: the first play of a way is its warm-up, the second is captured, and takes a thousand times as
    long; what is captured is faster than what Inductor made."""
    tuner, plays = Tuner(alone, {}), Counter()
    while (found := tuner.way(SIZE, ["split", "inductor"]))[1]:
        way, _ = found
        plays[way] += 1
        early = way == "split" and plays[way] < 3
        seconds = 1.0 if way == "inductor" else {1: 2.0, 2: 1000.0}.get(plays[way], 0.5)
        tuner.took(SIZE, way, seconds, {}, is_steady=not early)
    assert tuner.decisions[SIZE].chosen == "split"
    assert plays == {"split": TRIALS + 2, "inductor": TRIALS}


def test_sizes_that_are_never_captured_are_decided_all_the_same():
    tuner, plays = Tuner(alone, {}), 0
    while (found := tuner.way(SIZE, ["split", "unsplit"]))[1]:
        plays += 1
        tuner.took(SIZE, found[0], {"split": 0.5, "unsplit": 1.0}[found[0]], {}, is_steady=False)
    assert plays == 2 * (MOST_UNSTEADY + TRIALS)
    assert tuner.decisions[SIZE].chosen == "split"


def test_ways_that_are_close_to_the_fastest_are_timed_more_often():
    tuner = Tuner(alone, {})
    order = tuned(tuner, {"split": 0.3, "unsplit": 0.5, "inductor": 0.31})
    assert order == WAYS * TRIALS + ["split", "inductor"] * (MORE_TRIALS - TRIALS)
    assert tuner.decisions[SIZE].seconds.keys() == set(WAYS)


def test_more_trials_find_what_noise_has_hidden():
    tuner, noisy = Tuner(alone, {}), {"split": [1.0] * TRIALS + [0.5] * 99, "unsplit": [0.9] * 99}
    while (found := tuner.way(SIZE, list(noisy)))[1]:
        tuner.took(SIZE, found[0], noisy[found[0]].pop(0), {})
    assert tuner.decisions[SIZE].chosen == "split"


def test_a_way_that_comes_late_is_timed_as_often_and_one_that_is_gone_no_more():
    tuner = Tuner(alone, {})
    for _ in range(2 * TRIALS):
        way, _ = tuner.way(SIZE, ["split", "unsplit"])
        tuner.took(SIZE, way, 1.0, {})
    assert tuned(tuner, {"refined": 0.4, "unsplit": 1.0}) == ["refined"] * TRIALS
    assert tuner.decisions[SIZE].seconds.keys() == {"refined", "unsplit"}


def test_the_slowest_rank_counts_and_all_decide_alike():
    mine, theirs = {"split": 0.3, "unsplit": 0.5}, {"split": 0.7, "unsplit": 0.4}
    told = []

    def share(values):
        told.append(values)
        return [tuple(values), (*(round(s * 1e9) for s in theirs.values()), 0, 0)]

    tuner = Tuner(share, {})
    tuned(tuner, mine)
    assert told == [[300_000_000, 500_000_000, 0, 0]]
    assert tuner.decisions[SIZE].seconds == {"split": 0.7, "unsplit": 0.5}
    assert tuner.decisions[SIZE].chosen == "unsplit"


def test_each_size_is_timed_by_itself_and_a_size_that_cannot_be_split_uses_what_is_known():
    tuner = Tuner(alone, {})
    tuned(tuner, {"split": 0.3, "unsplit": 0.5, "inductor": 0.4})
    assert tuner.way(OTHER, WAYS) == ("split", True)
    assert tuner.way(SIZE, ["unsplit", "inductor"]) == ("inductor", False)


def test_one_way_needs_no_timing():
    assert Tuner(alone, {}).way(SIZE, ["inductor"]) == ("inductor", False)


def test_what_is_forgotten_is_timed_again():
    tuner = Tuner(alone, {})
    tuned(tuner, {"split": 0.3, "unsplit": 0.5})
    tuner.forget()
    assert tuned(tuner, {"split": 0.3, "unsplit": 0.2}) == ["split", "unsplit"] * TRIALS
    assert tuner.decisions[SIZE].chosen == "unsplit"


@pytest.fixture
def no_files(monkeypatch):
    monkeypatch.setattr(tune, "_loaded", {})


DECISIONS = {SIZE: Decision({"split": 0.3, "unsplit": 0.5}, "split"), OTHER: Decision({"unsplit": 0.1}, "unsplit")}


def test_decisions_survive_in_a_file(tmp_path, no_files):
    (tmp_path / "d.json").write_text(decisions_text({"1a": DECISIONS}))
    load_decisions(tmp_path / "d.json")
    assert known_decisions("1a") == DECISIONS
    assert known_decisions("2b") == {}


def test_decisions_of_another_version_of_pytorch_are_passed_over(tmp_path, no_files):
    text = decisions_text({"1a": DECISIONS}).replace(torch.__version__, "1.0")
    (tmp_path / "d.json").write_text(text)
    load_decisions(tmp_path / "d.json")
    assert known_decisions("1a") == {}


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"torch": "1", "graphs": {"1a": {"8": {}}}}'])
def test_a_file_of_something_else_is_an_error(tmp_path, no_files, text):
    (tmp_path / "d.json").write_text(text)
    with pytest.raises(ValueError, match=r"d.json has no decisions in it"):
        load_decisions(tmp_path / "d.json")
