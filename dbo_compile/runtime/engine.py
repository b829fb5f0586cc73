"""The engine of one graph: decides how a step is played, and plays it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import sympy
from torch import nn

from dbo_compile import compat
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


class Engine:
    """Plays a graph, split or unsplit, as its size allows.

    `programs` has the emitted module for each number of microbatches, 1 among them. `guards` are what tracing and
    compiling assumed of the number of rows: they must hold for every microbatch that is played; `symbol_inputs` are
    the arguments that hold the other symbols in them. `whole` plays the graph as it was traced, for calls whose token
    inputs turn out to have different sizes.
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
        self._plans: dict[tuple[int, ...], tuple[int, ...] | NotSplit] = {}

    def __call__(self, *args: Any) -> Any:
        self.calls.total += 1
        sizes = {t.name: args[t.index].shape[t.dim] for t in self.token_inputs}
        num_tokens = next(iter(sizes.values()))
        if len(set(sizes.values())) > 1:
            listed = ", ".join(f"{name}: {size}" for name, size in sizes.items())
            self.calls.declined[f"its token inputs differ in their number of tokens ({listed}); see token_dims"] += 1
            return self.whole(*args)
        try:
            rows = self.rows_of(num_tokens, *(args[i] for i in self.symbol_inputs.values()))
            self.calls.split += 1
        except NotSplit as why:
            self.calls.declined[str(why)] += 1
            rows = (num_tokens,)
        return self.play(rows, args)

    def play(self, rows: Sequence[int], args: Sequence[Any]) -> tuple[Any, ...]:
        """Play the program for `len(rows)` microbatches; microbatch i has `rows[i]` tokens."""
        return self.player(self.programs[len(rows)], rows, args)

    def rows_of(self, num_tokens: int, *others: int) -> tuple[int, ...]:
        """How many tokens each microbatch of a step has; raises `NotSplit` with the reason if it is not split.

        `others` are the values of the graph's other symbols, in the order of `symbol_inputs`.
        """
        key = (num_tokens, *others)
        if key not in self._plans:
            try:
                self._plans[key] = self._find_rows(num_tokens, dict(zip(self.symbol_inputs, others, strict=True)))
            except NotSplit as why:
                logger.info("%d tokens are not split: %s", num_tokens, why)
                self._plans[key] = why
        plan = self._plans[key]
        if isinstance(plan, NotSplit):
            raise NotSplit(str(plan))
        return plan

    def _find_rows(self, num_tokens: int, symbols: Mapping[sympy.Symbol, int]) -> tuple[int, ...]:
        n = self.num_microbatches
        if num_tokens < self.min_tokens:
            raise NotSplit(f"{num_tokens} tokens are fewer than min_tokens={self.min_tokens}")
        if num_tokens < n * self.least_rows:
            raise NotSplit(f"{num_tokens} tokens do not make {n} microbatches of at least {self.least_rows}")
        for rows in _candidates(num_tokens, n):
            if min(rows) >= self.least_rows and all(not self._broken(r, symbols) for r in set(rows)):
                return rows
        broken = self._broken(num_tokens // n, symbols)
        raise NotSplit(f"no split of {num_tokens} tokens keeps what the graph was compiled for: {broken[0]}")

    def _broken(self, rows: int, symbols: Mapping[sympy.Symbol, int]) -> list[sympy.Expr]:
        values = {TOKENS: rows, **symbols}
        return [guard for guard in self.guards if not compat.evaluate(guard, values)]


def played(module: Callable[..., Any], rows: Sequence[int], args: Sequence[Any]) -> tuple[Any, ...]:
    """The results of an emitted program on lanes of its own."""
    lanes = WorkLanes(rows)
    try:
        results: tuple[Any, ...] = module(lanes, *args)
    finally:
        lanes.finish()
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
