"""Brute force: what a rule claims of one call of an op, tried on parts of the tokens.

A call is one of ATen with real arguments. Every way to say which of its dims have tokens is a `View` of it: each tensor
has tokens in one dim or is shared, each size that is a multiple of the number of tokens counts them or is a number.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, islice, product
from typing import Any

import sympy
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from dbo_compile.errors import CannotSplit
from dbo_compile.ir.tokens import TOKENS, Count, Number, Ruling, Shared, Split, Value
from dbo_compile.rules import rule_of

MOST_VIEWS = 24
UNSET = ("aten.empty", "aten.new_empty", "aten.empty_like", "prims.empty", "aten.empty_strided", "aten.resize")


@dataclass(frozen=True)
class Call:
    op: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def key(self) -> str:
        return f"{self.op} {tree_map(_described, (self.args, self.kwargs))}"


def _described(arg: Any) -> Any:
    return (tuple(arg.shape), str(arg.dtype)) if isinstance(arg, torch.Tensor) else str(arg)


class Recorder(TorchDispatchMode):
    """Keeps the calls of ATen ops that a function makes, with the arguments as they were before."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(isinstance(a, torch.Tensor) for a in tree_flatten((args, kwargs))[0]):
            kept = tree_map(lambda a: a.detach().clone() if isinstance(a, torch.Tensor) else a, (args, kwargs))
            self.calls.append(Call(func, *kept))
        return func(*args, **kwargs)


@dataclass(frozen=True)
class View:
    """`num_tokens` tokens; leaf i of the arguments has them in dim `dims[i]`, or (a number) counts them (0)."""

    num_tokens: int
    dims: dict[int, int]
    positions: bool

    def __str__(self) -> str:
        return f"{self.num_tokens} tokens, leaf: dim {self.dims}{', row numbers' if self.positions else ''}"


@dataclass(frozen=True)
class Verdict:
    """`kind`: wrong, right, local, shared, refused, no rule, fails (on parts, as its guards would have told)."""

    kind: str
    text: str = ""


