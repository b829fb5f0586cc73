"""Ops that treat every element alone: tokens stay where they are, dims are aligned from the right.

`Local` rows keep their order as long as nothing else has rows. Numbers that count or number rows (`position`) may be
computed with, but not compared: which rows pass would depend on the split.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import wraps
from typing import Any

import sympy
import torch

from dbo_compile import compat
from dbo_compile.errors import CannotSplit
from dbo_compile.ir.tokens import TOKENS, Local, Number, Placement, Ruling, Shared, Split, Value
from dbo_compile.rules.registry import RULES, Rule, rule

aten = torch.ops.aten
prims = torch.ops.prims

# Ops by name: the overloads of each and their variants in place are alike.
COMPARING = frozenset({
    "clamp", "clamp_max", "clamp_min", "clip", "eq", "fmax", "fmin", "ge", "gt", "heaviside", "le", "lt", "max",
    "maximum", "min", "minimum", "ne",
    # with a bound of their own, mostly zero
    "celu", "elu", "hardshrink", "hardsigmoid", "hardswish", "hardtanh", "leaky_relu", "logical_and", "logical_not",
    "logical_or", "logical_xor", "relu", "relu6", "selu", "sgn", "sign", "signbit", "softshrink", "threshold",
})  # fmt: skip
PRIMS = (
    "abs", "acos", "acosh", "add", "asin", "asinh", "atan", "atan2", "atanh", "bitwise_and", "bitwise_not",
    "bitwise_or", "bitwise_xor", "cbrt", "ceil", "cos", "cosh", "digamma", "div", "eq", "erf", "erf_inv", "erfc", "exp",
    "exp2", "expm1", "floor", "fmax", "fmin", "fmod", "gcd", "ge", "gt", "hypot", "isfinite", "le", "lgamma", "log",
    "log10", "log1p", "log2", "lt", "maximum", "minimum", "mul", "ne", "neg", "nextafter", "pow", "reciprocal",
    "remainder", "round", "rsqrt", "shift_left", "shift_right_arithmetic", "sign", "signbit", "sin", "sinh", "sqrt",
    "sub", "tan", "tanh", "trunc", "where",
)  # fmt: skip
UNTAGGED = (
    aten._conj.default, aten._neg_view.default, aten._prelu_kernel.default, aten.complex.default, aten.copy.default,
    aten.fill.Scalar, aten.fill.Tensor, aten.floor_divide.default, aten.hardswish.default, aten.imag.default,
    aten.masked_fill.Tensor, aten.polar.default, aten.real.default, aten.rsub.Tensor, aten.where.Scalar,
    aten.where.ScalarOther, aten.where.ScalarSelf, aten.zero.default,
)  # fmt: skip

BOUNDED = "it compares positions or counts of rows: which rows pass would depend on the split"
NUMBERS_ROWS = frozenset({torch.int32, torch.int64})
"""Types that hold every row number: what is cast to one of them from another still leads to the same rows."""


def combined(values: Sequence[Value]) -> Ruling:
    """Where the tokens are in a result whose every element is made of one element of each value."""
    if not any(v.is_local for v in values):
        return Ruling(Split(_aligned(values)))
    own = [_numbered_locally(v) for v in values]
    if any(v.dim is not None for v in own):
        return Ruling(_mixed(own), assumes="the rows it combines with tokens are in the order of those tokens")
    _refuse_whole_rows(own)
    place = Local(_order(own), position=any(v.is_position for v in own))
    return Ruling(place, local_positions=any(v.dim is not None for v in values))


def renewed(x: Value) -> Split | Local:
    """The rows of `x` where they are, with new numbers in them: if they led home from an order, they no longer do."""
    if not isinstance(x.place, Local):
        return Split(carried(x))
    return replace(x.place, order="" if x.place.inverse else x.place.order, inverse=False)


def carried(x: Value) -> int:
    """The token dim of a value that is `Split`, as a rule knows."""
    assert x.dim is not None, f"{x} carries no tokens"
    return x.dim


def tensors(*args: Any) -> list[Value]:
    """The tensors among arguments, nested ones too; a number that counts tokens is refused."""
    found = []
    for leaf in _leaves(args):
        if isinstance(leaf, Number) and not isinstance(leaf.place, Shared):
            raise CannotSplit("it computes with the number of tokens")
        if isinstance(leaf, Value):
            found.append(leaf)
    return found


def _leaves(args: Any) -> Iterator[Any]:
    if isinstance(args, list | tuple):
        for arg in args:
            yield from _leaves(arg)
    else:
        yield args


def _aligned(values: Sequence[Value]) -> int:
    """The token dim of values that are broadcast together; those that are not `Split` have size 1 there."""
    ndim = max(v.ndim for v in values)
    dims = sorted({v.dim + ndim - v.ndim for v in values if v.dim is not None})
    if len(dims) != 1:
        raise CannotSplit(f"its arguments carry tokens in different dims {dims}")
    sizes = {_size_at(v, dims[0], ndim) for v in values if v.dim is not None}
    if len(sizes) != 1:
        raise CannotSplit(f"its arguments have different numbers of rows for a token: sizes {sorted(map(str, sizes))}")
    for v in values:
        if v.dim is None and (size := _size_at(v, dims[0], ndim)) != 1:
            raise CannotSplit(f"an argument without tokens has size {size} in the token dim {dims[0]}")
    return dims[0]


def _size_at(v: Value, dim: int, ndim: int) -> sympy.Expr:
    """The size of `v` where the result, which has `ndim` dims, has `dim`."""
    own = dim - (ndim - v.ndim)
    return v.sizes[own] if own >= 0 else sympy.Integer(1)


def _numbered_locally(v: Value) -> Value:
    """Beside rows of a microbatch's own, row numbers are those inside the microbatch."""
    return replace(v, place=Local(position=True)) if v.dim is not None and v.is_position else v


