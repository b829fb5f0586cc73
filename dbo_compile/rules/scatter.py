"""Ops that write elements by their numbers: what `index` reads, these write.

Numbers that arrange rows (`Local` positions) do one of two things. They bring rows in an order back to their tokens, if
they are known to lead from that order to tokens; or they arrange rows anew, in a buffer of a microbatch's own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch

from dbo_compile.errors import CannotSplit
from dbo_compile.ir.tokens import Local, Ruling, Shared, Split, Value
from dbo_compile.rules.create import rows_per_token
from dbo_compile.rules.pointwise import carried, tensors
from dbo_compile.rules.region import ONE, Region, along, is_mask, region
from dbo_compile.rules.registry import rule
from dbo_compile.rules.rows import (
    fits,
    is_inverse,
    is_multiple,
    is_permutation,
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

SHARED_BUFFER = "it writes rows of tokens into a buffer that all tokens share"
WRITES_ALONG = "what it writes does not have the tokens where the buffer has them"
FILLED = "the values it fills in one after the other are those of this microbatch's tokens, in their order"


@dataclass(frozen=True, slots=True)
class Write:
    """`values` (None: a plain number) go into a region; `adds` if to what is there. `full`: as `scatter` does it."""

    region: Region
    values: Value | None
    adds: bool = False
    full: bool = False

    @property
    def buffer(self) -> Value:
        return self.region.source

    @property
    def rows(self) -> Value | None:
        """The numbers of rows, if dim 0 alone is numbered and each row has one number."""
        first = self.region.indices.get(0)
        return first if first is not None and len(self.region.indices) == 1 and (self.full or first.ndim == 1) else None


def plain(values: Any) -> Value | None:
    tensors(values)
    return values if isinstance(values, Value) else None


def on(rule_of: Callable[..., Ruling], *ops: Any, in_place: Sequence[Any] = ()) -> None:
    """Register a rule for ops and their variants in place: a buffer that may be an argument keeps its placement."""

    @wraps(rule_of)
    def written(buffer: Value, *args: Any, **kwargs: Any) -> Ruling:
        if isinstance(buffer.place, Shared):
            raise CannotSplit(SHARED_BUFFER)
        ruling = rule_of(buffer, *args, **kwargs)
        if isinstance(buffer.place, Split) and ruling.place != buffer.place:
            raise CannotSplit(f"it writes {ruling.place} over {buffer.place}")
        return ruling

    rule(*ops)(rule_of)
    rule(*in_place)(written)


# ---- The ops


def index_put(
    buffer: Value, indices: Sequence[Value | None], values: Value, accumulate: bool = False, *_: Any
) -> Ruling:
    return write(Write(region(buffer, indices), values, adds=accumulate))


def index_copy(buffer: Value, dim: int, numbers: Value, values: Value) -> Ruling:
    return write(Write(along(buffer, dim, numbers), values))


def index_add(buffer: Value, dim: int, numbers: Value, values: Value, *_: Any, alpha: Any = 1, **__: Any) -> Ruling:
    tensors(alpha)
    return write(Write(along(buffer, dim, numbers), values, adds=True))


def index_fill(buffer: Value, dim: int, numbers: Value, value: Any) -> Ruling:
    return write(Write(along(buffer, dim, numbers), plain(value)))


def scatter(buffer: Value, dim: int, numbers: Value, values: Any, *, reduce: str | None = None) -> Ruling:
    place = Region(buffer, {dim % max(buffer.ndim, 1): numbers})
    return write(Write(place, plain(values), adds=reduce is not None, full=True))


def scatter_add(buffer: Value, dim: int, numbers: Value, values: Value, *_: Any, **__: Any) -> Ruling:
    return write(Write(Region(buffer, {dim % max(buffer.ndim, 1): numbers}), values, adds=True, full=True))


def masked_scatter(buffer: Value, mask: Value, values: Value) -> Ruling:
    """Values go one after the other to where the mask says: each token's place among them depends on those before."""
    if buffer.is_local and mask.dim is None and values.is_local:
        return Ruling(Local(position=buffer.is_position or values.is_position))
    if buffer.dim == 0 and values.is_local and not values.is_position and not mask.is_local:
        return Ruling(Split(token_dim([buffer, mask])), assumes=FILLED)
    raise CannotSplit("it fills in values one after the other: a token's depend on the tokens before it")


