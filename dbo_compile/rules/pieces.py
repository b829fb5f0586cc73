"""Ops that take pieces of a value, put values together, or turn a dim round: never along the token dim.

Taking some of a microbatch's own rows (`Local`) by plain numbers would drop other rows than on all tokens at once.
Integers are let through as positions, which may lay rows out but say nothing of a token: the last of running counts is
a count, neighbours among sorted expert numbers show borders.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import sympy
import torch

from dbo_compile.errors import CannotSplit
from dbo_compile.ir.tokens import Local, Placement, Ruling, Shared, Value
from dbo_compile.rules.create import Size, any_local, is_own
from dbo_compile.rules.pointwise import combined, renewed, tensors
from dbo_compile.rules.registry import rule
from dbo_compile.rules.view import by_place, moved, unordered

aten = torch.ops.aten

ONE = sympy.Integer(1)


def _piece(x: Value, dim: int, *bounds: Size | None) -> Placement:
    """Where the rows of a piece of `x` are that lies between `bounds` along `dim`, and need not be all of `x`."""
    if isinstance(x.place, Local):
        if x.is_rows(dim) and not any_local(bounds):
            return by_place(x, "it takes rows of a microbatch by their position")
        return unordered(x.place) if dim == 0 else x.place
    if isinstance(x.place, Shared) and any_local(bounds):
        return Local()
    if any(map(is_own, bounds)):
        raise CannotSplit("it takes as many rows as there are tokens")
    if x.dim == dim:
        raise CannotSplit(f"it takes some of the tokens, which are in dim {dim}")
    return x.place


def _is_whole(x: Value, dim: int, start: Size | None, end: Size | None, step: Size = 1) -> bool:
    """Whether a slice provably keeps all of `dim`, however many tokens there are."""
    if start not in (None, 0) or step != 1:
        return False
    if isinstance(end, int):
        return end == sys.maxsize or (sympy.Integer(end) - x.sizes[dim]).is_nonnegative is True
    if end is None:
        return True
    return end.expr == x.sizes[dim] and (x.is_local or x.dim == dim or not is_own(end))


@rule(aten.slice.Tensor)
def slice_(x: Value, dim: int = 0, start: Size | None = None, end: Size | None = None, step: Size = 1) -> Placement:
    return _sliced(x, dim % x.ndim, start, end, step)


@rule(aten.narrow.default)
def narrow(x: Value, dim: int, start: Size, length: Size) -> Placement:
    dim %= x.ndim
    return _sliced(x, dim, 0, length) if start == 0 else _piece(x, dim, start, length)


def _sliced(x: Value, dim: int, start: Size | None, end: Size | None, step: Size = 1) -> Placement:
    return x.place if _is_whole(x, dim, start, end, step) else _piece(x, dim, start, end, step)


@rule(aten.select.int)
def select(x: Value, dim: int, index: Size) -> Placement:
    return _selected(x, dim % x.ndim, index)


@rule(aten.unbind.int)
def unbind(x: Value, dim: int = 0) -> tuple[Placement, ...]:
    return (_selected(x, dim % x.ndim, 0),) * _plain_size(x, dim)


def _selected(x: Value, dim: int, index: Size) -> Placement:
    place = _piece(x, dim, index)
    kept = [d for d in range(x.ndim) if d != dim]
    return place if isinstance(x.place, Shared) else moved(replace(x, place=place), kept)


@rule(aten.split.Tensor)
def split(x: Value, size: Size, dim: int = 0) -> tuple[Placement, ...]:
    place = _piece(x, dim % x.ndim, size)
    if not isinstance(size, int):
        raise CannotSplit(f"it cuts pieces of size {size.expr}: into how many is not known")
    return (place,) * _num_pieces(x, dim, size)


@rule(aten.chunk.default)
def chunk(x: Value, chunks: int, dim: int = 0) -> tuple[Placement, ...]:
    size = -(-_plain_size(x, dim) // chunks)
    return (_piece(x, dim % x.ndim, size),) * _num_pieces(x, dim, size)


@rule(aten.split_with_sizes.default)
def split_with_sizes(x: Value, sizes: Sequence[Size], dim: int = 0) -> tuple[Placement, ...]:
    return (_piece(x, dim % x.ndim, *sizes),) * len(sizes)


def _num_pieces(x: Value, dim: int, size: int) -> int:
    return max(1, -(-_plain_size(x, dim) // max(1, size)))


def _plain_size(x: Value, dim: int) -> int:
    if x.is_rows(dim):
        raise CannotSplit(f"it cuts dim {dim % x.ndim} of size {x.sizes[dim]}: into how many pieces is not known")
    return int(x.sizes[dim])


# ---- Several values become one


@rule(aten.cat.default)
def cat(values: Sequence[Value], dim: int = 0) -> Placement | Ruling:
    values = [v for v in values if v.sizes != (0,) or len({w.ndim for w in values}) == 1]
    dim %= values[0].ndim
    if any(v.dim == dim for v in values):
        raise CannotSplit(f"it joins values one after the other along the token dim {dim}")
    ruling = combined([_with_size(v, dim, ONE) for v in values])
    return replace(ruling, place=unordered(ruling.place)) if isinstance(ruling.place, Local) and dim == 0 else ruling


@rule(aten.stack.default)
def stack(values: Sequence[Value], dim: int = 0) -> Placement | Ruling:
    dim %= values[0].ndim + 1
    ruling = combined(values)
    assert not isinstance(ruling.place, tuple)
    order = [*range(dim), None, *range(dim, values[0].ndim)]
    return replace(ruling, place=moved(replace(values[0], place=ruling.place), order))


@rule(aten.slice_scatter.default)
def slice_scatter(
    x: Value, src: Value, dim: int = 0, start: Size | None = None, end: Size | None = None, step: Size = 1
) -> Placement | Ruling:
    dim %= x.ndim
    if _is_whole(x, dim, start, end, step):
        return combined([x, src])
    if not x.is_local:
        tensors([start, end, step])
    return _written(x, src, dim)


@rule(aten.select_scatter.default)
def select_scatter(x: Value, src: Value, dim: int, index: Size) -> Placement | Ruling:
    dim %= x.ndim
    tensors([index])
    sizes = (*src.sizes[:dim], ONE, *src.sizes[dim:])
    place = src.place if isinstance(src.place, Shared) else moved(src, [*range(dim), None, *range(dim, src.ndim)])
    return _written(x, Value(sizes, place, src.dtype), dim)


def _written(x: Value, src: Value, dim: int) -> Placement | Ruling:
    """`x` with `src` in place of a piece of it along `dim`."""
    if dim in (x.dim, src.dim):
        raise CannotSplit(f"it writes over some of the tokens, which are in dim {dim}")
    if x.is_local and x.is_rows(dim):
        x = replace(x, place=by_place(x, "it writes over rows of a microbatch by their position"))
    ruling = combined([_with_size(x, dim, ONE), _with_size(src, dim, ONE)])
    return replace(ruling, place=unordered(ruling.place)) if isinstance(ruling.place, Local) and dim == 0 else ruling


def _with_size(v: Value, dim: int, size: sympy.Expr) -> Value:
    return replace(v, sizes=(*v.sizes[:dim], size, *v.sizes[dim + 1 :]))


# ---- More of a dim, or the same the other way round


@rule(aten.constant_pad_nd.default)
def constant_pad_nd(x: Value, pad: Sequence[Size], value: Any = 0) -> Placement:
    """`pad` has two sizes for each dim, from the last dim on backwards."""
    tensors([value])
    padded = {x.ndim - 1 - i // 2 for i, size in enumerate(pad) if size != 0}
    if any_local(pad) and isinstance(x.place, Shared):
        return Local()
    tensors([size for size in pad if not (x.is_local and any_local([size]))])
    if x.dim in padded:
        raise CannotSplit(f"it pads the token dim {x.dim}")
    if x.is_local and any(map(x.is_rows, padded)) and any(isinstance(size, int) and size < 0 for size in pad):
        return by_place(x, "it takes rows of a microbatch by their position")
    return renewed(replace(x, place=_unordered_along(x, padded)))


@rule(aten.flip.default)
def flip(x: Value, dims: Sequence[int]) -> Placement:
    return _turned(x, {d % x.ndim for d in dims})


@rule(aten.roll.default)
def roll(x: Value, shifts: int | Sequence[Size], dims: int | Sequence[int] = ()) -> Placement:
    tensors([shifts])
    dims = [dims] if isinstance(dims, int) else dims
    return _turned(x, {d % x.ndim for d in dims} if dims else set(range(x.ndim)))


def _turned(x: Value, dims: set[int]) -> Placement:
    """`x` with elements moved along `dims`."""
    if x.dim in dims:
        raise CannotSplit(f"it moves rows of tokens along the token dim {x.dim}")
    if x.is_local and any(map(x.is_rows, dims)):
        return by_place(x, "it moves rows of a microbatch by their position")
    return _unordered_along(x, dims)


def _unordered_along(x: Value, dims: set[int]) -> Placement:
    return unordered(x.place) if isinstance(x.place, Local) and 0 in dims else x.place


@rule(aten.as_strided.default)
def as_strided(*_: Any, **__: Any) -> Placement:
    raise CannotSplit("it addresses memory by strides, which differ between a microbatch and all tokens")
