"""Ranks agree on a step before it is played: one all-reduce, and the same plan on every rank.

Each rank fills its own column of a matrix that is 0 elsewhere; summed, it tells every rank every wish. What follows
from the wishes is in `plan`; who does not come, `rollcall` finds out.
"""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import NoReturn

import torch
import torch.distributed as dist

from dbo_compile.errors import Disagreement, RankLost
from dbo_compile.runtime.plan import NUM_ROWS, BatchPlan, Limits, Wish, decide
from dbo_compile.runtime.rollcall import Roll, RollCall

PATIENCE_SECONDS = 0.5
"""How long an all-reduce may take before this rank calls the roll: a step in time never touches the store."""
POLL_SECONDS = 0.1
CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class _Started:
    """A step that this rank has told the others its wish for; no work where a rank is alone."""

    wish: Wish
    work: dist.Work | None


class Agreement:
    """Where the ranks of a group meet before each step; with no group, or a group of one, each wish makes the plan.

    Ranks make their agreements over a group in the same order, and between `agree_ahead` and `agree` nothing else may
    communicate over it: `group_for_agreeing` makes a group of its own. `device` is where the numbers live that are
    exchanged, as the backend of the group demands. After a `RankLost` an agreement is of no use any more.
    """

    def __init__(
        self, group: dist.ProcessGroup | None, limits: Limits, *, timeout_s: float, device: torch.device = CPU
    ) -> None:
        self.limits = limits
        self._group = group if group is not None and group.size() > 1 else None
        self._rank = 0 if group is None else group.rank()
        self._timeout_s = timeout_s
        self._num_steps = 0
        self._met_at = float("-inf")
        self._ahead: _Started | None = None
        self._lost = ""
        self._stream = None if device.type == "cpu" else torch.Stream(device)
        if self._group is not None:
            self._roll = Roll(self._group.get_group_store(), self._rank, self._group.size())
            with torch.inference_mode(False), self._on_stream():  # no inference tensor: those are not written outside
                self._matrix = torch.zeros(NUM_ROWS, self._group.size(), dtype=torch.int64, device=device)

    def agree(self, wish: Wish) -> BatchPlan:
        """Wait until every rank has come to this step. Raises `Disagreement` or `RankLost`, the same on every rank.

        After `agree_ahead`, `wish` must be what was announced, since the others already act on it. If it is not, this
        rank raises `Disagreement` after it has met them, and they raise its words when they next wait for it.
        """
        started = self._ahead or self._start(wish)
        self._ahead = None
        wishes = self._finish(started)
        if wish != started.wish:
            self._refuse(f"rank {self._rank} announced {started.wish}, but came with {wish}")
        return decide(wishes, self.limits)

    def agree_ahead(self, wish: Wish) -> None:
        """Announce the wish of the next step while this one is played; the next `agree` then hardly has to wait."""
        if self._ahead is not None:
            self._refuse(f"rank {self._rank} announced {wish} before it came to play {self._ahead.wish}")
        self._ahead = self._start(wish)

    def leave(self, why: str) -> None:
        """Tell the others that this rank comes no more, so that they need not wait for `timeout_s` to know."""
        words = f"rank {self._rank} left: {why}"
        self._lost = words if self._group is None else self._roll.promptly(lambda: self._roll.publish(words)) or words

    def _refuse(self, why: str) -> NoReturn:
        self.leave(why)
        raise Disagreement(why)

    def _on_stream(self) -> AbstractContextManager[object]:
        return nullcontext() if self._stream is None else self._stream

    def _start(self, wish: Wish) -> _Started:
        # Only a rank that was away for long can find that the others gave it up: else a look would cost every step.
        if self._group is not None and time.monotonic() - self._met_at > 0.9 * self._timeout_s:
            self._lost = self._lost or self._roll.promptly(self._roll.verdict)
        if self._lost:
            raise RankLost(self._lost)
        self._num_steps += 1
        if self._group is None:
            return _Started(wish, None)
        column = torch.tensor(wish.packed(), dtype=torch.int64, device=CPU)
        with self._on_stream():
            self._matrix.zero_()[:, self._rank] = column.to(self._matrix.device)
            return _Started(wish, dist.all_reduce(self._matrix, group=self._group, async_op=True))

    def _finish(self, started: _Started) -> list[Wish]:
        if started.work is None:
            return [started.wish]
        self._wait(started.work)
        self._met_at = time.monotonic()
        with self._on_stream():
            return [Wish.unpacked(column) for column in zip(*self._matrix.tolist(), strict=True)]

    def _wait(self, work: dist.Work) -> None:
        """Wait for the other ranks, and after a while call the roll too. Raises `RankLost` with its verdict."""
        what = f"agree on step {self._num_steps}"
        call = RollCall(self._roll, self._num_steps, what, time.monotonic() + self._timeout_s)
        seconds = min(PATIENCE_SECONDS, self._timeout_s / 2)
        while not call.is_over:
            try:
                if self._is_done(work, seconds):
                    return call.end()
            except RuntimeError as error:
                call.fail(str(error).splitlines()[0])
                break
            call.begin()
            seconds = POLL_SECONDS
        self._lost = call.verdict()
        raise RankLost(self._lost)

    def _is_done(self, work: dist.Work, seconds: float) -> bool:
        """Whether the all-reduce ended within `seconds`; raises what made it fail."""
        if self._stream is None:
            try:
                return work.wait(timedelta(seconds=seconds))
            except RuntimeError:
                return work.is_completed() and work.wait()  # the second one raises if the work has failed
        until = time.monotonic() + seconds
        while not work.is_completed():
            if time.monotonic() > until:
                return False
            time.sleep(0)
        with self._stream:
            return work.wait()


def group_for_agreeing(group: dist.ProcessGroup, *, timeout_s: float) -> dist.ProcessGroup:
    """A new group of the same ranks that exchanges numbers on the CPU; all ranks of `group` must call this."""
    made = dist.new_group(
        dist.get_process_group_ranks(group),
        backend="gloo",
        timeout=timedelta(seconds=timeout_s),
        use_local_synchronization=True,
    )
    assert isinstance(made, dist.ProcessGroup), f"this rank is not in {group}"
    return made
