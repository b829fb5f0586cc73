from __future__ import annotations

import pytest
import torch

from dbo_compile.errors import CannotSplit
from dbo_compile.ir.tokens import Local, Shared, Split
from dbo_compile.rules.comm import FROM_GATHERED
from dbo_compile.rules.rows import RETURNED
from tests.rules.flow import NUM_TOKENS, RECEIVED, Flow, Rows

aten = torch.ops.aten
c10d = torch.ops._c10d_functional

TOP_K, EXPERTS, HIDDEN = 3, 5, 4


@pytest.fixture(params=[(3, 4), (1, 6), (2, 2, 3)], ids=str)
def f(request):
    return Flow(request.param)


def routing(f):
    """Hidden states, experts and weights of each token. No token names an expert twice, no expert gets equal shares."""
    scores = torch.rand(NUM_TOKENS, EXPERTS, dtype=torch.float64) + torch.linspace(0, 0.3, EXPERTS)
    weights, experts = f(aten.topk.default, f.tokens(scores), TOP_K)
    return f.tokens(torch.randn(NUM_TOKENS, HIDDEN, dtype=torch.float64)), experts, weights


def flat(f, x):
    return f(aten.view.default, x, [-1])


def column(f, x):
    return f(aten.unsqueeze.default, x, -1)


def run_experts(f, rows, experts):
    """Every expert scales by a number of its own, row by row."""
    scales = f(aten.index.Tensor, f.shared(torch.arange(2.0, 2.0 + EXPERTS, dtype=torch.float64)), [experts])
    return f(aten.mul.Tensor, rows, column(f, scales))


def combine(f, rows, weights):
    rows = f(aten.view.default, rows, [-1, TOP_K, HIDDEN])
    return f(aten.sum.dim_IntList, f(aten.mul.Tensor, rows, column(f, weights)), [1])


def reference(hidden, experts, weights):
    return (hidden.whole[:, None] * (2.0 + experts.whole)[..., None] * weights.whole[..., None]).sum(1)


def test_rows_sorted_by_expert_come_back_by_the_inverse_permutation(f):
    """As `grouped_mm` of transformers does it."""
    hidden, experts, weights = routing(f)
    sorted_experts, perm = f(aten.sort.default, flat(f, experts))
    rows = f(aten.index.Tensor, hidden, [f(aten.floor_divide.default, perm, TOP_K)])
    counts = f(
        aten.histc.default, f(aten._to_copy.default, sorted_experts, dtype=torch.float32), EXPERTS, 0, EXPERTS - 1
    )
    offsets = f(aten.cumsum.default, counts, 0, dtype=torch.int32)
    rows = run_experts(f, rows, sorted_experts)
    rows = f(aten.mul.Tensor, rows, column(f, f(aten.index.Tensor, flat(f, weights), [perm])))
    numbers = f(aten.arange.default, Rows(TOP_K))
    inverse = f(aten.index_put.default, f(aten.empty_like.default, perm), [perm], numbers)
    rows_again = f(aten.index.Tensor, rows, [inverse])
    result = f(aten.sum.dim_IntList, f(aten.view.default, rows_again, [-1, TOP_K, HIDDEN]), [1])

    order = perm.place.order
    assert [x.place for x in (sorted_experts, perm, rows, counts, offsets, numbers, inverse, rows_again, result)] == [
        Local(order),
        Local(order, position=True),
        Local(order),
        Local(position=True),
        Local(position=True),
        Split(0, position=True),
        Local(order, position=True, inverse=True),
        Split(0),
        Split(0),
    ]
    assert f.obligations == []
    torch.testing.assert_close(result.whole, reference(hidden, experts, weights))


def test_rows_sorted_by_expert_come_back_by_sorting_the_permutation(f):
    hidden, experts, weights = routing(f)
    sorted_experts, perm = f(aten.sort.stable, flat(f, experts), stable=True)
    rows = f(aten.index_select.default, hidden, 0, f(aten.floor_divide.default, perm, TOP_K))
    inverse = f(aten.argsort.default, perm)
    back = f(aten.index.Tensor, run_experts(f, rows, sorted_experts), [inverse])
    result = combine(f, back, weights)
    assert (result.place, f.obligations) == (Split(0), [])
    torch.testing.assert_close(result.whole, reference(hidden, experts, weights))


def test_rows_come_back_by_scattering_them_to_where_they_were(f):
    hidden, experts, weights = routing(f)
    sorted_experts, perm = f(aten.sort.default, flat(f, experts))
    rows = f(aten.index.Tensor, hidden, [f(aten.floor_divide.default, perm, TOP_K)])
    rows = run_experts(f, rows, sorted_experts)
    back = f(aten.index_put.default, f(aten.empty_like.default, rows), [perm], rows)
    assert (back.place, f.obligations) == (Split(0), [])
    torch.testing.assert_close(combine(f, back, weights).whole, reference(hidden, experts, weights))


