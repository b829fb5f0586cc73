"""The engine of one graph: decides how a step is played, and plays it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import sympy
from torch import nn

from dbo_compile.errors import NotSplit
from dbo_compile.ir.tokens import TOKENS
from dbo_compile.log import logger
from dbo_compile.runtime.lanes import WorkLanes

MOST_SHIFT = 512
"""How far from the middle a split point is looked for."""


@dataclass(frozen=True, slots=True)
class TokenInput:
    """An argument of the graph that carries tokens: its position, its token dim, its name for people."""

    index: int
    dim: int
    name: str


@dataclass(slots=True)
class Calls:
    """What happened so far, for the report."""

    total: int = 0
    split: int = 0
    declined: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True, slots=True)
class _Plan:
    """How a size is played: the rows of each microbatch, none of them for the graph as it was traced. `reason` says
    why it is not split."""

    rows: tuple[int, ...]
    reason: str = ""


class Engine:
    """Plays a graph, split or unsplit, as its size allows.

    `programs` has the emitted module for each number of microbatches, 1 among them. `guards` are what tracing and
    compiling assumed of the number of rows: they must hold for every microbatch that is played; `symbol_inputs` are
    the arguments that hold the other symbols in them. `whole` plays the graph as it was traced, for calls whose token
    inputs turn out to have different sizes, or whose number of tokens breaks a guard.
    """

    def __init__(
        self,
        programs: Mapping[int, nn.Module],
        guards: Sequence[sympy.Expr],
        token_inputs: Sequence[TokenInput],
        symbol_inputs: Mapping[sympy.Symbol, int],
        whole: Callable[..., Any],
        *,
        num_microbatches: int,
        min_tokens: int,
        least_rows: int,
    ) -> None:
        self.programs = programs
        self.guards = tuple(guards)
        self.token_inputs = tuple(token_inputs)
        self.symbol_inputs = dict(symbol_inputs)
        self.whole = whole
        self.num_microbatches = num_microbatches
        self.min_tokens = min_tokens
        self.least_rows = least_rows
        self.calls = Calls()
        self.player = played
        self._plans: dict[tuple[int, ...], _Plan] = {}

    def __call__(self, *args: Any) -> Any:
        self.calls.total += 1
        sizes = [args[t.index].shape[t.dim] for t in self.token_inputs]
        if len(set(sizes)) > 1:
            listed = ", ".join(f"{t.name}: {size}" for t, size in zip(self.token_inputs, sizes, strict=True))
            self.calls.declined[f"its token inputs differ in their number of tokens ({listed}); see token_dims"] += 1
            return self.whole(*args)
        plan = self._plan(sizes[0], *(args[i] for i in self.symbol_inputs.values()))
        if plan.reason:
            self.calls.declined[plan.reason] += 1
        else:
            self.calls.split += 1
        return self.play(plan.rows, args) if plan.rows else self.whole(*args)

    def play(self, rows: Sequence[int], args: Sequence[Any]) -> tuple[Any, ...]:
        """Play the program for `len(rows)` microbatches; microbatch i has `rows[i]` tokens."""
        return self.player(self.programs[len(rows)], rows, args)

    def rows_of(self, num_tokens: int, *others: int) -> tuple[int, ...]:
        """How many tokens each microbatch of a step has; raises `NotSplit` with the reason if it is not split.

        `others` are the values of the graph's other symbols, in the order of `symbol_inputs`.
        """
        plan = self._plan(num_tokens, *others)
        if plan.reason:
            raise NotSplit(plan.reason)
        return plan.rows

    def _plan(self, num_tokens: int, *others: int) -> _Plan:
        key = (num_tokens, *others)
        if key not in self._plans:
            symbols = dict(zip(self.symbol_inputs, others, strict=True))
            try:
                self._plans[key] = _Plan(self._find_rows(num_tokens, symbols))
            except NotSplit as why:
                logger.info("%d tokens are not split: %s", num_tokens, why)
                rows = () if self._broken(num_tokens, symbols) is not None else (num_tokens,)
                self._plans[key] = _Plan(rows, str(why))
        return self._plans[key]

    def _find_rows(self, num_tokens: int, symbols: Mapping[sympy.Symbol, int]) -> tuple[int, ...]:
        n = self.num_microbatches
        if num_tokens < self.min_tokens:
            raise NotSplit(f"{num_tokens} tokens are fewer than min_tokens={self.min_tokens}")
        if num_tokens < n * self.least_rows:
            raise NotSplit(f"{num_tokens} tokens do not make {n} microbatches of at least {self.least_rows}")
        broken = None
        for rows in _candidates(num_tokens, n):
            if min(rows) < self.least_rows:
                continue
            found = next((guard for r in dict.fromkeys(rows) if (guard := self._broken(r, symbols)) is not None), None)
            if found is None:
                return rows
            broken = found if broken is None else broken
        raise NotSplit(f"no split of {num_tokens} tokens keeps what the graph was compiled for: {broken}")

    def _broken(self, rows: int, symbols: Mapping[sympy.Symbol, int]) -> sympy.Expr | None:
        """The first guard that does not hold for so many rows."""
        values = {s: sympy.Integer(v) for s, v in {TOKENS: rows, **symbols}.items()}
        return next((guard for guard in self.guards if not _holds(guard, values)), None)


def _holds(guard: sympy.Expr, values: Mapping[sympy.Symbol, sympy.Integer]) -> bool:
    try:
        return bool(guard.xreplace(values))
    except ZeroDivisionError:  # blocks of T // 4 rows, and fewer than 4 tokens
        return False


def played(module: Callable[..., Any], rows: Sequence[int], args: Sequence[Any]) -> tuple[Any, ...]:
    """The results of an emitted program on lanes of its own."""
    with WorkLanes(rows) as lanes:
        results: tuple[Any, ...] = module(lanes, *args)
    return results


def _candidates(num_tokens: int, n: int) -> list[tuple[int, ...]]:
    """Splits in n parts, the most even first; then every part but the last grows or shrinks alike."""
    found: list[tuple[int, ...]] = []
    even = -(-num_tokens // n)
    for shift in count():
        sizes = dict.fromkeys((even - shift, even + shift))
        if shift > MOST_SHIFT or even - shift < 1:
            return found
        found += [(*[s] * (n - 1), num_tokens - s * (n - 1)) for s in sizes if num_tokens - s * (n - 1) > 0]
    return found
