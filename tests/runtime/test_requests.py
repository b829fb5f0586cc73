"""The splitter against a plain reference: what the halves are told must describe each token of the step once."""

from __future__ import annotations

from itertools import accumulate, pairwise

import pytest
import torch
from hypothesis import given as for_all
from hypothesis import settings
from hypothesis import strategies as st

from dbo_compile.axes import CuSeqlens, MaxSeqlen, Requests, SeqLens, Shared, Tokens, axis_of, request_dim
from dbo_compile.runtime.metadata import read_requests
from dbo_compile.runtime.requests import RequestTable, candidates, given_values, parts_of, straddles

AXES = {
    "ids": Tokens(0),
    "positions": Tokens(-1),
    "block_table": Requests(0),
    "adapter": Requests(1),
    "cu_q": CuSeqlens(),
    "cu_k": CuSeqlens(of="keys"),
    "seq_lens": SeqLens(),
    "max_q": MaxSeqlen(),
    "max_k": MaxSeqlen(of="keys"),
    "cache": Shared(),
}


def step(requests):
    """The inputs of a step; `requests` are (tokens, tokens cached before). Row r of the block table is [r, 10 * r]."""
    lengths = [n for n, _ in requests]
    keys = [n + c for n, c in requests]
    ids = torch.arange(len(requests))
    return {
        "ids": torch.arange(sum(lengths)),
        "positions": torch.cat([torch.arange(c, c + n) for n, c in requests]).expand(3, -1),
        "block_table": torch.stack([ids, 10 * ids], 1),
        "adapter": ids[None],
        "cu_q": torch.tensor([0, *accumulate(lengths)], dtype=torch.int32),
        "cu_k": torch.tensor([0, *accumulate(keys)], dtype=torch.int32),
        "seq_lens": torch.tensor(keys),
        "max_q": max(lengths),
        "max_k": torch.tensor(max(keys)),
        "cache": None,
    }


def described(requests, num_padding=0):
    """What a step is: for each row the request, how many tokens it attends to; None for padding."""
    rows = [(r, c + i + 1) for r, (n, c) in enumerate(requests) for i in range(n)]
    return rows + [None] * num_padding


def told(values, m, num_rows):
    """The same, read from the metadata of microbatch `m` the way that a kernel reads it."""
    mine = {name: v[m] for name, v in values.items()}
    bounds, keys = mine["cu_q"].tolist(), mine["seq_lens"].tolist()
    ids = mine["block_table"][:, 0].tolist()
    assert mine["block_table"].tolist() == [[i, 10 * i] for i in ids]
    assert mine["adapter"].tolist() == [ids]
    assert mine["cu_k"].tolist() == [0, *accumulate(keys)]
    lengths = [b - a for a, b in pairwise(bounds)]
    assert (mine["max_q"], int(mine["max_k"])) == (max(lengths, default=0), max(keys, default=0))
    rows = [(i, k - n + j + 1) for i, n, k in zip(ids, lengths, keys, strict=True) for j in range(n)]
    return rows + [None] * (num_rows - len(rows))


REQUESTS = st.lists(
    st.tuples(st.one_of(st.just(1), st.integers(1, 300)), st.one_of(st.just(0), st.integers(0, 500))),
    min_size=1,
    max_size=12,
)


@settings(max_examples=300, deadline=None)
@for_all(REQUESTS, st.integers(0, 40), st.integers(2, 4), st.data())
def test_every_token_is_described_once_wherever_the_split_points_are(requests, padding, n, data):
    total = sum(length for length, _ in requests) + padding
    cuts = sorted(data.draw(st.lists(st.integers(0, total), min_size=n - 1, max_size=n - 1)))
    rows = [b - a for a, b in pairwise([0, *cuts, total])]
    inputs = step(requests)
    table = read_requests(inputs, AXES, total - padding)
    values = given_values(inputs, AXES, table, rows)
    assert [row for m, k in enumerate(rows) for row in told(values, m, k)] == described(requests, padding)


