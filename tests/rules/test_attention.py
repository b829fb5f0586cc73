from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dbo_compile.errors import CannotSplit
from dbo_compile.ir.tokens import TOKENS as T
from dbo_compile.ir.tokens import Local, Ruling, Shared, Split
from dbo_compile.rules.registry import RULES
from tests.rules.truth import Whole, ask, claim, count, local, shared, tokens

aten = torch.ops.aten

Q, KV = tokens(T, 6, 5, 8), tokens(T, 2, 9, 8)
ROWS = local(3 * T, 8, order="sort")
CPU = aten._scaled_dot_product_flash_attention_for_cpu.default
FLASH = aten._scaled_dot_product_flash_attention.default
EFFICIENT = aten._scaled_dot_product_efficient_attention.default
CUDNN = aten._scaled_dot_product_cudnn_attention.default
OPEN = aten._scaled_dot_product_fused_attention_overrideable.default
MATH = aten._scaled_dot_product_attention_math.default
GROUP_NORM = aten.native_group_norm.default
BATCH_NORM = aten._native_batch_norm_legit_no_training.default
STATISTICS = (shared(8),) * 4


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        (lambda: ask(aten.scaled_dot_product_attention.default, Q, KV, KV, shared(5, 9), enable_gqa=True), Split(0)),
        (lambda: ask(CPU, Q, KV, KV, 0.0, True, attn_mask=tokens(T, 1, 5, 9), scale=0.5), (Split(0),) * 2),
        (lambda: ask(MATH, Q, KV, KV, shared(1, 1, 5, 9)), (Split(0),) * 2),
        (lambda: ask(FLASH, Q, KV, KV, 0.0, True), (Split(0), Split(0), *(Shared(),) * 7)),
        (lambda: ask(EFFICIENT, Q, KV, KV, tokens(T, 6, 5, 9), True), (Split(0), Split(0), Shared(), Shared())),
        (lambda: ask(CUDNN, Q, KV, KV, None, False), (Split(0), Split(0), *(Shared(),) * 7)),
        (lambda: ask(OPEN, Q, KV, KV, shared(5, 9)), (Split(0), Split(0), *(Shared(),) * 7)),
        (lambda: ask(aten._softmax.default, tokens(T, 8), -1, False), Split(0)),
        (lambda: ask(aten._log_softmax.default, tokens(3, T, 8), 0, False), Split(1)),
        (lambda: ask(aten._safe_softmax.default, ROWS, 1), Local("sort")),
        (lambda: ask(aten._softmax.default, local(6, 8, order="sort"), 0, False), Local()),
        (lambda: ask(aten.glu.default, tokens(T, 8)), Split(0)),
        (lambda: ask(aten.layer_norm.default, tokens(3, T, 8), [8], shared(8), shared(8)), Split(1)),
        (lambda: ask(aten.native_layer_norm.default, tokens(T, 5, 8), [5, 8], None, None, 1e-5), (Split(0),) * 3),
        (lambda: ask(aten.rms_norm.default, ROWS, [8], shared(8)), Local("sort")),
        (lambda: ask(aten._fused_rms_norm.default, tokens(T, 8), [8], shared(8), None), (Split(0),) * 2),
        (lambda: ask(GROUP_NORM, tokens(T, 8, 9), None, None, count(T), 8, 9, 2, 1e-5), (Split(0),) * 3),
        (lambda: ask(BATCH_NORM, tokens(T, 8, 5), *STATISTICS, 0.1, 1e-5), (Split(0), Shared(), Shared())),
        (lambda: ask(BATCH_NORM, ROWS, *STATISTICS, 0.1, 1e-5), (Local("sort"), Shared(), Shared())),
    ],
)
def test_tokens_follow(place, expected):
    assert place() == expected


SEQUENCES = (tokens(1, 6, T, 8), *[tokens(1, 2, T, 8)] * 2)


