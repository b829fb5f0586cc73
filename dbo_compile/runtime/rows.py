"""How many rows each microbatch gets: as even as what the code was compiled for allows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import count

import sympy

from dbo_compile.errors import NotSplit
from dbo_compile.ir.tokens import TOKENS

MOST_SHIFT = 512
"""How far from the middle a split point is looked for."""


class Guards:
    """What tracing and compiling assumed of the number of rows, and of other symbols.

    `symbols` are the others, in the order in which their values are given.
    """

    def __init__(self, guards: Sequence[sympy.Expr], symbols: Sequence[sympy.Symbol]) -> None:
        self.guards = tuple(guards)
        self.symbols = tuple(symbols)
        self._broken: dict[tuple[int, ...], sympy.Expr | None] = {}
        self._rows: dict[tuple[int, ...], tuple[int, ...] | NotSplit] = {}

    @property
    def know_others(self) -> bool:
        """Whether some guard speaks of more than the number of rows."""
        return any(guard.has(*self.symbols) for guard in self.guards) if self.symbols else False

    def broken(self, rows: int, others: Sequence[int]) -> sympy.Expr | None:
        """The first guard that does not hold for so many rows; None if all do."""
        key = (rows, *others)
        if key not in self._broken:
            self._broken[key] = self._find_broken(rows, others)
        return self._broken[key]

    def rows_of(
        self, num_tokens: int, others: Sequence[int], *, num_microbatches: int, least_rows: int
    ) -> tuple[int, ...]:
        """What `find_rows` found, or raised, for the same numbers."""
        key = (num_tokens, *others, num_microbatches, least_rows)
        if key not in self._rows:
            try:
                self._rows[key] = find_rows(
                    num_tokens, others, self, num_microbatches=num_microbatches, least_rows=least_rows
                )
            except NotSplit as why:
                self._rows[key] = why
        if isinstance(rows := self._rows[key], NotSplit):
            raise rows
        return rows

    def _find_broken(self, rows: int, others: Sequence[int]) -> sympy.Expr | None:
        given = {TOKENS: rows, **dict(zip(self.symbols, others, strict=True))}
        values = {symbol: sympy.Integer(value) for symbol, value in given.items()}
        return next((guard for guard in self.guards if not _holds(guard, values)), None)


def _holds(guard: sympy.Expr, values: Mapping[sympy.Symbol, sympy.Integer]) -> bool:
    try:
        return bool(guard.xreplace(values))
    except ZeroDivisionError:  # blocks of T // 4 rows, and fewer than 4 tokens
        return False


def find_rows(
    num_tokens: int, others: Sequence[int], guards: Guards, *, num_microbatches: int, least_rows: int
) -> tuple[int, ...]:
    """How many tokens each microbatch of a step has; raises `NotSplit` with the reason if none will do."""
    n = num_microbatches
    if num_tokens < n * least_rows:
        raise NotSplit(f"{num_tokens} tokens do not make {n} microbatches of at least {least_rows}")
    broken = None
    for rows in _candidates(num_tokens, n):
        if min(rows) < least_rows:
            continue
        found = next((guard for r in dict.fromkeys(rows) if (guard := guards.broken(r, others)) is not None), None)
        if found is None:
            return rows
        broken = found if broken is None else broken
    raise NotSplit(f"no split of {num_tokens} tokens keeps what the graph was compiled for: {broken}")


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
