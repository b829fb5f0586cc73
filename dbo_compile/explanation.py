"""Explain and verify: what a split does to a model, shown and checked on given inputs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import signature
from itertools import chain, count
from types import FunctionType
from typing import Any

import torch

from dbo_compile import compat
from dbo_compile.backend import dbo
from dbo_compile.measure import measured_each
from dbo_compile.overview import overview, overview_html
from dbo_compile.report import Report, new_reports, reports, times
from dbo_compile.runtime.clock import Timeline

MOST_CALLS = 4
"""`split="auto"` tries other ways in between: after so many calls a split one was among them."""

NOTHING = """Dynamo found nothing to compile: the call has no ops on tensors, or what it has between graph breaks was
compiled before (torch.compiler.reset() forgets that)."""


@dataclass(frozen=True, slots=True)
class Explanation:
    """What became of each graph of a model, for people: `print` it, or leave it in the last line of a notebook's cell.

    `timelines` has a call of each graph that was timed, None for a graph that does not run on lanes.
    """

    reports: tuple[Report, ...]
    timelines: tuple[Timeline | None, ...] = ()

    @property
    def split(self) -> bool:
        """Whether some graph is split."""
        return any(r.split for r in self.reports)

    @property
    def reasons(self) -> list[str]:
        """Why graphs, calls and ops are not split."""
        graphs = [r.reason for r in self.reports if r.reason]
        calls = [reason for r in self.reports for reason in r.decline_counts]
        ops = [f"{op}: {reason}" for r in self.reports for op, reason in r.barriers.items()]
        return graphs + calls + ops

    @property
    def program(self) -> str:
        """The programs of the split graphs, as text."""
        return "\n\n".join(str(r.levels.program) for r in self.reports if r.levels)

    @property
    def hidden_comm(self) -> float:
        """The share of communication that the clock predicts to lie under compute, in [0, 1]: the mean of the split
        graphs that communicate, 0 if there are none."""
        return _mean([r.hidden_comm for r in self.reports]) or 0.0

    @property
    def hidden_comm_measured(self) -> float | None:
        """The share of communication that lay under compute in the calls that were timed; None if none of these was
        split and communicated."""
        split = [t for t in self.timelines if t and any(i.microbatch is not None for i in t.intervals)]
        return _mean([t.hidden_comm for t in split])

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain data; `graphs` are as `report.schema.json` in this package says."""
        measured = [[times(t)] if t else [] for t in self._timelines()]
        graphs = [{**r.to_dict(), "measured": m} for r, m in zip(self.reports, measured, strict=True)]
        return {"split": self.split, "hidden_comm": self.hidden_comm, "reasons": self.reasons, "graphs": graphs}

    def __str__(self) -> str:
        return "\n\n".join(overview(i, r, t) for i, (r, t) in enumerate(self._rows())) or NOTHING

    def _repr_html_(self) -> str:
        return "\n".join(overview_html(i, r, t) for i, (r, t) in enumerate(self._rows())) or f"<pre>{NOTHING}</pre>"

    def _rows(self) -> list[tuple[Report, Timeline | None]]:
        return list(zip(self.reports, self._timelines(), strict=True))

    def _timelines(self) -> tuple[Timeline | None, ...]:
        return self.timelines or (None,) * len(self.reports)


def _mean(shares: Sequence[float | None]) -> float | None:
    """The mean of those that are known, None if none is."""
    known = [share for share in shares if share is not None]
    return sum(known) / len(known) if known else None


def explain(model: Any, *args: Any, options: dict[str, Any] | None = None, **kwargs: Any) -> Explanation:
    """Compile `model` for these arguments, call it a few times without gradients, and tell what was split and why not.

    `model` is a Module or a function; `options` are those of the backend. The first call compiles, another one is
    timed. Neither the arguments nor the buffers of the model are changed. Where ranks communicate, all must call this.
    Reads of numbers on the host (`.tolist()`) break no graph here, as with `fullgraph=True`.
    """
    before = reports()
    call = _compiled(model, options or {})
    _run(call, model, args, kwargs)
    found = tuple(new_reports(before))
    return Explanation(found, _timelines(found, lambda: _run(call, model, args, kwargs)))


def _timelines(found: Sequence[Report], call: Callable[[], Any]) -> tuple[Timeline | None, ...]:
    """A timed call of each graph, a split one if there is any within `MOST_CALLS`."""
    best: list[Timeline | None] = [None] * len(found)
    for _ in range(MOST_CALLS if any(r.split for r in found) else 0):
        with measured_each(found) as taken:
            call()
        best = [now[-1] if now else old for old, now in zip(best, taken, strict=True)]
        if all(not now or any(i.microbatch is not None for i in now[-1].intervals) for now in taken):
            break
    return tuple(best)