@settings(max_examples=200, deadline=None)
@for_all(REQUESTS, st.integers(2, 4), st.booleans())
def test_candidates_give_every_microbatch_tokens_and_straddle_only_where_they_may(requests, n, whole):
    table = read_requests(step(requests), AXES, sum(length for length, _ in requests))
    found = list(candidates(table, n, whole=whole))
    assert len(found) == len(set(found))
    for rows in found:
        assert len(rows) == n
        assert min(rows) > 0
        assert sum(rows) == table.num_tokens
        cuts = set(accumulate(rows[:-1]))
        assert straddles(table, rows) == (not cuts <= set(table.starts))
        assert not (whole and straddles(table, rows))
    if table.num_tokens >= n and not whole:
        assert found


def test_metadata_of_a_straddling_request():
    """Requests of 3, 5 and 2 tokens, with 4, 20 and 0 cached, cut behind the second token of the second."""
    inputs = step([(3, 4), (5, 20), (2, 0)])
    table = read_requests(inputs, AXES, 10)
    values = given_values(inputs, AXES, table, (5, 5))
    parts = ["rows [0, 5), requests [0, 2)", "rows [5, 10), requests [1, 3)"]
    assert list(map(str, parts_of(table, (5, 5)))) == parts
    assert {k: [x.tolist() if isinstance(x, torch.Tensor) else x for x in v] for k, v in values.items()} == {
        "block_table": [[[0, 0], [1, 10]], [[1, 10], [2, 20]]],
        "adapter": [[[0, 1]], [[1, 2]]],
        "cu_q": [[0, 3, 5], [0, 3, 5]],
        "cu_k": [[0, 7, 29], [0, 25, 27]],
        "seq_lens": [[7, 22], [25, 2]],  # 3 of request 1's are the second's, and taken off in the first only
        "max_q": [3, 3],
        "max_k": [22, 25],
    }
    assert values["cu_q"][0].dtype == torch.int32
    assert values["seq_lens"][0].dtype == torch.int64


def test_a_callable_gets_the_input_and_the_tokens_of_the_microbatch():
    axes = {"cu": CuSeqlens(), "mask": lambda mask, rows: mask[rows.start : rows.stop, : rows.stop]}
    inputs = {"cu": torch.tensor([0, 5]), "mask": torch.arange(25).view(5, 5)}
    values = given_values(inputs, axes, read_requests(inputs, axes, 5), (2, 3))
    assert [v.tolist() for v in values["mask"]] == [
        [[0, 1], [5, 6]],
        [[10, 11, 12, 13, 14], [15, 16, 17, 18, 19], [20, 21, 22, 23, 24]],
    ]


def test_an_optional_input_may_be_missing_and_without_requests_there_is_no_table():
    assert read_requests({"ids": torch.arange(7), "cu_q": None}, AXES, 7) is None
    assert given_values({"ids": torch.arange(7)}, AXES, None, (3, 4)) == {}


def test_decode_needs_no_bounds():
    inputs = {"seq_lens": torch.tensor([5, 9, 2]), "block_table": torch.tensor([[1], [2], [3]])}
    table = read_requests(inputs, AXES, 3)
    assert table == RequestTable((0, 1, 2, 3), (5, 9, 2))
    assert table.is_decode
    assert {k: [x.tolist() for x in v] for k, v in given_values(inputs, AXES, table, (2, 1)).items()} == {
        "seq_lens": [[5, 9], [2]],
        "block_table": [[[1], [2]], [[3]]],
    }


def test_requests_without_tokens_belong_to_one_microbatch():
    inputs = {"cu": torch.tensor([0, 0, 3, 3, 7, 7]), "row": torch.arange(5)}
    axes = {"cu": CuSeqlens(), "row": Requests()}
    table = read_requests(inputs, axes, 7)
    for rows in ((3, 4), (2, 5), (7, 0), (0, 7), (3, 4, 2)):
        values = given_values(inputs, axes, table, rows)
        seen = [i for part in values["row"] for i in part.tolist() if i not in (1, 3)]
        assert seen == [0, 2, 4], rows