# ---- What writing does to the buffer


def write(w: Write) -> Ruling:
    if any(map(is_mask, w.region.indices.values())):
        return _write_masked(w)
    if w.rows is not None and (ruling := _arrange(w, w.rows)):
        return ruling
    if isinstance(w.buffer.place, Split):
        return _write_split(w, carried(w.buffer))
    return _write_own(w)


def _arrange(w: Write, rows: Value) -> Ruling | None:
    """What is special about writing rows by numbers of known order: it is what makes and uses permutations."""
    values, order = w.values, order_of(rows)
    if not order or not rows.is_position or isinstance(w.buffer.place, Shared):
        return None
    if values is None or values.ndim != w.buffer.ndim or values.sizes[0] == 1:
        return None
    alike = not w.adds and w.buffer.sizes[0] == rows.sizes[0] == values.sizes[0]
    if values.dim == 0:
        if alike and is_inverse(rows) and not values.is_position:
            return Ruling(Local(order))
        if alike and is_permutation(rows) and values.is_position:
            return Ruling(Local(order, position=True, inverse=True), local_positions=True)
    if values.is_local and not values.is_position and not is_inverse(rows) and (alike or _adds_home(w, rows)):
        return put_back(values, rows) if rows_per_token(w.buffer.sizes[0]) else None
    return None


def _adds_home(w: Write, rows: Value) -> bool:
    """Whether the buffer has a row for each token, and every one of them is written to equally often, or not at all."""
    if w.buffer.dim != 0 or w.buffer.is_position:
        return False
    return rows_per_token(rows.sizes[0]) is None or (w.adds and is_multiple(rows.sizes[0], w.buffer.sizes[0]))


def _write_split(w: Write, dim: int) -> Ruling:
    indices = w.region.indices
    if w.full and dim not in indices:
        return _scatter_beside(w, dim)
    if dim not in indices:
        if any(not isinstance(v.place, Shared) for v in indices.values()):
            raise CannotSplit(f"its numbers carry tokens, and so does dim {dim} of the buffer")
        _check_values(w, w.region.dim(dim), dim)
        return Ruling(Split(dim))
    rows, others = indices[dim], w.region.others(dim)
    if rows.is_local and rows.is_position:
        return _write_own(w)
    buffers = [w.buffer, *others, *([] if w.values is None else [w.values])]
    if w.full or not leads_within(rows, w.buffer, dim) or any(v.is_local for v in others):
        raise CannotSplit(f"it writes rows of the token dim {dim} that may belong to another microbatch")
    if any(v.is_position for v in buffers):
        raise CannotSplit("it uses row numbers for more than finding the rows of tokens")
    _check_values(w, w.region.front + token_dim([rows, *others]), dim)
    return Ruling(Split(dim), local_positions=True)


def _check_values(w: Write, at: int, dim: int) -> None:
    """What is written to the region has the tokens in dim `at` of the region, or one row for all of them."""
    if w.values is None:
        return
    sizes = [ONE] * w.region.ndim
    sizes[at] = w.buffer.sizes[dim]
    if w.values.is_local or token_dim([Value(tuple(sizes), Split(at)), w.values]) != at:
        raise CannotSplit(WRITES_ALONG)


def _scatter_beside(w: Write, dim: int) -> Ruling:
    """Numbers and values have as many dims as the buffer, and its tokens in the same one."""
    (numbers,) = w.region.indices.values()
    for v in (numbers, *([] if w.values is None else [w.values])):
        if v.dim != dim or v.sizes[dim] != w.buffer.sizes[dim]:
            raise CannotSplit(WRITES_ALONG)
    return Ruling(Split(dim))


