"""Plays ops one after the other, on all tokens and on parts of them, as their rules say, and checks what they say."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import sympy
import torch

from dbo_compile.ir.tokens import FRESH, TOKENS, Count, Local, Number, Placement, Ruling, Shared, Split, Value
from dbo_compile.rules import RULES
from dbo_compile.rules.collectives import comm_op

NUM_TOKENS = 7
RECEIVED = sympy.Symbol("u", integer=True, nonnegative=True)


@dataclass(frozen=True)
class Seen:
    """What a rule sees of a tensor, the tensor for all tokens, and those of the microbatches."""

    value: Value
    whole: torch.Tensor
    parts: tuple[torch.Tensor, ...]

    @property
    def place(self) -> Placement:
        return self.value.place


@dataclass(frozen=True)
class Rows:
    """A number: `times` the number of tokens, or (with `of`) how many rows a tensor has."""

    times: int = 1
    of: Seen | None = None


class Flow:
    """Call it with an op and its arguments. `obligations` says what was taken on trust."""

    def __init__(self, sizes: tuple[int, ...]) -> None:
        assert sum(sizes) == NUM_TOKENS
        self.starts = (0, *accumulate(sizes))[:-1]
        self.sizes = sizes
        self.obligations: list[str] = []
        self.num_ops = 0

    def tokens(self, whole: torch.Tensor) -> Seen:
        return Seen(
            self._value(whole, Split(0), {}), whole, whole.split([k * len(whole) // NUM_TOKENS for k in self.sizes])
        )

    def shared(self, whole: torch.Tensor) -> Seen:
        return Seen(
            Value(tuple(map(sympy.Integer, whole.shape)), Shared(), whole.dtype), whole, (whole,) * len(self.sizes)
        )

    def __call__(self, op: Any, *args: Any, rows: sympy.Expr | None = None, **kwargs: Any) -> Any:
        """The result of an op; `rows` is its first size, if nothing is known of that."""
        self.num_ops += 1
        inputs = [a for a in _leaves([args, kwargs]) if isinstance(a, Seen)]
        ruling = Ruling(Shared())
        if any(isinstance(a, Rows) or (isinstance(a, Seen) and a.place != Shared()) for a in _leaves([args, kwargs])):
            answer = RULES[op](*_map(args, _as_seen), **_map(kwargs, _as_seen))
            ruling = answer if isinstance(answer, Ruling) else Ruling(answer)
        self.obligations += [ruling.assumes] if ruling.assumes else []
        run = _finished(op) if comm_op(op) else op
        whole = run(*_map(args, _whole), **_map(kwargs, _whole))
        parts = []
        for i in range(len(self.sizes)):
            arg = self._part(i, localised=ruling.local_positions)
            parts.append(run(*_map(args, arg), **_map(kwargs, arg)))
        known = {s: e for a in inputs for s, e in zip(a.whole.shape, a.value.sizes, strict=True) if s % NUM_TOKENS == 0}
        known |= {s: e for a in inputs for s, e in zip(a.whole.shape, a.value.sizes, strict=True) if e.has(TOKENS)}
        if isinstance(ruling.place, tuple):
            results = zip(ruling.place, whole, zip(*parts, strict=True), strict=True)
            return tuple(self._result(place, w, p, known, rows, bool(inputs)) for place, w, p in results)
        return self._result(ruling.place, whole, tuple(parts), known, rows, bool(inputs))

    def _part(self, i: int, *, localised: bool) -> Any:
        def part(arg: Any) -> Any:
            if isinstance(arg, Rows):
                return arg.times * self.sizes[i] if arg.of is None else len(arg.of.parts[i])
            if not isinstance(arg, Seen):
                return arg
            before = self._rows_before(arg.place, arg.whole, i) if localised else 0
            return arg.parts[i] - before if before else arg.parts[i].clone()

        return part

    def _rows_before(self, place: Placement, whole: torch.Tensor, i: int) -> int:
        is_position = isinstance(place, Split) and place.position
        return self.starts[i] * whole.shape[place.dim] // NUM_TOKENS if is_position else 0

    def _result(self, place: Any, whole: Any, parts: Any, known: Any, rows: Any, from_tensors: bool) -> Seen:
        if isinstance(place, Local) and place.order == FRESH:
            place = replace(place, order=f"op {self.num_ops}")
        if not from_tensors:  # the analysis counts from the first row of all
            parts = tuple(part + self._rows_before(place, whole, i) for i, part in enumerate(parts))
        value = self._value(whole, place, known)
        if rows is not None:
            value = replace(value, sizes=(rows, *value.sizes[1:]))
        result = Seen(value, whole, parts)
        if isinstance(place, Split):
            torch.testing.assert_close(torch.cat(parts, place.dim), whole, rtol=1e-12, atol=1e-12)
        return result

    def _value(self, whole: torch.Tensor, place: Placement, known: dict[int, sympy.Expr]) -> Value:
        sizes = (known.get(s, s // NUM_TOKENS * TOKENS if s % NUM_TOKENS == 0 else s) for s in whole.shape)
        return Value(tuple(map(sympy.sympify, sizes)), place, whole.dtype)


def _finished(op: Any) -> Any:
    return lambda *args: torch.ops._c10d_functional.wait_tensor(op(*args))


def _as_seen(arg: Any) -> Any:
    if isinstance(arg, Rows):
        own = Number(RECEIVED, Local(position=True))
        return Number(arg.times * TOKENS, Count()) if arg.of is None else own
    return arg.value if isinstance(arg, Seen) else arg


def _whole(arg: Any) -> Any:
    if isinstance(arg, Rows):
        return arg.times * NUM_TOKENS if arg.of is None else len(arg.of.whole)
    return arg.whole.clone() if isinstance(arg, Seen) else arg


def _leaves(args: Any) -> list[Any]:
    if isinstance(args, dict):
        args = [*args.values()]
    return [leaf for arg in args for leaf in _leaves(arg)] if isinstance(args, list | tuple) else [args]


def _map(args: Any, fn: Any) -> Any:
    if isinstance(args, dict):
        return {name: _map(arg, fn) for name, arg in args.items()}
    return type(args)(_map(arg, fn) for arg in args) if isinstance(args, list | tuple) else fn(args)
