"""Which attention masks over all tokens hide every later token from each token, whatever the inputs are.

Known by how a mask is made: what compares row numbers hides them, and whatever else only hides more. Never guessed: of
a mask that an input holds, or that is made of positions that an input holds, nothing is known.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from dbo_compile import graph as g
from dbo_compile.ir.tokens import Places, Split

aten = torch.ops.aten

QUERIES, KEYS = -2, -1
"""The dims of a mask."""
AND = (aten.bitwise_and.Tensor, aten.logical_and.default)
AT_MOST = (aten.le.Tensor, aten.lt.Tensor)
AT_LEAST = (aten.ge.Tensor, aten.gt.Tensor)
NOT_NEGATIVE = (aten.ge.Scalar, aten.gt.Scalar)
KEEPS_ELEMENTS = (aten.unsqueeze.default, aten.expand.default, aten.slice.Tensor, aten.alias.default,
                  aten.clone.default)  # fmt: skip


def hides_later_tokens(mask: fx.Node, places: Places) -> bool:
    """Whether each element of `mask`, [.., T, T], whose column is behind its row is known to be False, or -inf."""
    args: tuple[Any, ...] = mask.args
    match mask.target, args:
        case target, (x, *_) if target in KEEPS_ELEMENTS and _has_same_dims(mask, x):
            return hides_later_tokens(x, places)
        case aten._to_copy.default, (x,) if all(g.value(n).dtype.is_floating_point for n in (x, mask)):
            return hides_later_tokens(x, places)
        case target, (x, y) if target in AND:
            return any(hides_later_tokens(part, places) for part in (x, y) if _has_same_dims(mask, part))
        case target, (x, y) if target in AT_LEAST:
            return _numbers(x, QUERIES, places) and _numbers(y, KEYS, places)
        case target, (x, y) if target in AT_MOST:
            return _numbers(x, KEYS, places) and _numbers(y, QUERIES, places)
        case target, (fx.Node(target=aten.sub.Tensor, args=(x, y)) as behind, 0) if target in NOT_NEGATIVE:
            return not behind.kwargs and _numbers(x, QUERIES, places) and _numbers(y, KEYS, places)
        case aten.tril.default, (x,) if g.value(x).dtype == torch.bool:
            return True
        case aten.where.self, (shown, _, hidden):
            return _has_same_dims(mask, shown) and hides_later_tokens(shown, places) and _is_minus_infinity(hidden)
        case _:
            return False


def _has_same_dims(mask: fx.Node, x: Any) -> bool:
    """Whether `x` has a row and a column for each of those of `mask`: it is not broadcast."""
    return bool([*map(g.expression, g.value(mask).shape[QUERIES:])] == [*map(g.expression, g.value(x).shape[QUERIES:])])


def _numbers(x: Any, dim: int, places: Places) -> bool:
    """Whether the elements of `x` are the numbers of the rows of `dim`."""
    place = places.get(x) if isinstance(x, fx.Node) else None
    return isinstance(place, Split) and place.position and place.dim - g.value(x).ndim == dim


def _is_minus_infinity(x: Any) -> bool:
    if not isinstance(x, fx.Node):
        return bool(x == -math.inf)
    return x.target in (aten.full.default, aten.scalar_tensor.default) and -math.inf in x.args
