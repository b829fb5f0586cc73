"""Capture: which inputs of a Dynamo graph carry tokens, and a trace in which their number is a symbol."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from dbo_compile import compat, origin
from dbo_compile import graph as g
from dbo_compile.axes import Axis, checked_dim, dims_of_tokens, request_axes, request_dim
from dbo_compile.errors import NotSplit
from dbo_compile.rules.collectives import CommOp, comm_op

SPECIALISED = "the model was specialised to the number of tokens that it was first called with"


@dataclass(frozen=True, slots=True)
class TokenTensor:
    """An argument that carries tokens: where it stands among the arguments, its token dim, its name for people, and
    whether `token_dims` says so or its length is all that speaks for it."""

    index: int
    placeholder: fx.Node
    tensor: torch.Tensor
    dim: int
    name: str
    is_named: bool = False


@dataclass(frozen=True, slots=True)
class RequestTensor:
    """An argument that `token_dims` says something of which is not rows of tokens."""

    index: int
    placeholder: fx.Node
    tensor: torch.Tensor
    axis: Axis
    name: str


def has_communication(gm: fx.GraphModule) -> bool:
    """Whether a Dynamo graph, or a graph nested in it, calls a collective that we know."""
    return any(True for _ in _collectives(gm))


def comm_groups(gm: fx.GraphModule) -> list[str]:
    """The names of the process groups that a Dynamo graph communicates over."""
    args = (node.args[op.group_arg] for node, op in _collectives(gm) if op.group_arg is not None)
    return list(dict.fromkeys(map(str, args)))


def _collectives(gm: fx.GraphModule) -> Iterator[tuple[fx.Node, CommOp]]:
    for module in gm.modules():
        if isinstance(module, fx.GraphModule):
            for node in module.graph.nodes:
                yield from ((node, op) for target in _overloads(node.target) if (op := comm_op(target)))


def _overloads(target: Any) -> Iterator[Any]:
    """Dynamo graphs name ops without saying which overload."""
    if hasattr(target, "overloads"):
        yield from (getattr(target, name) for name in target.overloads())
    else:
        yield target


def token_tensors(
    gm: fx.GraphModule, example_inputs: Sequence[Any], token_dims: Mapping[str, int | Axis] | None
) -> list[TokenTensor]:
    """The arguments that carry tokens, the one that tells their number first: those that `token_dims` names; if it
    names none of this graph's, every tensor that is no weight and whose dim 0 is as long as the first one's, which is
    one that the caller passes if there is any. Raises `NotSplit` if there are none.

    A wrong guess costs time, never a wrong answer: placing values is sound for whatever is sliced, and calls in which
    these differ in length are not split.
    """
    found = [TokenTensor(i, node, x, 0, _short_name(node)) for i, node, x in _own_tensors(gm, example_inputs) if x.ndim]
    dims, known = dims_of_tokens(token_dims or {}), token_dims or {}
    found = [t for t in found if t.name in dims or t.name not in known]
    named = [
        replace(t, dim=checked_dim(t.name, dims[t.name], t.tensor.shape), is_named=True)
        for t in found
        if t.name in dims
    ]
    if named:
        if len({t.tensor.shape[t.dim] for t in named}) > 1:
            sizes = ", ".join(f"{t.name} (dim {t.dim}): {t.tensor.shape[t.dim]}" for t in named)
            raise ValueError(f"token_dims names dims of different sizes: {sizes}; each must count the same tokens")
        return named
    if not found:
        raise NotSplit("none of its inputs is a tensor that could carry tokens")
    first = min(found, key=lambda t: compat.is_closed_over(t.placeholder))
    if dims and first.tensor.shape[0] == 1:
        names = ", ".join(t.name for t in found)
        raise NotSplit(f"token_dims names none of its inputs ({names}), and in dim 0 they have a single token")
    others = [t for t in found if t is not first and t.tensor.shape[0] == first.tensor.shape[0]]
    return [first, *others]


def input_names(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> list[str]:
    """The names of the arguments that are tensors and no weights."""
    return list(dict.fromkeys(_short_name(node) for _, node, _ in _own_tensors(gm, example_inputs)))


def argument_names(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> list[str]:
    """What a person calls each argument: `input_ids` as in `token_dims`, `layers_0_mlp_gate_weight` of what the model
    owns, `s77` of the number that Dynamo has made this symbol."""
    return [_full_name(node, x) for node, x in zip(g.inputs(gm.graph), example_inputs, strict=True)]


def _full_name(placeholder: fx.Node, x: Any) -> str:
    if not isinstance(x, torch.Tensor):
        return placeholder.name
    path = origin.path_of(compat.source_name(placeholder)) if compat.is_parameter(placeholder, x) else ""
    return path.removeprefix("model.").replace(".", "_") or _short_name(placeholder)


def _own_tensors(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> list[tuple[int, fx.Node, torch.Tensor]]:
    inputs = enumerate(zip(g.inputs(gm.graph), example_inputs, strict=True))
    return [(i, n, x) for i, (n, x) in inputs if isinstance(x, torch.Tensor) and not compat.is_parameter(n, x)]


def request_tensors(
    gm: fx.GraphModule, example_inputs: Sequence[Any], token_dims: Mapping[str, int | Axis] | None
) -> list[RequestTensor]:
    """The arguments that `token_dims` says to tell of requests, or to be the same for all microbatches."""
    axes = request_axes(token_dims or {})
    return [
        RequestTensor(i, node, x, axes[name], name)
        for i, (node, x) in enumerate(zip(g.inputs(gm.graph), example_inputs, strict=True))
        if isinstance(x, torch.Tensor) and (name := _short_name(node)) in axes
    ]


def _short_name(placeholder: fx.Node) -> str:
    """The last name in where an argument comes from: `input_ids` for `L['kwargs']['input_ids']`."""
    names = re.findall(r"[A-Za-z_]\w*", compat.source_name(placeholder))
    return str(names[-1]) if names else placeholder.name


def dims_as_long(gm: fx.GraphModule, example_inputs: Sequence[Any], num_tokens: int) -> list[tuple[torch.Tensor, int]]:
    """The dims of inputs that may count tokens, too: a mask has a row and a column for each of them."""
    own = _own_tensors(gm, example_inputs)
    return [(x, d) for _, _, x in own for d, size in enumerate(x.shape) if size == num_tokens]


def make_symbolic(
    tokens: Sequence[TokenTensor],
    requests: Sequence[RequestTensor] = (),
    others: Sequence[tuple[torch.Tensor, int]] = (),
) -> list[TokenTensor]:
    """The arguments that carry tokens, whose token dims are symbols of this trace; where they are not, have Dynamo
    trace again, or raise `NotSplit`. One that was guessed, and has another fixed size there, carries none.

    Dims that count requests are made symbols of their own in the same way, where they can be; `others` are if token
    dims cannot be without them.
    """
    fixed = [t for t in tokens if not compat.is_dynamic(t.placeholder, t.dim)]
    counted = [(r.tensor, d) for r in requests if (d := _counts_requests(r)) is not None and r.tensor.shape[d] > 1]
    if any([compat.ask_for_dynamic(tensor, dim) for tensor, dim in counted]):
        for t in tokens:
            compat.ask_for_dynamic(t.tensor, t.dim)
        compat.trace_again("dbo: the number of requests becomes a symbol")
    if not fixed:
        return list(tokens)
    if all(t.tensor.shape[t.dim] == 1 for t in fixed):
        raise NotSplit("it has a single token")
    if any([compat.ask_for_dynamic(t.tensor, t.dim) for t in fixed]):
        compat.trace_again("dbo: the token dim becomes a symbol")
    if tokens[0] not in fixed and not any(t.is_named for t in fixed):
        return [t for t in tokens if t not in fixed]
    if any([compat.ask_for_dynamic(tensor, dim) for tensor, dim in others]):
        compat.trace_again("dbo: dims as long as the token dim become symbols")
    names = ", ".join(f"{t.name} (dim {t.dim})" for t in fixed)
    raise NotSplit(f"{SPECIALISED}, in {names}")


def _counts_requests(r: RequestTensor) -> int | None:
    """The dim of an argument that counts requests; None if it has none (that it should is said when it is read)."""
    dim = request_dim(r.axis)
    return dim % r.tensor.ndim if dim is not None and -r.tensor.ndim <= dim < r.tensor.ndim else None
