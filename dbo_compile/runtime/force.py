"""A step that was agreed on before the graphs of a model are called: they obey its plan instead of agreeing again."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch

from dbo_compile.errors import Unpaddable
from dbo_compile.log import warn_once
from dbo_compile.runtime.plan import BatchPlan, Pads, has_to_be_padded
from dbo_compile.runtime.signature import Signature

LEAST_ROWS = 2
"""What can be padded is padded to no fewer tokens: Dynamo makes a graph of its own for one."""


@dataclass(slots=True)
class InForce:
    """The plan of a step, and what the graphs of the model tell of it.

    `num_tokens` are those of this rank; with `pads`, inputs have the rows of the plan. `results` has each result with
    its token dim (None: it has none), by identity; `written` where the inputs lie that were written in place.
    `knows_any` says whether a graph was met that somebody has looked at, `can_pad` whether all graphs can be padded
    (None: nobody knows), `same_size` whether one of them needs as many rows on all ranks, `may_need_it` whether one
    might that nobody has looked at.
    """

    plan: BatchPlan
    num_tokens: int = 0
    pads: bool = True
    results: dict[int, tuple[torch.Tensor, int | None]] = field(default_factory=dict)
    written: set[int] = field(default_factory=set)
    knows_any: bool = False
    can_pad: bool | None = True
    same_size: bool = False
    may_need_it: bool = False
    num_played: int = 0

    @property
    def num_rows(self) -> int:
        """How many rows of tokens the inputs of this rank have."""
        return self.plan.padded_tokens if self.pads else self.num_tokens

    def meet(self, signature: Signature) -> None:
        """Hear of the next graph; raises `Unpaddable` if the step was padded, and it must not be."""
        self.knows_any = True
        self.same_size |= signature.same_size
        if signature.unpaddable:
            self.can_pad = False
            if self.pads:
                raise Unpaddable(signature.unpaddable)

    def meet_unknown(self, why: str, *, communicates: bool) -> None:
        """Hear that the next graph is not split for the reason `why`, so that nobody has looked at it; raises
        `Unpaddable` if padding could have been left out, and warns if it could not be."""
        self.may_need_it |= communicates
        if self.can_pad:
            self.can_pad = None
        if self.pads and self.plan.is_even:
            raise Unpaddable("a graph is not split, and nobody knows what padding would change there")
        if self.pads:
            sizes = ", ".join(map(str, self.plan.num_tokens))
            warn_once(why, "ranks bring %s tokens and are padded to %d, but a graph is not split (%s), so nobody knows "
                      "what padding changes there; if it mixes tokens, give all ranks as many",
                      sizes, self.num_rows, why)  # fmt: skip
        self.num_played += 1

    def note(self, signature: Signature, args: Sequence[Any], results: Sequence[Any]) -> None:
        for x, dim in zip(results, signature.output_dims, strict=True):
            if isinstance(x, torch.Tensor):
                self.results[id(x)] = x, dim
        self.num_played += 1
        self.written.update(args[i].data_ptr() for i in signature.written)


@dataclass(slots=True)
class Known:
    """What the graphs of a model have told so far: whether they can be padded (None: nobody knows), and whether one of
    them needs as many rows on all ranks, or may. One that cannot be padded is not forgotten: it may come again."""

    can_pad: bool | None = None
    same_size: bool = False
    may_need_it: bool = False

    @property
    def pads(self) -> Pads:
        """Without knowing, what ranks may need is padded: they share a graph if their sizes are the same."""
        if self.can_pad:
            return Pads.ALWAYS
        return Pads.NEVER if self.can_pad is False and not self.same_size else Pads.UNEVEN

    def learn(self, step: InForce) -> None:
        """Keep what the graphs of a step have told; those of a single token are others than those of more.

        What nobody knows is left out if nobody needs it: no graph that may mind padding exchanges anything.
        """
        self.same_size |= step.same_size
        self.may_need_it |= step.may_need_it
        if step.num_rows >= LEAST_ROWS and self.can_pad is not False:
            self.can_pad = step.can_pad if step.knows_any else None
            if self.can_pad is None and step.num_played and not (self.same_size or self.may_need_it):
                self.can_pad = False

    def check_unpadded(self, step: InForce, why: str) -> None:
        """Raise if a step that was padded, and for the reason `why` must not be, cannot be played without padding."""
        if has_too_few(step.plan) or (self.same_size and not step.plan.is_even):
            raise has_to_be_padded(step.plan, why)
        if step.num_played:
            raise Unpaddable(f"a graph of the model cannot be padded: {why}. A part of this step was played before "
                             "that was known; the next one is not padded")


def has_too_few(plan: BatchPlan) -> bool:
    """Whether ranks that differ in size must be padded since one of them has less than a graph of several tokens can
    do with."""
    return not plan.is_even and min(plan.num_tokens) < LEAST_ROWS


_step: ContextVar[InForce | None] = ContextVar("dbo_compile_step", default=None)


@contextmanager
def in_force(step: InForce) -> Generator[None]:
    """Every graph that is called meanwhile plays the plan of `step`."""
    token = _step.set(step)
    try:
        yield
    finally:
        _step.reset(token)


def unknown(fn: Callable[..., Any], why: str, *, communicates: bool) -> Callable[..., Any]:
    """A graph that is not split for the reason `why`, which says so to the step that it is part of."""

    def play(*args: Any) -> Any:
        if (step := _step.get()) is not None:
            step.meet_unknown(why, communicates=communicates)
        return fn(*args)

    return play


def step_in_force() -> InForce | None:
    return _step.get()