def test_rows_gathered_by_token_are_added_up_at_their_token(f):
    """As torchtitan does it: full rank numbers for `gather` and `scatter_add`."""
    hidden, experts, weights = routing(f)
    perm = f(aten.argsort.stable, flat(f, experts), stable=True)
    sorted_experts = f(aten.gather.default, flat(f, experts), 0, perm)
    weights_sorted = f(aten.index.Tensor, flat(f, weights), [perm])
    tokens = f(aten.floor_divide.default, perm, TOP_K)
    numbers = f(aten.expand.default, f(aten.reshape.default, tokens, [-1, 1]), [-1, HIDDEN])
    rows = f(aten.gather.default, hidden, 0, numbers)
    rows = f(aten.mul.Tensor, run_experts(f, rows, sorted_experts), column(f, weights_sorted))
    result = f(aten.scatter_add.default, f(aten.zeros_like.default, hidden), 0, numbers, rows)
    assert (rows.place, result.place, f.obligations) == (Local(perm.place.order), Split(0), [])
    torch.testing.assert_close(result.whole, reference(hidden, experts, weights))


def test_rows_picked_expert_by_expert_are_added_up_at_their_token(f):
    """As the loop over experts of transformers does it."""
    hidden, experts, weights = routing(f)
    chosen = f(aten.permute.default, f(aten.one_hot.default, experts, EXPERTS), [2, 1, 0])
    result = f(aten.zeros_like.default, hidden)
    for expert in range(EXPERTS):
        hits = f(aten.nonzero.default, f(aten.select.int, chosen, 0, expert), rows=RECEIVED)
        slot, token = (f(aten.select.int, hits, 1, i) for i in range(2))
        rows = f(aten.mul.Tensor, f(aten.index.Tensor, hidden, [token]), 2.0 + expert)
        rows = f(aten.mul.Tensor, rows, column(f, f(aten.index.Tensor, weights, [token, slot])))
        result = f(aten.index_add.default, result, 0, token, rows)
    assert (token.place.position, rows.place, result.place) == (True, Local(token.place.order), Split(0))
    assert f.obligations == []
    torch.testing.assert_close(result.whole, reference(hidden, experts, weights))


def exchange(f, rows, sizes, group_name):
    return f(c10d.all_to_all_single.default, rows, sizes, sizes, group_name, rows=RECEIVED)


def test_rows_exchanged_between_ranks_come_back_on_trust(f, group_name):
    """Expert parallelism with exact splits: counts travel first, and received rows are sorted once more."""
    hidden, experts, weights = routing(f)
    routes = flat(f, experts)
    zeros = f.shared(torch.zeros(EXPERTS, dtype=torch.int64))
    sent = f(aten.scatter_add.default, zeros, 0, routes, f(aten.ones_like.default, routes))
    received = f(c10d.all_to_all_single.default, sent, [EXPERTS], [EXPERTS], group_name)
    perm = f(aten.argsort.default, routes)
    rows = f(aten.index.Tensor, hidden, [f(aten.floor_divide.default, perm, TOP_K)])
    arrived = exchange(f, rows, [Rows(of=rows)], group_name)
    arrived_for = f(aten.repeat_interleave.Tensor, received, output_size=Rows(of=rows), rows=RECEIVED)
    by_expert = f(aten.argsort.default, arrived_for)
    done = run_experts(f, f(aten.index.Tensor, arrived, [by_expert]), f(aten.index.Tensor, arrived_for, [by_expert]))
    there_again = f(aten.index.Tensor, done, [f(aten.argsort.default, by_expert)])
    back = exchange(f, there_again, [Rows(of=rows)], group_name)
    numbers = f(aten.arange.default, Rows(TOP_K))
    inverse = f(aten.index_put.default, f(aten.empty_like.default, perm), [perm], numbers)
    at_tokens = f(aten.index.Tensor, back, [inverse])

    assert [x.place for x in (sent, received, arrived, arrived_for, by_expert, there_again, back, at_tokens)] == [
        Local(position=True),
        Local(position=True),
        Local(),
        Local(),
        Local(position=True),
        Local(),
        Local(),
        Split(0),
    ]
    assert f.obligations == [RETURNED]
    torch.testing.assert_close(combine(f, at_tokens, weights).whole, reference(hidden, experts, weights))


