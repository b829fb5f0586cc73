"""How many rows each microbatch gets: as even as what the code was compiled for allows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import count

import sympy

from dbo_compile.errors import NotSplit
from dbo_compile.ir.tokens import TOKENS

MOST_SHIFT = 512
"""How far from the middle a split point is looked for."""


class _Guards:
    """Guards that must hold for the same rows, and what was found of them so far."""

    def __init__(self, guards: Sequence[sympy.Expr], symbols: Sequence[sympy.Symbol]) -> None:
        self.know_others = any(guard.has(*symbols) for guard in guards) if symbols else False
        self._guards = tuple(guards)
        self._symbols = symbols
        self._broken: dict[tuple[int, ...], sympy.Expr | None] = {}

    def broken(self, rows: int, others: Sequence[int]) -> sympy.Expr | None:
        """The first that does not hold for so many rows; None if all do."""
        key = (rows, *others)
        if key not in self._broken:
            given = {TOKENS: rows, **dict(zip(self._symbols, others, strict=True))}
            values = {symbol: sympy.Integer(value) for symbol, value in given.items()}
            self._broken[key] = next((guard for guard in self._guards if not _holds(guard, values)), None)
        return self._broken[key]


class Guards:
    """What tracing and compiling assumed of the number of rows, and of other symbols.

    `guards` must hold for the rows of each microbatch, `once` for all rows, also where the step is split: they are of
    code that is then played once. `symbols` are the others, in the order in which their values are given.
    """

    def __init__(
        self, guards: Sequence[sympy.Expr], symbols: Sequence[sympy.Symbol], once: Sequence[sympy.Expr] = ()
    ) -> None:
        self.symbols = tuple(symbols)
        self._per_microbatch = _Guards(guards, self.symbols)
        self._once = _Guards(once, self.symbols)
        self._rows: dict[tuple[int, ...], tuple[int, ...] | NotSplit] = {}

    @property
    def know_others(self) -> bool:
        """Whether some guard speaks of more than the number of rows."""
        return self._per_microbatch.know_others or self._once.know_others

    def broken(self, num_tokens: int, others: Sequence[int]) -> sympy.Expr | None:
        """The first guard that does not hold where all code is played on all rows; None if all do."""
        broken = self._per_microbatch.broken(num_tokens, others)
        return self._once.broken(num_tokens, others) if broken is None else broken

    def broken_once(self, num_tokens: int, others: Sequence[int]) -> sympy.Expr | None:
        """The first guard that does not hold for a split step of so many rows, whatever its microbatches have."""
        return self._once.broken(num_tokens, others)

    def broken_part(self, rows: int, others: Sequence[int]) -> sympy.Expr | None:
        """The first guard that does not hold for a microbatch of so many rows."""
        return self._per_microbatch.broken(rows, others)

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
    broken = guards.broken_once(num_tokens, others)
    if broken is not None:
        raise NotSplit(f"what is played once was not compiled for {num_tokens} tokens: {broken}")
    for rows in _candidates(num_tokens, n):
        if min(rows) < least_rows:
            continue
        found = next((guard for r in dict.fromkeys(rows) if (guard := guards.broken_part(r, others)) is not None), None)
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
