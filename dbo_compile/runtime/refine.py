"""Measured costs: what each code takes on this machine, so that the split program can be made again by them.

Steps are timed on the user's own calls, one by one and nothing overlapping, on all rows and on those of a microbatch.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from dbo_compile.ir.schedule import Step
from dbo_compile.runtime.agree import Agreement
from dbo_compile.runtime.capture import uncaptured
from dbo_compile.runtime.cuts import Cut
from dbo_compile.runtime.steps import around_steps
from dbo_compile.runtime.tune import SPLIT, UNSPLIT, Costs, Size
from dbo_compile.runtime.ways import Programs, Ways

CALLS = 4
"""How often a size is measured split, and as often unsplit; the first time, when memory is cold, does not count."""


class Refiner:
    """Measures sizes, and has `replan` make a split program for the costs of each; None if none is better."""

    def __init__(self, ways: Ways, agreement: Agreement, replan: Callable[[Costs], Programs | None]) -> None:
        self.programs: dict[Size, Programs | None] = {}
        self.costs: dict[Size, Costs] = {}
        self._ways = ways
        self._agreement = agreement
        self._replan = replan
        self._taken: dict[Size, list[dict[str, float]]] = defaultdict(list)

    def measure(self, size: Size, cut: Cut, num_rows: int, args: Sequence[Any]) -> Sequence[Any]:
        """Play a call step by step, split and unsplit in turn; the last of them makes the program of the size."""
        taken = self._taken[size]
        way = (SPLIT, UNSPLIT)[len(taken) % 2]
        watch = _Stopwatch(self._ways.programs.codes)
        results = self._ways.play(way, cut, num_rows, args, by=watch.player(self._ways.player))
        taken.append(watch.seconds())
        if len(taken) == 2 * CALLS:
            self.make(size, self._agreed(taken))
            del self._taken[size]
        return results

    def make(self, size: Size, costs: Costs) -> None:
        """Make the program for these costs, which all ranks have alike."""
        self.costs[size] = costs
        with self._agreement.compiling():
            self.programs[size] = self._replan(costs)

    def forget(self) -> None:
        self.programs.clear()
        self.costs.clear()
        self._taken.clear()

    def _agreed(self, taken: Sequence[Mapping[str, float]]) -> Costs:
        """The slowest rank counts for compute. For a collective the fastest: the others waited for it."""
        codes = sorted(taken[0])
        halves, wholes = ([statistics.median(t[c] for t in taken[i::2][1:]) for c in codes] for i in (0, 1))
        ranks = self._agreement.share([round(s * 1e9) for s in (*halves, *wholes)])
        comm = set(self._ways.programs.comm_codes)
        agreed = [
            (min if codes[i % len(codes)] in comm else max)(values) / 1e9
            for i, values in enumerate(zip(*ranks, strict=True))
        ]
        return dict(zip(codes, zip(agreed[: len(codes)], agreed[len(codes) :], strict=True), strict=True))


class _Stopwatch:
    """Times the steps of a call by their code; a collective from its start to its end, before anything else starts."""

    def __init__(self, code_of: Mapping[str, str]) -> None:
        self._code_of = code_of
        self._taken: dict[str, list[float]] = defaultdict(list)

    def player(self, player: Any) -> Callable[..., Any]:
        """Plays as `player` does, step by step and never captured."""
        player = uncaptured(player)
        return lambda module, rows, args: player(around_steps(module, lambda _lanes: self._timed), rows, args)

    def seconds(self) -> dict[str, float]:
        return {code: statistics.mean(taken) for code, taken in self._taken.items()}

    def _timed(self, step: Step, fn: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        start = time.perf_counter()
        results = fn(*args)
        if hasattr(args[0] if args else None, "finish"):  # the lanes: a collective was started on them
            args[0].finish()
        synchronize(args)
        self._taken[self._code_of[step.segment]].append(time.perf_counter() - start)
        return results


def synchronize(args: Sequence[Any]) -> None:
    """Wait until the accelerators that the arguments are on have done what they were given."""
    for device in {x.device for x in args if isinstance(x, torch.Tensor) and x.device.type != "cpu"}:
        torch.accelerator.synchronize(device)
