"""Random ways of rows through sorting, indexing and scattering, op by op as the rules have it: what a rule places as
rows of tokens, on nothing taken on trust, is those rows on every microbatch."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from random import Random

import pytest
import torch

from dbo_compile.errors import CannotSplit
from dbo_compile.ir.tokens import Shared
from tests.rules.flow import Flow, Rows, Seen

aten = torch.ops.aten
NUM_ROUTES = int(os.environ.get("SOUNDNESS_ROUTES", "500"))
PARTS = ((3, 4), (1, 6), (5, 1, 1))
NOT_DONE = (RuntimeError, IndexError, TypeError, ValueError)
KINDS = {"x": ("f", 2), "v": ("f", 1), "n": ("i", 1), "m": ("i", 2), "b": ("b", 1)}

# Ops and what they take: x floats with two dims, v with one, n integers with one, m with two, b booleans, W a weight,
# T and U how many tokens there are, once and twice.
# Row numbers are not divided here: test_row_numbers_divided_by_k_lead_to_other_rows says what that does wrong.
OPS = [
    *((op, "n") for op in (aten.sort.default, aten.argsort.default, aten.neg.default, aten.zeros_like.default)),
    *((op, "x") for op in (aten.sin.default, aten.zeros_like.default)), (aten.ones_like.default, "v"),
    *((aten.index.Tensor, spec) for spec in ("x[n]", "x[n]", "n[n]", "v[n]", "x[b]", "W[n]")),
    *((aten.index_select.default, spec) for spec in ("x0n", "n0n")), (aten.take.default, "nn"),
    *((aten.gather.default, spec) for spec in ("n0n", "x0m", "x1m", "v0n")),
    *((op, "nn") for op in (aten.sub.Tensor, aten.add.Tensor, aten.eq.Tensor, aten.lt.Tensor)),
    (aten.mul.Tensor, "n2"), (aten.add.Tensor, "n1"), (aten.remainder.Scalar, "n3"), (aten.remainder.Scalar, "nT"),
    (aten.flip.default, "n[0]"), (aten.flip.default, "x[0]"), (aten.cumsum.default, "n0"), (aten.cumsum.default, "x1"),
    (aten.arange.default, "T"), (aten.arange.default, "U"), (aten.bincount.default, "n"), (aten.nonzero.default, "b"),
    *((aten.index_put.default, spec) for spec in ("n[n]n", "x[n]x")), (aten.index_fill.int_Scalar, "x0n1"),
    *((op, "x0nx") for op in (aten.index_copy.default, aten.index_add.default, aten.index_add.default)),
    *((op, "x0mx") for op in (aten.scatter.src, aten.scatter_add.default)), (aten.index_copy.default, "n0nn"),
    *((op, "n0nn") for op in (aten.scatter.src, aten.scatter_add.default)), (aten.masked_fill.Scalar, "nb0"),
    (aten.mm.default, "xW"), (aten.add.Tensor, "xx"), (aten.mul.Tensor, "xx"), (aten.mul.Tensor, "xm"),
    *((aten.sum.dim_IntList, spec) for spec in ("x[1]", "n[0]", "m[1]")), (aten.amax.default, "n[0]"),
    (aten.cat.default, "[xx]"), (aten.cat.default, "[nn]"), (aten.where.self, "bnn"), (aten.slice.Tensor, "x11"),
    *((aten.unsqueeze.default, spec) for spec in ("n1", "v1", "b1")), (aten.squeeze.dim, "m1"),
    (aten.select.int, "m10"),
    *((aten.view.default, spec) for spec in ("x[T8]", "x[U4]", "n[T2]", "m[U]")), (aten.transpose.int, "x01"),
    *((aten.repeat_interleave.self_int, spec) for spec in ("x20", "n20")), (aten.topk.default, "x2"),
    *((aten.expand.default, spec) for spec in ("m[T4]", "m[U4]")), (aten.sort.default, "m1"), (aten.sort.default, "m0"),
]  # fmt: skip


@dataclass
class Route:
    """A random walk; `trace` says what was done."""

    random: Random
    trace: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.flow = Flow(self.random.choice(PARTS))
        self.weight = self.flow.shared(torch.randn(4, 4, dtype=torch.double))
        experts = [torch.randint(0, 5, (n,)) for n in (7, 14)]
        rows = [torch.randn(n, 4, dtype=torch.double) for n in (7, 14)]
        self.values = [self.flow.tokens(t) for t in (*experts, *rows)]

    def step(self) -> None:
        op, spec = self.random.choice(OPS)
        try:
            args = self._arguments(iter(spec))
        except IndexError:  # nothing there to take
            return
        if not _is_done(op, args):
            return
        known = len(self.flow.obligations)
        at = [self._name(a) for a in _flat(args)]
        self.trace.append(f"{op}({', '.join(at)})")
        try:
            result = self.flow(op, *args)
        except (CannotSplit, KeyError, *NOT_DONE):  # refused, no rule; parts of other sizes than the op takes
            self.trace.pop()
            return
        results = result if isinstance(result, tuple) else (result,)
        if len(self.flow.obligations) > known:
            del self.flow.obligations[known:]
            self.trace.pop()
            return
        kept = [r for r in results if r.place != Shared()]
        self.trace[-1] += f" -> {[f'v{len(self.values) + i} {r.place}' for i, r in enumerate(kept)]}"
        self.values += kept

    def _arguments(self, spec):
        args = []
        for letter in spec:
            if letter == "]":
                break
            args.append(self._arguments(spec) if letter == "[" else self._argument(letter))
        return args

    def _argument(self, letter):
        if letter.isdigit():
            return int(letter)
        if letter in "TU":
            return Rows(1 if letter == "T" else 2)
        if letter == "W":
            return self.weight
        return self.random.choice([v for v in self.values if _kind(v.whole) == KINDS[letter]][-6:])

    def _name(self, arg):
        return next((f"v{i}" for i, v in enumerate(self.values) if v is arg), "W" if arg is self.weight else str(arg))


def _kind(x: torch.Tensor) -> tuple[str, int]:
    return "b" if x.dtype == torch.bool else "f" if x.is_floating_point() else "i", x.ndim


def _flat(args):
    return [leaf for a in args for leaf in (_flat(a) if isinstance(a, list) else [a])]


def _is_done(op, args) -> bool:
    """Whether the op can be done on all tokens."""

    def whole(arg):
        match arg:
            case list(): return [whole(a) for a in arg]
            case Seen(): return arg.whole.clone()
            case Rows(): return arg.times * 7
            case _: return arg

    try:
        op(*whole(args))
    except NOT_DONE:
        return False
    return True


@pytest.mark.parametrize("seed", range(5))
def test_rows_placed_with_tokens_are_those_of_the_tokens(seed):
    for i in range(NUM_ROUTES // 5):
        route = Route(Random(seed * NUM_ROUTES + i))
        for _ in range(40):
            try:
                route.step()
            except AssertionError as wrong:
                if route.flow.obligations:  # that is what was taken on trust
                    break
                raise AssertionError(f"route {i}: {wrong}\n" + "\n".join(route.trace)) from wrong