def views(call: Call) -> Iterator[View]:
    leaves = tree_flatten((call.args, call.kwargs))[0]
    tensors = {i: a for i, a in enumerate(leaves) if isinstance(a, torch.Tensor)}
    sizes = sorted({s // k for a in tensors.values() for s in a.shape for k in (1, 2, 3) if s % k == 0 and s // k > 1})
    counted = _counted(call)
    for n in sizes:
        options = [[None, *(d for d, s in enumerate(a.shape) if s and s % n == 0 and s // n < 4)] for a in tensors.values()]
        numbers = {i: 0 for i in counted if _counts(leaves[i], n)}
        for choice in islice(product(*options), MOST_VIEWS):
            dims = {i: d for i, d in zip(tensors, choice, strict=True) if d is not None}
            if not dims:
                continue
            integers = [i for i in dims if tensors[i].dtype == torch.int64]
            for of_numbers in [{}, *([numbers] if numbers else []), *({i: 0} for i in counted if i not in numbers)]:
                yield View(n, dims | of_numbers, positions=False)
                if integers:
                    yield View(n, dims | of_numbers, positions=True)


def _counts(number: float, n: int) -> bool:
    return type(number) is int and number % n == 0 and 0 < number // n < 7


def _counted(call: Call) -> list[int]:
    """The leaves that may be symbolic numbers by the schema: sizes, factors, bounds."""
    def sized(name: str, arg: Any) -> Any:
        kind = types.get(name, "")
        may_count = any(t in kind for t in ("SymInt", "number", "float"))
        return tree_map(lambda a: may_count and type(a) in (int, float), arg)

    types = {a.name: str(a.real_type) for a in call.op._schema.arguments}
    names = [a.name for a in call.op._schema.arguments]
    flags = (
        tuple(sized(name, arg) for name, arg in zip(names, call.args, strict=False)),
        {name: sized(name, arg) for name, arg in call.kwargs.items()},
    )
    return [i for i, flag in enumerate(tree_flatten(flags)[0]) if flag is True]


def judge(call: Call, view: View) -> Verdict:
    """Ask the rule, and try its claim."""
    leaves, spec = tree_flatten((call.args, call.kwargs))
    leaves = [_numbered(a, i, view) for i, a in enumerate(leaves)]
    if (rule := rule_of(call.op)) is None:
        return Verdict("no rule")
    args, kwargs = tree_unflatten([_seen(a, i, view) for i, a in enumerate(leaves)], spec)
    try:
        ruling = rule(*args, **kwargs)
    except CannotSplit as why:
        return Verdict("refused", str(why))
    ruling = ruling if isinstance(ruling, Ruling) else Ruling(ruling)
    if str(call.op).startswith(UNSET):
        return Verdict("right")
    return _tried(call, view, ruling, leaves, spec)


def _numbered(arg: Any, i: int, view: View) -> Any:
    """With `positions`, integers with tokens are the numbers of their rows; a number that counts is a multiple."""
    if i in view.dims and not isinstance(arg, torch.Tensor):
        return arg if _counts(arg, view.num_tokens) else view.num_tokens
    if not (view.positions and i in view.dims and isinstance(arg, torch.Tensor) and arg.dtype == torch.int64):
        return arg
    dim = view.dims[i]
    numbers = torch.arange(arg.shape[dim]).view(-1, *[1] * (arg.ndim - dim - 1))
    return numbers.expand(arg.shape).clone()


def _seen(arg: Any, i: int, view: View) -> Any:
    dim = view.dims.get(i)
    if isinstance(arg, torch.Tensor):
        sizes = [sympy.Integer(s) for s in arg.shape]
        if dim is None:
            return Value(tuple(sizes), Shared(), arg.dtype)
        sizes[dim] = sizes[dim] // view.num_tokens * TOKENS
        return Value(tuple(sizes), Split(dim, view.positions and arg.dtype == torch.int64), arg.dtype)
    return arg if dim is None else Number(arg // view.num_tokens * TOKENS, Count())


def _tried(call: Call, view: View, ruling: Ruling, leaves: list[Any], spec: Any) -> Verdict:
    def run(part: tuple[int, int], shared: list[Any]) -> tuple[Any, list[Any]]:
        own = [_part(a, s, i, view, part, ruling) for i, (a, s) in enumerate(zip(leaves, shared, strict=True))]
        args, kwargs = tree_unflatten(own, spec)
        return call.op(*args, **kwargs), own

    def fresh() -> list[Any]:
        return [a.clone() if isinstance(a, torch.Tensor) else a for a in leaves]

    n = view.num_tokens
    try:
        whole, written = run((0, n), fresh())
    except (RuntimeError, IndexError, NotImplementedError, ValueError) as why:
        return Verdict("fails", str(why))
    for parts in dict.fromkeys([(1, n - 1), (n - n // 2, n // 2), *([(n - 2, 1, 1)] if n > 2 else [])]):
        shared = fresh()
        bounds = list(zip((0, *accumulate(parts)), accumulate(parts), strict=False))
        try:
            results = [run(part, shared) for part in bounds]
        except (RuntimeError, IndexError, NotImplementedError, ValueError) as why:
            counts = any(not isinstance(leaves[i], torch.Tensor) for i in view.dims)
            return Verdict("fails", f"{'counted ' if counts else ''}{parts}: {ruling.place}: {why}")
        wrong = [w for (r, _), part in zip(results, bounds, strict=True) for w in _wrong(ruling.place, whole, r, part, n)]
        wrong += [w for (_, own), part in zip(results, bounds, strict=True) for w in _written(written, own, view, part)]
        wrong += _threaded(written, shared, view, ruling)
        if wrong:
            return Verdict("wrong", f"{parts}: {ruling}: {wrong[0]}")
    kinds = ruling.place if isinstance(ruling.place, tuple) else (ruling.place,)
    return Verdict("right" if any(isinstance(p, Split) for p in kinds) else str(kinds[0]).lower().partition("(")[0])


def _part(arg: Any, shared: Any, i: int, view: View, part: tuple[int, int], ruling: Ruling) -> Any:
    start, stop = part
    if i not in view.dims:
        return shared
    if not isinstance(arg, torch.Tensor):
        return arg // view.num_tokens * (stop - start)
    rows = _rows(arg, view.dims[i], part, view.num_tokens).clone()
    if view.positions and arg.dtype == torch.int64 and ruling.local_positions:
        rows -= arg.shape[view.dims[i]] // view.num_tokens * start
    return rows


def _rows(x: torch.Tensor, dim: int, part: tuple[int, int], n: int) -> torch.Tensor:
    k, rest = divmod(x.shape[dim], n)
    assert rest == 0, f"dim {dim} of {tuple(x.shape)} does not count {n} tokens"
    return x.narrow(dim, k * part[0], k * (part[1] - part[0]))


def _wrong(place: Any, whole: Any, got: Any, part: tuple[int, int], n: int) -> list[str]:
    if isinstance(whole, tuple | list):
        if not isinstance(place, tuple) or not len(place) == len(whole) == len(got):
            return [f"{len(whole)} results, {len(got)} of a part, placed {place}"]
        return [w for p, a, b in zip(place, whole, got, strict=True) for w in _wrong(p, a, b, part, n)]
    if not isinstance(whole, torch.Tensor):
        return []
    if isinstance(place, Split):
        if place.dim >= whole.ndim or whole.shape[place.dim] % n:
            return [f"{tuple(whole.shape)} is said to be {place}"]
        want = _rows(whole, place.dim, part, n)
        numbers = torch.arange(whole.shape[place.dim]).view(-1, *[1] * (whole.ndim - place.dim - 1))
        if place.position and not bool((whole == numbers).all()):
            return [f"{place}, but no row numbers"]
        return _unequal(got, want, f"{place} of tokens {part}")
    return _unequal(got, whole, f"{place} of tokens {part}") if isinstance(place, Shared) else []


def _written(whole: list[Any], own: list[Any], view: View, part: tuple[int, int]) -> list[str]:
    """Arguments with tokens that the op wrote into."""
    if view.positions:
        return []
    pairs = [(whole[i], own[i], d, i) for i, d in view.dims.items() if isinstance(whole[i], torch.Tensor)]
    return [w for a, b, d, i in pairs for w in _unequal(b, _rows(a, d, part, view.num_tokens), f"argument {i} after")]


def _threaded(whole: list[Any], shared: list[Any], view: View, ruling: Ruling) -> list[str]:
    """Shared arguments that one microbatch after the other wrote into."""
    pairs = [(a, b, i) for i, (a, b) in enumerate(zip(whole, shared, strict=True)) if i not in view.dims]
    return [w for a, b, i in pairs if isinstance(a, torch.Tensor) for w in _unequal(b, a, f"shared argument {i} after")]


def _unequal(got: torch.Tensor, want: torch.Tensor, what: str) -> list[str]:
    if got.shape != want.shape:
        return [f"{what}: {tuple(got.shape)} instead of {tuple(want.shape)}"]
    if got.dtype != want.dtype:
        return [f"{what}: {got.dtype} instead of {want.dtype}"]
    tolerance = 1e-9 if want.dtype in (torch.float64, torch.complex128) or not want.is_floating_point() else 1e-4
    close = torch.allclose(got, want, rtol=tolerance, atol=tolerance, equal_nan=True)
    return [] if close else [f"{what}: {got.tolist()} instead of {want.tolist()}"[:600]]
