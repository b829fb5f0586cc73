"""Capture: each program once per size as a graph of its device, which one launch plays from then on.

The first play of a size is its warm-up, the second is captured: real steps both, so nothing runs that the caller did
not ask for. `capture_all` does it ahead of the first step, largest size first. Whatever cannot be captured is played
as it is, and `refused` has the reason. Ranks that play together have graphs of the same plays, or none of them has
one. Knows no CUDA: see `runtime/cuda.py` for a device.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import partial, reduce
from operator import or_
from typing import Any

import torch
from tqdm import tqdm

from dbo_compile.log import logger
from dbo_compile.runtime.agree import Agreement
from dbo_compile.runtime.graphs import Captured, GraphDevice, Key, Limits, Place, Play, Player, Room
from dbo_compile.runtime.moved import lent
from dbo_compile.runtime.obstacles import Busy, Obstacle, TooMuchMemory, Uncapturable, on_all_ranks, one_at_a_time

MOST_MOVES = 3
"""How often a program is captured again because an argument that it uses in place lies elsewhere. A weight that moves
again and again ends that; what is written in place is copied there and back then."""


MOST_BITS = 62
"""How many token inputs can be told apart in one number of an exchange."""


class CapturePlayer:
    """Plays programs by `player` until they are captured, then by their graphs.

    A collective has to be captured on all of its ranks or on none (NVIDIA, "Using NCCL with CUDA Graphs"). So `ranks`
    must bring the same plays in the same order, and exchange what became of each capture; a replay needs no exchange
    of its own. Where something has moved from under a graph on one rank, this rank brings it back for one replay,
    and with the next step all of them forget their graphs: see `Agreement.tell` and `settle`.

    It never ends in an error, but for the loss of a rank: what goes wrong is logged, kept in `refused`, and played
    uncaptured. Inside a capture of somebody else a program is played uncaptured, and so becomes a part of that graph.
    """

    def __init__(
        self,
        player: Player,
        device: GraphDevice,
        tensors_on: torch.device,
        limits: Limits,
        ranks: Agreement | None = None,
    ) -> None:
        self.player = player
        self.device = device
        self.tensors_on = tensors_on
        self.limits = limits
        self.ranks = ranks or Agreement(None, timeout_s=1.0)
        self.graphs: dict[Key, Captured] = {}
        self.refused: dict[Key, str] = {}
        self.calls: Counter[Key] = Counter()
        self.num_unsteady = 0
        """How many plays were warm-ups or captures, and so say nothing of how long others take."""
        self._moves: Counter[int] = Counter()
        self._moved: set[int] = set()
        self._bit_of = {i: bit for bit, i in enumerate(sorted(limits.tokens & limits.written)[:MOST_BITS], start=1)}
        self._met: dict[Key, list[Place]] = {}
        self._room = Room()

    def __call__(self, module: Callable[..., Any], rows: Sequence[int], args: Sequence[Any]) -> tuple[Any, ...]:
        if self.device.is_capturing():
            return self.player(module, rows, args)
        play = Play(module, rows, args)
        key = Key.of(play)
        self.calls[key] += 1
        self.num_unsteady += key not in self.graphs and key not in self.refused
        if key in self.graphs:
            return self._replay(key, play)
        if key in self._met:
            try:
                self._capture(key, play, self._stable(key, args))
            except Busy:
                logger.debug("%s is captured later: another capture runs", key)
            except Obstacle as why:
                self._refuse(key, str(why))
        if key in self.graphs:
            return self.graphs[key].replay(args, clone=self.limits.clone)
        return self._play(key, play)

    def capture_all(self, plays: Sequence[Play]) -> None:
        """Capture `plays` now, largest first, so that smaller ones find room in the memory of larger ones.

        Each is played once before, which all ranks must do together; who calls this restores what that wrote. Where
        graphs would take more than `most_bytes`, the least useful size goes uncaptured: the one played least so far,
        and of those the largest, whose launches cost least beside its work.
        """
        plays = sorted(plays, key=lambda p: -sum(p.rows))
        with tqdm(total=len(plays), desc="dbo: capturing", disable=not sys.stderr.isatty(), leave=False) as bar:
            for play in plays:
                self._play(Key.of(play), play)
            while why := self._capture_each(plays, bar):
                least = min(plays, key=lambda p: (self.calls[Key.of(p)], -sum(p.rows)))
                plays.remove(least)
                self._refuse(Key.of(least), f"it is the least useful size, and {why}")
                self.release()
                bar.reset(len(plays))

    def release(self) -> None:
        """Forget every graph, and give their memory back."""
        self.forget(lambda _key: True)
        self._room = Room()

    def restart(self) -> None:
        """Forget all that was met, captured or refused so far."""
        self.release()
        self.refused.clear()
        self.calls.clear()
        self._moves.clear()
        self._moved.clear()

    def forget(self, is_lost: Callable[[Key], bool]) -> None:
        """Forget some graphs; what is played again is captured again. All ranks forget those of the same plays."""
        lost = [key for key in self.graphs if is_lost(key)]
        for key in lost:
            self.graphs.pop(key).graph.reset()
        for key in [key for key in self._met if is_lost(key)]:
            del self._met[key]
        if lost:
            self._renew_pool()

    @property
    def news(self) -> int:
        """What other ranks must know of what has moved: a bit for each token input that is written in place, of those
        that have one, and the lowest for all other inputs. 0: nothing has."""
        return sum({1 << self._bit_of.get(i, 0) for i in self._moved})

    def settle(self, news: Iterable[int]) -> None:
        """Forget all graphs if there are news on any rank; all ranks call this at once.

        A token input that is written in place lies elsewhere wherever it is padded: on some ranks, again and again.
        So one that has moved anywhere is copied on all of them.
        """
        bits = reduce(or_, news)
        self._moved.clear()
        self._moves.update({i: MOST_MOVES for i, bit in self._bit_of.items() if bits >> bit & 1})
        if bits:
            self.forget(lambda _key: True)

    @property
    def num_bytes(self) -> int:
        """What all graphs together have taken from the device."""
        return sum(captured.num_bytes for captured in self.graphs.values())

    def __str__(self) -> str:
        rows = [f"{key}: {c.num_bytes / 2**20:.1f} MiB, {c.seconds:.2f} s" for key, c in self.graphs.items()]
        rows += [f"{key}: not captured, {reason}" for key, reason in self.refused.items()]
        return "\n".join([*rows, f"{len(self.graphs)} graphs, {self.num_bytes / 2**20:.1f} MiB in all"])

    # -- capturing ----------------------------------------------------------------------------------------------------

    def _play(self, key: Key, play: Play) -> tuple[Any, ...]:
        if key not in self.refused:
            self._met[key] = [Place.of(x) for x in play.args]
        return self.player(*play)

    def _capture_each(self, plays: Sequence[Play], bar: Any) -> str:
        """Capture all that can be; stops where that takes too much memory, and returns how much."""
        for play in plays:
            key = Key.of(play)
            bar.set_postfix_str(str(key))
            try:
                self._capture(key, play, self._in_place())
            except TooMuchMemory as why:
                return str(why)
            except Uncapturable as why:
                self._refuse(key, str(why))
            except Busy:
                logger.info("%s is captured when it is played: another capture runs", key)
            bar.update()
        return ""

    def _stable(self, key: Key, args: Sequence[Any]) -> frozenset[int]:
        """The arguments that are what they were in the last call, and have never moved before."""
        met = self._met[key]
        seen = frozenset(i for i, x in enumerate(args) if met[i].has(x) and not self._moves[i])
        return seen | self._in_place()

    def _in_place(self) -> frozenset[int]:
        """The arguments that are never copied."""
        return self.limits.static | {i for i in self.limits.written if self._moves[i] < MOST_MOVES}

    def _capture(self, key: Key, play: Play, stable: frozenset[int]) -> None:
        """Make a graph of `play` on every rank; raises an `Obstacle` on all of them if one has any."""
        if key in self.refused or key in self.graphs:
            return
        with one_at_a_time() as is_free:
            on_all_ranks(self.ranks, partial(self._check, play, is_free=is_free))
            try:
                record = partial(self._record, key, play, stable)
                self.graphs[key] = on_all_ranks(self.ranks, record, drop=lambda made: made.graph.reset())
            except Obstacle:
                self._renew_pool()
                raise
        self._met.pop(key, None)

    def _renew_pool(self) -> None:
        """What lies in a pool without graphs, a workspace of a library perhaps, is nobody's."""
        if not self.graphs:
            self.device.new_pool()

    def _record(self, key: Key, play: Play, stable: frozenset[int]) -> Captured:
        start, before = time.perf_counter(), self.device.memory_used()
        tensors = {i: x for i, x in enumerate(play.args) if isinstance(x, torch.Tensor)}
        pinned = {i: x.detach() for i, x in tensors.items() if i in stable}  # keeps the memory if `x.data` is replaced
        copied = {i: self._room.copy(i, x) for i, x in tensors.items() if i not in stable}
        args = [copied.get(i, pinned.get(i, x)) for i, x in enumerate(play.args)]
        with self.ranks.busy():
            graph, results = self.device.capture(lambda: self.player(play.module, play.rows, args))
        num_bytes = self.device.memory_used() - before
        if self.limits.most_bytes is not None and self.num_bytes + num_bytes > self.limits.most_bytes:
            graph.reset()
            raise TooMuchMemory(
                f"with it, graphs take {(self.num_bytes + num_bytes) / 2**30:.2f} GiB, more than "
                f"graph_memory_gib={self.limits.most_bytes / 2**30:g}"
            )
        seconds = time.perf_counter() - start
        logger.info("captured %s: %.1f MiB, %.2f s", key, num_bytes / 2**20, seconds)
        addresses = [pinned[i].data_ptr() if i in pinned else None for i in range(len(args))]
        returned = self.limits.written & copied.keys()
        return Captured(graph, pinned, copied, returned, addresses, results, num_bytes, seconds)

    def _check(self, play: Play, *, is_free: bool) -> None:
        if not is_free:
            raise Busy
        for i, x in enumerate(play.args):
            if isinstance(x, torch.Tensor) and x.device != self.tensors_on:
                raise Uncapturable(
                    f"{self.limits.name(i)} is on {x.device} and the others on {self.tensors_on}: a graph would keep "
                    f"the values that it has now; move it to {self.tensors_on}"
                )
        stuck = [i for i in self.limits.static if self._moves[i] >= MOST_MOVES]
        if stuck:
            raise Uncapturable(f"{self.limits.name(min(stuck))} lies elsewhere in every call; keep it in one place")

    def _replay(self, key: Key, play: Play) -> tuple[Any, ...]:
        """Replay a graph. If something that it uses in place has moved, it is forgotten: a rank by itself plays
        uncaptured at once, one among others brings back what has moved, and tells them.

        What has moved is copied from then on.
        """
        captured, args = self.graphs[key], play.args
        if captured.is_at_home(args):
            return captured.replay(args, clone=self.limits.clone)
        moved = captured.moved(args)
        self._moves.update(set(moved) - self._moved)
        if self.ranks.size == 1:
            self.forget(key.__eq__)
            return self._play(key, play)
        self._moved.update(moved)
        self.ranks.tell()
        with lent([(captured.pinned[i], args[i]) for i in moved]):
            return captured.replay(args, clone=self.limits.clone)

    def _refuse(self, key: Key, reason: str) -> None:
        self.refused[key] = reason
        self._met.pop(key, None)
        logger.warning("%s is played uncaptured: %s", key, reason)


def uncaptured(player: Player) -> Player:
    """What plays step by step under a player that captures."""
    while isinstance(player, CapturePlayer):
        player = player.player
    return player
