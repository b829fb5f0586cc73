"""Ops that read elements by their numbers: advanced indexing, gathering, embedding.

Row numbers of tokens lead anywhere among all tokens, but for two kinds. A microbatch's own row numbers lead to its own
rows: `Split` positions counted from its first row, and `Local` positions, which arrange rows anew. And the inverse of
an arrangement leads its rows back to their tokens: proven if they are known to be in that order, else taken on trust.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from dbo_compile.errors import CannotSplit
from dbo_compile.ir.tokens import Local, Ruling, Shared, Split, Value
from dbo_compile.rules.create import rows_per_token
from dbo_compile.rules.pointwise import carried, combined
from dbo_compile.rules.region import Region, along, is_mask, region
from dbo_compile.rules.registry import rule
from dbo_compile.rules.rows import (
    MIXES,
    fits,
    is_inverse,
    is_multiple,
    leads_within,
    order_of,
    ordered,
    own,
    put_back,
    rows_of,
    token_dim,
)
from dbo_compile.rules.view import by_place

aten = torch.ops.aten


# ---- Advanced indexing


@rule(aten.index.Tensor, aten._unsafe_index.Tensor)
def index(source: Value, indices: Sequence[Value | None]) -> Ruling:
    return read(region(source, indices))


@rule(aten.index_select.default)
def index_select(source: Value, dim: int, numbers: Value) -> Ruling:
    return read(along(source, dim, numbers))


@rule(aten.embedding.default)
def embedding(weight: Value, numbers: Value, *_: Any, **__: Any) -> Ruling:
    return read(Region(weight, {0: numbers}))


@rule(aten.take.default)
def take(source: Value, numbers: Value) -> Ruling:
    """Numbers count through all dims of the source."""
    if source.dim is not None and source.ndim > 1:
        raise CannotSplit("it reads elements by numbers that count through all tokens")
    return read(Region(Value((math.prod(source.sizes),), source.place, source.dtype), {0: numbers}))


@rule(aten.masked_select.default)
def masked_select(x: Value, mask: Value) -> Ruling:
    if not x.is_integer:
        raise CannotSplit("it picks single elements out of many tokens")
    if isinstance(x.place, Shared) and rows_of(x):
        raise CannotSplit("it picks elements of what all tokens share")
    combined([x, mask])
    return own(Local(position=x.is_position), x)


def read(r: Region) -> Ruling:
    if any(map(is_mask, r.indices.values())):
        return _read_masked(r)
    if isinstance(r.source.place, Local):
        return _read_local(r)
    return _read_shared(r) if isinstance(r.source.place, Shared) else _read_split(r, carried(r.source))


def _read_shared(r: Region) -> Ruling:
    indices = [*r.indices.values()]
    if not any(v.is_local for v in indices):
        return Ruling(Split(r.front + token_dim(indices)))
    if any(v.dim is not None for v in indices):
        raise CannotSplit(MIXES)
    if any(v.is_position for v in indices):
        raise CannotSplit("it reads what all tokens share by the row numbers of a microbatch")
    return Ruling(Local(_order_after(r)))


def _read_split(r: Region, dim: int) -> Ruling:
    source = r.source
    if dim not in r.indices:
        if any(not isinstance(v.place, Shared) for v in r.indices.values()):
            raise CannotSplit(f"its numbers carry tokens, and so does dim {dim} of what it reads")
        return Ruling(Split(r.dim(dim), position=source.is_position))
    rows, others = r.indices[dim], r.others(dim)
    if leads_within(rows, source, dim):
        if source.is_position or any(v.is_position or v.is_local for v in others):
            raise CannotSplit("it uses row numbers for more than finding the rows of tokens")
        return Ruling(Split(r.front + token_dim([rows, *others])), local_positions=True)
    if rows.is_local and rows.is_position:
        if any(v.dim is not None for v in others):
            raise CannotSplit(MIXES)
        order = _order_after(r) if rows.ndim and is_multiple(rows.sizes[0], source.sizes[dim]) else ""
        return own(Local(order, position=source.is_position), source)
    raise CannotSplit(_foreign(dim))


def _foreign(dim: int) -> str:
    return f"it reads rows of the token dim {dim} that may belong to another microbatch"


def _read_local(r: Region) -> Ruling:
    source, indices = r.source, [*r.indices.values()]
    first = r.indices.get(0)
    if len(indices) == 1 and first is not None and first.ndim == 1 and is_inverse(first):
        return _returned(source, first)
    if all(isinstance(v.place, Shared) for v in indices):
        if any(d in r.indices for d in rows_of(source)):
            return Ruling(by_place(source, "it takes rows of a microbatch by their position"))
        order = order_of(source) if 0 not in r.indices and r.dim(0) == 0 else ""
        return Ruling(Local(order, position=source.is_position))
    if any(v.is_local for v in indices) and any(v.dim is not None and not v.is_position for v in indices):
        raise CannotSplit(MIXES)
    return own(Local(position=source.is_position), *indices)


def _read_masked(r: Region) -> Ruling:
    """A mask over some dims picks rows in their own order; how many they are depends on the data."""
    source, ((at, mask), *more) = r.source, [*r.indices.items()]
    if more:
        raise CannotSplit("it reads by a mask and by numbers at once")
    if not fits(mask, source, at):
        raise CannotSplit("it picks by a mask rows that may belong to another microbatch")
    return own(Local(position=source.is_position), source)


def _returned(source: Value, inverse: Value) -> Ruling:
    """Rows led back to their tokens, if there are as many for each token; counts stay those of a microbatch."""
    if source.is_position or rows_per_token(inverse.sizes[0]) is None:
        return Ruling(Local(position=source.is_position))
    return put_back(source, inverse)


def _order_after(r: Region) -> str:
    """The order that dim 0 of the region has by the indices: all that have rows must be in that order."""
    rows = [v for v in r.indices.values() if v.ndim == r.index_ndim > 0 and v.sizes[0] != 1]
    if r.front > 0 or any(is_inverse(v) for v in rows) or any(v.is_local for v in r.indices.values() if v not in rows):
        return ""
    orders = {order_of(v) for v in rows}
    return orders.pop() if len(orders) == 1 else ""


# ---- Gathering: as many dims as the source, and each number leads along one of them


@rule(aten.gather.default)
def gather(source: Value, dim: int, numbers: Value, **_: Any) -> Ruling:
    if not source.ndim:
        raise CannotSplit("it reads a single number")
    dim %= source.ndim
    match source.place:
        case Shared():
            return _gather_shared(source, dim, numbers)
        case Split():
            return _gather_split(source, dim, numbers, carried(source))
        case _:
            return _gather_local(source, dim, numbers)


def _gather_shared(source: Value, dim: int, numbers: Value) -> Ruling:
    rows = rows_of(numbers) if numbers.is_local else [carried(numbers)]
    if rows and rows != [dim]:
        raise CannotSplit("it reads a row of what all tokens share for each token, by its place among all tokens")
    if numbers.is_local:
        return _read_shared(Region(source, {dim: numbers}))
    return Ruling(Split(dim))


def _gather_split(source: Value, dim: int, numbers: Value, tokens: int) -> Ruling:
    if dim == tokens and numbers.is_local:
        return _read_split(Region(source, {dim: numbers}), tokens)
    if dim == tokens:
        if numbers.dim != dim or source.is_position or not leads_within(numbers, source, dim):
            raise CannotSplit(_foreign(dim))
        return Ruling(Split(dim), local_positions=True)
    if numbers.dim != tokens or numbers.sizes[tokens] != source.sizes[tokens]:
        raise CannotSplit(f"its numbers do not have the tokens in dim {tokens}, as what it reads has")
    return Ruling(Split(tokens))


def _gather_local(source: Value, dim: int, numbers: Value) -> Ruling:
    if dim == 0 and is_inverse(numbers):
        return _returned(source, numbers)
    if numbers.dim is not None and source.ndim > 1:
        raise CannotSplit(MIXES)
    if not numbers.is_local and rows_of(source):
        return own(by_place(source, "it takes rows of a microbatch by their position"), numbers)
    if dim > 0 and numbers.is_local and order_of(numbers) == order_of(source):
        return Ruling(ordered(source, order_of(source)))
    return own(Local(position=source.is_position), numbers)
