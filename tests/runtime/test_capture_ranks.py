"""Capture on several ranks at once, each a thread: whatever befalls one of them, all capture and replay the same."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist

from dbo_compile.runtime import capture as capture_module
from dbo_compile.runtime.agree import Agreement
from dbo_compile.runtime.capture import CapturePlayer
from dbo_compile.runtime.graphs import Limits
from dbo_compile.runtime.streams import StreamPlayer
from tests.runtime.fake_device import FakeDevice
from tests.runtime.test_agree import LIMITS, Group, wish
from tests.runtime.test_capture_graphs import WEIGHT, FakeGraphs, Program, check

SIZES = 7, 11, 3


def on_ranks(num_ranks, play):
    """What `play(rank, agreement)` returns on each of so many ranks."""
    store = dist.HashStore()
    with ThreadPoolExecutor(num_ranks) as pool:
        groups = [Group(store, rank, num_ranks) for rank in range(num_ranks)]
        made = [pool.submit(Agreement, group, timeout_s=20.0) for group in groups]
        ranks = [pool.submit(play, rank, agreement.result()) for rank, agreement in enumerate(made)]
        return [rank.result() for rank in ranks]


def steps(seed, num_steps=60):
    """What happens on one rank by itself: captures fail, weights move, inputs stay in place or do not."""
    own = random.Random(seed)

    def play(rank, agreement):
        shared, mine = random.Random(seed), random.Random(f"{own.random()} {rank}")
        graphs, module = FakeGraphs(), Program()
        limits = Limits(static=frozenset({1}))
        player = CapturePlayer(StreamPlayer(FakeDevice()), graphs, torch.device("cpu"), limits, agreement)
        weight, kept = WEIGHT.clone(), {n: torch.randn(n, 5) for n in SIZES}
        for _ in range(num_steps):
            n = shared.choice(SIZES)
            plan = agreement.agree(wish(n), LIMITS)
            if plan.has_news:
                player.settle(news for (news,) in agreement.share([player.news]))
            weight = weight.clone() if mine.random() < 0.03 else weight
            graphs.error = RuntimeError("no") if mine.random() < 0.02 else None
            x = kept[n] if mine.random() < 0.8 else torch.randn(n, 5)
            graphs.log.append(n)
            check(player, module, (n,), [n, weight, x])
        return graphs.log, sorted(map(str, player.refused))

    return play


@pytest.mark.parametrize("seed", range(6))
def test_all_ranks_capture_and_replay_the_same_in_the_same_order(seed, monkeypatch):
    monkeypatch.setattr(capture_module, "one_at_a_time", lambda: nullcontext(True))  # they are threads of one process
    first, *others = on_ranks(3, steps(seed))
    assert others == [first] * 2
    assert first[0].count("replay") > 10


def test_news_are_in_the_next_plan_of_all_ranks_and_in_no_other():
    def play(rank, agreement):
        told = []
        for step in range(4):
            if (rank, step) == (1, 2):
                agreement.tell()
            told.append(agreement.agree(wish(19), LIMITS).has_news)
        return told

    assert on_ranks(3, play) == [[False, False, True, False]] * 3


def test_news_that_come_after_a_step_was_announced_wait_for_the_one_after():
    def play(rank, agreement):
        agreement.agree_ahead(wish(19))
        if rank == 1:
            agreement.tell()
        return [agreement.agree(wish(19), LIMITS).has_news for _ in range(3)]

    assert on_ranks(2, play) == [[False, True, False]] * 2
