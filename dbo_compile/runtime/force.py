"""A step that was agreed on before the graphs of a model are called: they obey its plan instead of agreeing again."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch

from dbo_compile.runtime.plan import BatchPlan
from dbo_compile.runtime.signature import Signature


@dataclass(slots=True)
class InForce:
    """The plan of a step, and what the graphs of the model tell of it.

    `is_first`: no step was played before, so ranks have still to see that they play the same. `results` has each
    result with its token dim (None: it has none), by identity; `written` where the inputs lie that were written in
    place; `engines` the fingerprint of each graph that was played; `can_pad` whether all of them can be padded.
    `num_tokens` are those of this rank.
    """

    plan: BatchPlan
    is_first: bool
    num_tokens: int = 0
    results: dict[int, tuple[torch.Tensor, int | None]] = field(default_factory=dict)
    written: set[int] = field(default_factory=set)
    engines: list[str] = field(default_factory=list)
    can_pad: bool = True

    def note(self, signature: Signature, args: Sequence[Any], results: Sequence[Any]) -> None:
        for x, dim in zip(results, signature.output_dims, strict=True):
            if isinstance(x, torch.Tensor):
                self.results[id(x)] = x, dim
        self.can_pad &= not signature.unpaddable
        self.written.update(args[i].data_ptr() for i in signature.written)


_step: ContextVar[InForce | None] = ContextVar("dbo_compile_step", default=None)


@contextmanager
def in_force(step: InForce) -> Generator[None]:
    """Every graph that is called meanwhile plays the plan of `step`."""
    token = _step.set(step)
    try:
        yield
    finally:
        _step.reset(token)


def step_in_force() -> InForce | None:
    return _step.get()