def _mixed(values: Sequence[Value]) -> Split:
    """Tokens combined with rows of a microbatch's own, which must be as many, or they are no tokens' rows."""
    if any(v.is_local and v.is_position for v in values):
        raise CannotSplit("it mixes positions or counts of a microbatch's rows into single tokens")
    if orders := [v.place.order for v in values if isinstance(v.place, Local) and v.place.order]:
        raise CannotSplit(f"it combines tokens with rows in the order of {orders[0]}")
    ndim = max(v.ndim for v in values)
    dim = _aligned([v for v in values if not v.is_local] + [Value((sympy.S.One,) * ndim, Shared())])
    (rows,) = {_size_at(v, dim, ndim) for v in values if v.dim is not None}
    for v in values:
        others = [d for d in range(v.ndim) if d != dim - (ndim - v.ndim)]
        if v.is_local and (_size_at(v, dim, ndim) != rows or any(v.is_rows(d) for d in others)):
            raise CannotSplit("it mixes what all tokens of a microbatch share into single tokens")
    return Split(dim)


def _refuse_whole_rows(values: Sequence[Value]) -> None:
    for v in values:
        if not v.is_local and any(size.has(TOKENS) for size in v.sizes):
            raise CannotSplit(f"it mixes a value of all tokens, of size {list(v.sizes)}, with a microbatch's own rows")


def _order(values: Sequence[Value]) -> str:
    """The order that all values with rows have; values without rows must be the same for every microbatch.

    Numbers of rows lose it: with an order they say how it came about, and say something else after arithmetic.
    """
    if any(v.is_position for v in values):
        return ""
    ndim = max(v.ndim for v in values)
    rows = [v for v in values if ndim and v.ndim == ndim and v.sizes[0] != 1]
    orders = {v.place.order if isinstance(v.place, Local) else "" for v in rows}
    if len(orders) != 1 or any(v.is_local for v in values if v not in rows):
        return ""
    return orders.pop()


def elementwise(*args: Any, **kwargs: Any) -> Ruling:
    return combined(tensors(args, [*kwargs.values()]))


def comparing(*args: Any, **kwargs: Any) -> Ruling:
    """Positions are compared with nothing, not even with each other: which of a microbatch's rows pass (`2 * position <
    count`, say, or the expert that has most) would depend on the split."""
    ruling = elementwise(*args, **kwargs)
    if isinstance(ruling.place, Local) and ruling.place.position:
        raise CannotSplit(BOUNDED)
    return ruling


