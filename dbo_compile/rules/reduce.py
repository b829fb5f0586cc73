"""Ops that reduce dims, and ops that count.

Adding up integers over tokens counts: each microbatch has the counts of its own rows (`Local`). Adding up anything else
over tokens needs them all at once, and so does asking for the place of the largest.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from dbo_compile.errors import CannotSplit
from dbo_compile.ir.tokens import FRESH, Local, Placement, Ruling, Shared, Split, Value
from dbo_compile.rules.create import Size
from dbo_compile.rules.pointwise import tensors
from dbo_compile.rules.registry import rule
from dbo_compile.rules.rows import order_of, ordered, own, rows_of

aten = torch.ops.aten

Dims = int | Sequence[int] | None
OVER_ROWS = "it reduces over rows of many tokens"


def reduced(x: Value, dims: Dims, *, keepdim: bool = False, counts: bool = False) -> Ruling:
    """Where the tokens are after `dims` are gone (None or [] are all); `counts` if the result is exact for integers."""
    gone = set(range(x.ndim)) if dims is None or dims in ([], ()) else _given_dims(x, dims)
    if isinstance(x.place, Local):
        if not gone & {*rows_of(x)}:
            return Ruling(ordered(x, "" if 0 in gone else order_of(x)))
        if not (counts and x.is_integer):
            raise CannotSplit(OVER_ROWS)
        return Ruling(Local(position=True))
    assert x.dim is not None, f"{x} carries no tokens"
    if x.dim not in gone:
        return Ruling(Split(x.dim if keepdim else x.dim - sum(d < x.dim for d in gone)))
    if not (counts and x.is_integer):
        raise CannotSplit(f"it reduces over the token dim {x.dim}")
    return own(Local(position=True), x)


def _given_dims(x: Value, dims: int | Sequence[int]) -> set[int]:
    return {d % x.ndim for d in ([dims] if isinstance(dims, int) else dims)} if x.ndim else set()


def twice(ruling: Ruling) -> Ruling:
    """The ruling of an op with two results that are placed alike."""
    assert not isinstance(ruling.place, tuple)
    return Ruling((ruling.place, ruling.place), local_positions=ruling.local_positions)


# ---- Reductions that are exact on integers, whatever the order of rows


@rule(aten.sum.default, aten.sum.dim_IntList, aten.nansum.default, aten.amax.default, aten.amin.default,
      aten.max.default, aten.min.default, aten.any.default, aten.any.dim, aten.all.default, aten.all.dim,
      aten.count_nonzero.default, aten.count_nonzero.dim_IntList)  # fmt: skip
def count(x: Value, dims: Dims = None, keepdim: bool = False, **_: Any) -> Ruling:
    return reduced(x, dims, keepdim=keepdim, counts=True)


@rule(aten.any.dims, aten.all.dims)
def any_of_dims(x: Value, dims: Dims = None, keepdim: bool = False) -> Ruling:
    """Unlike elsewhere, no dims are none."""
    if dims in ([], ()):
        return Ruling(Split(x.dim) if x.dim is not None else ordered(x, order_of(x)))
    return reduced(x, dims, keepdim=keepdim, counts=True)


@rule(aten.aminmax.default)
def aminmax(x: Value, *, dim: int | None = None, keepdim: bool = False) -> Ruling:
    return twice(reduced(x, dim, keepdim=keepdim, counts=True))


# ---- Reductions that need all rows


@rule(aten.mean.default, aten.mean.dim, aten.prod.default, aten.prod.dim_int, aten.logsumexp.default,
      aten.argmax.default, aten.argmin.default, aten.median.default, aten.nanmedian.default)  # fmt: skip
def reduce(x: Value, dims: Dims = None, keepdim: bool = False, **_: Any) -> Ruling:
    return reduced(x, dims, keepdim=keepdim)


@rule(aten.max.dim, aten.min.dim, aten.median.dim, aten.nanmedian.dim, aten.mode.default)
def reduce_with_place(x: Value, dim: int = -1, keepdim: bool = False) -> Ruling:
    return twice(reduced(x, dim, keepdim=keepdim))


@rule(aten.kthvalue.default)
def kthvalue(x: Value, k: Size, dim: int = -1, keepdim: bool = False) -> Ruling:
    tensors(k)
    return twice(reduced(x, dim, keepdim=keepdim))


@rule(aten.linalg_vector_norm.default, aten.norm.ScalarOpt_dim, aten.norm.ScalarOpt_dim_dtype,
      aten.norm.Scalar, aten.norm.ScalarOpt_dtype)  # fmt: skip
def norm(x: Value, p: Any = 2, dims: Dims = None, keepdim: bool = False, **_: Any) -> Ruling:
    tensors(p)
    return reduced(x, dims, keepdim=keepdim)


@rule(aten.var.correction, aten.std.correction)
def spread(x: Value, dims: Dims = None, *, keepdim: bool = False, correction: Any = None) -> Ruling:
    tensors(correction)
    return reduced(x, dims, keepdim=keepdim)


@rule(aten.var_mean.correction, aten.std_mean.correction)
def spread_and_mean(x: Value, dims: Dims = None, *, keepdim: bool = False, correction: Any = None) -> Ruling:
    tensors(correction)
    return twice(reduced(x, dims, keepdim=keepdim))


@rule(aten.var.dim, aten.std.dim)
def spread_of_dims(x: Value, dims: Dims, _unbiased: bool = True, keepdim: bool = False) -> Ruling:
    return reduced(x, dims, keepdim=keepdim)


@rule(aten.var_mean.dim, aten.std_mean.dim)
def spread_and_mean_of_dims(x: Value, dims: Dims, _unbiased: bool = True, keepdim: bool = False) -> Ruling:
    return twice(reduced(x, dims, keepdim=keepdim))


@rule(aten.var.default, aten.std.default)
def spread_of_all(x: Value, _unbiased: bool = True) -> Ruling:
    return reduced(x, None)


@rule(aten.var_mean.default, aten.std_mean.default)
def spread_and_mean_of_all(x: Value, _unbiased: bool = True) -> Ruling:
    return twice(reduced(x, None))


# ---- Counting


@rule(aten.histc.default)
def histc(x: Value, bins: int = 100, low: Any = 0, high: Any = 0) -> Ruling:
    """Counts how many values are in each bin; without bounds, the bins would be those of a microbatch's own values."""
    tensors(low, high)
    if low == high:
        raise CannotSplit("the bounds of its bins are the smallest and the largest of all values")
    return own(Local(position=True), x)


