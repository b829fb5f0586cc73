"""PyTorch's own samples of every op, as small functions, compiled and split: they do what they do in eager."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from dbo_compile import reports
from dbo_compile.report import new_reports
from tests.soundness.calls import SAMPLE_ERRORS, UNCHECKED, all_ops, samples

FULL = "SOUNDNESS_OP_DB" in os.environ
ALWAYS = {"split": "always", "inner": "eager"}
FAST_STEP, MOST_SAMPLES = 32, 4
UNSET = ("empty", "resize")
"""Ops whose results are whatever the memory holds."""
SINGLE = (torch.float32, torch.complex64)
"""What functions make of integers."""


class Text(str):
    """Text that stands for itself among arguments."""

    __slots__ = ()
    __repr__ = str.__str__


@dataclass(frozen=True)
class Case:
    """A sample of an op as a function of its tensors by name, and which of their dims have tokens."""

    info: Any
    leaves: list[Any]
    spec: Any
    token_dims: dict[str, int]

    def __str__(self) -> str:
        sizes = [tuple(x.shape) if isinstance(x, torch.Tensor) else x for x in self.leaves]
        return f"{self.info.name} of {sizes}, tokens in {self.token_dims}"

    def tensors(self, fewer: int = 0) -> dict[str, torch.Tensor]:
        """The arguments that are tensors, with so many tokens less."""
        named = {f"t{i}": x.clone() for i, x in enumerate(self.leaves) if isinstance(x, torch.Tensor)}
        dims = self.token_dims
        return {n: x.narrow(dims[n], fewer, x.shape[dims[n]] - fewer) if n in dims else x for n, x in named.items()}

    @cached_property
    def fn(self) -> Callable[[dict[str, torch.Tensor]], Any]:
        """One line of text, so that there is little to trace."""
        names = [f"t[{f't{i}'!r}]" if isinstance(x, torch.Tensor) else f"c{i}" for i, x in enumerate(self.leaves)]
        first, args, kwargs = tree_unflatten([Text(name) for name in names], self.spec)
        scope = {"op": self.info.op} | {f"c{i}": x for i, x in enumerate(self.leaves)}
        exec(f"def fn(t):\n    return op({first!r}, *{args!r}, **{kwargs!r})", scope)
        return scope["fn"]

    def numbers_fewer(self) -> tuple[int, ...]:
        """With how many tokens less it may be called: none, where an argument without tokens has a row for each."""
        all_tokens = len(self.token_dims) == sum(isinstance(x, torch.Tensor) for x in self.leaves)
        unchecked = any(name in self.info.name.replace(".", "_") for name in UNCHECKED)
        return (0, 1) if all_tokens and not unchecked else (0,)


def cases(info: Any, dtype: torch.dtype, num_samples: int) -> Iterator[Case]:
    """Each dim of the first argument has tokens in turn: alone, and with all others that are as long in that dim."""
    for sample in islice(samples(info, dtype), num_samples):
        leaves, spec = tree_flatten((sample.input, sample.args, sample.kwargs))
        first = leaves[0]
        if not isinstance(first, torch.Tensor) or first.layout != torch.strided:
            continue
        for dim, size in enumerate(first.shape):
            alike = {
                f"t{i}": dim for i, x in enumerate(leaves)
                if isinstance(x, torch.Tensor) and x.ndim > dim and x.shape[dim] == size
            }  # fmt: skip
            if size > 1:
                yield Case(info, leaves, spec, {"t0": dim})
                if len(alike) > 1:
                    yield Case(info, leaves, spec, alike)


def outcome(case: Case) -> str:
    """How a case was played; a wrong answer raises `AssertionError`."""
    torch._dynamo.reset()
    known = reports()
    compiled = torch.compile(case.fn, backend="dbo", options=ALWAYS | {"token_dims": case.token_dims})
    for fewer in case.numbers_fewer():
        mine, its = case.tensors(fewer), case.tensors(fewer)
        try:
            torch.manual_seed(7)
            want = case.fn(mine)
        except SAMPLE_ERRORS:  # numbers among its arguments say how many rows there are
            break
        torch.manual_seed(7)
        _assert_same(compiled(its), want, f"{case}: {fewer} tokens less")
        _assert_same(its, mine, f"{case}: arguments after, {fewer} tokens less")
    return "split" if any(r.calls_split for r in new_reports(known)) else "whole"


def _assert_same(got: Any, want: Any, what: str) -> None:
    """To rounding: kernels take the last rows of a tensor, which are others in a microbatch, another way."""
    is_single = any(isinstance(x, torch.Tensor) and x.dtype in SINGLE for x in tree_leaves(want))
    most = 1e-5 if is_single else 1e-9
    torch.testing.assert_close(got, want, rtol=most, atol=most, equal_nan=True, msg=lambda m: f"{what}: {m}")


def outcomes(infos: list[Any], dtypes: tuple[torch.dtype, ...], num_samples: int) -> tuple[Counter[str], list[str]]:
    """How often which outcome, and what went wrong."""
    counts, wrong = Counter(), []
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        for info in (i for i in infos if not any(name in i.name for name in UNSET)):
            for case in (c for dtype in dtypes for c in cases(info, dtype, num_samples)):
                try:
                    counts[outcome(case)] += 1
                except Exception as error:
                    if _aot_eager_raises(case):
                        counts["aot_eager raises"] += 1
                    else:
                        wrong.append(f"{case}: {type(error).__name__}: {error}"[:1500])
    return counts, wrong


def _aot_eager_raises(case: Case) -> bool:
    """Whether PyTorch itself cannot compile this with a symbolic number of tokens, or gets it wrong."""
    torch._dynamo.reset()
    try:
        named = case.tensors()
        for name, dim in case.token_dims.items():
            torch._dynamo.maybe_mark_dynamic(named[name], dim)
        torch.manual_seed(7)
        want = case.fn(case.tensors())
        torch.manual_seed(7)
        _assert_same(torch.compile(case.fn, backend="aot_eager")(named), want, "aot_eager")
    except Exception:
        return True
    return False


def test_samples_of_some_ops_do_split_what_they_do_whole():
    counts, wrong = outcomes(all_ops()[::FAST_STEP], (torch.float64,), 1)
    assert wrong == []
    assert counts["split"] > 15, counts


@pytest.mark.slow
@pytest.mark.skipif(not FULL, reason="many minutes: make soundness")
@pytest.mark.parametrize("part", range(8))
def test_samples_of_every_op_do_split_what_they_do_whole(part):
    counts, wrong = outcomes(all_ops()[part::8], (torch.float64, torch.int64), MOST_SAMPLES)
    print(f"part {part}:", dict(counts))
    assert wrong == []
