"""Is what a rule says true? Runs the op on all tokens and on parts of them, and compares."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import sympy
import torch

from dbo_compile.errors import CannotSplit
from dbo_compile.ir.tokens import TOKENS, Count, Local, Number, Placement, Ruling, Shared, Split, Value
from dbo_compile.rules.registry import RULES

NUM_TOKENS = 7
"""No other size in a call may be a multiple of it: dims and numbers that are count tokens."""
PARTS = ((3, 4), (1, 6), (2, 2, 3))


@dataclass(frozen=True)
class Whole:
    """A tensor that all microbatches share, although one of its sizes is a multiple of the number of tokens."""

    tensor: torch.Tensor


@dataclass(frozen=True)
class Along:
    """A tensor with tokens in `dim`, for tensors with several dims that could have them, and for positions."""

    tensor: torch.Tensor
    dim: int
    position: bool = False


def shape(*sizes: Any) -> tuple[sympy.Expr, ...]:
    return tuple(map(sympy.sympify, sizes))


def tokens(*sizes: Any, dim: int | None = None, position: bool = False, dtype: torch.dtype = torch.float32) -> Value:
    """A value with tokens in `dim`, or in the one dim whose size counts them."""
    exprs = shape(*sizes)
    (dim,) = [d for d, size in enumerate(exprs) if size.has(TOKENS)] if dim is None else [dim]
    return Value(exprs, Split(dim, position), dtype)


def shared(*sizes: Any, dtype: torch.dtype = torch.float32) -> Value:
    return Value(shape(*sizes), Shared(), dtype)


def local(*sizes: Any, dtype: torch.dtype = torch.float32, **facts: Any) -> Value:
    return Value(shape(*sizes), Local(**facts), dtype)


def count(expr: sympy.Expr) -> Number:
    return Number(expr, Count())


def ask(op: Any, *args: Any, **kwargs: Any) -> Placement | tuple[Placement, ...]:
    """The placement in the answer of an op's rule."""
    answer = RULES[op](*args, **kwargs)
    return answer.place if isinstance(answer, Ruling) else answer


def claim(op: Any, *args: Any, **kwargs: Any) -> Placement | tuple[Placement, ...] | str:
    """The rule's placement for a call on real tensors, found true on every way to part the tokens; or its refusal."""
    try:
        place = ask(op, *_map(args, _seen), **_map(kwargs, _seen))
    except CannotSplit as why:
        return str(why)
    whole = op(*_map(args, _part(0, NUM_TOKENS)), **_map(kwargs, _part(0, NUM_TOKENS)))
    makes_rows = not any(isinstance(arg, torch.Tensor | Along | Whole) for arg in args)
    for sizes in PARTS:
        bounds = list(zip((0, *accumulate(sizes)), accumulate(sizes), strict=False))
        parts = [op(*_map(args, _part(*b)), **_map(kwargs, _part(*b))) for b in bounds]
        if makes_rows:
            parts = [_numbered(part, place, b) for part, b in zip(parts, bounds, strict=True)]
        _check(place, whole, parts, bounds, str(op))
    return place


def _numbered(part: torch.Tensor, place: Any, bounds: tuple[int, int]) -> torch.Tensor:
    """Row numbers made by a microbatch, counted from the first row of all, as the analysis has them counted."""
    if not (isinstance(place, Split) and place.position):
        return part
    start, stop = bounds
    return part + part.shape[place.dim] // (stop - start) * start


def _map(args: Any, fn: Callable[[Any], Any]) -> Any:
    if isinstance(args, dict):
        return {name: _map(arg, fn) for name, arg in args.items()}
    if isinstance(args, list | tuple):
        return type(args)(_map(arg, fn) for arg in args)
    return fn(args)


def _counts(arg: Any) -> bool:
    return type(arg) is int and 0 < arg < 1000 and arg % NUM_TOKENS == 0


def _seen(arg: Any) -> Any:
    """What the rule sees of an argument."""
    if isinstance(arg, Whole):
        return Value(_sizes(arg.tensor), Shared(), arg.tensor.dtype)
    if isinstance(arg, Along):
        return Value(_sizes(arg.tensor), Split(arg.dim, arg.position), arg.tensor.dtype)
    if isinstance(arg, torch.Tensor):
        dims = [d for d, size in enumerate(arg.shape) if _counts(size)]
        assert len(dims) <= 1, f"say which dim of {tuple(arg.shape)} has tokens: Along(tensor, dim) or Whole(tensor)"
        return Value(_sizes(arg), Split(dims[0]) if dims else Shared(), arg.dtype)
    return Number(arg // NUM_TOKENS * TOKENS, Count()) if _counts(arg) else arg


def _sizes(tensor: torch.Tensor) -> tuple[sympy.Expr, ...]:
    return shape(*(size // NUM_TOKENS * TOKENS if _counts(size) else size for size in tensor.shape))


def _part(start: int, stop: int) -> Callable[[Any], Any]:
    """What a microbatch of the tokens from `start` to `stop` has of an argument; ops may write into it."""

    def part(arg: Any) -> Any:
        seen = _seen(arg)
        if isinstance(seen, Number):
            return arg // NUM_TOKENS * (stop - start)
        if not isinstance(seen, Value):
            return arg
        tensor = arg if isinstance(arg, torch.Tensor) else arg.tensor
        return (tensor if seen.dim is None else _rows(tensor, seen.dim, start, stop)).clone()

    return part


def _rows(tensor: torch.Tensor, dim: int, start: int, stop: int) -> torch.Tensor:
    k = tensor.shape[dim] // NUM_TOKENS
    assert k * NUM_TOKENS == tensor.shape[dim], f"dim {dim} of {tuple(tensor.shape)} does not count tokens"
    return tensor.narrow(dim, k * start, k * (stop - start))


def _check(place: Any, whole: Any, parts: list[Any], bounds: list[tuple[int, int]], name: str) -> None:
    """Each microbatch's result is its rows of the result on all tokens, or, where that is shared, all of it."""
    if isinstance(place, tuple) or isinstance(whole, list | tuple):
        assert isinstance(place, tuple), f"{name} has {len(whole)} results, its rule gives one placement"
        assert len(place) == len(whole), f"{name} has {len(whole)} results, its rule places {len(place)}"
        for i, each in enumerate(place):
            _check(each, whole[i], [part[i] for part in parts], bounds, f"{name}[{i}]")
        return
    for part, (start, stop) in zip(parts, bounds, strict=True):
        if isinstance(place, Shared):
            _assert_equal(part, whole, f"{name} on tokens {start} to {stop}, said to be {place}")
        elif isinstance(place, Split):
            rows = _rows(whole, place.dim, start, stop)
            _assert_equal(part, rows, f"{name} on tokens {start} to {stop}, said to be {place}")
            if place.position:
                numbers = torch.arange(whole.shape[place.dim], dtype=whole.dtype)
                numbers = numbers.view(-1, *[1] * (whole.ndim - place.dim - 1)).expand(whole.shape)
                _assert_equal(whole, numbers, f"{name}, said to hold the numbers of its rows")


def _assert_equal(got: Any, expected: Any, what: str) -> None:
    if not isinstance(expected, torch.Tensor):
        assert got == expected, what
        return
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12, equal_nan=True, msg=lambda m: f"{what}: {m}")