@rule(aten.bincount.default)
def bincount(x: Value, weights: Value | None = None, minlength: Size = 0) -> Ruling:
    tensors(minlength)
    if weights is not None and not weights.is_integer:
        raise CannotSplit("it adds up weights of many tokens")
    return own(Local(position=True), x, weights)


@rule(aten._unique2.default, aten.unique_consecutive.default)
def unique(x: Value, *args: Any, dim: int | None = None, **_: Any) -> Ruling:
    """The distinct values, the number of each value among them, and how often each occurs."""
    if not x.is_integer or dim is not None or any(not isinstance(a, bool) for a in args):
        raise CannotSplit("it looks for equal rows among all tokens")
    return own((Local(position=x.is_position), Local(position=True), Local(position=True)), x)


@rule(aten.nonzero.default, aten.nonzero_static.default)
def nonzero(x: Value, *, size: Size | None = None, **_: Any) -> Ruling:
    """The rows picked are in an order of their own, which is lost where a fixed number of them is asked for."""
    if not x.is_integer:
        raise CannotSplit("it numbers the rows of many tokens by what they hold")
    if x.is_position:
        raise CannotSplit("it compares positions or counts of rows with zero")
    return Ruling(Local(order=FRESH if size is None and x.dim is not None else "", position=True))


@rule(aten.repeat_interleave.Tensor)
def numbered_by_counts(counts: Value, **_: Any) -> Placement:
    """For each row the number of the bin that it was counted in: of an expert, say, where bins are not rows as well."""
    if not counts.is_local:
        raise CannotSplit("it repeats tokens a number of times that depends on the token")
    return Local(position=bool(rows_of(counts)))


@rule(aten.repeat_interleave.self_Tensor)
def repeated_by_counts(x: Value, counts: Value, dim: int | None = None, **_: Any) -> Placement:
    if x.dim is not None or counts.dim is not None:
        raise CannotSplit("it repeats tokens a number of times that depends on the token")
    if isinstance(x.place, Shared) and rows_of(counts):
        raise CannotSplit("it repeats what all tokens share by counts for the rows of a microbatch")
    return Local(position=x.is_position)


@rule(aten.one_hot.default)
def one_hot(x: Value, num_classes: int = -1) -> Placement:
    if num_classes == -1:
        raise CannotSplit("the number of its classes is the largest of all values")
    return Split(x.dim) if x.dim is not None else ordered(x, order_of(x))
