"""Symbolic sizes: the shape environment of a segment, what tracing assumed of symbols, arithmetic on them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any, cast

import sympy
import torch
from torch._dynamo.source import ConstantSource
from torch._guards import TracingContext
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.reference import PythonReferenceAnalysis


@lru_cache(maxsize=10_000)
def symbols_in(expr: sympy.Expr) -> frozenset[sympy.Symbol]:
    """Its free symbols, kept: sympy walks the expression each time, and passes ask for those of a few sizes often."""
    return frozenset(expr.free_symbols)


class SegmentShapes:
    """The private shape environment of one segment: its guards never reach the user's, and can be asked for.

    `backed` symbols have a hint and a least value; `unbacked` ones have neither, and so never a guard.
    """

    def __init__(self, backed: Mapping[sympy.Symbol, int], unbacked: Sequence[sympy.Symbol]) -> None:
        self.env = ShapeEnv()
        self.mode = FakeTensorMode(shape_env=self.env)
        self._own: dict[sympy.Symbol, sympy.Expr] = {}
        self._hints: dict[sympy.Symbol, sympy.Integer] = {}
        for symbol, hint in backed.items():
            self._own[symbol] = self._new_backed(str(symbol), hint)
            self._hints[self._own[symbol]] = sympy.Integer(hint)
        for symbol in unbacked:
            with self.env.ignore_fresh_unbacked_symbols():  # they come from outside: no op here makes them
                number = self.env.create_unbacked_symint()
            torch._check(number >= 0)
            self._own[symbol] = number.node.expr

    def _new_backed(self, name: str, hint: int) -> sympy.Expr:
        source = ConstantSource(f"dbo_{name}")
        return self.env.create_symbol(hint, source=source, dynamic_dim=DimDynamic.DYNAMIC, constraint_dim=None)

    def number(self, expr: sympy.Expr) -> int | torch.SymInt:
        """An expression over the symbols given, as a number of this environment."""
        own = sympy.sympify(expr).xreplace(self._own)
        if own.is_Integer:
            return int(own)
        hint = own.xreplace(self._hints)
        return self.env.create_symintnode(own, hint=int(hint) if hint.is_Integer else None)

    def tensor(self, sizes: Sequence[sympy.Expr], strides: Sequence[sympy.Expr], like: torch.Tensor) -> torch.Tensor:
        with self.mode:
            return torch.empty_strided(
                [self.number(s) for s in sizes],
                [self.number(s) for s in strides],
                dtype=like.dtype,
                device=like.device,
            )

    def guards(self) -> list[sympy.Expr]:
        """What compiling assumed of the backed symbols, over the symbols given."""
        back = {own: symbol for symbol, own in self._own.items()}
        ranges = [
            sympy.Ge(own, bounds.lower, evaluate=False)
            for own, bounds in self.env.var_to_range.items()
            if own in self._hints and bounds.lower > 0
        ]
        return [g.xreplace(back) for g in (*(guard.expr for guard in self.env.guards), *ranges)]


class OtherNumbers:
    """The fake values of the code that is being compiled once more, as another call of it has them.

    `symbols` stand for what the code reads out of data; here, each has another name.
    """

    def __init__(self, symbols: Iterable[sympy.Symbol]) -> None:
        self._mode = cast("Any", TracingContext.get().fake_mode)
        self._new: dict[sympy.Symbol, sympy.Symbol] = {}
        self._alike: dict[tuple[Any, ...], torch.Tensor] = {}
        env = self._mode.shape_env
        for symbol in sorted(symbols, key=str):  # on every rank in the same order
            make = env.create_unbacked_symint if symbol.is_integer else env.create_unbacked_symfloat
            with env.ignore_fresh_unbacked_symbols():  # a copy of a node makes it, not an op that runs now
                self._new[symbol] = make().node.expr
            env.var_to_range[self._new[symbol]] = env.var_to_range[symbol]

    def value(self, val: Any) -> Any:
        """A value of a node; itself, if it has none of the symbols."""
        if isinstance(val, tuple | list):
            return type(val)(map(self.value, val))
        if isinstance(val, torch.Tensor):
            return self._tensor(val)
        return self._number(val)

    def _tensor(self, val: torch.Tensor) -> torch.Tensor:
        dims = (*val.shape, *val.stride())
        if not any(map(self._is_renamed, dims)):
            return val
        key = (*(d if isinstance(d, int) else d.node.expr for d in dims), val.dtype, val.device)
        if key not in self._alike:  # making one takes long, and many values of a layer are alike
            sizes, strides = (list(map(self._number, dims)) for dims in (val.shape, val.stride()))
            with self._mode:
                self._alike[key] = torch.empty_strided(sizes, strides, dtype=val.dtype, device=val.device)
        return self._alike[key]

    def _number(self, val: Any) -> Any:
        if not self._is_renamed(val):
            return val
        env, expr = self._mode.shape_env, val.node.expr.xreplace(self._new)
        match val:
            case torch.SymBool():
                return env.create_symboolnode(expr)
            case torch.SymFloat():
                return env.create_symfloatnode(expr, hint=None)
            case _:
                return env.create_symintnode(expr, hint=None)

    def _is_renamed(self, val: Any) -> bool:
        is_symbolic = isinstance(val, torch.SymInt | torch.SymFloat | torch.SymBool)
        return is_symbolic and not symbols_in(val.node.expr).isdisjoint(self._new)


def graph_guards(val: torch.SymInt) -> list[sympy.Expr]:
    """What tracing assumed of the symbols of the shape environment that `val` belongs to.

    Symbols that turned out to be equal are written as one, so what says so is no guard any more.
    """
    env = val.node.shape_env
    return [expr for guard in env.guards if (expr := env.replace(guard.expr)) is not sympy.true]


class _Arithmetic(PythonReferenceAnalysis):
    """On proxies too. PyTorch's own makes sympy expressions of quotients, and has no whole numbers of proxies."""

    @staticmethod
    def int_truediv(a: Any, b: Any) -> Any:
        return a / b

    truediv = int_truediv

    @staticmethod
    def trunc_to_int(x: Any, dtype: torch.dtype) -> Any:
        return torch.sym_int(x)

    @staticmethod
    def floor_to_int(x: Any, dtype: torch.dtype) -> Any:
        return torch.sym_int(x // 1)

    @staticmethod
    def ceil_to_int(x: Any, dtype: torch.dtype) -> Any:
        return -torch.sym_int(-x // 1)


def evaluate(expr: sympy.Expr, values: Mapping[sympy.Symbol, Any]) -> Any:
    """An expression over given values: integers, or proxies of an fx.Graph under construction."""
    return sympy_interp(_Arithmetic, dict(values), expr)