@dataclass(frozen=True, slots=True)
class Verification:
    """Whether splitting changes the answer: what a call returns, and what it leaves in its arguments and in the buffers
    of the model. Differences are the largest over all elements; NaN in both is none, NaN in one is infinite.

    `equal`: split and unsplit agree within `atol + rtol * |unsplit|`. `error` has the reason if they could not be
    compared, and `equal` is False then.
    """

    equal: bool
    max_abs_diff: float
    max_abs_diff_eager: float
    split: bool
    error: str = ""


def verify(
    model: Any,
    *args: Any,
    atol: float | None = None,
    rtol: float | None = None,
    options: dict[str, Any] | None = None,
    **kwargs: Any,
) -> Verification:
    """Compare eager, unsplit and split on these arguments. Raises nothing: what goes wrong is in `error`.

    Each run starts from the same arguments, buffers and random numbers, and leaves none of them changed. The tolerances
    default to those of `torch.testing.assert_close` for the outputs' dtype.
    """
    try:
        eager = _run(model, model, args, kwargs)
        always = {**(options or {}), "split": "always", "gate": "never"}  # it is what the gate does, to be seen
        unsplit = _run(_compiled(model, always | {"min_tokens": 2**62}), model, args, kwargs)
        before = reports()
        split = _run(_compiled(model, always), model, args, kwargs)
        diff, equal = _difference(split, unsplit, atol, rtol)
        eager_diff, _ = _difference(split, eager, atol, rtol)
    except Exception as error:  # a check that raises is one more thing to guard
        return Verification(False, float("nan"), float("nan"), split=False, error=f"{type(error).__name__}: {error}")
    return Verification(equal, diff, eager_diff, split=any(r.calls_split for r in new_reports(before)))


def _compiled(model: Any, options: dict[str, Any]) -> Callable[..., Any]:
    """`model` compiled afresh, beside what the user has compiled: Dynamo caches by code object.

    Arguments keep the names that the model has for them, by which `token_dims` tells them apart.
    """

    def call(named: dict[str, Any], kwargs: dict[str, Any]) -> Any:
        return model(*named.values(), **kwargs)

    own = FunctionType(call.__code__.replace(), call.__globals__, closure=call.__closure__)
    compiled: Callable[..., Any] = torch.compile(own, backend=dbo, options=options)
    names = _positional_names(model)
    return lambda *args, **kwargs: compiled(dict(zip(chain(names, map(str, count())), args, strict=False)), kwargs)


def _positional_names(model: Any) -> list[str]:
    try:
        parameters = signature(model.forward if isinstance(model, torch.nn.Module) else model).parameters.values()
    except (TypeError, ValueError):  # of a function that is built in
        return []
    return [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]


def _run(fn: Any, model: Any, args: Any, kwargs: Any) -> list[torch.Tensor]:
    """What a call returns, and what it leaves in copies of its arguments and in the buffers of `model`."""
    args, kwargs = compat.tree_map(_copied, (args, kwargs))
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with torch.no_grad(), compat.host_reads_in_graph(), torch.random.fork_rng(devices), _put_back(model) as buffers:
        leaves = compat.tree_leaves((fn(*args, **kwargs), args, kwargs, buffers))
        return [torch.as_tensor(a).clone() for a in leaves if isinstance(a, torch.Tensor | int | float | complex)]


def _copied(leaf: Any) -> Any:
    """A copy of an argument, because a model may write to it; a cache is an object that holds tensors."""
    if isinstance(leaf, torch.Tensor):
        return leaf.clone()
    try:
        return leaf if isinstance(leaf, torch.nn.Module) else copy.deepcopy(leaf)
    except (TypeError, RuntimeError, NotImplementedError):  # a process group
        return leaf


@contextmanager
def _put_back(model: Any) -> Generator[list[torch.Tensor]]:
    buffers = list(model.buffers()) if isinstance(model, torch.nn.Module) else []
    before = [b.clone() for b in buffers]
    try:
        yield buffers
    finally:
        for buffer, value in zip(buffers, before, strict=True):
            buffer.copy_(value)


def _difference(
    got: list[torch.Tensor], want: list[torch.Tensor], atol: float | None, rtol: float | None
) -> tuple[float, bool]:
    worst, equal = 0.0, True
    for a, b in zip(got, want, strict=True):
        worst = max(worst, _largest(a, b))
        try:
            torch.testing.assert_close(a, b, atol=atol, rtol=rtol, equal_nan=True)
        except AssertionError:
            equal = False
    return worst, equal


def _largest(got: torch.Tensor, want: torch.Tensor) -> float:
    if not got.numel():
        return 0.0
    wide = torch.complex128 if got.is_complex() else torch.float64
    diff = (got.to(wide) - want.to(wide)).abs().nan_to_num(nan=torch.inf)
    return diff.where((got != want) & ~(got.isnan() & want.isnan()), 0.0).max().item()
