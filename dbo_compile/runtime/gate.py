"""The equality gate: whether two plays of a step gave the same, row by row.

Rounding can flip a routing choice, since the path of a matrix product depends on its number of rows: then a token
differs a lot without any fault. So rows are judged, and the yardstick is how many rows differ between two unsplit
plays whose padding differs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dbo_compile.log import logger
from dbo_compile.runtime.agree import Agreement
from dbo_compile.runtime.cuts import Cut
from dbo_compile.runtime.signature import State
from dbo_compile.runtime.tune import SPLIT
from dbo_compile.runtime.ways import Programs, Ways

TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}
"""How far a value may be off, relative to the largest of its tensor: rounding through some dozen layers stays
below, and models of 64 bits route in 32."""


MOST_ROUNDED = 0.25
"""The share of rows that rounding may change; more is an op that sees the padding."""
YARDSTICK_ROWS = 8
"""How many more rows of padding the yardstick has."""


class Gate:
    """Judges the first split call of a graph, every one or none (`mode`), and says whether it may be split on.

    When it refutes the programs, `recompile` makes others that trust nothing, or None if nothing was on trust.
    """

    def __init__(self, ways: Ways, mode: str, recompile: Callable[[], Programs | None]) -> None:
        self.refuted = ""
        """Why the graph is split no more."""
        self._ways = ways
        self._judges_all = mode == "every-call"
        self._is_done = mode == "never"
        self._recompile = recompile

    @property
    def is_wanted(self) -> bool:
        return not self.refuted and (self._judges_all or not self._is_done)

    def play(self, cut: Cut, num_rows: int, args: Sequence[Any], recut: Callable[[], Cut]) -> Sequence[Any]:
        """Play unsplit and split, and keep splitting only if both give the same on every rank.

        If they do not, and something is taken on trust, programs that do not trust it get a second chance; `recut`
        cuts the step for them.
        """
        trial = Trial(self._ways, self._ways.agreement, num_rows, args)
        fault = trial.fault(cut)
        if fault and cut.rows and (other := self._without_trust(fault)):
            self._ways.replace(other)
            cut = recut()
            fault = trial.fault(cut) if cut.rows else fault
        trial.close()
        self._is_done = True
        if fault:
            self.refuted = f"splitting changed {fault}: some op mixes tokens, and its rule does not say so"
            logger.warning("%s. The graph is not split any more; dbo_compile.explain shows its ops", self.refuted)
        return trial.results

    def _without_trust(self, fault: str) -> Programs | None:
        trusts = self._ways.programs.trusts
        with self._ways.agreement.compiling():
            programs = self._recompile()
        if programs:
            logger.warning("splitting changed %s, so this is not taken on trust any more: %s", fault, "; ".join(trusts))
        return programs


class Trial:
    """Judges one step: plays it unsplit, and then split from the same state, as often as `fault` is asked.

    `close` leaves everything as the play left it whose results count. Ranks take part at the same place.
    """

    def __init__(self, ways: Ways, agreement: Agreement, num_rows: int, args: Sequence[Any]) -> None:
        self._ways = ways
        self._agreement = agreement
        self._num_rows = num_rows
        self._args = args
        self._before = State(ways.signature, args)
        self._want = self._before.apart(ways.unsplit(num_rows, args))
        self._after = State(ways.signature, args)
        self.results: Sequence[Any] = self._want
        """What the step gave: split if that was right, unsplit else."""

    def fault(self, cut: Cut) -> str:
        """What splitting changed, on any rank; "" if nothing."""
        self._before.restore()
        got = self._ways.play(SPLIT, cut, self._num_rows, self._args)
        fault = self._judged(got)
        self.results = self._want if fault else got
        return fault

    def close(self) -> None:
        """Have what is written in place fit the results."""
        if self.results is self._want:
            self._after.restore()

    def _judged(self, got: Sequence[Any]) -> str:
        num_results = len(self._want)
        off = difference([*got, *self._before.written], [*self._want, *self._after.values])
        if not self._on_any_rank(off.first is not None):
            return ""
        worst = off.first if self._ways.signature.unpaddable else off.beyond(self._yardstick(off))
        if not self._on_any_rank(worst is not None):
            return ""
        if worst is None:
            return "a result on another rank"
        what = f"result {worst} of the graph" if worst < num_results else "what it writes in place"
        return f"{what}, in {off.bad_rows[worst]} of {off.num_rows[worst]} rows"

    def _yardstick(self, off: Difference) -> Difference:
        """How far two unsplit plays differ of which one has more padding; state counts like the worst result."""
        signature, num_rows = self._ways.signature, self._num_rows + YARDSTICK_ROWS
        got = State(signature, self._args)
        self._before.restore()
        longer = self._ways.unsplit(num_rows, signature.padded(self._args, num_rows))
        usual = difference(signature.unpadded(longer, num_rows, self._num_rows), self._want)
        got.restore()
        worst = max((bad / n for bad, n in zip(usual.bad_rows, usual.num_rows, strict=True) if n), default=0.0)
        state = [round(worst * n) for n in off.num_rows[len(self._want) :]]
        return Difference((*usual.bad_rows, *state), off.num_rows)

    def _on_any_rank(self, here: bool) -> bool:
        return any(there for there, in self._agreement.share([here]))


@dataclass(frozen=True, slots=True)
class Difference:
    """How many rows of each value differ, of how many. The last dim of a value is a row."""

    bad_rows: tuple[int, ...]
    num_rows: tuple[int, ...]

    @property
    def first(self) -> int | None:
        """The first value in which any row differs."""
        return next((i for i, bad in enumerate(self.bad_rows) if bad), None)

    def beyond(self, usual: Difference) -> int | None:
        """The first value in which more rows differ than rounding explains: twice as many as usually, or so many
        usually that it is no rounding (an op that mixes tokens sees padding as well)."""
        pairs = zip(self.bad_rows, usual.bad_rows, usual.num_rows, strict=True)
        return next(
            (i for i, (bad, few, n) in enumerate(pairs) if bad > 2 * few or (bad and few > MOST_ROUNDED * n)), None
        )


def difference(got: Sequence[Any], want: Sequence[Any]) -> Difference:
    rows = [_rows(a, b) for a, b in zip(got, want, strict=True)]
    return Difference(tuple(bad for bad, _ in rows), tuple(n for _, n in rows))


def _rows(got: Any, want: Any) -> tuple[int, int]:
    """How many rows differ, of how many."""
    if not isinstance(want, torch.Tensor):
        return int(got != want), 1
    num_rows = want.numel() // max(1, want.shape[-1]) if want.ndim > 1 else want.numel()
    if got.shape != want.shape or got.dtype != want.dtype:
        return max(1, num_rows), max(1, num_rows)
    if not want.numel():
        return 0, 0
    return int(_differs(got, want).reshape(num_rows, -1).any(1).sum()), num_rows


def _differs(got: torch.Tensor, want: torch.Tensor) -> torch.Tensor:
    same = (got == want) | (got.isnan() & want.isnan())
    if not (want.is_floating_point() or want.is_complex()):
        return ~same
    finite = want.abs().nan_to_num(nan=0.0, posinf=0.0)
    tolerance = TOLERANCE.get(want.abs().dtype, 3e-2) * finite.max()
    return ~(same | ((got - want).abs() <= tolerance))
