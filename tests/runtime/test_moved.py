"""What has moved is where a graph looks for it for one replay: whatever shares memory with what."""

from __future__ import annotations

import pytest
import torch

from dbo_compile.runtime import moved
from dbo_compile.runtime.moved import lent, swap


def squared(pairs):
    """What a graph does with its old places; the new ones must have seen it, and the old ones nothing."""
    with lent(pairs):
        for old, _ in pairs:
            old.mul_(old)


def test_old_places_are_as_they_were_and_new_ones_are_written():
    old, new = torch.arange(6.0).view(2, 3), torch.full((2, 3), 5.0)
    squared([(old, new)])
    assert torch.equal(old, torch.arange(6.0).view(2, 3))
    assert torch.equal(new, torch.full((2, 3), 25.0))


def test_two_that_have_changed_places():
    x, y = torch.full((3,), 2.0), torch.full((3,), 5.0)
    squared([(x, y), (y, x)])
    assert (x.tolist(), y.tolist()) == ([4.0] * 3, [25.0] * 3)


def test_one_that_moved_by_a_few_rows():
    memory = torch.arange(5.0)
    squared([(memory[:4], memory[1:])])
    assert memory.tolist() == [0.0, 1.0, 4.0, 9.0, 16.0]


def test_an_error_meanwhile_puts_everything_back():
    old, new = torch.zeros(3), torch.ones(3)
    with pytest.raises(KeyError), lent([(old, new)]):
        raise KeyError
    assert (old.tolist(), new.tolist()) == ([0.0] * 3, [1.0] * 3)


@pytest.mark.parametrize("shape", [(), (1,), (7,), (1, 9), (5, 3, 2), (0, 4)])
def test_large_ones_change_places_piece_by_piece(shape, monkeypatch):
    monkeypatch.setattr(moved, "SWAPPED_ELEMENTS", 2)
    x, y = torch.randn(shape), torch.randn(shape)
    want = y.clone(), x.clone()
    swap(x, y)
    assert torch.equal(x, want[0])
    assert torch.equal(y, want[1])


def test_an_expanded_one_has_one_row_in_memory():
    x, y = torch.zeros(1, 3).expand(4, 3), torch.ones(1, 3).expand(4, 3)
    swap(x, y)
    assert (x.sum(), y.sum()) == (12, 0)
