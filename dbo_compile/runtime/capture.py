"""Capture: each program once per size as a graph of its device, which one launch plays from then on.

The first play of a size is its warm-up, the second is captured: real steps both, so nothing runs that the caller did
not ask for. `capture_all` does it ahead of the first step, largest size first. Whatever cannot be captured is played
as it is, and `refused` has the reason. Knows no CUDA: see `runtime/cuda.py` for a device.
"""

from __future__ import annotations

import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from tqdm import tqdm

from dbo_compile.log import logger
from dbo_compile.runtime.graphs import Captured, GraphDevice, Key, Limits, Play, Player, write

MOST_MOVES = 3
"""How often a program is captured again because an argument that it uses in place lies elsewhere. A weight that moves
again and again ends that; what is written in place is copied there and back then."""

_capturing = threading.Lock()  # one capture at a time: a second one would end both


class _TooMuchMemory(Exception):
    """Completes "it is the least useful size, and ..."."""


class CapturePlayer:
    """Plays programs by `player` until they are captured, then by their graphs.

    Capturing runs nothing, and replaying issues what the uncaptured program would: ranks may capture at different
    steps. It never ends in an error: what goes wrong is logged, kept in `refused`, and played uncaptured. Inside a
    capture of somebody else a program is played uncaptured, and so becomes a part of that graph.
    """

    def __init__(self, player: Player, device: GraphDevice, tensors_on: torch.device, limits: Limits) -> None:
        self.player = player
        self.device = device
        self.tensors_on = tensors_on
        self.limits = limits
        self.graphs: dict[Key, Captured] = {}
        self.refused: dict[Key, str] = {}
        self.calls: Counter[Key] = Counter()
        self._moves: Counter[int] = Counter()
        self._met: dict[Key, list[tuple[int, int]]] = {}
        self._room: dict[int, torch.Tensor] = {}

    def __call__(self, module: Callable[..., Any], rows: Sequence[int], args: Sequence[Any]) -> tuple[Any, ...]:
        if self.device.is_capturing():
            return self.player(module, rows, args)
        play = Play(module, rows, args)
        key = Key.of(play)
        self.calls[key] += 1
        if key in self.graphs:
            self._look_for_moves(key, args)
        elif key in self._met:
            try:
                self._capture(key, play, self._stable(key, args))
            except _TooMuchMemory as why:
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
        for captured in self.graphs.values():
            captured.graph.reset()
        self.graphs.clear()
        self._room.clear()
        self.device.new_pool()

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
            self._met[key] = [_identity(x) for x in play.args]
        return self.player(*play)

    def _capture_each(self, plays: Sequence[Play], bar: Any) -> str:
        """Capture all that can be; stops where that takes too much memory, and returns how much."""
        for play in plays:
            key = Key.of(play)
            bar.set_postfix_str(str(key))
            try:
                self._capture(key, play, self._in_place())
            except _TooMuchMemory as why:
                return str(why)
            bar.update()
        return ""

    def _stable(self, key: Key, args: Sequence[Any]) -> frozenset[int]:
        """The arguments that lie where they did in the last call, and have never moved before."""
        met = self._met[key]
        seen = frozenset(i for i, x in enumerate(args) if _identity(x) == met[i] and not self._moves[i])
        return seen | self._in_place()

    def _in_place(self) -> frozenset[int]:
        """The arguments that are never copied."""
        return self.limits.static | {i for i in self.limits.written if self._moves[i] < MOST_MOVES}

    def _capture(self, key: Key, play: Play, stable: frozenset[int]) -> None:
        """Make a graph of `play`, or note why there is none. While another capture runs, try again at the next call."""
        if key in self.refused or key in self.graphs or not _capturing.acquire(blocking=False):
            return
        try:
            self._check(play)
            self.graphs[key] = self._record(key, play, stable)
            self._met.pop(key, None)
        except _TooMuchMemory:
            raise
        except Exception as error:
            self._refuse(key, str(error) or type(error).__name__)
        finally:
            _capturing.release()

    def _record(self, key: Key, play: Play, stable: frozenset[int]) -> Captured:
        start, before = time.perf_counter(), self.device.memory_used()
        tensors = {i: x for i, x in enumerate(play.args) if isinstance(x, torch.Tensor)}
        pinned = {i: x for i, x in tensors.items() if i in stable}
        copied = {i: self._buffer(i, x) for i, x in tensors.items() if i not in stable}
        args = [copied.get(i, x) for i, x in enumerate(play.args)]
        graph, results = self.device.capture(lambda: self.player(play.module, play.rows, args))
        num_bytes = self.device.memory_used() - before
        if self.limits.most_bytes is not None and self.num_bytes + num_bytes > self.limits.most_bytes:
            graph.reset()
            raise _TooMuchMemory(
                f"with it, graphs take {(self.num_bytes + num_bytes) / 2**30:.2f} GiB, more than "
                f"graph_memory_gib={self.limits.most_bytes / 2**30:g}"
            )
        seconds = time.perf_counter() - start
        logger.info("captured %s: %.1f MiB, %.2f s", key, num_bytes / 2**20, seconds)
        addresses = [pinned[i].data_ptr() if i in pinned else None for i in range(len(args))]
        returned = self.limits.written & copied.keys()
        return Captured(graph, pinned, copied, returned, addresses, results, num_bytes, seconds)

    def _buffer(self, index: int, x: torch.Tensor) -> torch.Tensor:
        """Memory for an argument that comes from elsewhere in each call; smaller sizes lie in that of larger ones."""
        num_elements = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
        num_elements = num_elements if x.numel() else 0
        if index not in self._room or self._room[index].numel() < num_elements:
            self._room[index] = torch.empty(num_elements, dtype=x.dtype, device=x.device)
        buffer = self._room[index].as_strided(x.shape, x.stride())
        write(buffer, x)
        return buffer

    def _check(self, play: Play) -> None:
        for i, x in enumerate(play.args):
            if isinstance(x, torch.Tensor) and x.device != self.tensors_on:
                raise ValueError(
                    f"{self.limits.name(i)} is on {x.device} and the others on {self.tensors_on}: a graph would keep "
                    f"the values that it has now; move it to {self.tensors_on}"
                )

    def _look_for_moves(self, key: Key, args: Sequence[Any]) -> None:
        """Forget the graph if something that it reads in place has moved: it is captured anew at the next call.

        What moves is copied from then on.
        """
        captured = self.graphs[key]
        if captured.is_at_home(args):
            return
        moved = [i for i, x in captured.pinned.items() if args[i].data_ptr() != x.data_ptr()]
        self._moves.update(moved)
        captured.graph.reset()
        del self.graphs[key]
        stuck = [i for i in moved if i in self.limits.static and self._moves[i] >= MOST_MOVES]
        if stuck:
            self._refuse(key, f"{self.limits.name(stuck[0])} lies elsewhere in every call; keep it in one place")

    def _refuse(self, key: Key, reason: str) -> None:
        self.refused[key] = reason
        self._met.pop(key, None)
        logger.warning("%s is played uncaptured: %s", key, reason)


def _identity(x: Any) -> tuple[int, int]:
    return (id(x), x.data_ptr()) if isinstance(x, torch.Tensor) else (0, 0)
