"""Ops that treat every element alone: tokens stay where they are, dims are aligned from the right.

`Local` rows stay in their order as long as nothing else has rows. Numbers that count or number rows (`position`) may be
computed with, but not compared with what is not of the same microbatch: which rows pass would depend on the split.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import sympy
import torch

from dbo_compile.errors import CannotSplit
from dbo_compile.ir.tokens import TOKENS, Local, Number, Placement, Ruling, Shared, Split, Value
from dbo_compile.rules.registry import RULES, Rule, rule

aten = torch.ops.aten
prims = torch.ops.prims

BOUNDED = "it compares positions or counts of rows with a bound: which rows pass would depend on the split"
COUNTS = "it computes with the number of tokens"

# Ops by name, without the overload and the underscore of the variants in place.
TESTS = frozenset({"eq", "ne", "lt", "le", "gt", "ge"})
BOUNDS = frozenset({
    "clamp", "clamp_max", "clamp_min", "clip", "fmax", "fmin", "heaviside", "max", "maximum", "min", "minimum",
})  # fmt: skip
# Each of these compares with a bound of its own, mostly zero.
INNER_BOUNDS = frozenset({
    "_add_relu", "elu", "celu", "hardshrink", "hardsigmoid", "hardswish", "hardtanh", "leaky_relu", "logical_and",
    "logical_not", "logical_or", "logical_xor", "relu", "relu6", "selu", "sgn", "sign", "signbit", "softshrink",
    "threshold",
})  # fmt: skip
EXACT = frozenset({torch.int32, torch.int64})
"""Types that hold every row number, so that a position cast to one of them is still a position."""


def tensors(args: Sequence[Any], kwargs: dict[str, Any]) -> list[Value]:
    """The tensors among the arguments of an op; a number that counts tokens is refused."""
    found = []
    for leaf in _leaves([*args, *kwargs.values()]):
        if isinstance(leaf, Value):
            found.append(leaf)
        elif isinstance(leaf, Number) and not isinstance(leaf.place, Shared):
            raise CannotSplit(COUNTS)
    return found


def combined(values: Sequence[Value]) -> Ruling:
    """Where the tokens are in a result that has an element of each value in every element."""
    if not any(v.is_local for v in values):
        return Ruling(Split(aligned(values)))
    own = [_numbered_locally(v) for v in values]
    if any(v.dim is not None for v in own):
        return Ruling(Split(_returned(own)), assumes="the rows it combines with tokens are in the order of the tokens")
    _refuse_whole_rows(own)
    place = Local(_order(own), position=any(v.is_position for v in own))
    return Ruling(place, local_positions=any(v.dim is not None for v in values))


def aligned(values: Sequence[Value]) -> int:
    """The token dim of values that are broadcast together, none of which is `Local`."""
    ndim = max(v.ndim for v in values)
    carriers = [v for v in values if v.dim is not None]
    dims = sorted({v.ndim_from(ndim) for v in carriers})
    raise NotImplementedError
