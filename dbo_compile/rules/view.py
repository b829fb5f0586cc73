"""Ops that move, cut or join dims. Rows of tokens survive where their dim keeps its place in memory order.

A size that counts tokens is computed again for each microbatch, so it may stand for the token dim and nothing else.
`Local` rows keep their order as long as they stay dim 0, whole. Dims outside of the token dim that are merged with it
leave blocks of tokens, which is such an order, until a view takes them apart again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import sympy
import torch

from dbo_compile.errors import CannotSplit
from dbo_compile.ir.tokens import TOKENS, Local, Number, Placement, Shared, Split, Value
from dbo_compile.rules.create import Size, any_local, expression, is_own, rows_per_token, sized
from dbo_compile.rules.pointwise import carried, renewed, tensors
from dbo_compile.rules.registry import rule

aten = torch.ops.aten
prims = torch.ops.prims

ONE = sympy.Integer(1)
SIZED_BY_TOKENS = "it gives a dim that is not the token dim a size that counts tokens"


def moved(x: Value, source: Sequence[int | None]) -> Split | Local:
    """Where the rows of `x` are when dim i of the result is its dim source[i], or has none of its rows (None)."""
    if isinstance(x.place, Local):
        return x.place if source and source[0] == 0 else unordered(x.place)
    if (dim := carried(x)) not in source:
        raise CannotSplit(f"it takes some of the tokens, which are in dim {dim}, or rearranges them")
    return Split(source.index(dim), position=x.is_position)


def unordered(place: Local) -> Local:
    return Local(position=place.position)


def by_place(x: Value, refused: str) -> Local:
    """What is made of a microbatch's own rows by where they are in it: other rows than it would be of all tokens, so
    integers alone, and as positions, of which no token may depend."""
    if not x.is_integer:
        raise CannotSplit(refused)
    return Local(position=True)


def blocks(number: sympy.Expr | int) -> Local:
    """Rows in blocks one after the other, each with all tokens in their order: of a copy, or of a dim outside."""
    return Local(order=f"{number} blocks of all tokens")


# ---- The same elements under other sizes


@rule(
    aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten._reshape_alias.default,
    prims.reshape.default,
)  # fmt: skip
def view(x: Value, shape: Sequence[Size], *_: Any) -> Placement:
    return _viewed(x, shape)


def _viewed(x: Value, shape: Sequence[Size]) -> Placement:
    if not x.is_local and (x.dim is None or any_local(shape)):
        raise CannotSplit(SIZED_BY_TOKENS)
    return _resized(x, [expression(size) for size in shape])


@rule(aten.flatten.using_ints)
def flatten(x: Value, start: int = 0, end: int = -1) -> Placement:
    start, end = start % x.ndim, end % x.ndim
    return _resized(x, [*x.sizes[:start], sympy.Integer(-1), *x.sizes[end + 1 :]])


@rule(aten.unflatten.int)
def unflatten(x: Value, dim: int, sizes: Sequence[Size]) -> Placement:
    dim %= x.ndim
    return _viewed(x, [*map(_given, x.sizes[:dim]), *sizes, *map(_given, x.sizes[dim + 1 :])])


def _given(size: sympy.Expr) -> Size:
    return Number(size, Shared())


def _resized(x: Value, shape: Sequence[sympy.Expr]) -> Placement:
    """The token dim is the one with as many elements before it as before, and tokens outermost in it."""
    sizes = _inferred(x, shape)
    if isinstance(x.place, Local):
        if x.ndim and sizes and sizes[0] == sympy.expand(x.sizes[0]):
            return x.place
        return _of_blocks(x, sizes) or unordered(x.place)
    old = carried(x)
    before = math.prod(x.sizes[:old], start=ONE)
    if before.is_Integer and before > 1 and not x.is_position and sizes and _equal(sizes[0], before * x.sizes[old]):
        return blocks(before)
    dims = [d for d, size in enumerate(sizes) if rows_per_token(size) and _equal(math.prod(sizes[:d]), before)]
    if not dims:
        raise CannotSplit(f"the view {list(x.sizes)} -> {sizes} merges or cuts the token dim {old}")
    if any(size.has(TOKENS) for d, size in enumerate(sizes) if d != dims[0]):
        raise CannotSplit(SIZED_BY_TOKENS)
    return Split(dims[0], position=x.is_position and sizes[dims[0]] == sympy.expand(x.sizes[old]))


def _of_blocks(x: Value, sizes: Sequence[sympy.Expr]) -> Split | None:
    """Where the tokens are if blocks of them become dims outside; None if these rows are no blocks, or do not."""
    for dim, size in enumerate(sizes):
        outside = math.prod(sizes[:dim], start=ONE)
        if x.place == blocks(outside) and _equal(outside * size, x.sizes[0]):
            return Split(dim)
    return None


def _equal(a: sympy.Expr, b: sympy.Expr) -> bool:
    return bool(sympy.expand(a - b) == 0)


def _inferred(x: Value, shape: Sequence[sympy.Expr]) -> list[sympy.Expr]:
    """The sizes of a view, with -1 worked out."""
    others = math.prod(size for size in shape if size != -1)
    rest = math.prod(x.sizes) / others if others != 0 else sympy.Integer(0)
    return [sympy.expand(rest if size == -1 else size) for size in shape]


@rule(aten.expand.default, aten.broadcast_to.default)
def expand(x: Value, shape: Sequence[Size], **_: Any) -> Placement:
    new = len(shape) - x.ndim
    old = [ONE] * new + list(x.sizes)
    grown = [d for d, size in enumerate(shape) if size != -1 and expression(size) != old[d]]
    if isinstance(x.place, Local):
        return x.place if not new and x.ndim and 0 not in grown else unordered(x.place)
    if x.dim is None:
        if any(is_own(size) and d not in grown for d, size in enumerate(shape)):
            raise CannotSplit(SIZED_BY_TOKENS)
        return sized([size if d in grown else 1 for d, size in enumerate(shape)])
    if x.dim + new in grown or any(is_own(size) for d, size in enumerate(shape) if d != x.dim + new):
        raise CannotSplit(SIZED_BY_TOKENS)
    return moved(x, [None] * new + list(range(x.ndim)))


@rule(aten.repeat.default)
def repeat(x: Value, repeats: Sequence[Size]) -> Placement:
    new = len(repeats) - x.ndim
    grown = [d for d, times in enumerate(repeats) if times != 1]
    if isinstance(x.place, Local):
        return x.place if not new and x.ndim and 0 not in grown else unordered(x.place)
    if x.dim is None:
        if any(is_own(times) and d >= new and x.sizes[d - new].has(TOKENS) for d, times in enumerate(repeats)):
            raise CannotSplit(SIZED_BY_TOKENS)
        return sized(repeats)
    if x.dim + new in grown:
        if grown == [0] and isinstance(repeats[0], int) and not x.is_position:
            return blocks(repeats[0])
        raise CannotSplit(f"it repeats the token dim {x.dim} as a whole")
    if any(map(is_own, repeats)):
        raise CannotSplit(SIZED_BY_TOKENS)
    return moved(x, [None] * new + list(range(x.ndim)))


@rule(aten.repeat_interleave.self_int)
def repeat_interleave(x: Value, repeats: Size, dim: int | None = None, **_: Any) -> Placement:
    """Each row is followed by its copies, so the rows of a token stay together."""
    tensors([repeats])
    if dim is None and x.dim is not None and x.dim > 0:
        raise CannotSplit(f"it flattens dims before the token dim {x.dim}")
    along = 0 if dim is None else dim % x.ndim
    if isinstance(x.place, Local):
        return unordered(x.place) if along == 0 else x.place
    return Split(along) if x.dim == along else x.place


# ---- Dims in another order, new dims, dims that go


@rule(aten.permute.default, prims.transpose.default)
def permute(x: Value, dims: Sequence[int]) -> Placement:
    return moved(x, [d % x.ndim for d in dims])


@rule(aten.transpose.int)
def transpose(x: Value, dim0: int, dim1: int) -> Placement:
    order = list(range(x.ndim))
    order[dim0], order[dim1] = order[dim1], order[dim0]
    return moved(x, order)


@rule(aten.t.default)
def t(x: Value) -> Placement:
    return moved(x, range(x.ndim)[::-1])


@rule(aten.movedim.int, aten.movedim.intlist)
def movedim(x: Value, source: int | Sequence[int], destination: int | Sequence[int]) -> Placement:
    pairs = zip(*([d] if isinstance(d, int) else d for d in (destination, source)), strict=True)
    placed = {to % x.ndim: dim % x.ndim for to, dim in pairs}
    rest = iter(d for d in range(x.ndim) if d not in placed.values())
    return moved(x, [placed[d] if d in placed else next(rest) for d in range(x.ndim)])


@rule(aten.unsqueeze.default)
def unsqueeze(x: Value, dim: int) -> Placement:
    dim %= x.ndim + 1
    return moved(x, [*range(dim), None, *range(dim, x.ndim)])


@rule(aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims)
def squeeze(x: Value, dims: int | Sequence[int] | None = None) -> Placement:
    """Whether a dim goes must not depend on how many tokens a microbatch has: it may have one."""
    asked = range(x.ndim) if dims is None else [d % x.ndim for d in ([dims] if isinstance(dims, int) else dims)]
    for d in asked:
        if x.is_rows(d) and rows_per_token(x.sizes[d]) in (None, 1):
            raise CannotSplit(f"it drops dim {d} of size {x.sizes[d]} where that is 1, as it may be in a microbatch")
    return moved(x, [d for d in range(x.ndim) if d not in asked or x.sizes[d] != 1])


@rule(aten.view_as_complex.default)
def view_as_complex(x: Value) -> Placement:
    return moved(x, range(x.ndim - 1))


@rule(aten.view_as_real.default)
def view_as_real(x: Value) -> Placement:
    return moved(x, [*range(x.ndim), None])


@rule(aten.diagonal.default)
def diagonal(x: Value, offset: int = 0, dim1: int = 0, dim2: int = 1) -> Placement:
    tensors([offset])
    return moved(x, [d for d in range(x.ndim) if d not in (dim1 % x.ndim, dim2 % x.ndim)] + [None])


@rule(aten.unfold.default)
def unfold(x: Value, dim: int, size: int, step: int) -> Placement:
    return moved(x, [None if d == dim % x.ndim else d for d in range(x.ndim)] + [None])


@rule(aten.view.dtype, prims.view_of_dtype.default)
def view_dtype(x: Value, dtype: torch.dtype) -> Placement:
    """The same bytes: the last dim grows or shrinks where the new type has another size."""
    last = x.ndim - 1 if dtype.itemsize == x.dtype.itemsize else None
    return renewed(replace(x, place=moved(x, [*range(x.ndim - 1), last])))
