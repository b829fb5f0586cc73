"""Every way to say which dims of a call have tokens, and which of its numbers count them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice, product
from typing import Any

import sympy
import torch
from torch.utils._pytree import tree_map

from dbo_compile.ir.tokens import TOKENS, Count, Number, Shared, Split, Value
from tests.soundness.calls import Call
from tests.soundness.exchanges import SIMULATED

MOST_ROWS = 3
"""So many rows may one token have in a dim."""


@dataclass(frozen=True)
class View:
    """`num_tokens` tokens; leaf i of the arguments has them in dim `dims[i]`, or is a number that counts them (0).

    With `positions`, integers with tokens are the numbers of their rows.
    """

    num_tokens: int
    dims: Mapping[int, int]
    positions: bool = False
    numbers: tuple[int, ...] = ()

    def __str__(self) -> str:
        return f"{self.num_tokens} tokens, leaf: dim {dict(self.dims)}{', row numbers' if self.positions else ''}"

    def leaves(self, leaves: list[Any]) -> list[Any]:
        """The arguments for all tokens: with `positions`, row numbers; a number that counts is made a multiple."""
        return [self._leaf(i, a) if i in self.dims else a for i, a in enumerate(leaves)]

    def _leaf(self, i: int, arg: Any) -> Any:
        if not isinstance(arg, torch.Tensor):
            return arg if counts(arg, self.num_tokens) else self.num_tokens
        if not (self.positions and arg.dtype == torch.int64):
            return arg
        return row_numbers(arg, self.dims[i]).expand(arg.shape).clone()

    def seen(self, leaves: list[Any]) -> list[Any]:
        """What a rule sees of the arguments."""
        return [self._seen(i, a) for i, a in enumerate(leaves)]

    def _seen(self, i: int, arg: Any) -> Any:
        dim = self.dims.get(i)
        if not isinstance(arg, torch.Tensor):
            return arg if dim is None else Number(arg // self.num_tokens * TOKENS, Count())
        sizes = [sympy.Integer(s) for s in arg.shape]
        if dim is None:
            return Value(tuple(sizes), Shared(), arg.dtype)
        sizes[dim] = sizes[dim] // self.num_tokens * TOKENS
        return Value(tuple(sizes), Split(dim, self.positions and arg.dtype == torch.int64), arg.dtype)


def row_numbers(x: torch.Tensor, dim: int) -> torch.Tensor:
    return torch.arange(x.shape[dim]).view(-1, *[1] * (x.ndim - dim - 1))


def counts(number: float, num_tokens: int) -> bool:
    return type(number) is int and number % num_tokens == 0 and 0 < number // num_tokens < 7


def views(call: Call, most: int) -> Iterator[View]:
    """At most so many choices of token dims for each number of tokens: first each tensor alone, then together."""
    leaves = call.leaves
    tensors = {i: a for i, a in enumerate(leaves) if isinstance(a, torch.Tensor)}
    numbers = _symbolic_numbers(call)
    sizes = {s for a in tensors.values() for s in a.shape}
    for n in sorted({s // k for s in sizes for k in range(1, MOST_ROWS + 1) if s % k == 0 and s // k > 1}):
        counted = {i: 0 for i in numbers if counts(leaves[i], n)}
        alone = [{i: 0} for i in numbers if {i: 0} != counted]
        for dims in islice(_token_dims(tensors, n, ranked=call.op in SIMULATED), most):
            for of_numbers in ({}, *([counted] if counted else []), *alone):
                view = View(n, dims | of_numbers, numbers=tuple(of_numbers))
                yield view
                if any(tensors[i].dtype == torch.int64 for i in dims):
                    yield replace(view, positions=True)


def _token_dims(tensors: Mapping[int, torch.Tensor], n: int, *, ranked: bool) -> Iterator[dict[int, int]]:
    sizes = {i: a.shape[:-1] if ranked else a.shape for i, a in tensors.items()}
    may = {i: [d for d, s in enumerate(s) if s % n == 0 and 0 < s // n <= MOST_ROWS] for i, s in sizes.items()}
    yield from ({i: d} for i, dims in may.items() for d in dims)
    for choice in product(*([None, *dims] for dims in may.values())):
        chosen = {i: d for i, d in zip(may, choice, strict=True) if d is not None}
        if len(chosen) > 1:
            yield chosen


def _symbolic_numbers(call: Call) -> list[int]:
    """The leaves that may be symbolic numbers by the schema: sizes, factors, bounds."""

    def flags(name: str, arg: Any) -> Any:
        return tree_map(lambda a: name in may and type(a) in (int, float), arg)

    names = [a.name for a in call.op._schema.arguments]
    may = {*re.findall(r"(?:SymInt|Scalar|float)\S* (\w+)", str(call.op._schema).partition(" -> ")[0])}
    args = tuple(flags(name, arg) for name, arg in zip(names, call.args, strict=False))
    kwargs = {name: flags(name, arg) for name, arg in call.kwargs.items()}
    return [i for i, flag in enumerate(Call(None, args, kwargs).leaves) if flag is True]
