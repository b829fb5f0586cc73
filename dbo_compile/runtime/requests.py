"""The requests of a step, and what each microbatch is told of them: pure functions, on the host, before the step.

A step has rows: the tokens of request after request, then padding. A microbatch has a stretch of them, which may begin
or end inside a request (it straddles, and both microbatches have it).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch

from dbo_compile.axes import Axis, CuSeqlens, MaxSeqlen, Requests, SeqLens, Shared, Tokens, is_given

NEAR = 0.02
"""The share of the tokens by which a split point may be off the middle to lie between two requests: SGLang cuts inside
a request where the smaller half would have less than 0.48 of the tokens."""


@dataclass(frozen=True, slots=True)
class RequestTable:
    """Request r owns the tokens `starts[r]` to `starts[r + 1]`, and attends to `keys[r]` tokens, its own the last."""

    starts: tuple[int, ...]
    keys: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        return self.starts[-1]

    @property
    def lengths(self) -> tuple[int, ...]:
        return tuple(b - a for a, b in pairwise(self.starts))

    @property
    def is_decode(self) -> bool:
        """Whether every request brings one token."""
        return max(self.lengths, default=0) <= 1

    def __str__(self) -> str:
        return f"{len(self.keys)} requests of {', '.join(map(str, self.lengths))} tokens"


@dataclass(frozen=True, slots=True)
class Part:
    """What a microbatch has of a step: the rows `start` to `stop`, and the requests `first` to `last` that own them.

    `lengths` are the tokens that these requests have in it, `keys` those that they attend to up to there: of a request
    that goes on in the next microbatch, without the tokens that are there.
    """

    start: int
    stop: int
    first: int
    last: int
    lengths: tuple[int, ...]
    keys: tuple[int, ...]

    def __str__(self) -> str:
        return f"rows [{self.start}, {self.stop}), requests [{self.first}, {self.last})"


def parts_of(table: RequestTable, rows: Sequence[int]) -> tuple[Part, ...]:
    """The part of each microbatch; `rows` says how many rows it has, padding included."""
    bounds = enumerate(pairwise((0, *accumulate(rows))), start=1)
    return tuple(_part(table, a, b, is_last=m == len(rows)) for m, (a, b) in bounds)


def straddles(table: RequestTable | None, rows: Sequence[int]) -> bool:
    """Whether a request may have tokens in two microbatches, so that the second attends to what the first one writes.

    True where nothing is known of requests.
    """
    return table is None or any(
        cut < table.num_tokens and cut not in table.starts for cut in accumulate(rows[:-1])
    )


def candidates(table: RequestTable, n: int, *, near: float = NEAR, whole: bool = False) -> Iterator[tuple[int, ...]]:
    """Ways to split the tokens (without padding) in n parts that all have some, the best first.

    Between requests, where that is as good as even; else inside a request, as even as can be; then whatever is left
    between requests. `whole` requests are never cut.
    """
    num_tokens = table.num_tokens
    borders = [b for b in dict.fromkeys(table.starts) if 0 < b < num_tokens]
    ideal = [num_tokens * i / n for i in range(1, n)]
    nearest = _increasing([min(borders, key=lambda b: (abs(b - to), -b)) for to in ideal] if borders else [])
    is_near = bool(nearest) and all(abs(b - to) <= near * num_tokens for b, to in zip(nearest, ideal, strict=True))
    even = _increasing([-(-num_tokens * i // n) for i in range(1, n)]) if num_tokens >= n else []
    ways = [nearest] if is_near or whole else [even, nearest]
    if is_near and not whole:
        ways.append(even)
    yield from dict.fromkeys(tuple(b - a for a, b in pairwise((0, *way, num_tokens))) for way in ways if way)


def given(value: Any, axis: Axis, part: Part) -> Any:
    """What a microbatch has of an input that is neither cut by tokens nor shared."""
    match axis:
        case Requests(dim):
            return value.narrow(dim, part.first, part.last - part.first)
        case CuSeqlens(of):
            return _like((0, *accumulate(part.lengths if of == "queries" else part.keys)), value)
        case SeqLens():
            return _like(part.keys, value)
        case MaxSeqlen(of):
            longest = max(part.lengths if of == "queries" else part.keys, default=0)
            return torch.full_like(value, longest) if isinstance(value, torch.Tensor) else longest
        case Tokens() | Shared():
            raise AssertionError(f"no microbatch has a value of its own of {axis}")
        case _:
            return axis(value, range(part.start, part.stop))


def given_values(
    inputs: Mapping[str, Any], axes: Mapping[str, Axis], table: RequestTable | None, rows: Sequence[int]
) -> dict[str, tuple[Any, ...]]:
    """For each input that has one value per microbatch, these values; an input that is None or missing has none."""
    total = sum(rows)
    parts = parts_of(table or RequestTable((0, total), (total,)), rows)
    return {
        name: tuple(given(inputs[name], axis, part) for part in parts)
        for name, axis in axes.items()
        if is_given(axis) and inputs.get(name) is not None
    }


def _part(table: RequestTable, start: int, stop: int, *, is_last: bool) -> Part:
    """A request without tokens belongs to the part that the place where it stands belongs to."""
    bounds = list(pairwise(table.starts))
    first = sum(a < start and b <= start for a, b in bounds)
    last = len(bounds) if is_last else max(first, sum(a < stop for a, _ in bounds))
    lengths = tuple(min(b, stop) - max(a, start) for a, b in bounds[first:last])
    later = [max(0, b - stop) for _, b in bounds[first:last]]
    keys = tuple(k - taken for k, taken in zip(table.keys[first:last], later, strict=True))
    return Part(start, stop, first, last, lengths, keys)


def _like(numbers: Sequence[int], value: torch.Tensor) -> torch.Tensor:
    return torch.tensor(numbers, dtype=value.dtype).to(value.device)


def _increasing(cuts: list[int]) -> list[int]:
    return cuts if all(a < b for a, b in pairwise(cuts)) else []
