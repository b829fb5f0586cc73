"""Seeing what happens, and what there is: profilers, trace artifacts, generated code, the names of ops."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from types import CellType, FunctionType
from typing import Any

import torch
from torch import fx
from torch._guards import CompileContext
from torch._logging import trace_structured  # type: ignore[attr-defined]
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.autograd import profiler


def aten_op_names() -> list[str]:
    """The names of all ATen ops, without their overloads, in alphabetical order."""
    names = (name.partition("::") for name in torch._C._dispatch_get_all_op_names())
    return sorted({op.partition(".")[0] for library, _, op in names if library == "aten"})


def is_profiling() -> bool:
    """Whether a profiler runs, `torch.profiler` and `emit_nvtx` alike."""
    return profiler._is_profiler_enabled


def compile_id() -> str:
    """What Dynamo and tlparse call the compilation that goes on, e.g. `0/1`; "" for none."""
    return str(CompileContext.current_compile_id() or "")


def without_fake_tensors() -> AbstractContextManager[Any]:
    """While it lasts, real tensors may be used inside of a compilation."""
    return unset_fake_temporarily()


def trace_artifact(name: str, encoding: str, payload: Callable[[], str]) -> None:
    """Hand a text to `TORCH_TRACE`, where tlparse shows it under the compile id. `payload` is called only if it is on.

    `encoding` is "string" or "json". Costs nothing to speak of where tracing is off.
    """
    trace_structured("artifact", metadata_fn=lambda: {"name": name, "encoding": encoding}, payload_fn=payload)


TORCH = str(Path(torch.__file__).parent)


def generated_file(compiled: Any) -> str:
    """The file with the code that Inductor generated for a function that it compiled; "" if it cannot be found."""
    seen: set[int] = set()
    todo: list[Any] = [compiled]
    while todo and len(seen) < 2000:
        item = todo.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        code = getattr(item, "__code__", None)
        if code is not None and code.co_name == "call" and not code.co_filename.startswith(TORCH):
            return str(code.co_filename)
        todo += _held_by(item)
    return ""


def _held_by(item: Any) -> list[Any]:
    """What a function, or an object of Inductor that can be called, holds that can be called."""
    cells = getattr(item, "__closure__", None) or ()
    held = [c.cell_contents for c in cells if c != CellType()]
    if not isinstance(item, type | FunctionType | fx.GraphModule) and type(item).__module__.startswith("torch._"):
        held += vars(item).values() if hasattr(item, "__dict__") else ()
    held += [getattr(item, name, None) for name in ("__wrapped__", "__func__", "__self__", "func")]
    return [h for h in held if callable(h)]
