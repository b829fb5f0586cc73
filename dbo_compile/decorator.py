"""The decorator: ranks agree on a step, and pad it, before Dynamo sees its sizes; so all ranks share one graph.

What a call does is in `decorated.py`; here is what may be decorated, and how a method finds the steps of its instance.
"""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from dbo_compile.axes import Axis
from dbo_compile.config import Config
from dbo_compile.decorated import Steps, check_names


def dbo(target: Any = None, /, *, token_dims: Mapping[str, int | Axis], **options: Any) -> Any:
    """Compile a Module class, a Module, a `forward` method or a function with the backend `dbo`.

    `token_dims` names the arguments that carry tokens, and their token dims, or says what they tell of requests
    (`CuSeqlens()` and its like); `metadata.slots` is a field of a dataclass, or what a dict has under that. `options`
    are the other fields of `Config`. Before each call the ranks of `dp_group` (default: all ranks) agree on the step,
    so every rank has to call, whatever it has: a rank with nothing to do calls `idle_step`, or brings inputs of no
    tokens. Then the token arguments are padded to the largest rank and its bucket, and the results un-padded.

        @dbo_compile.dbo(token_dims={"input_ids": 0, "positions": -1}, pad_to="auto")
        class Model(nn.Module): ...

        model = dbo_compile.dbo(model, token_dims={"input_ids": 0})     # changes `model.forward` of this one
        model.forward.idle_step()

    What is decorated keeps its signature, docstring and state; exported or traced as part of something larger, it is
    what it was. Raises `ValueError` for a wrong option, or a name that is no argument.
    """
    if target is None:
        return functools.partial(dbo, token_dims=token_dims, **options)
    config = Config.from_options({**options, "token_dims": token_dims})
    if isinstance(target, type) and issubclass(target, nn.Module):
        target.forward = Forward(target.forward, config)
        return target
    if isinstance(target, nn.Module):
        target.forward = Steps(target.forward, config)
        return target
    if not callable(target):
        raise ValueError(f"dbo decorates a Module, a class of Modules or a function, not {type(target).__name__}")
    first = next(iter(inspect.signature(target).parameters), "")
    return Forward(target, config) if first == "self" else Steps(target, config)


class Forward:
    """A decorated method: each instance has its own `Steps`, which are gone with it."""

    def __init__(self, fn: Callable[..., Any], config: Config) -> None:
        functools.update_wrapper(self, fn)
        check_names(config, inspect.signature(fn))
        self._fn = fn
        self._config = config
        self._steps: weakref.WeakKeyDictionary[Any, Steps] = weakref.WeakKeyDictionary()

    def __get__(self, owner: Any, _kind: type | None = None) -> Any:
        if owner is None:
            return self
        if torch.compiler.is_compiling():
            return functools.partial(self._fn, owner)
        if owner not in self._steps:
            self._steps[owner] = Steps(self._fn, self._config, owner)
        return Bound(self._steps[owner], owner)

    def __call__(self, owner: Any, *args: Any, **kwargs: Any) -> Any:
        return self.__get__(owner)(*args, **kwargs)


class Bound:
    """A decorated method of one instance, which it keeps alive as any bound method does; its `Steps`, whose attributes
    it has, do not."""

    def __init__(self, steps: Steps, owner: Any) -> None:
        self.__doc__ = steps.__doc__
        self.steps = steps
        self.owner = owner

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.steps(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.steps, name)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Bound) and other.steps is self.steps

    def __hash__(self) -> int:
        return hash(self.steps)

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (self.owner, self.__name__)
