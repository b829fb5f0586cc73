"""Buckets waste little and never shrink; padding changes nothing but rows behind the tokens, and goes away again."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dbo_compile.runtime.padding import (
    Buckets,
    Padding,
    can_hold,
    fill,
    pad,
    unpad,
    unpad_outputs,
    unpad_tree,
)

# -- buckets ----------------------------------------------------------------------------------------------------------


def test_given_sizes_are_sorted_and_the_least_that_fits_is_taken():
    buckets = Buckets([65, 9, 257, 9])
    assert [buckets.bucket(n) for n in (0, 1, 9, 10, 65, 66, 257)] == [0, 9, 9, 65, 65, 257, 257]
    assert buckets.sizes == (9, 65, 257)
    assert str(buckets) == "9 (2 steps), 65 (2 steps), 257 (2 steps)"


def test_a_step_over_the_largest_size_is_refused_with_both_sizes():
    with pytest.raises(ValueError, match=r"^258 tokens are more than the largest size in pad_to, 257: "):
        Buckets([9, 257]).bucket(258)


def test_without_sizes_nothing_is_padded():
    buckets = Buckets(None)
    assert [buckets.bucket(n) for n in (0, 1, 13, 4097)] == [0, 1, 13, 4097]


def test_auto_sizes_are_these():
    auto = Buckets("auto")
    assert sorted({auto.bucket(n) for n in range(1, 130)}) == [
        *range(1, 16), 16, 18, 20, 22, 24, 26, 28, 30, 32, 36, 40, 44, 48, 52, 56, 60,
        64, 72, 80, 88, 96, 104, 112, 120, 128, 144,
    ]  # fmt: skip
    assert [auto.bucket(n) for n in (0, 1025, 8191, 8192, 8193)] == [0, 1152, 8192, 8192, 9216]


@given(st.integers(1, 1 << 40))
def test_auto_wastes_at_most_an_eighth(num_tokens):
    bucket = Buckets("auto").bucket(num_tokens)
    assert 0 <= (bucket - num_tokens) * 8 < num_tokens or bucket == num_tokens
    assert num_tokens <= 60 or bucket % 8 == 0
    assert Buckets("auto").bucket(bucket) == bucket


@given(st.sampled_from(["auto", None, (3, 7, 65, 1 << 20)]), st.integers(0, 1 << 20), st.integers(0, 1 << 20))
def test_the_largest_bucket_is_that_of_the_largest_rank(pad_to, a, b):
    buckets = Buckets(pad_to)
    assert max(buckets.bucket(a), buckets.bucket(b)) == buckets.bucket(max(a, b))


def test_the_sizes_that_were_used_are_reported():
    auto = Buckets("auto")
    for num_tokens in (67, 71, 13, 72, 0):
        auto.bucket(num_tokens)
    assert (auto.sizes, dict(auto.uses)) == ((0, 13, 72), {72: 3, 13: 1, 0: 1})


# -- padding ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [0, 1, 2, -1, -2, -3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int64, torch.bool, torch.float8_e4m3fn])
def test_padding_adds_rows_behind_the_tokens_and_unpadding_takes_them_away(dim, dtype):
    x = torch.arange(105).reshape(3, 5, 7).to(dtype)
    padded = pad(x, dim, 11, 1)
    size = x.shape[dim]
    assert padded.shape[dim] == 11
    assert padded.dtype == dtype
    assert padded.narrow(dim, 0, size).tolist() == x.tolist()
    assert set(padded.narrow(dim, size, 11 - size).flatten().tolist()) == {1}
    assert unpad(padded, dim, 11, size).tolist() == x.tolist()


def test_nothing_to_pad_is_no_copy():
    x = torch.arange(15).reshape(3, 5)
    assert pad(x, -1, 5) is x
    assert unpad(x, -1, 5, 5) is x
    padding = Padding({"x": 1}, {})
    assert padding.pad({"x": x}, 5)["x"] is x


def test_unpadding_is_a_view():
    padded = torch.arange(22).reshape(11, 2)
    rows = unpad(padded, 0, 11, 5)
    assert rows.data_ptr() == padded.data_ptr()
    assert rows.tolist() == padded[:5].tolist()


def test_a_rank_without_tokens_is_padding_alone():
    assert pad(torch.empty(3, 0, dtype=torch.int64), -1, 5, -7).tolist() == [[-7] * 5] * 3


LAYOUTS = [
    (lambda rows: torch.randn(rows, 3, 5), 0),
    (lambda rows: torch.randn(3, rows, 5), 1),
    (lambda rows: torch.randn(5, rows, 3).permute(2, 0, 1), 2),
    (lambda rows: torch.randn(rows, 3, 8)[..., :5], 0),
    (lambda rows: torch.randn(rows).expand(3, 5, rows), -1),
    (lambda rows: torch.randn(rows, 5).t(), 1),
]


@pytest.mark.parametrize(("make", "dim"), LAYOUTS)
def test_the_layout_is_that_of_so_many_rows(make, dim):
    x = make(7)
    padded = pad(x, dim, 11, 3)
    assert padded.stride() == make(11).stride()
    assert torch.equal(padded.narrow(dim, 0, 7), x)
    assert (padded.narrow(dim, 7, 4) == 3).all()


@pytest.mark.parametrize("x", [torch.tensor(3).expand(7), torch.randn(3, 40)[:, :7], torch.randn(1, 7)])
def test_other_layouts_are_padded_as_well(x):
    padded = pad(x, -1, 11, 2)
    assert torch.equal(padded.narrow(-1, 0, 7), x)
    assert (padded.narrow(-1, 7, 4) == 2).all()


def test_a_static_buffer_keeps_nothing_of_the_step_before():
    buffer = torch.full((2, 7), 99)
    assert fill(buffer, torch.tensor([[1, 2, 3], [4, 5, 6]]), 1, -1) is buffer
    assert buffer.tolist() == [[1, 2, 3, -1, -1, -1, -1], [4, 5, 6, -1, -1, -1, -1]]


def test_named_inputs_are_padded_with_their_values():
    padding = Padding({"ids": 0, "positions": -1, "slots": 0, "absent": 0, "none": 0}, {"slots": -1, "other": 0.5})
    weight = torch.randn(3, 3)
    inputs = {
        "ids": torch.tensor([7, 8, 9]),
        "positions": torch.tensor([[0, 1, 2], [3, 4, 5]]),
        "slots": torch.tensor([4, 2, 6]),
        "weight": weight,
        "none": None,
    }
    padding.check(inputs)
    assert padding.num_tokens(inputs) == 3
    padded = padding.pad(inputs, 5)
    assert list(padded) == list(inputs)
    assert padded["ids"].tolist() == [7, 8, 9, 0, 0]
    assert padded["positions"].tolist() == [[0, 1, 2, 0, 0], [3, 4, 5, 0, 0]]
    assert padded["slots"].tolist() == [4, 2, 6, -1, -1]
    assert padded["weight"] is weight
    assert padded["none"] is None
    assert inputs["ids"].tolist() == [7, 8, 9]


def test_inputs_that_differ_in_their_tokens_are_refused_by_name():
    padding = Padding({"ids": 0, "positions": -1}, {})
    with pytest.raises(ValueError, match=r"one number of tokens \(ids: 3, positions: 5\); see token_dims"):
        padding.num_tokens({"ids": torch.zeros(3), "positions": torch.zeros(3, 5)})
    with pytest.raises(ValueError, match=r"\(ids: 3, positions: 5, mask is a list, not a tensor\)"):
        Padding({"ids": 0, "positions": -1, "mask": 0}, {}).num_tokens(
            {"ids": torch.zeros(3), "positions": torch.zeros(3, 5), "mask": [1]}
        )


def test_token_inputs_none_of_which_is_a_tensor_are_refused_by_what_they_are():
    padding = Padding({"ids": 0, "positions": -1, "mask": 0}, {})
    with pytest.raises(ValueError, match=r"\(ids is a list, not a tensor, positions is None, mask is missing\)"):
        padding.num_tokens({"ids": [1, 2], "positions": None})


def test_a_token_dim_that_an_input_has_not_is_refused_by_name():
    for dim in (2, -3):
        with pytest.raises(ValueError, match=rf"^token_dims names dim {dim} of ids, whose shape is \[3, 5\]$"):
            Padding({"ids": dim}, {}).num_tokens({"ids": torch.zeros(3, 5)})


def test_a_value_that_the_dtype_cannot_hold_is_refused_by_name():
    padding = Padding({"mask": 0, "slots": 0}, {"mask": -math.inf, "slots": -1})
    padding.check({"mask": torch.zeros(3), "slots": torch.zeros(3, dtype=torch.int32)})
    with pytest.raises(ValueError, match=r"^pad_values\['slots'\]=-1 is no value of torch.uint8, its dtype$"):
        padding.check({"mask": torch.zeros(3), "slots": torch.zeros(3, dtype=torch.uint8)})
    with pytest.raises(ValueError, match=r"^pad_values\['mask'\]=-inf is no value of torch.bool, its dtype$"):
        padding.check({"mask": torch.zeros(3, dtype=torch.bool)})


HOLDS = [
    (torch.bool, [0, 1, 1.0], [-1, 2, 0.5, math.nan]),
    (torch.uint8, [0, 255, 3.0], [-1, 256, 0.5, math.inf, math.nan]),
    (torch.int8, [-128, 127], [128, -129, -math.inf]),
    (torch.int64, [2**63 - 1, -(2**63)], [2**63, 1e300, 10**400]),
    (torch.float16, [0.1, 65504, -math.inf, math.nan], [65536, -1e9, 10**400]),
    (torch.bfloat16, [-1e9, 0.1, math.inf], [1e39]),
    (torch.float64, [1e300, -math.inf], [10**400]),
    (torch.float8_e4m3fn, [448, 0.1, math.nan], [449, math.inf]),
    (torch.float8_e5m2, [57344, -math.inf], [57345]),
    (torch.complex64, [-1e9, math.inf], [1e39]),
]


@pytest.mark.parametrize(("dtype", "held", "not_held"), HOLDS)
def test_what_a_dtype_holds(dtype, held, not_held):
    assert [v for v in held if not can_hold(dtype, v)] == []
    assert [v for v in not_held if can_hold(dtype, v)] == []


# -- unpadding --------------------------------------------------------------------------------------------------------


def test_flat_results_lose_their_padding_where_they_have_tokens():
    tokens, last, blocks, shared, number = (torch.randn(s) for s in [(11, 3), (2, 11), (33, 2), (11, 11), ()])
    results = unpad_outputs([tokens, last, blocks, shared, number, 11, None], [0, -1, 0, None, None, None, None], 11, 5)
    assert torch.equal(results[0], tokens[:5])
    assert torch.equal(results[1], last[:, :5])
    assert torch.equal(results[2], blocks[:15])
    assert results[3] is shared
    assert results[4:] == (number, 11, None)


def test_results_and_their_token_dims_are_as_many():
    with pytest.raises(ValueError, match="zip"):
        unpad_outputs([torch.zeros(3)], [0, 1], 3, 2)


def test_nested_results_are_cut_only_where_the_dim_is_of_the_padded_size():
    logits, hidden, cache, other = (torch.randn(s) for s in [(1, 11, 3), (1, 11), (1, 22, 3), (11,)])
    tree = {"logits": logits, "states": (hidden, [cache, other]), "text": "eleven", "count": 11}
    cut = unpad_tree(tree, 1, 11, 5)
    assert torch.equal(cut["logits"], logits[:, :5])
    assert torch.equal(cut["states"][0], hidden[:, :5])
    assert cut["states"][1][0] is cache
    assert cut["states"][1][1] is other
    assert (cut["text"], cut["count"]) == ("eleven", 11)


@given(st.integers(0, 9), st.integers(0, 9), st.sampled_from([0, 1, -1]))
def test_a_step_comes_back_as_it_went(num_tokens, more, dim):
    x = torch.randn(num_tokens, num_tokens)
    padded = pad(x, dim, num_tokens + more, math.nan)
    assert torch.equal(unpad_tree([padded], dim, num_tokens + more, num_tokens)[0], x)