def test_rows_sorted_after_an_exchange_of_fixed_size_are_not_taken_for_tokens(f, group_name):
    """As many rows arrive as there are routes, so only the order tells that they are not those of the tokens."""
    hidden, experts, _ = routing(f)
    perm = f(aten.argsort.default, flat(f, experts))
    rows = f(aten.index.Tensor, hidden, [f(aten.floor_divide.default, perm, TOP_K)])
    sizes = [Rows(TOP_K)]
    sorted_experts = f(aten.index.Tensor, flat(f, experts), [perm])
    arrived_for = f(c10d.all_to_all_single.default, sorted_experts, sizes, sizes, group_name)
    arrived = f(c10d.all_to_all_single.default, rows, sizes, sizes, group_name)
    by_expert = f(aten.argsort.default, arrived_for)
    sorted_rows = f(aten.index.Tensor, arrived, [by_expert])
    there_again = f(aten.index.Tensor, sorted_rows, [f(aten.argsort.default, by_expert)])
    by_writing = f(aten.index_put.default, f(aten.empty_like.default, sorted_rows), [by_expert], sorted_rows)
    assert [x.place for x in (sorted_rows, there_again, by_writing)] == [Local(), Local(), Local()]
    assert f.obligations == []


def test_rows_laid_out_in_a_buffer_of_fixed_capacity_are_not_taken_for_tokens(f):
    """The buffer has a fixed number of rows for each token, as a tensor of tokens has."""
    hidden, experts, _ = routing(f)
    sorted_experts, perm = f(aten.sort.default, flat(f, experts))
    rows = f(aten.index.Tensor, hidden, [f(aten.floor_divide.default, perm, TOP_K)])
    counts = f(aten.bincount.default, flat(f, experts), None, EXPERTS)
    first = f(aten.sub.Tensor, f(aten.cumsum.default, counts, 0), counts)
    numbers = f(aten.arange.default, Rows(TOP_K))
    place = f(aten.sub.Tensor, numbers, f(aten.index.Tensor, first, [sorted_experts]))
    slots = f(aten.add.Tensor, f(aten.mul.Tensor, place, EXPERTS), sorted_experts)
    buffer = f(aten.zeros.default, [Rows(EXPERTS), HIDDEN], dtype=torch.float64)
    filled = f(aten.index_copy.default, buffer, 0, slots, rows)
    assert (slots.place, buffer.place, filled.place) == (Local(position=True), Split(0), Local())


def test_dropping_rows_beyond_a_capacity_is_refused(f):
    _, experts, _ = routing(f)
    chosen = f(aten.one_hot.default, flat(f, experts), EXPERTS)
    place = f(aten.sub.Tensor, f(aten.cumsum.default, chosen, 0), 1)
    assert place.place == Local(position=True)
    for numbers in (place, f(aten.sum.dim_IntList, place, [1]), f(aten.amax.default, place, [0])):
        with pytest.raises(CannotSplit, match="it compares positions or counts of rows"):
            f(aten.lt.Scalar, numbers, 2)


def test_rows_gathered_from_all_ranks_are_scattered_back_to_them(f, group_name):
    """Data parallel attention before experts on all ranks: proven row by row, on trust if experts arranged the rows."""
    hidden, experts, _ = routing(f)
    everywhere = f(c10d.wait_tensor.default, f(c10d.all_gather_into_tensor.default, hidden, 1, group_name))
    done = f(aten.mul.Tensor, everywhere, 3.0)
    back = f(c10d.reduce_scatter_tensor.default, done, "sum", 1, group_name)
    assert everywhere.place == done.place == Local(f"the 1 ranks of {group_name}")
    assert (back.place, f.obligations) == (Split(0), [])

    experts_everywhere = f(c10d.all_gather_into_tensor.default, experts, 1, group_name)
    sorted_experts, perm = f(aten.sort.default, flat(f, experts_everywhere))
    tokens = f(aten.floor_divide.default, perm, TOP_K)
    rows = run_experts(f, f(aten.index.Tensor, everywhere, [tokens]), sorted_experts)
    summed = f(aten.index_add.default, f(aten.zeros_like.default, everywhere), 0, tokens, rows)
    back = f(c10d.reduce_scatter_tensor.default, summed, "sum", 1, group_name)
    assert (perm.place, rows.place, summed.place) == (Local(position=True), Local(), Local())
    assert (back.place, f.obligations) == (Split(0), [FROM_GATHERED])


def test_each_token_reads_its_own_row_of_a_mask_by_its_row_number(f):
    """A mask that carries tokens is read with row numbers inside the microbatch, another one with those of all."""
    mask = torch.rand(NUM_TOKENS, 5) < 0.5
    batch = f(aten.view.default, f(aten.arange.default, Rows()), [-1, 1, 1, 1])
    keys = f.shared(torch.arange(5).view(1, 1, 1, 5))
    read = [f(aten.index.Tensor, m, [batch, keys]) for m in (f.tokens(mask), f.shared(mask))]
    assert [x.place for x in read] == [Split(0), Split(0)]
    assert torch.equal(read[0].whole, read[1].whole)


def test_what_needs_no_tokens_stays_shared(f):
    assert f(aten.cumsum.default, f.shared(torch.ones(5)), 0).place == Shared()
