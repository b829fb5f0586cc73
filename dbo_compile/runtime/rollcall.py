"""Finds out which ranks did not come, by signs of life in the store of their group, once a collective takes long.

A step in time never touches the store. All that does runs on threads of its own, with a limit to how long it is
waited for: the store may live on the very rank that is gone.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from itertools import count

from torch.distributed.distributed_c10d import PrefixStore, Store

from dbo_compile.runtime.comparison import listed

BEAT_SECONDS = 0.2
WATCH_SECONDS = 1.0
"""How long signs of life are watched before a rank is called silent: longer than a rank may wait before its first."""
GRACE_SECONDS = WATCH_SECONDS + 3 * BEAT_SECONDS
PROMPT_SECONDS = 1.0
BUSY_SECONDS = 1800.0
"""How long a rank is waited for that says that it compiles."""
COMPILING = -1
"""The step of a rank that compiles."""


class Roll:
    """What ranks know of each other beside their collectives: the last step each one waited in, and the verdict.

    The ranks of a group make its rolls in the same order: that numbers them.
    """

    def __init__(self, store: Store, rank: int, num_ranks: int) -> None:
        self.rank = rank
        self.num_ranks = num_ranks
        self._store = store
        self._keys = f"dbo_compile/roll{store.add(f'dbo_compile/rolls/{rank}', 1)}"

    def store_for(self, what: str) -> PrefixStore:
        """A part of the store that is used for `what` alone."""
        return PrefixStore(f"{self._keys}/{what}", self._store)

    def sign(self, step: int, beat: int) -> None:
        """Say that this rank is alive and has come to `step`."""
        self._store.set(f"{self._keys}/{self.rank}", f"{step} {beat}")

    def signs(self) -> dict[int, str]:
        """The newest sign of life of every other rank that gave one: its step, and a number that grows."""
        others = [rank for rank in range(self.num_ranks) if rank != self.rank]
        found = {rank: self._read(str(rank)) for rank in others}
        return {rank: sign for rank, sign in found.items() if sign}

    @contextmanager
    def compiling(self) -> Generator[None]:
        """Give signs of life for as long as it lasts, although this rank has come to no step."""
        ended = threading.Event()

        def live() -> None:
            for beat in count():
                self.sign(COMPILING, beat)
                if ended.wait(BEAT_SECONDS):
                    return

        threading.Thread(target=_quietly, args=(live,), daemon=True).start()
        try:
            yield
        finally:
            ended.set()

    def verdict(self) -> str:
        return self._read("verdict")

    def publish(self, verdict: str) -> str:
        """The verdict of the first rank that came to one, and so the same on every rank."""
        return self._store.compare_set(f"{self._keys}/verdict", "", verdict).decode()

    def promptly(self, ask: Callable[[], str]) -> str:
        """The answer of the store, or "" if it takes longer than one may wait for it."""
        answers: list[str] = []
        thread = threading.Thread(target=_quietly, args=(lambda: answers.append(ask()),), daemon=True)
        thread.start()
        thread.join(PROMPT_SECONDS)
        return answers[0] if answers else ""

    def _read(self, name: str) -> str:
        key = f"{self._keys}/{name}"
        return self._store.get(key).decode() if self._store.check([key]) else ""


class RollCall:
    """Gives signs of life while a rank waits in a step, and names the ranks that give none.

    It judges `timeout_s` after the wait began (`since`, a time of `time.monotonic`), or sooner: after `fail`, as soon
    as one rank only can have caused it. A rank that came and then fell silent counts as not come. While one that has
    not come says that it compiles, all wait, up to `BUSY_SECONDS`, and from then on `timeout_s` once more.
    """

    def __init__(self, roll: Roll, step: int, what: str, since: float, timeout_s: float) -> None:
        self._roll = roll
        self._step = step
        self._what = what
        self._timeout_s = timeout_s
        self._deadline = since + timeout_s
        self._last_deadline = since + max(timeout_s, BUSY_SECONDS)
        self._since = time.monotonic()
        self._num_beats = 0
        self._verdict = ""
        self._failure = ""
        self._all_came = False
        self._ended = threading.Event()
        self._thread = threading.Thread(target=_quietly, args=(self._call,), daemon=True)

    @property
    def is_over(self) -> bool:
        """Whether there is a verdict, or none comes any more; until then the collective may still end well."""
        return bool(self._verdict) or time.monotonic() >= self._deadline + GRACE_SECONDS

    def begin(self) -> None:
        if self._thread.ident is None:
            self._thread.start()

    def fail(self, failure: str) -> None:
        """The collective itself has failed: some rank is gone, whichever it is."""
        self._failure = failure

    def end(self) -> None:
        self._ended.set()

    def verdict(self) -> str:
        """Wait for it; it comes until `GRACE_SECONDS` after the deadline, whether the store answers or not."""
        self.begin()
        self._thread.join(max(0.0, self._deadline + GRACE_SECONDS - time.monotonic()))
        silent = f"ranks did not all {self._what}, nor does their store say who is missing: has the rank died it is on?"
        return self._verdict or f"{silent} {self._failure}".rstrip()

    def _call(self) -> None:
        while not self._ended.is_set():
            self._beat()
            if found := self._roll.verdict() or self._judge():
                self._verdict = found
                return
            self._ended.wait(BEAT_SECONDS)

    def _beat(self) -> None:
        self._num_beats += 1
        self._roll.sign(self._step, self._num_beats)

    def _judge(self) -> str:
        if not self._failure and time.monotonic() < self._deadline:
            return ""
        missing, compiling = self._missing()
        now = time.monotonic()
        if self._ended.is_set():
            return ""
        if not self._failure and missing and missing == compiling and now < self._last_deadline:
            self._deadline = min(self._last_deadline, now + self._timeout_s)
        elif not self._failure and not missing and not self._all_came:
            self._all_came, self._deadline = True, now  # the last one has just come: one more look
        elif len(missing) == 1 or now >= self._deadline:
            return self._roll.publish(self._words(missing))
        return ""

    def _missing(self) -> tuple[list[int], list[int]]:
        """The ranks that did not come to the step, or show no life any more; and those of them that compile."""
        before = self._roll.signs()
        until = time.monotonic() + WATCH_SECONDS
        while time.monotonic() < until and not self._ended.wait(BEAT_SECONDS):
            self._beat()
        after = self._roll.signs()
        others = [rank for rank in range(self._roll.num_ranks) if rank != self._roll.rank]
        lives = {rank: rank in after and after[rank] != before.get(rank) for rank in others}
        missing = [rank for rank in others if not lives[rank] or _step_of(after[rank]) < self._step]
        return missing, [rank for rank in missing if lives[rank] and _step_of(after[rank]) == COMPILING]

    def _words(self, missing: Sequence[int]) -> str:
        waited = f"within {time.monotonic() - self._since:.1f} s"
        why = f" ({self._failure})" if self._failure else ""
        if missing:
            return f"{listed(missing)} did not {self._what} {waited}{why}"
        return f"all ranks are there, but did not {self._what} {waited}{why}"


def _step_of(sign: str) -> int:
    return int(sign.split()[0])


def _quietly(run: Callable[[], object]) -> None:
    """Run what asks a store; one that is gone raises, which whoever waits for an answer sees by there being none."""
    try:
        run()
    except (RuntimeError, OSError, ValueError):
        return