def test_padding_behind_the_last_request_is_said():
    axes = {"cu": CuSeqlens(padded=True), "ids": Tokens(0)}
    inputs = {"cu": torch.tensor([0, 3, 5, 5, 5, 5, 5, 5, 5, 5]), "ids": torch.arange(8)}
    table = read_requests(inputs, axes, 8)
    assert table.num_tokens == 5
    assert [straddles(table, rows) for rows in ((4, 4), (3, 5), (5, 3), (6, 2))] == [True, False, False, False]
    assert [v.tolist() for v in given_values(inputs, axes, table, (4, 4))["cu"]] == [
        [0, 3, 4], [0, 1, 1, 1, 1, 1, 1, 1, 1],
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("lengths", "n", "expected"),
    [
        ([50, 50], 2, [(50, 50)]),  # between requests, which is even
        ([49, 51], 2, [(49, 51), (50, 50)]),  # near enough
        ([47, 53], 2, [(50, 50), (47, 53)]),  # not near enough: inside the second
        ([1] * 7, 2, [(4, 3)]),
        ([10], 2, [(5, 5)]),
        ([1], 2, []),
        ([30, 31, 29], 3, [(30, 31, 29), (30, 30, 30)]),
        ([5, 80, 5], 3, [(30, 30, 30), (5, 80, 5)]),
    ],
)
def test_split_points(lengths, n, expected):
    table = RequestTable((0, *accumulate(lengths)), tuple(lengths))
    assert list(candidates(table, n)) == expected


def test_whole_requests_are_never_cut():
    assert list(candidates(RequestTable((0, 3, 10), (3, 7)), 2, whole=True)) == [(3, 7)]
    assert list(candidates(RequestTable((0, 10), (10,)), 2, whole=True)) == []


def good(**changes):
    return step([(3, 4), (5, 20), (2, 0)]) | changes


@pytest.mark.parametrize(
    ("inputs", "reason"),
    [
        (good(cu_q=torch.tensor([0, 3, 8, 9])), "cu_q ends at 9, but the step has 10 tokens; is it of another step"),
        (good(cu_q=torch.tensor([0, 3, 8, 11])), "cu_q ends at 11, but the step has 10 tokens"),
        (good(cu_q=torch.tensor([1, 3, 8, 10])), "cu_q begins with 1, expected 0"),
        (good(cu_q=torch.tensor([0, 8, 3, 10])), "cu_q goes down from 8 to 3: request 1 would have -5 tokens"),
        (good(cu_q=torch.tensor([0.0, 3, 8, 10])), "cu_q is CuSeqlens.*one dim of integers, got torch.float32"),
        (good(cu_q=torch.tensor([], dtype=torch.int32)), "expected at least its first number, 0"),
        (good(cu_q=torch.tensor([0, 3, 10])), r"tell of as many requests \(block_table: 3, adapter: 3, cu_q: 2"),
        (good(seq_lens=torch.tensor([7, 4, 2])), "seq_lens says that request 1 attends to 4 tokens, fewer than its 5"),
        (good(seq_lens=torch.tensor([7, -1, 2])), "request 1 attends to -1 tokens"),
        (good(seq_lens=torch.tensor([7, 26, 2])), "cu_k and seq_lens differ in how many tokens"),
        (good(max_q=4), "max_q is 4, but the longest request has 5 tokens"),
        (good(max_k=torch.tensor(24)), "max_k is 24, but the longest request has 25 tokens"),
        (good(max_k=torch.tensor([5, 6])), "expected one number, got torch.int64 of shape"),
        (good(ids=torch.arange(9)), "ids has 9 rows in dim 0, but the step 10 tokens"),
        (good(adapter=torch.arange(3)), "adapter is Requests.*but has shape"),
        (good(block_table=[[0]]), "block_table is Requests.*expected a tensor, got"),
        ({"cu_q": torch.tensor([0, 0, 1, 1, 2])}, "there are 4 requests, more than the 2 tokens"),
        ({"seq_lens": torch.tensor([7, 9])}, "2 requests share 10 tokens, and no input is CuSeqlens"),
    ],
)  # fmt: skip
def test_bad_metadata_says_what_is_wrong(inputs, reason):
    num_tokens = 2 if inputs.keys() == {"cu_q"} else 10
    with pytest.raises(ValueError, match=reason):
        read_requests(inputs, AXES, num_tokens)


def test_an_integer_is_a_token_dim():
    assert axis_of(-1) == Tokens(-1)
    assert axis_of(SeqLens()) == SeqLens()


def test_which_dim_counts_requests():
    assert {name: request_dim(axis) for name, axis in AXES.items() if request_dim(axis) is not None} == {
        "block_table": 0, "adapter": 1, "cu_q": 0, "cu_k": 0, "seq_lens": 0,
    }  # fmt: skip