def _write_own(w: Write) -> Ruling:
    """The result is a microbatch's own: rows arranged by their numbers, counts, updates of what is its own already."""
    buffer, indices = w.buffer, [*w.region.indices.values()]
    written = [] if w.values is None else [w.values]
    if w.adds and buffer.is_integer and all(v.is_integer for v in written):
        return own(Local(position=True), buffer, *indices, *written)
    if any(v.dim is not None for v in indices):
        raise CannotSplit("its numbers are those of single tokens" if buffer.is_local else SHARED_BUFFER)
    arranges = any(v.is_local and v.is_position for v in indices)
    if not arranges and any(v.dim is not None for v in written):
        raise CannotSplit(SHARED_BUFFER)
    adds_up = w.adds or not arranges  # else each row has a place of its own
    if isinstance(buffer.place, Shared) and adds_up and any(v.is_local for v in indices):
        raise CannotSplit(SHARED_BUFFER)
    if _writes_by_place(w):
        return own(by_place(buffer, "it writes over rows of a microbatch by their position"), buffer, *written)
    return own(_updated(w, written), buffer, *written)


def _writes_by_place(w: Write) -> bool:
    """Whether numbers that are the same for all microbatches say which of a microbatch's rows are written to."""
    rows = rows_of(w.buffer) if w.buffer.is_local else []
    return any(isinstance(v.place, Shared) and ((w.full and rows) or d in rows) for d, v in w.region.indices.items())


def _updated(w: Write, written: Sequence[Value]) -> Local:
    """The buffer keeps the order of its rows if what is written to them leaves each in its place."""
    read = [*w.region.indices.values(), *written]
    if any(v.is_position for v in (w.buffer, *written)):
        return Local(position=True)
    kept = 0 not in w.region.indices and all(order_of(v) == order_of(w.buffer) for v in read if v.is_local)
    return Local(order_of(w.buffer) if kept else "")


def _write_masked(w: Write) -> Ruling:
    (at, mask), *more = w.region.indices.items()
    buffer, values = w.buffer, w.values
    if more:
        raise CannotSplit("it writes by a mask and by numbers at once")
    if not fits(mask, buffer, at):
        raise CannotSplit("it picks by a mask rows that may belong to another microbatch")
    picked = buffer.ndim - at - mask.ndim + 1  # counted from the last dim: the dim of the rows picked
    one_for_all = values is None or values.ndim < picked or values.sizes[-picked] == 1
    if values is None or (isinstance(values.place, Shared) and one_for_all):
        return Ruling(Split(carried(buffer)) if buffer.dim is not None else ordered(buffer, _common(buffer, mask)))
    if buffer.dim != at or one_for_all or not values.is_local or values.is_position:
        raise CannotSplit("it fills in values one after the other: a token's depend on the tokens before it")
    return Ruling(Split(at), assumes=FILLED)


def _common(a: Value, b: Value) -> str:
    return order_of(a) if order_of(a) == order_of(b) else ""


on(index_put, aten.index_put.default, aten._unsafe_index_put.default,
   in_place=[aten.index_put_.default, aten._index_put_impl_.default])  # fmt: skip
on(index_copy, aten.index_copy.default, in_place=[aten.index_copy_.default])
on(index_add, aten.index_add.default, aten.index_reduce.default,
   in_place=[aten.index_add_.default, aten.index_reduce_.default])  # fmt: skip
on(index_fill, aten.index_fill.int_Scalar, aten.index_fill.int_Tensor,
   in_place=[aten.index_fill_.int_Scalar, aten.index_fill_.int_Tensor])  # fmt: skip
on(scatter, aten.scatter.src, aten.scatter.value, aten.scatter.reduce, aten.scatter.value_reduce,
   in_place=[aten.scatter_.src, aten.scatter_.value, aten.scatter_.reduce, aten.scatter_.value_reduce])  # fmt: skip
on(scatter_add, aten.scatter_add.default, aten.scatter_reduce.two,
   in_place=[aten.scatter_add_.default, aten.scatter_reduce_.two])  # fmt: skip
on(masked_scatter, aten.masked_scatter.default, in_place=[aten.masked_scatter_.default])