@rule(aten.floor_divide.default, aten.floor_divide.Scalar, aten.div.Tensor_mode, aten.div.Scalar_mode)
def divide(x: Any, by: Any, *, rounding_mode: str | None = "floor") -> Ruling:
    """Dividing sorted row numbers by the rows of a token, rounded, leads to the tokens of the sorted rows."""
    ruling = elementwise(x, by)
    if isinstance(ruling.place, Local) and type(by) is int and by > 0 and rounding_mode is not None:
        return Ruling(renewed(x))
    return ruling


@rule(aten.frexp.Tensor, aten.log_sigmoid_forward.default)
def pair(x: Value) -> tuple[Placement, ...]:
    return renewed(x), renewed(x)


@rule(
    aten.alias.default, aten.clone.default, aten.contiguous.default, aten.detach.default, aten.lift_fresh.default,
    aten.lift_fresh_copy.default, aten.positive.default, aten.resolve_conj.default, aten.resolve_neg.default,
    prims.clone.default, prims.device_put.default, prims.view_of.default,
)  # fmt: skip
def same(x: Value, *_: Any, **__: Any) -> Placement:
    return x.place


@rule(aten._to_copy.default, aten.to.dtype, aten.to.device, prims.convert_element_type.default)
def cast(x: Value, *args: Any, dtype: torch.dtype | None = None, **_: Any) -> Placement:
    """Rows stay where they are; numbers lead to the same rows only if the new type holds them all."""
    dtype = dtype or next((a for a in args if isinstance(a, torch.dtype)), x.dtype)
    if dtype == x.dtype or (dtype in NUMBERS_ROWS and x.is_integer):
        return x.place
    if x.is_local and x.is_position and dtype == torch.bool:
        raise CannotSplit(BOUNDED)
    return renewed(x)


def writing(fn: Rule) -> Rule:
    """The rule of the variant that writes its result over its first argument, which goes on having one placement."""

    @wraps(fn)
    def written(target: Value, *args: Any, **kwargs: Any) -> Ruling:
        tensors(args, [*kwargs.values()])
        if isinstance(target.place, Shared):
            raise CannotSplit("it writes rows of tokens into a buffer that all tokens share")
        ruling = fn(target, *args, **kwargs)
        assert isinstance(ruling, Ruling)
        if ruling.place != target.place:
            raise CannotSplit(f"it writes {ruling.place} over {target.place}")
        return ruling

    return written


def _family(name: str) -> Rule:
    """The rule of the op of this name."""
    return comparing if name in COMPARING else elementwise


def _register() -> None:
    """Ask PyTorch which ops are pointwise: it tags them, but for a few, and but for many of their variants in place.

    Of all ops that there are: `dir(aten)` lists only those that somebody has looked up by now.
    """
    names = [name for name in compat.aten_op_names() if not name.endswith("_") or name.endswith("__")]
    packets = [getattr(aten, name, None) for name in names]
    overloads = [op for p in packets if hasattr(p, "overloads") for op in _overloads_of(p)]
    tagged = [op for op in overloads if torch.Tag.pointwise in op.tags and not op._schema.is_mutable]
    functional = [op for op in tagged if all("Tensor" in str(r.type) for r in op._schema.returns)]  # not aten.equal
    for op in [*functional, *UNTAGGED, *(getattr(prims, name).default for name in PRIMS)]:
        name = op._schema.name.split("::")[1]
        if op not in RULES and torch.Tag.nondeterministic_seeded not in op.tags:
            rule(op)(_family(name))
        in_place = getattr(aten, f"{name}_", None)
        for variant in () if in_place is None else _overloads_of(in_place):
            if variant not in RULES:
                rule(variant)(writing(_family(name)))


def _overloads_of(packet: Any) -> list[Any]:
    ops = [getattr(packet, overload) for overload in packet.overloads()]
    return [op for op in ops if not any(arg.is_out for arg in op._schema.arguments)]


_register()
