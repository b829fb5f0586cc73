"""Brute force: what a rule claims of a call, tried on parts of the tokens, joined, against the call on all of them.

Each claim is tried on the sample as it is, shuffled, and negated and shuffled, so that zeros and signs hide nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch

from dbo_compile.errors import CannotSplit
from dbo_compile.ir.tokens import Local, Placement, Ruling, Shared, Split
from dbo_compile.rules import rule_of
from tests.soundness.calls import UNCHECKED, Call
from tests.soundness.views import View, row_numbers

RUN_ERRORS = (RuntimeError, IndexError, NotImplementedError, ValueError, TypeError)
UNSET = ("aten.empty", "aten.new_empty", "aten.empty_like", "prims.empty", "aten.empty_strided", "aten.resize")
"""Ops whose results hold anything: only their sizes are claimed."""
Places = Placement | tuple[Placement, ...]
Part = tuple[int, int]


@dataclass(frozen=True)
class Verdict:
    """`kind`: wrong, right (a true `Split`), local, shared, refused, no rule, fails (on parts: a size is fixed)."""

    kind: str
    text: str = ""


class Trial:
    """A call on each variant of its sample."""

    def __init__(self, call: Call, *, variants: tuple[str, ...] = ("as it is", "shuffled", "negated")) -> None:
        self.call = call
        self.samples = [_variant(call.leaves, name, integers=self.rule is not None) for name in variants]
        self._whole: dict[Any, Any] = {}

    @cached_property
    def rule(self) -> Any:
        return rule_of(self.call.op)

    def judge(self, view: View) -> Verdict:
        """Ask the rule, and try its claim."""
        if self.rule is None:
            return Verdict("no rule")
        seen = self.call.replaced(view.seen(view.leaves(self.call.leaves)))
        try:
            ruling = self.rule(*seen.args, **seen.kwargs)
        except CannotSplit as why:
            return Verdict("refused", str(why))
        ruling = ruling if isinstance(ruling, Ruling) else Ruling(ruling)
        kind = _kind(ruling.place)
        if str(self.call.op).startswith(UNSET):
            return Verdict(kind)
        for i in range(len(self.samples)):
            if wrong := self._wrong(i, view, ruling):
                return wrong
        return Verdict(kind)

    def can_be_split(self, view: View) -> bool:
        """Whether each result on parts of the tokens is rows of that on all of them, or all of it; some is rows."""
        if any(name in str(self.call.op) for name in UNCHECKED):
            return False
        candidates: list[Places] | None = None
        for i in range(len(self.samples)):
            if (whole := self.whole(i, view)) is None:
                continue
            results = _results(whole)
            if candidates is None:
                candidates = [_placements(r, view.num_tokens) for r in results]
            for bounds in _all_bounds(view.num_tokens):
                try:
                    parts = [self._run(view.leaves(self.samples[i]), view, part, Ruling(Shared())) for part in bounds]
                except RUN_ERRORS:
                    return False
                if {len(candidates)} != {len(results), *(len(r) for r in map(_results, parts))}:
                    return False
                candidates = [
                    [p for p in places if not _differ(p, r, got, view.num_tokens, bounds)]
                    for places, r, got in zip(candidates, results, _by_result(parts), strict=True)
                ]
                if not all(candidates) or _writes_differ(whole[1], parts, bounds, view):
                    return False
        return bool(candidates) and any(isinstance(p, Split) for places in candidates for p in places)

    def whole(self, i: int, view: View) -> tuple[Any, list[Any]] | None:
        """The result for all tokens and the arguments after it, of a variant of the sample; None if it has none."""
        changed = view.positions and tuple((k, d) for k, d in view.dims.items() if k not in view.numbers)
        key = (i, changed, view.numbers and (view.num_tokens, view.numbers))
        if key not in self._whole:
            call = self.call.replaced(_copied(view.leaves(self.samples[i])))
            try:
                result = call()
                self._whole[key] = (_copied([result])[0], call.leaves) if _is_finite(result) or i == 0 else None
            except RUN_ERRORS:
                self._whole[key] = None
        return self._whole[key]

    def _wrong(self, i: int, view: View, ruling: Ruling) -> Verdict | None:
        if (whole := self.whole(i, view)) is None:
            return Verdict("fails", "on all tokens") if i == 0 else None
        leaves = view.leaves(self.samples[i])
        for bounds in _all_bounds(view.num_tokens):
            shared = _copied(leaves)
            try:
                parts = [self._run(leaves, view, part, ruling, shared) for part in bounds]
            except RUN_ERRORS as why:
                return Verdict("fails", f"{bounds}: {ruling.place}: {why}")
            wrong = _misplaced(ruling.place, whole[0], [p[0] for p in parts], view.num_tokens, bounds)
            wrong = wrong or _writes_differ(whole[1], parts, bounds, view) or _shared_differ(whole[1], shared, view)
            if wrong:
                return Verdict("wrong", f"{bounds}: {ruling}: {wrong}")
        return None

    def _run(
        self, leaves: list[Any], view: View, part: Part, ruling: Ruling, shared: list[Any] | None = None
    ) -> tuple[Any, list[Any]]:
        shared = _copied(leaves) if shared is None else shared
        own = [_part(a, i, view, part, ruling) if i in view.dims else shared[i] for i, a in enumerate(leaves)]
        return self.call.replaced(own)(), own


def _variant(leaves: list[Any], name: str, *, integers: bool) -> list[Any]:
    """`shuffled`: the elements of each tensor in another order; `negated`: that, and all but integers negated.

    Integers stay as they are for ops that nobody claims anything of: some believe what numbers they are given.
    """
    random = torch.Generator().manual_seed(3)

    def changed(x: Any) -> Any:
        if not isinstance(x, torch.Tensor) or name == "as it is":
            return x
        if not (integers or x.is_floating_point() or x.is_complex()):
            return x
        shuffled = x.flatten()[torch.randperm(x.numel(), generator=random)].view(x.shape)
        return -shuffled if name == "negated" and (x.is_floating_point() or x.is_complex()) else shuffled

    return [changed(x) for x in leaves]


def _all_bounds(n: int) -> Iterator[list[Part]]:
    """Where microbatches begin and end: uneven, about even, three of them."""
    for parts in dict.fromkeys([(1, n - 1), (n - n // 2, n // 2), *([(n - 2, 1, 1)] if n > 2 else [])]):
        yield list(zip((0, *accumulate(parts)), accumulate(parts), strict=False))


def _part(arg: Any, i: int, view: View, part: Part, ruling: Ruling) -> Any:
    start, stop = part
    if not isinstance(arg, torch.Tensor):
        return arg // view.num_tokens * (stop - start)
    rows = _rows(arg, view.dims[i], part, view.num_tokens).clone()
    if view.positions and arg.dtype == torch.int64 and ruling.local_positions:
        rows -= arg.shape[view.dims[i]] // view.num_tokens * start
    return rows


def _rows(x: torch.Tensor, dim: int, part: Part, n: int) -> torch.Tensor:
    k, rest = divmod(x.shape[dim], n)
    assert rest == 0, f"dim {dim} of {tuple(x.shape)} does not count {n} tokens"
    return x.narrow(dim, k * part[0], k * (part[1] - part[0]))


def _kind(place: Places) -> str:
    places = place if isinstance(place, tuple) else (place,)
    for kind, name in ((Local, "local"), (Split, "right")):
        if any(isinstance(p, kind) for p in places):
            return name
    return "shared"


def _placements(result: Any, n: int) -> list[Placement]:
    sizes = enumerate(result.shape) if isinstance(result, torch.Tensor) else ()
    return [Shared(), *(Split(d) for d, size in sizes if size and size % n == 0)]


def _results(made: tuple[Any, list[Any]]) -> list[Any]:
    return list(made[0]) if isinstance(made[0], tuple | list) else [made[0]]


def _by_result(parts: list[tuple[Any, list[Any]]]) -> list[list[Any]]:
    return [list(r) for r in zip(*map(_results, parts), strict=True)]


def _misplaced(place: Places, whole: Any, parts: list[Any], n: int, bounds: list[Part]) -> str:
    if not isinstance(whole, tuple | list):
        return _differ(place, whole, parts, n, bounds)
    if not isinstance(place, tuple) or {len(place)} != {len(whole), *map(len, parts)}:
        return f"{len(whole)} results, {[len(p) for p in parts]} of parts, placed {place}"
    each = zip(place, whole, zip(*parts, strict=True), strict=True)
    return next(filter(None, (_differ(p, w, list(got), n, bounds) for p, w, got in each)), "")


def _differ(place: Any, whole: Any, parts: list[Any], n: int, bounds: list[Part]) -> str:
    """What is wrong about the placement of one result; "" if nothing is."""
    if not isinstance(whole, torch.Tensor):
        return "" if all(p == whole for p in parts) else f"{place}: {parts} instead of {whole}"
    if isinstance(place, Local):
        return "" if place.position else _lost(whole, parts)
    if isinstance(place, Split):
        if place.dim >= whole.ndim or whole.shape[place.dim] % n:
            return f"{tuple(whole.shape)} is said to be {place}"
        if place.position and not bool((whole == row_numbers(whole, place.dim)).all()):
            return f"{place}, but no row numbers"
    wants = [_rows(whole, place.dim, b, n) if isinstance(place, Split) else whole for b in bounds]
    unequal = (unlike(g, w, f"{place} of tokens {b}") for g, w, b in zip(parts, wants, bounds, strict=True))
    return next(filter(None, unequal), "")


def _lost(whole: torch.Tensor, parts: list[torch.Tensor]) -> str:
    """Rows in an order of their own are together the rows of all tokens; integers may be numbers or counts of rows."""
    if not whole.is_floating_point():
        return ""
    got = torch.cat([p.flatten() for p in parts]).sort()[0]
    return unlike(got, whole.flatten().sort()[0], "Local: the rows of all microbatches")


def _writes_differ(whole: list[Any], parts: list[tuple[Any, list[Any]]], bounds: list[Part], view: View) -> str:
    """Arguments with tokens that the op wrote into."""
    if view.positions:
        return ""
    for i, dim in view.dims.items():
        for (_, own), part in zip(parts, bounds, strict=True):
            want = whole[i]
            if isinstance(want, torch.Tensor) and want.ndim > dim and want.shape[dim] % view.num_tokens == 0:
                rows = _rows(want, dim, part, view.num_tokens)
                if wrong := unlike(own[i], rows, f"argument {i} after"):
                    return wrong
    return ""


def _shared_differ(whole: list[Any], shared: list[Any], view: View) -> str:
    """Shared arguments that one microbatch after the other wrote into."""
    pairs = [(a, b, i) for i, (a, b) in enumerate(zip(whole, shared, strict=True)) if i not in view.dims]
    unequal = (unlike(b, a, f"shared argument {i} after") for a, b, i in pairs if isinstance(a, torch.Tensor))
    return next(filter(None, unequal), "")


def _copied(leaves: list[Any]) -> list[Any]:
    return [a.clone() if isinstance(a, torch.Tensor) else a for a in leaves]


def _is_finite(result: Any) -> bool:
    """Whether a variant shows anything: logarithms of negated numbers do not."""
    results = result if isinstance(result, tuple | list) else (result,)
    return not any(isinstance(r, torch.Tensor) and bool(r.isnan().all()) and r.numel() > 0 for r in results)


def unlike(got: torch.Tensor, want: torch.Tensor, what: str) -> str:
    """How two tensors differ in more than rounding; "" if they do not."""
    if got.shape != want.shape:
        return f"{what}: {tuple(got.shape)} instead of {tuple(want.shape)}"
    if got.dtype != want.dtype:
        return f"{what}: {got.dtype} instead of {want.dtype}"
    exact = want.dtype in (torch.float64, torch.complex128) or not want.is_floating_point()
    tolerance = 1e-9 if exact else 1e-4
    close = torch.allclose(got, want, rtol=tolerance, atol=tolerance, equal_nan=True)
    return "" if close else f"{what}: {got.tolist()} instead of {want.tolist()}"[:600]
