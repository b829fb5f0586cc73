"""The equality gate: whether two plays of a step gave the same, row by row.

Rounding can flip a routing choice, since the path of a matrix product depends on its number of rows: then a token
differs a lot without any fault. So rows are judged, and the yardstick is how many rows differ between two unsplit
plays whose padding differs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}
"""How far a value may be off, relative to the largest of its tensor: rounding through some dozen layers stays
below, and models of 64 bits route in 32."""


@dataclass(frozen=True, slots=True)
class Difference:
    """How many rows differ in each result, and the first result in which any do."""

    bad_rows: tuple[int, ...]

    @property
    def first(self) -> int | None:
        return next((i for i, bad in enumerate(self.bad_rows) if bad), None)

    def beyond(self, yardstick: Difference) -> int | None:
        """The first result in which more rows differ than twice as many as in the yardstick."""
        pairs = zip(self.bad_rows, yardstick.bad_rows, strict=True)
        return next((i for i, (bad, usual) in enumerate(pairs) if bad > 2 * usual), None)


def difference(got: Sequence[Any], want: Sequence[Any], dims: Sequence[int | None]) -> Difference:
    """Compare results; `dims` has the token dim of each, None for one that is judged as a whole."""
    return Difference(tuple(_bad_rows(a, b, dim) for a, b, dim in zip(got, want, dims, strict=True)))


def _bad_rows(got: Any, want: Any, dim: int | None) -> int:
    if not isinstance(want, torch.Tensor):
        return int(got != want)
    if got.shape != want.shape or got.dtype != want.dtype:
        return max(1, want.shape[dim] if dim is not None and want.ndim else 1)
    if not want.numel():
        return 0
    bad = _differs(got, want)
    return int(bad.any()) if dim is None else int(bad.movedim(dim, 0).flatten(1).any(1).sum())


def _differs(got: torch.Tensor, want: torch.Tensor) -> torch.Tensor:
    got, want = got.unsqueeze(-1), want.unsqueeze(-1)  # so that every tensor has a dim besides its token dim
    same = (got == want) | (got.isnan() & want.isnan())
    if not (want.is_floating_point() or want.is_complex()):
        return ~same
    finite = want.abs().nan_to_num(nan=0.0, posinf=0.0)
    tolerance = TOLERANCE.get(want.abs().dtype, 3e-2) * finite.max()
    return ~(same | ((got - want).abs() <= tolerance))