@pytest.mark.parametrize(
    ("op", "args", "num_others"),
    [
        (aten.scaled_dot_product_attention.default, (None, 0.0, True), -1),
        (MATH, (None, 0.0, True), 0),
        (CPU, (0.0, True), 0),
        (FLASH, (0.0, True), 7),
        (CUDNN, (None, False, 0.0, True), 7),
        (OPEN, (None, 0.0, True), 7),
        (EFFICIENT, (None, False, 0.0, True), 2),
    ],
    ids=lambda x: str(x) if isinstance(x, torch._ops.OpOverload) else "",
)
def test_causal_attention_of_a_sequence_reads_keys_and_values_of_earlier_microbatches(op, args, num_others):
    place = Split(2) if num_others < 0 else (Split(2), Split(2), *(Shared(),) * num_others)
    assert RULES[op](*SEQUENCES, *args) == Ruling(place, prefix=(1, 2))


@pytest.mark.parametrize("mask", [shared(1, 1, T, T), shared(T, T), shared(6, T, T), None])
def test_attention_to_later_tokens_reads_keys_and_values_of_all_microbatches(mask):
    attend = RULES[aten.scaled_dot_product_attention.default]
    assert attend(*SEQUENCES, mask) == Ruling(Split(2), whole=(1, 2))
    if mask is not None:
        assert attend(*SEQUENCES, replace(mask, is_causal=True)) == Ruling(Split(2), prefix=(1, 2))


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda: ask(CPU, *SEQUENCES, 0.0, True, attn_mask=shared(1, 1, 5, 5)), "in the sequence dim, and it relates"),
        (lambda: ask(CPU, *SEQUENCES, attn_mask=shared(T, 1, T, T)), "in the sequence dim, and it relates"),
        (lambda: ask(CPU, *SEQUENCES, attn_mask=shared(1, 1, T, 2 * T)), "in the sequence dim, and it relates"),
        (lambda: ask(CPU, *SEQUENCES, attn_mask=shared(T)), "in the sequence dim, and it relates"),
        (lambda: ask(CPU, Q, KV, KV, attn_mask=shared(1, T, 5, 9)), "has a size that counts the tokens of all microb"),
        (lambda: ask(CPU, *SEQUENCES, 0.1, True), "draws random numbers"),
        (lambda: ask(CPU, *[tokens(1, 2, 3 * T, 8)] * 3, 0.0, True), "in the sequence dim, and it relates"),
        (lambda: ask(CPU, SEQUENCES[0], *[shared(1, 2, 5, 8)] * 2, 0.0, True), "do not carry tokens alike"),
        (lambda: ask(CPU, *[tokens(3, T, 5, 8)] * 3), "tokens are in the heads dim"),
        (lambda: ask(CPU, *[tokens(3, 2, 5, T)] * 3), "tokens are in the features dim"),
        (lambda: ask(aten.scaled_dot_product_attention.default, *[tokens(2, T, 8)] * 3), "in the sequence dim"),
        (lambda: ask(CPU, Q, shared(T, 2, 9, 8), shared(T, 2, 9, 8)), "do not carry tokens alike"),
        (lambda: ask(CPU, Q, tokens(2 * T, 2, 9, 8), tokens(2 * T, 2, 9, 8)), "do not carry tokens alike"),
        (lambda: ask(CPU, Q, KV, KV, attn_mask=shared(T, 1, 5, 9)), "size T in the token dim 0, but no tokens"),
        (lambda: ask(CPU, Q, KV, KV, attn_mask=tokens(T, 9)), "carries tokens in dim 0, not in the batch dim alone"),
        (lambda: ask(CPU, Q, KV, KV, attn_mask=tokens(1, 1, T, 9)), "carries tokens in dim 2, not in the batch dim"),
        (lambda: ask(CPU, *[shared(3, 2, 5, 8)] * 3, attn_mask=tokens(T, 5)), "its mask carries tokens, but"),
        (lambda: ask(CPU, *[local(3 * T, 2, 5, 8)] * 3), "rows of a microbatch that are in an order of their own"),
        (lambda: ask(CPU, Q, KV, KV, 0.1), "draws random numbers"),
        (lambda: ask(MATH, Q, KV, KV, None, 0.0, False, tokens(T, 6, 5, 9)), "drops elements by a mask"),
        (lambda: ask(FLASH, Q, KV, KV, 0.0, True, True), "returns a mask for debugging"),
        (lambda: ask(aten._softmax.default, tokens(T, 8), 0, False), "normalises over the token dim 0"),
        (lambda: ask(aten._log_softmax.default, tokens(3, T), -1, False), "normalises over the token dim 1"),
        (lambda: ask(aten._softmax.default, ROWS, 0, False), "normalises over rows of a microbatch"),
        (lambda: ask(aten.glu.default, tokens(8, 2 * T)), "folds the token dim 1"),
        (lambda: ask(aten.layer_norm.default, tokens(T, 8), [count(T), 8]), "computes with the number of tokens"),
        (lambda: ask(aten.layer_norm.default, tokens(3, T, 8), [T, 8]), "normalises over the token dim 1"),
        (lambda: ask(aten.rms_norm.default, tokens(T, 8), [8], tokens(8 * T)), "its weight carries tokens"),
        (lambda: ask(GROUP_NORM, tokens(8, T, 9), None, None, 8, count(T), 9, 2, 1e-5), "number of tokens"),
        (lambda: ask(GROUP_NORM, tokens(8, T, 9), None, None, 8, T, 9, 2, 1e-5), "over the token dim 1"),
        (lambda: ask(aten.native_batch_norm.default, tokens(T, 8), *STATISTICS, True, 0.1, 1e-5), "over all tokens"),
        (lambda: ask(BATCH_NORM, tokens(8, T), *STATISTICS, 0.1, 1e-5), "has a weight for each row of the token dim 1"),
    ],
)
def test_says_why_not(call, reason):
    with pytest.raises(CannotSplit, match=reason):
        call()


