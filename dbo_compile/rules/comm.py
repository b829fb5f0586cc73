"""Communication: PyTorch's functional collectives. All ranks of a group have as many tokens, and cut them alike.

Where a collective leaves dim 0 alone, or treats every element alone, tokens stay where they are. Where it deals out the
rows of dim 0 to ranks, those must be a microbatch's own, for which any number of rows is right.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from dbo_compile.errors import CannotSplit
from dbo_compile.ir.tokens import Local, Number, Placement, Ruling, Shared, Split, Value
from dbo_compile.rules.collectives import register_comm_op
from dbo_compile.rules.create import is_own, rows_per_token
from dbo_compile.rules.pointwise import carried
from dbo_compile.rules.registry import rule
from dbo_compile.rules.rows import order_of, ordered, own

c10d = torch.ops._c10d_functional
autograd = torch.ops._c10d_functional_autograd

Splits = Sequence[int | Number]
FROM_GATHERED = "the rows it scatters are in the order in which they were gathered from all ranks"


@rule(c10d.wait_tensor.default)
def wait_tensor(x: Value) -> Placement:
    return x.place


def all_to_all_single(x: Value, output_splits: Splits, input_splits: Splits, _group: Any) -> Placement:
    """Row i of dim 0 goes to a rank that depends on i."""
    if x.is_local:
        return Local(position=x.is_position)
    if isinstance(x.place, Shared):
        raise CannotSplit("it sends the same rows for all microbatches, by numbers of which each has its own")
    if x.dim == 0:
        raise CannotSplit("which rank a row goes to depends on its place among all tokens")
    if any(map(is_own, [*output_splits, *input_splits])):
        raise CannotSplit("it sends another number of rows for each microbatch, and dim 0 does not count its rows")
    return Split(carried(x))


def all_reduce(x: Value, *_: Any) -> Placement:
    """Also `broadcast`: every element meets those in the same place on other ranks."""
    return ordered(x, order_of(x)) if x.is_local else Split(carried(x))


def all_reduce_coalesced(xs: Sequence[Value], *_: Any) -> tuple[Placement, ...]:
    return tuple(x.place if isinstance(x.place, Shared) else all_reduce(x) for x in xs)


def gathered(group_size: int, group: Any) -> str:
    """The order of rows that all ranks of a group have put together: rank by rank, tokens in order."""
    return f"the {group_size} ranks of {group}"


def all_gather(x: Value, group_size: int, group: Any) -> Ruling:
    if x.is_local:
        return Ruling(Local(position=x.is_position))
    if x.dim == 0:
        return own(ordered(x, gathered(group_size, group)), x)
    return Ruling(Split(carried(x)))


def reduce_scatter(x: Value, _reduce_op: str, group_size: int, group: Any) -> Ruling:
    if x.dim is not None:
        if x.dim == 0:
            raise CannotSplit("which rank a row goes to depends on its place among all tokens")
        return Ruling(Split(x.dim))
    if x.is_position or not x.ndim or rows_per_token(x.sizes[0] / group_size) is None:
        return Ruling(Local(position=x.is_position))
    if order_of(x) not in ("", gathered(group_size, group)):
        raise CannotSplit(f"its rows are in the order of {order_of(x)}, not in that of {gathered(group_size, group)}")
    return Ruling(Split(0), assumes="" if order_of(x) else FROM_GATHERED)


def all_gather_coalesced(xs: Sequence[Value], group_size: int, group: Any) -> Ruling:
    return _together([Ruling(x.place) if isinstance(x.place, Shared) else all_gather(x, group_size, group) for x in xs])


def reduce_scatter_coalesced(xs: Sequence[Value], op: str, group_size: int, group: Any) -> Ruling:
    return _together([
        Ruling(x.place) if isinstance(x.place, Shared) else reduce_scatter(x, op, group_size, group) for x in xs
    ])


def _together(rulings: Sequence[Ruling]) -> Ruling:
    places = tuple(p for r in rulings for p in (r.place if isinstance(r.place, tuple) else (r.place,)))
    return Ruling(
        places,
        assumes=next((r.assumes for r in rulings if r.assumes), ""),
        local_positions=any(r.local_positions for r in rulings),
    )


for op in (c10d.all_to_all_single.default, autograd.all_to_all_single.default):
    register_comm_op(op, rule=all_to_all_single, group_arg=3)
for op in (c10d.all_reduce.default, c10d.all_reduce_.default, c10d.broadcast.default, c10d.broadcast_.default):
    register_comm_op(op, rule=all_reduce, group_arg=2)
for op in (c10d.all_reduce_coalesced.default, c10d.all_reduce_coalesced_.default):
    register_comm_op(op, rule=all_reduce_coalesced, group_arg=2)
for op in (c10d.all_gather_into_tensor.default, autograd.all_gather_into_tensor.default):
    register_comm_op(op, rule=all_gather, group_arg=2)
for op in (c10d.reduce_scatter_tensor.default, autograd.reduce_scatter_tensor.default):
    register_comm_op(op, rule=reduce_scatter, group_arg=3)
register_comm_op(c10d.all_gather_into_tensor_coalesced.default, rule=all_gather_coalesced, group_arg=2)
register_comm_op(c10d.reduce_scatter_tensor_coalesced.default, rule=reduce_scatter_coalesced, group_arg=3)
