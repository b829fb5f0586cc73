"""Which elements of a value the numbers in some of its dims stand for: what advanced indexing reads and writes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import sympy
import torch

from dbo_compile.ir.tokens import Value

ONE = sympy.Integer(1)


@dataclass(frozen=True, slots=True)
class Region:
    """The elements of `source` that numbers in some of its dims stand for: `source[:, i, j]` is {1: i, 2: j}."""

    source: Value
    indices: Mapping[int, Value]

    @property
    def index_ndim(self) -> int:
        return max(v.ndim for v in self.indices.values())

    @property
    def ndim(self) -> int:
        return self.source.ndim - len(self.indices) + self.index_ndim

    @property
    def front(self) -> int:
        """The dim of the region at which those of the indices begin: dim 0 if other dims lie between the indexed."""
        dims = sorted(self.indices)
        return dims[0] if dims[-1] - dims[0] + 1 == len(dims) else 0

    def dim(self, source_dim: int) -> int:
        """Where a dim of the source that is not indexed is in the region."""
        before = sum(d not in self.indices for d in range(source_dim))
        return before if before < self.front else before + self.index_ndim

    def others(self, dim: int) -> list[Value]:
        return [v for d, v in self.indices.items() if d != dim]


def region(source: Value, indices: Sequence[Value | None]) -> Region:
    return Region(source, {d: v for d, v in enumerate(indices) if v is not None})


def along(source: Value, dim: int, index: Value) -> Region:
    """A region of one index with one dim, or none, which counts as one."""
    return Region(source, {dim % source.ndim: Value(index.sizes or (ONE,), index.place, index.dtype)})


def is_mask(index: Value) -> bool:
    return index.dtype in (torch.bool, torch.uint8)
