"""The equality gate: whether two plays of a step gave the same, row by row.

Rounding can flip a routing choice, since the path of a matrix product depends on its number of rows: then a token
differs a lot without any fault. So rows are judged, and the yardstick is how many rows differ between two unsplit
plays of which one has twice the rows. What is slight and yet more than that is judged again, on the next call: rounding
does not strike every time, and a fault does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dbo_compile import compat
from dbo_compile.log import logger
from dbo_compile.runtime.agree import Agreement
from dbo_compile.runtime.capture import uncaptured
from dbo_compile.runtime.comparison import listed
from dbo_compile.runtime.cuts import Cut
from dbo_compile.runtime.signature import Signature, State
from dbo_compile.runtime.tune import SPLIT
from dbo_compile.runtime.ways import Programs, Ways

TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}
"""How far a value may be off, relative to the largest of its tensor: rounding through some dozen layers stays
below, and models of 64 bits route in 32."""


MOST_ROUNDED = 0.25
"""The share of rows that rounding may change; more is an op that sees the padding."""
MOST_PADDING = 4096
"""How many rows of padding the yardstick has at most; as many as there are rows, if those are fewer. A product of half
the rows often takes another path, as one of twice the rows does, but one of many thousand takes the same as of more."""
SLIGHT = 0.01
"""The share of rows, or else a single one, that may differ by chance where the yardstick has seen none."""
MOST_SLIGHT = 3
"""How many calls in a row may differ slightly."""
MOST_OF_FREE = 0.8
"""The share of the free memory of a device that copies of what is written in place may take."""
GIB = 2**30


class Gate:
    """Judges split calls of a graph, and says whether it may be split on: the first one and each that is more than
    twice as large as any judged before, every one, or none (`mode`). What a fault does may show in large steps alone.

    When it refutes the programs, `recompile` makes others that trust nothing, or None if nothing was on trust.
    """

    def __init__(self, ways: Ways, mode: str, recompile: Callable[[], Programs | None]) -> None:
        self.refuted = ""
        """Why the graph is split no more."""
        self._ways = ways
        self._mode = mode
        self._most_judged = 0
        self._recompile = recompile
        self._num_slight = 0
        self._was_left_out = False

    def wants(self, num_tokens: int) -> bool:
        """Whether a step of so many tokens, on the rank that has most, is to be judged if it is split."""
        if self.refuted or self._mode == "never":
            return False
        return self._mode == "every-call" or self._num_slight > 0 or num_tokens > 2 * self._most_judged

    def restart(self) -> None:
        """Judge all sizes again."""
        self._most_judged, self._num_slight = 0, 0

    def play(
        self, cut: Cut, num_rows: int, args: Sequence[Any], recut: Callable[[], Cut], *, num_tokens: int
    ) -> Sequence[Any]:
        """Play unsplit and split, and keep splitting only if both give the same on every rank.

        `num_tokens` is what `wants` was asked of, on all ranks alike. If they do not give the same, and something is
        taken on trust, programs that do not trust it get a second chance; `recut` cuts the step for them.
        """
        if not self._has_room(num_rows, args):
            self._most_judged = max(self._most_judged, num_tokens)
            return self._ways.play(SPLIT, cut, num_rows, args)
        trial = Trial(self._ways, self._ways.agreement, num_rows, args)
        fault = trial.fault(cut)
        if fault and not self._is_chance(trial) and cut.rows and (other := self._without_trust(fault)):
            self._ways.replace(other)
            self._num_slight = 0
            cut = recut()
            fault = trial.fault(cut) if cut.rows else fault
        trial.close()
        if fault and cut.rows and self._is_chance(trial):
            self._num_slight += 1
            logger.info("splitting changed %s, as rounding may: the next call is judged as well", fault)
            return trial.results
        self._num_slight = 0
        self._most_judged = max(self._most_judged, num_tokens)
        if fault:
            self.refuted = f"splitting changed {fault}: some op mixes tokens, and its rule does not say so"
            logger.warning("%s. The graph is not split any more; dbo_compile.explain shows its ops", self.refuted)
        return trial.results

    def _is_chance(self, trial: Trial) -> bool:
        """Whether a fault may be no fault: the results that count are then the unsplit ones all the same."""
        return trial.is_slight and self._num_slight < MOST_SLIGHT

    def _has_room(self, num_rows: int, args: Sequence[Any]) -> bool:
        """Whether every rank has memory for the copies that a trial makes; says so if one has not."""
        needed, free = bytes_of_trial(self._ways.signature, num_rows, args), free_bytes(args)
        found = self._ways.agreement.share([needed, int(MOST_OF_FREE * free)])
        short = [rank for rank, (needs, has) in enumerate(found) if needs > has]
        if short and not self._was_left_out:
            self._was_left_out = True
            needs, has = found[short[0]]
            logger.warning(
                "the gate is left out, and nothing proves that splitting is right here: copies of what the graph "
                "writes in place take %.1f GiB, and %.1f GiB may be taken on %s. Play a step with smaller caches "
                'first, in the same process or in a test; gate="never" says that you have',
                needs / GIB, has / GIB, listed(short),
            )
        return not short

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
        self.is_slight = False
        """Whether rounding may explain what splitting changed, by chance."""
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
        usual = off.none if self._ways.signature.unpaddable else self._yardstick(off)
        worst = off.beyond(usual)
        found = [bad for (bad,) in self._agreement.share([0 if worst is None else 1 if off.is_slight(usual) else 2])]
        self.is_slight = max(found) == 1
        if not any(found):
            return ""
        if worst is None:
            return "a result on another rank"
        what = f"result {worst} of the graph" if worst < num_results else "what it writes in place"
        return f"{what}, in {off.bad_rows[worst]} of {off.num_rows[worst]} rows"

    def _yardstick(self, off: Difference) -> Difference:
        """How far two unsplit plays differ of which one has more padding; state counts like the worst result."""
        signature, num_rows = self._ways.signature, self._num_rows + min(self._num_rows, MOST_PADDING)
        got = State(signature, self._args)
        self._before.restore()
        padded = signature.padded(self._args, num_rows)
        longer = self._ways.unsplit(num_rows, padded, by=uncaptured(self._ways.player))  # it comes only once
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

    @property
    def none(self) -> Difference:
        """That of values that are equal."""
        return Difference((0,) * len(self.bad_rows), self.num_rows)

    def beyond(self, usual: Difference) -> int | None:
        """The first value in which more rows differ than rounding explains."""
        return next(iter(self._beyond(usual)), None)

    def is_slight(self, usual: Difference) -> bool:
        """Whether it takes only a few rows more, in each value, for rounding to explain it."""
        beyond = [(self.bad_rows[i], usual.bad_rows[i], self.num_rows[i]) for i in self._beyond(usual)]
        return all(few <= MOST_ROUNDED * n and bad <= 2 * few + max(1, SLIGHT * n) for bad, few, n in beyond)

    def _beyond(self, usual: Difference) -> list[int]:
        """Where twice as many rows differ as usually, or usually so many that it is no rounding: an op that mixes
        tokens sees padding as well."""
        pairs = zip(self.bad_rows, usual.bad_rows, usual.num_rows, strict=True)
        return [i for i, (bad, few, n) in enumerate(pairs) if bad > 2 * few or (bad and few > MOST_ROUNDED * n)]


def bytes_of_trial(signature: Signature, num_rows: int, args: Sequence[Any]) -> int:
    """What a trial takes: three copies of what is written in place (before, unsplit, split), and the token inputs once
    more with the padding of the yardstick."""
    written = sum(int(args[i].nbytes) for i in signature.written)
    tokens = sum(int(args[t.index].nbytes) for t in signature.token_inputs)
    return 3 * written + (0 if signature.unpaddable else tokens * (num_rows + min(num_rows, MOST_PADDING)) // num_rows)


def free_bytes(args: Sequence[Any]) -> int:
    """The memory that is free on the device of the arguments; more than there can be where nobody knows."""
    devices = {x.device for x in args if isinstance(x, torch.Tensor)}
    return min((free for device in devices if (free := compat.free_memory(device)) is not None), default=1 << 60)


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
