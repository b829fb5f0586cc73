"""Ops that make values of nothing but sizes, and triangles: the tokens are where a size counts them.

A number that counts tokens is computed again for each microbatch. As a size it stands for the microbatch's rows; as an
element of the result it would make the result depend on the split.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import sympy
import torch

from dbo_compile.errors import CannotSplit
from dbo_compile.ir.tokens import TOKENS, Local, Number, Placement, Shared, Split, Value
from dbo_compile.rules.pointwise import carried, renewed, tensors
from dbo_compile.rules.registry import rule

aten = torch.ops.aten
prims = torch.ops.prims

Size = int | Number

NUMBERS_ROWS = frozenset({None, torch.int32, torch.int64, torch.float32, torch.float64})
"""Types whose `arange` is exact, however it is cut in two."""


def expression(size: Size) -> sympy.Expr:
    return size.expr if isinstance(size, Number) else sympy.Integer(size)


def is_own(size: Any) -> bool:
    """Whether a number differs between microbatches."""
    return isinstance(size, Number) and not isinstance(size.place, Shared)


def any_local(sizes: Iterable[Any]) -> bool:
    """Whether one of the numbers depends on how the rows of a microbatch are arranged."""
    return any(isinstance(size, Number) and isinstance(size.place, Local) for size in sizes)


def rows_per_token(size: sympy.Expr) -> sympy.Expr | None:
    """k where `size` is k times the number of tokens, else None."""
    rows = sympy.expand(size / TOKENS)
    return rows if rows.is_integer and rows != 0 and not rows.has(TOKENS) else None


def sized(shape: Sequence[Size]) -> Placement:
    """Where the tokens are in a value whose rows are all alike."""
    if any_local(shape):
        return Local()
    dims = [d for d, size in enumerate(shape) if expression(size).has(TOKENS)]
    if not dims:
        return Shared()
    if len(dims) > 1 or rows_per_token(expression(shape[dims[0]])) is None:
        raise CannotSplit(f"no single dim of {[str(expression(size)) for size in shape]} has rows for each token alike")
    return Split(dims[0])


@rule(
    aten.empty.memory_format, aten.empty_permuted.default, aten.empty_strided.default, aten.ones.default,
    aten.zeros.default, prims.empty.default, prims.empty_permuted.default, prims.empty_strided.default,
)  # fmt: skip
def blank(shape: Sequence[Size], *_: Any, **__: Any) -> Placement:
    return sized(shape)


@rule(aten.full.default, prims.full.default)
def full(shape: Sequence[Size], value: Any, **_: Any) -> Placement:
    tensors(value)
    return sized(shape)


@rule(aten.new_empty.default, aten.new_empty_strided.default, aten.new_ones.default, aten.new_zeros.default)
def new_blank(_like: Value, shape: Sequence[Size], *_: Any, **__: Any) -> Placement:
    return sized(shape)


@rule(aten.new_full.default)
def new_full(_like: Value, shape: Sequence[Size], value: Any, **_: Any) -> Placement:
    tensors(value)
    return sized(shape)


@rule(
    aten.empty_like.default, aten.full_like.default, aten.ones_like.default, aten.zeros_like.default,
    prims.full_like.default,
)  # fmt: skip
def like(x: Value, *value: Any, **_: Any) -> Placement:
    """As many rows in the same place; what is said about their numbers and their order does not hold for new ones."""
    tensors(value)
    return Local() if x.is_local else Split(carried(x))


@rule(aten.scalar_tensor.default, prims.scalar_tensor.default)
def scalar_tensor(value: Any, **_: Any) -> Placement:
    tensors(value)
    return Shared()


@rule(aten.eye.default, aten.eye.m)
def eye(*shape: Size, **_: Any) -> Placement:
    raise CannotSplit("it makes a square of the number of tokens")


@rule(aten.arange.default)
def arange(end: Size, *, dtype: torch.dtype | None = None, **_: Any) -> Placement:
    return _row_numbers(0, end, 1, dtype)


@rule(aten.arange.start, aten.arange.start_step)
def arange_start(start: Size, end: Size, step: Size = 1, *, dtype: torch.dtype | None = None, **_: Any) -> Placement:
    return _row_numbers(start, end, step, dtype)


@rule(prims.iota.default)
def iota(length: Size, *, start: Size, step: Size, dtype: torch.dtype, **_: Any) -> Placement:
    return _row_numbers(start, length, step, dtype)


def _row_numbers(start: Size, end: Size, step: Size, dtype: torch.dtype | None) -> Placement:
    """With start 0 and step 1 the numbers are those of the rows, which the analysis counts from the first token on."""
    if isinstance(start, Number) or isinstance(step, Number) or (start, step) != (0, 1):
        raise CannotSplit(f"it counts from {_text(start)} in steps of {_text(step)}, not from 0 in steps of 1")
    if any_local([end]):
        return Local(position=True)
    if rows_per_token(expression(end)) is None:
        raise CannotSplit(f"it makes {_text(end)} numbers, which is not a fixed number for each token")
    if dtype not in NUMBERS_ROWS:
        raise CannotSplit(f"{dtype} cannot hold the number of every row")
    return Split(0, position=True)


def _text(size: Size) -> str:
    return str(expression(size))


@rule(aten.tril.default, aten.triu.default)
def triangle(x: Value, diagonal: Size = 0) -> Placement:
    """Which elements stay depends on their row and column."""
    tensors([diagonal])
    square = (x.ndim - 2, x.ndim - 1)
    if x.dim in square:
        raise CannotSplit(f"it keeps a triangle of the token dim {x.dim}")
    if isinstance(x.place, Local):
        if any(x.is_rows(d) for d in square):
            raise CannotSplit("it keeps a triangle of rows that have an order of their own")
        if x.ndim == 2:
            return Local(position=x.is_position)
    return renewed(x)
