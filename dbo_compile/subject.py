"""What a command looks at: a model and the arguments of a call, from a function that the user names."""

from __future__ import annotations

import os
import sys
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
import torch.distributed as dist

DEFAULT = "dbo_compile.example:moe"


class NoSubject(Exception):
    """What the user named is no function that returns a model and its arguments; the message says what to do."""


@dataclass(frozen=True, slots=True)
class Subject:
    """A model, or any function, and the arguments to call it with."""

    model: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


def load(name: str) -> Subject:
    """What the function `module:function` returns: `(model, args)` or `(model, args, kwargs)`.

    Modules of the current folder are found. Raises `NoSubject`.
    """
    module, _, function = name.partition(":")
    if not module or not function:
        raise NoSubject(f"{name!r}: write module:function, of a function that returns (model, args)")
    sys.path.insert(0, os.getcwd())
    try:
        found = getattr(import_module(module), function)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise
        raise NoSubject(f"{name!r}: there is no module {module!r} here") from None
    except AttributeError:
        raise NoSubject(f"{name!r}: module {module!r} has no function {function!r}") from None
    finally:
        sys.path.remove(os.getcwd())
    match found() if callable(found) else found:
        case (model, tuple() | list() as args) if callable(model):
            return Subject(model, tuple(args), {})
        case (model, tuple() | list() as args, Mapping() as kwargs) if callable(model):
            return Subject(model, tuple(args), kwargs)
        case other:
            raise NoSubject(f"{name!r} must return (model, args) or (model, args, kwargs), not {type(other).__name__}")


@contextmanager
def ranks() -> Generator[int]:
    """The rank of this process: that of `torchrun`, or the only one. Makes the process group if there is none."""
    mine = not dist.is_initialized()
    if mine and "WORLD_SIZE" in os.environ:
        dist.init_process_group()
    elif mine:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    try:
        if "LOCAL_RANK" in os.environ and torch.accelerator.is_available():
            torch.accelerator.set_device_index(int(os.environ["LOCAL_RANK"]))
        yield dist.get_rank()
    finally:
        if mine:
            dist.destroy_process_group()
