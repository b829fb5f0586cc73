"""What Dynamo is asked and told: where inputs come from, which dims are symbols, when it compiles."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from types import FunctionType
from typing import Any, NoReturn

import torch
from torch import fx
from torch._dynamo import config as dynamo_config
from torch._dynamo import maybe_mark_dynamic
from torch._dynamo.callback import callback_handler
from torch._dynamo.exc import TensorifyScalarRestartAnalysis
from torch._dynamo.source import GlobalSource
from torch._dynamo.symbolic_convert import InstructionTranslator

Compiled = Callable[..., Any]


def is_parameter(placeholder: fx.Node, tensor: torch.Tensor) -> bool:
    """Whether an input of a Dynamo graph is a parameter or buffer of the model, by where it comes from.

    A tensor of a fixed address need not be one: static KV caches are marked so, and carry tokens.
    """
    owned = any(part in source_name(placeholder) for part in ("._parameters[", "._buffers["))
    return isinstance(tensor, torch.nn.Parameter) or owned


def is_static(placeholder: fx.Node, tensor: torch.Tensor) -> bool:
    """Whether an input of a Dynamo graph stays where it is: what the model owns, and what was marked so."""
    return is_parameter(placeholder, tensor) or hasattr(tensor, "_dynamo_static_input_type")


def is_closed_over(placeholder: fx.Node) -> bool:
    """Whether an input of a Dynamo graph is a global, or a variable of a function around the compiled one."""
    source = getattr(placeholder, "_dynamo_source", None)
    return isinstance(source, GlobalSource) or getattr(source, "is_derefed_cell_contents", False)


def source_name(placeholder: fx.Node) -> str:
    """Where an argument of a Dynamo graph comes from in the user's frame, e.g. `L['input_ids']`."""
    source = getattr(placeholder, "_dynamo_source", None)
    name = getattr(source, "name", "")
    return str(name() if callable(name) else name)


def is_dynamic(placeholder: fx.Node, dim: int) -> bool:
    """Whether Dynamo traced `dim` of this argument as a symbol, and found no number that it must be."""
    size = placeholder.meta["example_value"].shape[dim]
    return isinstance(size, torch.SymInt) and not size.node.expr.is_number


def ask_for_dynamic(tensor: torch.Tensor, dim: int) -> bool:
    """Mark a dim of a real tensor so that the next trace makes it a symbol; False if it was asked for before."""
    if dim in getattr(tensor, "_dynamo_weak_dynamic_indices", ()):
        return False
    maybe_mark_dynamic(tensor, dim)
    return True


def trace_again(reason: str) -> NoReturn:
    """Leave the backend so that Dynamo traces the frame once more: one of the few exceptions it lets through.

    It also keeps a record of where it broke the graph, to break it there again. With sizes that are symbols now it
    traces other instructions, and would stop where they do not match that record.
    """
    InstructionTranslator.current_tx().speculation_log.clear()
    raise TensorifyScalarRestartAnalysis(restart_reason=reason)


def host_reads_in_graph() -> AbstractContextManager[None]:
    """While it lasts, Dynamo keeps `.tolist()` and `.item()` in the graph, as `fullgraph=True` does."""
    context: AbstractContextManager[None] = dynamo_config.patch(capture_scalar_outputs=True)
    return context


def while_dynamo_compiles(begin: Callable[[Any], None], end: Callable[[Any], None]) -> None:
    """Have these called before and after each compilation of this process; once, however often this is asked for.

    `torch._dynamo.reset()` forgets it.
    """
    if begin not in callback_handler.start_callbacks:
        callback_handler.register_start_callback(begin)
        callback_handler.register_end_callback(end)


def compiled_apart(fn: Compiled) -> Compiled:
    """`fn` left to `torch.compile`, which compiles it again where what it assumed does not hold, up to a limit.

    That limit is one for each code object, so `fn` gets one of its own, however often this is asked for.
    """
    own = FunctionType(fn.__code__.replace(), fn.__globals__, fn.__name__, fn.__defaults__, fn.__closure__)
    return torch.compile(own)
