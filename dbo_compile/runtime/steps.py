"""Plays an emitted program with something around each of its steps: a range for a profiler, a clock."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch.profiler import record_function

from dbo_compile.compat import is_profiling
from dbo_compile.ir.schedule import Step

Fn = Callable[..., Any]
Around = Callable[[Step, Fn, tuple[Any, ...]], Any]
"""Plays a step: is given the segment's function and its arguments, and returns what the function returns."""


def ranged(module: Fn) -> Fn:
    """The emitted `module`; while a profiler runs, with each of its steps in a range `dbo/<segment>#<microbatch>`.

    Profilers show the ranges, `torch.autograd.profiler.emit_nvtx` hands them on to Nsight. Costs one branch otherwise.
    """
    return around_steps(module, lambda _: _in_range) if is_profiling() else module


def _in_range(step: Step, fn: Fn, args: tuple[Any, ...]) -> Any:
    with record_function(f"dbo/{step}"):
        return fn(*args)


def around_steps(module: Fn, begin: Callable[[Any], Around]) -> Fn:
    """The emitted `module` to be called just so, but each call asks `begin(lanes)` what is to play its steps.

    The module itself is not changed. What comes of this may be wrapped again.
    """
    inner = module if isinstance(module, _Wrapped) else _Wrapped(module, ())
    return _Wrapped(inner.module, (*inner.begins, begin))


class _Wrapped:
    def __init__(self, module: Any, begins: tuple[Callable[[Any], Around], ...]) -> None:
        self.module = module
        self.begins = begins

    def __call__(self, lanes: Any, *args: Any) -> Any:
        arounds = [begin(lanes) for begin in self.begins]
        return type(self.module).forward(_Steps(self.module, arounds), lanes, *args)


class _Steps:
    """Stands in for an emitted module in one call of its generated code, which looks up a segment for each step."""

    def __init__(self, module: Any, arounds: list[Around]) -> None:
        self.__module = module  # mangled: a segment may have any other name
        self.__arounds = arounds
        self.__steps: Iterator[Step] = iter(module.steps.values())

    def __getattr__(self, code: str) -> Fn:
        fn, step = getattr(self.__module, code), next(self.__steps)
        for around in self.__arounds:
            fn = _played_by(around, step, fn)
        return fn  # type: ignore[no-any-return]


def _played_by(around: Around, step: Step, fn: Fn) -> Fn:
    return lambda *args: around(step, fn, args)
