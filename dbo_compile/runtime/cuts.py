"""How a step is cut into microbatches where its inputs tell of requests: by tokens and requests, not by rows alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from dbo_compile.errors import NotSplit
from dbo_compile.runtime.plan import Limits
from dbo_compile.runtime.requests import RequestTable, candidates, parts_of, straddles
from dbo_compile.runtime.rows import Guards
from dbo_compile.runtime.signature import Signature


@dataclass(frozen=True, slots=True)
class Cut:
    """The rows of each microbatch (none: the step is not split), and what a split program takes behind its arguments.

    `straddles`: a request may have tokens in two microbatches.
    """

    rows: tuple[int, ...] = ()
    given: tuple[Any, ...] = ()
    straddles: bool = True


@dataclass(slots=True)
class CutSteps:
    """How the steps that told of requests were cut so far: with each request in one microbatch, or one in two."""

    whole: int = 0
    straddling: int = 0
    _last: tuple[RequestTable, Cut] | None = field(default=None, repr=False)

    def note(self, table: RequestTable | None, cut: Cut) -> None:
        if table is None or not cut.rows:
            return
        self._last = table, cut
        if cut.straddles:
            self.straddling += 1
        else:
            self.whole += 1

    @property
    def last_straddles(self) -> bool:
        """Whether a request may have had tokens in two microbatches of the last step."""
        return self._last is None or self._last[1].straddles

    @property
    def last(self) -> list[str]:
        """What each microbatch of the last one had: `rows [0, 7), requests [0, 2)`."""
        return [str(part) for part in parts_of(self._last[0], self._last[1].rows)] if self._last else []


def cut_requests(
    signature: Signature,
    args: Sequence[Any],
    table: RequestTable | None,
    num_rows: int,
    *,
    guards: Guards,
    limits: Limits,
    even: Callable[[], tuple[int, ...]],
) -> Cut:
    """The best cut of `num_rows`, the last of them padding perhaps; raises `NotSplit` with the reason if there is none.

    `even` cuts rows without a look at requests.
    """
    inputs, n = signature.requests, limits.num_microbatches
    assert inputs is not None, "nothing is said of requests"
    refused = ""
    for rows in _ways(signature, table, num_rows, limits, even):
        try:
            values = inputs.values(args, table, rows)
        except NotSplit as why:
            refused = refused or str(why)
            continue
        others = [values.get(i, (args[i],) * n) for i in (signature.symbol_inputs or {}).values()]
        broken = [guards.broken(size, [of[m] for of in others]) for m, size in enumerate(rows)]
        if not any(guard is not None for guard in broken):
            return Cut(rows, tuple(v for i in sorted(values) for v in values[i]), straddles(table, rows))
        refused = refused or f"no split of its requests keeps what the graph was compiled for: {broken}"
    raise NotSplit(refused or f"its {table} do not make {n} microbatches of at least {limits.least_rows} rows")


def _ways(
    signature: Signature,
    table: RequestTable | None,
    num_rows: int,
    limits: Limits,
    even: Callable[[], tuple[int, ...]],
) -> Iterator[tuple[int, ...]]:
    """Rows of microbatches, the best first.

    Where ranks must have as many rows, these follow from their number alone; where a rank has no tokens, it has no
    requests to look at.
    """
    if table is None and signature.whole_requests:
        raise NotSplit("nothing tells which tokens belong to one request, and none may be cut")
    if table is None or signature.same_size or not table.num_tokens:
        rows = even()
        if table is not None and signature.whole_requests and straddles(table, rows):
            raise NotSplit("all ranks must have as many rows, which would cut a request that has to stay whole")
        yield rows
        return
    for *first, last in candidates(table, limits.num_microbatches, whole=signature.whole_requests):
        rows = (*first, last + num_rows - table.num_tokens)
        if min(rows) >= limits.least_rows:
            yield rows
