"""Ranks agree on a step before it is played: one all-reduce, and the same plan on every rank.

Each rank fills its own column of a matrix that is 0 elsewhere; summed, it tells every rank every wish. What follows
from the wishes is in `plan`; who does not come, `rollcall` finds out.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import NoReturn, Protocol, cast
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import AllreduceOptions, ProcessGroup, ProcessGroupGloo, Work

from dbo_compile.errors import Disagreement, RankLost
from dbo_compile.runtime.plan import NUM_ROWS, BatchPlan, Limits, Wish, decide, listed
from dbo_compile.runtime.rollcall import GRACE_SECONDS, Roll, RollCall

PATIENCE_SECONDS = 0.5
"""How long an all-reduce may take before this rank calls the roll: a step in time never touches the store."""
POLL_SECONDS = 0.1
BUSY_SECONDS = 900.0
"""How long a rank that gives signs of life, because it compiles, is waited for."""
CPU = torch.device("cpu")


class Link(Protocol):
    """What carries the numbers: a process group, or connections that no group knows of."""

    def allreduce(self, tensors: list[torch.Tensor], options: AllreduceOptions) -> Work: ...


@dataclass(frozen=True, slots=True)
class _Started:
    """A step that this rank has told the others its wish for; no work where a rank is alone."""

    wish: Wish
    work: Work | None


_agreements: WeakKeyDictionary[ProcessGroup, dict[tuple[float, torch.device], Agreement]] = WeakKeyDictionary()


def agreement_over(group: ProcessGroup | None, timeout_s: float, device: torch.device = CPU) -> Agreement:
    """The agreement of this process over `group`: one for all that is played over it."""
    if group is None:
        return Agreement(None, timeout_s=timeout_s)
    made = _agreements.setdefault(group, {})
    if (timeout_s, device) not in made:
        made[timeout_s, device] = Agreement(group, timeout_s=timeout_s, device=device)
    return made[timeout_s, device]


def check_covers(group: ProcessGroup, others: Iterable[ProcessGroup]) -> None:
    """Raise `ValueError` if a model talks to ranks, in its groups `others`, that do not decide with it in `group`."""
    ranks = dist.get_process_group_ranks(group)
    left_out = dict.fromkeys(r for other in others for r in dist.get_process_group_ranks(other) if r not in ranks)
    if left_out:
        raise ValueError(
            f"dp_group leaves out {listed(list(left_out))} of the world, with whom the model communicates: they would "
            "decide for themselves what is played; give a group that has them all"
        )


class Agreement:
    """Where the ranks of a group meet before each step; with no group, or a group of one, each wish makes the plan.

    Ranks make their agreements over a group in the same order; to make one waits ten times as long (or for
    `connect_timeout_s`), since other ranks may still be loading. On the CPU it has connections of its own, and so
    never mixes with what else is sent over the group. On another `device` it uses those of the group, and between
    `agree_ahead` and `agree` every rank must send the same over them. Ranks are numbered as in the group. After a
    `RankLost` it is of no use any more.
    """

    def __init__(
        self,
        group: ProcessGroup | None,
        *,
        timeout_s: float,
        connect_timeout_s: float | None = None,
        device: torch.device = CPU,
    ) -> None:
        self.rank = 0 if group is None else group.rank()
        self.size = 1 if group is None else group.size()
        self.num_steps = 0
        self._timeout_s = timeout_s
        self._ahead: _Started | None = None
        self._lost = ""
        self._link: Link | None = None
        self._stream = None if device.type == "cpu" else torch.Stream(device)
        if group is None or self.size == 1:
            return
        self._roll = Roll(group.get_group_store(), self.rank, self.size)
        connect_s = connect_timeout_s or 10 * timeout_s
        self._shared = _connected(self._roll, "share", connect_s)
        self._link = _connected(self._roll, "agree", connect_s) if self._stream is None else group
        self._met_at = time.monotonic()
        with torch.inference_mode(False), self._on_stream():  # no inference tensor: those are not written outside
            self._matrix = torch.zeros(NUM_ROWS, self.size, dtype=torch.int64, device=device)

    def agree(self, wish: Wish, limits: Limits, *, patient: bool = False) -> BatchPlan:
        """Wait until every rank has come to this step. Raises `Disagreement` or `RankLost`, the same on every rank.

        `patient`: this rank has just compiled, and ranks that are still `busy` with that are waited for.

        After `agree_ahead`, `wish` must be what was announced, since the others already act on it. If it is not, this
        rank raises `Disagreement` after it has met them, and they raise its words when they next wait for it.
        """
        started = self._ahead or self._start(wish, self._longest(patient))
        self._ahead = None
        wishes = self._finish(started, self._longest(patient))
        if wish != started.wish:
            self._refuse(f"rank {self.rank} announced {started.wish}, but came with {wish}")
        return decide(wishes, limits)

    def meet(self, wish: Wish) -> None:
        """Come to a step without playing it; the others raise what `decide` makes of that."""
        self._finish(self._ahead or self._start(wish, self._timeout_s), self._timeout_s)
        self._ahead = None

    def agree_ahead(self, wish: Wish) -> None:
        """Announce the wish of the next step while this one is played; the next `agree` then hardly has to wait."""
        if self._ahead is not None:
            self._refuse(f"rank {self.rank} announced {wish} before it came to play {self._ahead.wish}")
        self._ahead = self._start(wish, self._timeout_s)

    @property
    def announced(self) -> Wish | None:
        """The wish of the next step, if the others were told it ahead."""
        return self._ahead.wish if self._ahead else None

    def share(self, values: Sequence[int], *, patient: bool = False) -> list[tuple[int, ...]]:
        """The values of every rank, by rank; each rank gives as many, at the same place of its program.

        `patient` as for `agree`. Raises `RankLost`.
        """
        if self._link is None:
            return [tuple(values)]
        self._refuse_if_lost()
        with torch.inference_mode(False):
            matrix = torch.zeros(len(values), self.size, dtype=torch.int64)
            matrix[:, self.rank] = torch.tensor(list(values), dtype=torch.int64)
        longest = self._longest(patient)
        work = self._shared.allreduce([matrix], _options(longest))
        self._wait(work, f"agree in step {self.num_steps}", longest, on_device=False)
        return list(zip(*matrix.tolist(), strict=True))

    def busy(self) -> AbstractContextManager[None]:
        """While it lasts, this rank gives signs of life: it compiles."""
        return nullcontext() if self._link is None else self._roll.living()

    def wait_for(self, work: Work, what: str) -> None:
        """Wait for a collective of the step. Raises `RankLost` if some rank does not come to it."""
        if self._link is None:
            work.wait()
            return
        self._wait(work, f"finish {what} of step {self.num_steps}", BUSY_SECONDS, on_device=False)

    def leave(self, why: str) -> None:
        """Tell the others that this rank comes no more, so that they need not wait for `timeout_s` to know."""
        if self._link is not None:
            words = f"rank {self.rank} left: {why.splitlines()[0]}"
            self._lost = self._roll.promptly(lambda: self._roll.publish(words)) or words

    def _refuse(self, why: str) -> NoReturn:
        self.leave(why)
        raise Disagreement(why)

    def _refuse_if_lost(self) -> None:
        # Only a rank that was away for long can find that the others gave it up: else a look would cost every step.
        if self._link is not None and time.monotonic() - self._met_at > 0.9 * self._timeout_s:
            self._lost = self._lost or self._roll.promptly(self._roll.verdict)
        if self._lost:
            raise RankLost(self._lost)

    def _on_stream(self) -> AbstractContextManager[object]:
        return nullcontext() if self._stream is None else self._stream

    def _longest(self, patient: bool) -> float:
        return max(BUSY_SECONDS, self._timeout_s) if patient else self._timeout_s

    def _start(self, wish: Wish, longest: float) -> _Started:
        self._refuse_if_lost()
        self.num_steps += 1
        if self._link is None:
            return _Started(wish, None)
        column = torch.tensor(wish.packed(), dtype=torch.int64, device=CPU)
        with self._on_stream():
            self._matrix.zero_()[:, self.rank] = column.to(self._matrix.device)
            return _Started(wish, self._link.allreduce([self._matrix], _options(longest)))

    def _finish(self, started: _Started, longest: float) -> list[Wish]:
        if started.work is None:
            return [started.wish]
        on_device = self._stream is not None
        self._wait(started.work, f"agree on step {self.num_steps}", longest, on_device=on_device)
        with self._on_stream():
            return [Wish.unpacked(column) for column in zip(*self._matrix.tolist(), strict=True)]

    def _wait(self, work: Work, what: str, longest: float, *, on_device: bool) -> None:
        """Wait for the other ranks, and after a while call the roll too; for `longest` seconds if they live.

        Raises `RankLost` with the verdict.
        """
        if self._lost:
            raise RankLost(self._lost)
        since = time.monotonic()
        seconds = min(PATIENCE_SECONDS, self._timeout_s / 2)
        call: RollCall | None = None  # most waits end before there is reason to call the roll
        while call is None or not call.is_over:
            try:
                if self._is_done_on_device(work, seconds) if on_device else _is_done(work, seconds):
                    if call:
                        call.end()
                    self._met_at = time.monotonic()
                    return
            except RuntimeError as error:
                call = call or RollCall(self._roll, self.num_steps, what, since + self._timeout_s, since + longest)
                call.fail(_cause(error))
                break
            if call is None:
                call = RollCall(self._roll, self.num_steps, what, since + self._timeout_s, since + longest)
                call.begin()
            seconds = POLL_SECONDS
        self._lost = call.verdict()
        raise RankLost(self._lost)

    def _is_done_on_device(self, work: Work, seconds: float) -> bool:
        until = time.monotonic() + seconds
        while not work.is_completed():
            if time.monotonic() > until:
                return False
            time.sleep(0)
        with self._on_stream():
            return work.wait()


def _is_done(work: Work, seconds: float) -> bool:
    """Whether a collective ended within `seconds`; raises what made it fail."""
    try:
        return work.wait(timedelta(seconds=seconds))
    except RuntimeError:
        return work.is_completed() and work.wait()  # the second one raises if the work has failed


def _cause(error: RuntimeError) -> str:
    """What gloo says went wrong, without the line of its source and its advice."""
    return re.sub(r"^\[[^\]]*\.cc:\d+\] ", "", str(error).splitlines()[0]).partition(". ")[0]


def _options(timeout_s: float) -> AllreduceOptions:
    options = AllreduceOptions()
    options.timeout = timedelta(seconds=timeout_s + GRACE_SECONDS)  # a link with work under way cannot be closed
    return options


def _connected(roll: Roll, what: str, timeout_s: float) -> Link:
    deadline = time.monotonic() + timeout_s
    call = RollCall(roll, 0, "connect", deadline, deadline)
    call.begin()
    try:
        link = ProcessGroupGloo(roll.store_for(what), roll.rank, roll.num_ranks, timedelta(seconds=timeout_s))
    except RuntimeError as error:
        call.fail(_cause(error))
        raise RankLost(call.verdict()) from error
    call.end()
    return cast("Link", link)
