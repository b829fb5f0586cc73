"""Ops whose every result depends on a whole dim: sorting, running sums, searching.

Along other dims than that of the tokens they keep tokens apart. Sorting integers along the tokens, as by expert, makes
the rows a microbatch's own (`Local`): the order gets a name, by which rows find back.
"""

from __future__ import annotations

from typing import Any

import torch

from dbo_compile.errors import CannotSplit
from dbo_compile.ir.tokens import FRESH, Local, Placement, Ruling, Split, Value
from dbo_compile.rules.create import Size
from dbo_compile.rules.pointwise import BOUNDED, combined, tensors
from dbo_compile.rules.reduce import twice
from dbo_compile.rules.registry import rule
from dbo_compile.rules.rows import is_permutation, order_of, ordered, own, rows_of

aten = torch.ops.aten


def beside(x: Value, dim: int) -> Placement | None:
    """Where the tokens are after an op along `dim` that keeps its size, or None if that is a dim of rows."""
    dim %= max(x.ndim, 1)
    if x.dim is not None:
        return None if x.dim == dim else Split(x.dim)
    return None if dim in rows_of(x) else ordered(x, "" if dim == 0 else order_of(x))


@rule(aten.sort.default, aten.sort.stable)
def sort(x: Value, dim: int = -1, descending: bool = False, *, stable: bool | None = None) -> Ruling:
    return own(_sorted(x, dim, descending=descending), x)


@rule(aten.argsort.default, aten.argsort.stable)
def argsort(x: Value, dim: int = -1, descending: bool = False, *, stable: bool | None = None) -> Ruling:
    return own(_sorted(x, dim, descending=descending)[1], x)


@rule(aten.msort.default)
def msort(x: Value) -> Ruling:
    return own(_sorted(x, 0)[0], x)


def _sorted(x: Value, dim: int, *, descending: bool = False) -> tuple[Placement, Placement]:
    """Values, and the numbers of the rows that they come from."""
    if (place := beside(x, dim)) is not None:
        return place, place
    if not x.is_integer:
        raise CannotSplit("it sorts values of many tokens that are no integers")
    if isinstance(x.place, Split):
        order = FRESH if x.ndim == 1 else ""
        return Local(order, position=x.is_position), Local(order, position=True)
    values = Local(position=x.is_position)
    if is_permutation(x) and not descending:
        return values, Local(order_of(x), position=True, inverse=True)
    # These rows were in no order of tokens before: the way back to where they were does not lead to tokens.
    return values, Local(position=True)


@rule(aten.topk.default)
def topk(x: Value, k: Size, dim: int = -1, *_: Any) -> Ruling:
    tensors(k)
    if (place := beside(x, dim)) is None:
        raise CannotSplit("it takes the largest among many tokens")
    return twice(Ruling(place))


@rule(aten.cumsum.default)
def cumsum(x: Value, dim: int, **_: Any) -> Ruling:
    if (place := beside(x, dim)) is not None:
        return Ruling(place)
    if not x.is_integer:
        raise CannotSplit("it adds up values of many tokens that are no integers")
    return own(Local(position=True), x)


@rule(aten.cumprod.default, aten.logcumsumexp.default)
def running(x: Value, dim: int, **_: Any) -> Placement:
    if (place := beside(x, dim)) is None:
        raise CannotSplit("it runs over many tokens")
    return place


@rule(aten.cummax.default, aten.cummin.default)
def running_with_place(x: Value, dim: int) -> tuple[Placement, ...]:
    place = running(x, dim)
    assert not isinstance(place, Ruling | tuple)
    return place, place


@rule(aten.searchsorted.Tensor, aten.searchsorted.Scalar)
def searchsorted(bounds: Value, x: Any, *, sorter: Value | None = None, **_: Any) -> Ruling:
    return _searched(bounds, x, sorter)


@rule(aten.bucketize.Tensor, aten.bucketize.Scalar)
def bucketize(x: Any, bounds: Value, **_: Any) -> Ruling:
    return _searched(bounds, x, None)


def _searched(bounds: Value, x: Any, sorter: Value | None) -> Ruling:
    """Between which of the sorted `bounds` each of `x` lies."""
    found = tensors(x)
    if sorter is not None:
        raise CannotSplit("it reads what it searches by the numbers of rows")
    if bounds.is_local:
        return own(Local(position=True), *found)
    if any(v.is_local and v.is_position for v in found):
        raise CannotSplit(BOUNDED)
    if bounds.ndim == 1 and bounds.dim is None:
        return combined(found)
    if bounds.dim is None or bounds.dim == bounds.ndim - 1 or [v.dim for v in found] != [bounds.dim]:
        raise CannotSplit("it searches what other tokens hold")
    return Ruling(Split(bounds.dim))
