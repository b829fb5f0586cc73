"""What a graph uses in place, where it has moved: for one replay its contents lie where the graph looks for them."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from itertools import pairwise

import torch

from dbo_compile.runtime.graphs import distinct, num_elements, write

SWAPPED_ELEMENTS = 1 << 24
"""How much changes places at a time: a KV cache may fill half of the device, and there is no room for a copy."""

Pair = tuple[torch.Tensor, torch.Tensor]


@contextmanager
def lent(pairs: Sequence[Pair]) -> Generator[None]:
    """While it lasts, each old place holds what is in its new one; afterwards what was written is in the new one, and
    the old ones, which may be somebody's, are as they were."""
    with _swapped(pairs) if _are_apart([x for pair in pairs for x in pair]) else _copied(pairs):
        yield


@contextmanager
def _swapped(pairs: Sequence[Pair]) -> Generator[None]:
    for old, new in pairs:
        swap(old, new)
    try:
        yield
    finally:
        for old, new in pairs:
            swap(old, new)


@contextmanager
def _copied(pairs: Sequence[Pair]) -> Generator[None]:
    before = [old.clone() for old, _ in pairs]
    for (old, _), value in zip(pairs, [new.clone() for _, new in pairs], strict=True):
        write(old, value)
    try:
        yield
    finally:
        after = [old.clone() for old, _ in pairs]
        for (old, _), value in zip(pairs, before, strict=True):
            write(old, value)
        for (_, new), value in zip(pairs, after, strict=True):
            write(new, value)


def _are_apart(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether no two lie in the same piece of memory."""
    pieces = sorted((x.data_ptr(), x.data_ptr() + num_elements(x) * x.element_size()) for x in tensors)
    return all(end <= begin for (_, end), (begin, _) in pairwise(pieces))


def swap(x: torch.Tensor, y: torch.Tensor) -> None:
    """Have two tensors of the same sizes, which lie apart, change their contents."""
    x, y = distinct(x), distinct(y)
    longest = max(range(x.ndim), key=lambda d: x.shape[d], default=0)
    if x.numel() > SWAPPED_ELEMENTS and x.shape[longest] > 1:
        for part, other in zip(x.tensor_split(2, longest), y.tensor_split(2, longest), strict=True):
            swap(part, other)
        return
    kept = x.clone()
    x.copy_(y)
    y.copy_(kept)
