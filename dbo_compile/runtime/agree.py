"""Ranks agree on a step before it is played: one exchange, and the same plan on every rank.

Every rank tells every other its wish (`links`). What follows from the wishes is in `plan`; who does not come,
`rollcall` finds out.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from typing import NoReturn
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import ProcessGroup, Work

from dbo_compile.compat import while_dynamo_compiles
from dbo_compile.errors import Disagreement, RankLost
from dbo_compile.runtime.comparison import listed
from dbo_compile.runtime.links import DeviceLink, Exchange, Link, SocketLink
from dbo_compile.runtime.plan import NUM_ROWS, BatchPlan, Limits, Wish, decide
from dbo_compile.runtime.rollcall import Roll, RollCall

PATIENCE_SECONDS = 0.5
"""How long an exchange may take before this rank calls the roll: a step in time never touches the store."""
POLL_SECONDS = 0.1
CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class _Started:
    """A step that this rank has told the others its wish for; no exchange where a rank is alone."""

    wish: Wish
    exchange: Exchange | None


_agreements: WeakKeyDictionary[ProcessGroup, dict[tuple[float, torch.device], Agreement]] = WeakKeyDictionary()


def agreement_over(group: ProcessGroup | None, timeout_s: float, device: torch.device = CPU) -> Agreement:
    """The agreement of this process over `group`: one for all that is played over it."""
    if group is None:
        return Agreement(None, timeout_s=timeout_s)
    while_dynamo_compiles(_compilation_begins, _compilation_ended)
    made = _agreements.setdefault(group, {})
    if (timeout_s, device) not in made:
        made[timeout_s, device] = Agreement(group, timeout_s=timeout_s, device=device)
    return made[timeout_s, device]


def _all_agreements() -> list[Agreement]:
    return [agreement for made in _agreements.values() for agreement in made.values()]


_telling = ExitStack()


def _compilation_begins(_: object) -> None:
    """Dynamo traces and compiles whenever a call brings something new, on one rank alone perhaps."""
    for agreement in _all_agreements():
        _telling.enter_context(agreement.busy())


def _compilation_ended(_: object) -> None:
    _telling.close()


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

    `num_steps` and `num_shared` count its exchanges, and are the same on all ranks.

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
        self.num_shared = 0
        self._timeout_s = timeout_s
        self._ahead: _Started | None = None
        self._lost = ""
        self._has_news = False
        self._link: Link | None = None
        if group is None or self.size == 1:
            return
        self._roll = Roll(group.get_group_store(), self.rank, self.size)
        connect_s = connect_timeout_s or 10 * timeout_s
        self._shared = _connected(self._roll, "share", connect_s)
        on_cpu = device.type == "cpu"
        self._link = _connected(self._roll, "agree", connect_s) if on_cpu else DeviceLink(group, device, NUM_ROWS + 1)
        self._met_at = time.monotonic()

    def agree(self, wish: Wish, limits: Limits) -> BatchPlan:
        """Wait until every rank has come to this step. Raises `Disagreement` or `RankLost`, the same on every rank.

        After `agree_ahead`, the wish that was announced counts, and must stand for this one, since the others already
        act on it. If it does not, this rank raises `Disagreement` after it has met them, and they raise its words when
        they next wait for it.
        """
        started, self._ahead = self._ahead or self._start(wish), None
        wishes, has_news = self._finish(started)
        if not started.wish.stands_for(wish):
            self._refuse(f"rank {self.rank} announced {started.wish}, but came with {wish}")
        plan = decide(wishes, limits)
        return replace(plan, has_news=True) if has_news else plan

    def meet(self, wish: Wish) -> None:
        """Come to a step without playing it; the others raise what `decide` makes of that.

        If they act on a wish that was announced, they raise that this rank left.
        """
        started, self._ahead = self._ahead or self._start(wish), None
        self._finish(started)
        if not started.wish.stands_for(wish):
            self.leave(f"it announced {started.wish}, but came with {wish}")

    def agree_ahead(self, wish: Wish) -> None:
        """Announce the wish of the next step while this one is played; the next `agree` then hardly has to wait."""
        if self._ahead is not None:
            self._refuse(f"rank {self.rank} announced {wish} before it came to play {self._ahead.wish}")
        self._ahead = self._start(wish)

    def share(self, values: Sequence[int]) -> list[tuple[int, ...]]:
        """The values of every rank, by rank; each rank gives as many, at the same place of its program.

        Raises `RankLost`.
        """
        if self._link is None:
            return [tuple(values)]
        self._refuse_if_lost()
        self.num_shared += 1
        exchange = self._shared.start(values)
        self._wait(exchange.is_done, f"agree in step {self.num_steps}")
        return exchange.values()

    def tell(self) -> None:
        """Have a plan say on every rank that there is news: the next one that is agreed on after those under way,
        here or in another agreement of this process."""
        for agreement in (self, *_all_agreements()):
            agreement._has_news = True

    def busy(self) -> AbstractContextManager[None]:
        """While it lasts, this rank tells the others that it compiles, and they wait for it."""
        return nullcontext() if self._link is None else self._roll.compiling()

    @contextmanager
    def compiling(self) -> Generator[None]:
        """What all ranks compile at the same place: none goes on before the last has done so."""
        with self.busy():
            yield
        self.share([0])

    def wait_for(self, work: Work, what: str) -> None:
        """Wait for a collective of the step. Raises `RankLost` if some rank does not come to it."""
        if self._link is None:
            work.wait()
            return
        self._wait(partial(_is_done, work), f"finish {what} of step {self.num_steps}")

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

    def _start(self, wish: Wish) -> _Started:
        self._refuse_if_lost()
        self.num_steps += 1
        has_news, self._has_news = self._has_news, False
        return _Started(wish, None if self._link is None else self._link.start((*wish.packed(), has_news)))

    def _finish(self, started: _Started) -> tuple[list[Wish], bool]:
        """The wishes of all ranks, and whether any has news."""
        if started.exchange is None:
            return [started.wish], False
        self._wait(started.exchange.is_done, f"agree on step {self.num_steps}")
        columns = started.exchange.values()
        return [Wish.unpacked(wish) for *wish, _ in columns], any(has_news for *_, has_news in columns)

    def _wait(self, is_done: Callable[[float], bool], what: str) -> None:
        """Wait for the other ranks, and after a while call the roll too. Raises `RankLost` with the verdict.

        `is_done` waits for so many seconds at most.
        """
        if self._lost:
            raise RankLost(self._lost)
        since = time.monotonic()
        done, failure = _tried(is_done, min(PATIENCE_SECONDS, self._timeout_s / 2))
        if not done:
            call = RollCall(self._roll, self.num_steps, what, since, self._timeout_s)
            call.begin()
            while not (done or failure or call.is_over):
                done, failure = _tried(is_done, POLL_SECONDS)
            if not done:
                call.fail(failure)
                self._lost = call.verdict()
                raise RankLost(self._lost)
            call.end()
        self._met_at = time.monotonic()


def _tried(is_done: Callable[[float], bool], seconds: float) -> tuple[bool, str]:
    """Whether it ends within `seconds`, and what made it fail."""
    try:
        return is_done(seconds), ""
    except (RuntimeError, OSError) as error:
        return False, _cause(error)


def _is_done(work: Work, seconds: float) -> bool:
    """Whether a collective ended within `seconds`; raises what made it fail."""
    try:
        return work.wait(timedelta(seconds=seconds))
    except RuntimeError:
        return work.is_completed() and work.wait()  # the second one raises if the work has failed


def _cause(error: Exception) -> str:
    """What went wrong, without gloo's line of its source and its advice; never nothing."""
    first, *_ = str(error).splitlines() or [""]
    return re.sub(r"^\[[^\]]*\.cc:\d+\] ", "", first).partition(". ")[0] or type(error).__name__


def _connected(roll: Roll, what: str, timeout_s: float) -> Link:
    since = time.monotonic()
    call = RollCall(roll, 0, "connect", since, timeout_s)
    call.begin()
    try:
        link = SocketLink(roll.store_for(what), roll.rank, roll.num_ranks, since + timeout_s)
    except (RuntimeError, OSError) as error:
        call.fail(_cause(error))
        raise RankLost(call.verdict()) from error
    call.end()
    return link
