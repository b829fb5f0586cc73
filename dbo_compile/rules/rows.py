"""What is known of rows in an order of their own, and of the numbers that lead from and to them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sympy

from dbo_compile.errors import CannotSplit
from dbo_compile.ir.tokens import TOKENS, Local, Placement, Ruling, Split, Value
from dbo_compile.rules.create import rows_per_token
from dbo_compile.rules.pointwise import combined, tensors

MIXES = "it mixes rows in the order of the tokens with rows in an order of their own"
RETURNED = "the rows it puts back are in the order in which they were taken from their tokens"


def rows_of(x: Value) -> list[int]:
    """The dims of a value without tokens that count rows of theirs all the same."""
    return [d for d in range(x.ndim) if x.is_rows(d)]


def order_of(x: Value) -> str:
    return x.place.order if isinstance(x.place, Local) else ""


def ordered(x: Value, order: str) -> Local:
    """What is made of the numbers in `x` no longer leads to rows, so it may be in an order only if they did not."""
    return Local(position=True) if x.is_position else Local(order)


def own(place: Placement | tuple[Placement, ...], *read: Any) -> Ruling:
    """Rows of a microbatch's own are made of row numbers inside the microbatch."""
    is_local = any(isinstance(p, Local) for p in (place if isinstance(place, tuple) else (place,)))
    return Ruling(place, local_positions=is_local and any(v.is_position and v.dim is not None for v in tensors(read)))


def is_inverse(index: Value) -> bool:
    return isinstance(index.place, Local) and index.place.inverse


def is_permutation(x: Value) -> bool:
    """Whether the numbers lead from an order of rows to those rows in the order of the tokens, one for one."""
    place = x.place
    if not isinstance(place, Local) or x.ndim != 1:
        return False
    return place.position and not place.inverse and place.order != "" and rows_per_token(x.sizes[0]) is not None


def leads_within(index: Value, source: Value, dim: int) -> bool:
    """Whether `index` numbers the tokens of `dim` one by one: the rows of a microbatch lead to its own rows."""
    return index.is_position and index.dim is not None and index.sizes[index.dim] == source.sizes[dim]


def fits(mask: Value, source: Value, at: int) -> bool:
    """Whether a mask over dims of `source` from `at` on says of each row of a microbatch whether it is picked."""
    if source.dim is not None and mask.dim is not None:
        return mask.dim + at == source.dim and mask.sizes[mask.dim] == source.sizes[source.dim]
    return source.is_local and mask.is_local


def is_multiple(rows: sympy.Expr, of: sympy.Expr) -> bool:
    """Whether each row of `of` may be there equally often: if not, these are numbers of other rows."""
    times = sympy.expand(rows / of)
    return rows_per_token(rows) is None or (times.is_integer is True and not times.has(TOKENS))


def put_back(rows: Value, numbers: Value) -> Ruling:
    """The rows of tokens, made of `rows` by `numbers` that lead from or to the order that these are in."""
    order, wanted = order_of(rows), order_of(numbers)
    if order and order != wanted:
        raise CannotSplit(f"the rows were put in order by {order}, but are put back by {wanted}")
    proven = order != "" and rows.sizes[0] == numbers.sizes[0]
    return Ruling(Split(0), assumes="" if proven else RETURNED)


def token_dim(values: Sequence[Value]) -> int:
    """The token dim of values that are broadcast together, none of which is `Local`."""
    place = combined(values).place
    assert isinstance(place, Split)
    return place.dim