def r(*sizes):
    return torch.rand(sizes, dtype=torch.float64)


QKV = (r(7, 6, 5, 3), r(7, 6, 9, 3), r(7, 6, 9, 3))
WEIGHTS = [r(3), r(3)]


@pytest.mark.parametrize(
    "call",
    [
        (aten.scaled_dot_product_attention.default, *QKV, r(5, 9)),
        (aten.scaled_dot_product_attention.default, *QKV, r(7, 1, 5, 9)),
        (CPU, *QKV, 0.0, True),
        (MATH, *QKV, r(1, 6, 5, 9)),
        (aten._softmax.default, r(2, 7, 3), 0, False),
        (aten._log_softmax.default, r(2, 7, 3), -1, False),
        (aten._safe_softmax.default, r(2, 7, 3), 2),
        (aten.glu.default, r(2, 7, 6), 0),
        (aten.layer_norm.default, r(2, 7, 3), [3], *WEIGHTS),
        (aten.native_layer_norm.default, r(7, 2, 3), [2, 3], None, None, 1e-5),
        (aten.rms_norm.default, r(7, 2, 3), [3], WEIGHTS[0]),
        (GROUP_NORM, r(7, 6, 5), None, None, 7, 6, 5, 2, 1e-5),
        (BATCH_NORM, r(7, 3, 5), *WEIGHTS, *WEIGHTS, 0.1, 1e-5),
        (BATCH_NORM, r(5, 3, 7), *WEIGHTS, *WEIGHTS, 0.1, 1e-5),
        (aten.native_batch_norm.default, r(7, 3), *WEIGHTS, *WEIGHTS, False, 0.1, 1e-5),
    ],
    ids=lambda call: str(call[0]),
)
def test_the_claim_is_true(call):
    assert not isinstance(claim(*call), str)


def test_a_mask_that_all_tokens_share_may_have_any_other_sizes():
    assert claim(CPU, *QKV, attn_mask=r(5, 9)) == (Split(0), Split(0))
    assert "but no tokens" in claim(CPU, *QKV, attn_mask=Whole(r(7, 1, 5, 9)))
