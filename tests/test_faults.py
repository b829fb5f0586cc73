"""One rank of several goes wrong: every other one gets an error that names it, in time, and can go on.

Each trial takes a rank, a step and a place in it at random (seeded). `FAULT_TRIALS=20` has twenty trials of each fault
instead of four.
"""

from __future__ import annotations

import os
import random
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from queue import Queue
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol

import dbo_compile
from dbo_compile.errors import Disagreement, RankLost
from tests.ranks import Ranks

pytestmark = pytest.mark.ranks
NUM_TRIALS = int(os.environ.get("FAULT_TRIALS", "4"))
NUM_RANKS, NUM_WORLDS = 4, 4
TIMEOUT_S = 2.0
HIDDEN, MIDDLE, OUT = 5, 11, 3
STYLES = ("plain", "decorated")
PLACES = ("before the step", "in the first microbatch", "in the second microbatch", "while it compiles")


# -- what ranks play --------------------------------------------------------------------------------------------------


class Alarm:
    """What befalls this rank when the op `touch` is run, or traced, for the n-th time from now on."""

    def __init__(self) -> None:
        self.fault: Callable[[], None] | None = None
        self.num_left = 0
        self.traced = False
        self.last_at = 0.0

    def set(self, fault: Callable[[], None], place: str) -> None:
        self.fault, self.traced = fault, place == "while it compiles"
        self.num_left = 2 if place == "in the second microbatch" else 1

    def ring(self, *, traced: bool) -> None:
        self.last_at = time.monotonic()
        if self.fault is not None and traced == self.traced:
            self.num_left -= 1
            if not self.num_left:
                fault, self.fault = self.fault, None
                fault()


ALARM = Alarm()


@torch.library.custom_op("dbo_faults::touch", mutates_args=())
def touch(x: torch.Tensor) -> torch.Tensor:
    ALARM.ring(traced=False)
    return x.clone()


@touch.register_fake
def _(x):
    ALARM.ring(traced=True)
    return torch.empty_like(x)


@dbo_compile.register_rule(torch.ops.dbo_faults.touch.default)
def _(x):
    return x.place


def weights(*sizes):
    return torch.randn(*sizes, dtype=torch.float64, generator=torch.Generator().manual_seed(sizes[0]))


IN, BACK = weights(HIDDEN, MIDDLE), weights(MIDDLE, OUT)


def model_over(group, *, num_layers=1):
    def model(x, shift):
        x = torch.ops.dbo_faults.touch(x @ IN + shift[:, None])
        for _ in range(num_layers):
            x = torch.tanh(funcol.all_reduce(x, "sum", group))
        return x @ BACK

    return model


# -- one trial, as each rank sees it ----------------------------------------------------------------------------------


class Inputs(NamedTuple):
    x: torch.Tensor
    shift: torch.Tensor


class Told(NamedTuple):
    """What a rank has to say of a trial: each error as `type: words`, and how long it took."""

    error: str
    seconds: float
    again: str
    seconds_again: float
    threads_left: tuple[str, ...]
    is_right_after: bool


@dataclass(frozen=True)
class Trial:
    fault: str
    style: str
    place: str
    num_good: int
    victim: int
    members: tuple[int, ...]
    seed: int

    @cached_property
    def sizes(self):
        rng = random.Random(self.seed)
        return [[rng.randrange(3, 40, 2) for _ in self.members] for _ in range(self.num_good + 2)]

    def inputs(self, step, member):
        rng, n = torch.Generator().manual_seed(1000 * self.seed + 10 * step + member), self.sizes[step][member]
        return Inputs(torch.randn(n, HIDDEN, dtype=torch.float64, generator=rng), torch.randint(-3, 4, (n,), generator=rng))

    def expected(self, step, member, among):
        """The result on `member`, if only the members `among` take part."""
        total = torch.zeros(max(self.sizes[step]), MIDDLE, dtype=torch.float64)
        for i in among:
            x, shift = self.inputs(step, i)
            total[: len(x)] += x @ IN + shift[:, None]
        return torch.tanh(total[: self.sizes[step][member]]) @ BACK
