from __future__ import annotations

import pytest
import torch

from dbo_compile.axes import CuSeqlens, MaxSeqlen, Requests, Tokens
from dbo_compile.errors import NotSplit
from dbo_compile.runtime.given import RequestInputs

INPUTS = RequestInputs(
    {"ids": (3, Tokens(0)), "table": (5, Requests(0)), "cu": (1, CuSeqlens()), "longest": (2, MaxSeqlen())},
    numbers={0: (1, 0), 4: (5, 0)},
    sizes={5: (None, 2), 1: (None,)},
)


def args(lengths):
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    table = torch.arange(2 * len(lengths)).view(-1, 2)
    return [len(bounds), bounds, max(lengths), torch.arange(sum(lengths)), len(table), table]


def plain(values):
    return [v.tolist() if isinstance(v, torch.Tensor) else v for v in values]


def test_values_of_microbatches_are_in_the_order_of_the_arguments():
    step = args([2, 4, 1])
    table = INPUTS.read(step, 7)
    assert INPUTS.positions == (0, 1, 2, 4, 5)
    assert plain(INPUTS.given(step, table, (3, 4))) == [
        3, 3,
        [0, 2, 3], [0, 3, 4],
        2, 3,
        2, 2,
        [[0, 1], [2, 3]], [[2, 3], [4, 5]],
    ]  # fmt: skip


def test_sizes_that_the_graph_was_not_made_for_are_refused():
    made_for_one = RequestInputs(INPUTS.axes, INPUTS.numbers, {5: (1, 2)})
    step = args([6])
    assert made_for_one.given(step, made_for_one.read(step, 6), (2, 4))[-1].tolist() == [[0, 1]]
    step = args([2, 3, 1])
    with pytest.raises(NotSplit, match="microbatch 1 would have 2 rows of table, and the graph is made for 1"):
        made_for_one.given(step, made_for_one.read(step, 6), (2, 4))
