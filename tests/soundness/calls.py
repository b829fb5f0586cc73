"""Calls of ATen ops with real arguments: those that PyTorch's samples make, and made-up ones for ops that they miss."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch.testing._internal.common_methods_invocations import op_db
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from dbo_compile.rules import rule_of
from tests.soundness.exchanges import SIMULATED

MOST_NUMBERS = 5000
UNCHECKED = ("lu_", "ldl_", "_embedding_bag", "segment_reduce", "ormqr", "batch_norm", "group_norm", "_loss",
             "histogramdd", "linalg_solve", "cholesky_inverse",
             "_backward", "scaled_dot_product")  # fmt: skip
"""Ops that believe what they are given: offsets and pivots of other sizes make them read memory that is not theirs."""
SAMPLE_ERRORS = (AssertionError, ImportError, IndexError, NotImplementedError, RuntimeError, TypeError, ValueError)


@dataclass(frozen=True)
class Call:
    op: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def key(self) -> str:
        return f"{self.op} {tree_map(_described, (self.args, self.kwargs))}"

    @property
    def leaves(self) -> list[Any]:
        return tree_flatten((self.args, self.kwargs))[0]

    def replaced(self, leaves: list[Any]) -> Call:
        args, kwargs = tree_flatten((self.args, self.kwargs))[1].unflatten(leaves)
        return Call(self.op, args, kwargs)

    def __call__(self) -> Any:
        return SIMULATED.get(self.op, self.op)(*self.args, **self.kwargs)


def _described(arg: Any) -> Any:
    return (tuple(arg.shape), str(arg.dtype)) if isinstance(arg, torch.Tensor) else str(arg)


class Recorder(TorchDispatchMode):
    """Keeps the calls of ATen ops that a function makes, with the arguments as they were before."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, Call] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        call = Call(func, args, kwargs or {})
        if not can_be_cut(call) or (key := call.key) in self.calls:
            return call()
        before = call.replaced([a.detach().clone() if isinstance(a, torch.Tensor) else a for a in call.leaves])
        result = call()
        self.calls[key] = before
        return result


def can_be_cut(call: Call) -> bool:
    """Whether brute force can judge a call: there are tensors, plain and small, and it draws no random numbers."""
    tensors = [a for a in call.leaves if isinstance(a, torch.Tensor)]
    draws = torch.Tag.nondeterministic_seeded in call.op.tags and rule_of(call.op) is None
    plain = all(x.layout == torch.strided and not x.is_quantized and x.numel() <= MOST_NUMBERS for x in tensors)
    return bool(tensors) and plain and not draws


def samples(info: Any, dtype: torch.dtype) -> Iterator[Any]:
    """The sample inputs of an op; none where another package is needed to make them."""
    if dtype not in info.supported_dtypes("cpu"):
        return
    torch.manual_seed(0)
    try:  # not `info.sample_inputs`, which walks the stack for each op to say which test was running
        yield from info.sample_inputs_func(info, "cpu", dtype, requires_grad=False)
    except SAMPLE_ERRORS:
        return


def calls_of(info: Any, dtypes: Iterable[torch.dtype], num_samples: int | None = None) -> list[Call]:
    """The distinct calls of ATen ops that the samples of an op make, and those of its variant in place."""
    recorder = Recorder()
    for dtype in dtypes:
        for sample in islice(samples(info, dtype), num_samples):
            for fn in filter(None, (info.op, info.inplace_variant)):
                _record(recorder, fn, sample)
    return list(recorder.calls.values())


def _record(recorder: Recorder, fn: Callable[..., Any], sample: Any) -> None:
    first = sample.input.clone() if isinstance(sample.input, torch.Tensor) else sample.input
    try:
        with torch.no_grad(), recorder:
            fn(first, *sample.args, **sample.kwargs)
    except SAMPLE_ERRORS:  # has no kernel for this dtype, cannot be done in place
        return


def made_up(op: Any) -> list[Call]:
    """Calls of an op by its schema alone, for rules that no sample asks: two tensors of five rows, small numbers.

    None where the op takes something else, or does not take that.
    """
    found = []
    for dtype in (torch.float64, torch.int64):
        random = torch.Generator().manual_seed(5)
        args = [_made_up(a, dtype, random) for a in op._schema.arguments if not a.has_default_value()]
        call = Call(op, tuple(args), {})
        try:
            if can_be_cut(call):
                call.replaced([a.clone() if isinstance(a, torch.Tensor) else a for a in call.leaves])()
                found.append(call)
        except SAMPLE_ERRORS:
            continue
    return found


def _made_up(argument: Any, dtype: torch.dtype, random: torch.Generator) -> Any:
    match str(argument.real_type):
        case "Tensor": return torch.randint(-4, 5, (5, 3), generator=random).to(dtype)
        case "List[Tensor]": return [torch.randint(-4, 5, (5, 3), generator=random).to(dtype) for _ in range(2)]
        case "int" | "SymInt": return 1
        case "number" | "float": return 2
        case "bool": return False
        case "List[int]" | "List[SymInt]": return [1]
        case "ScalarType": return torch.float64
        case _: return None


def all_ops() -> list[Any]:
    return list(op_db)
