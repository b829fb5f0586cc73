"""Attention, and ops that normalise along dims: what they relate must lie within one token, or one sequence.

The fused attention ops take (batch, heads, sequence, features): tokens are in the batch or in the sequence. In the
sequence the queries of a microbatch attend to the keys of all tokens: where later ones are known to be hidden, to its
own and to those of earlier microbatches, so that it need not wait for the next ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from dbo_compile.errors import CannotSplit
from dbo_compile.ir.tokens import TOKENS, Local, Placement, Ruling, Shared, Split, Value
from dbo_compile.rules.contract import refuse_tokens
from dbo_compile.rules.create import Size
from dbo_compile.rules.pointwise import carried, renewed, tensors
from dbo_compile.rules.registry import rule

aten = torch.ops.aten

DIMS = ("batch", "heads", "sequence", "features")


def _attend(
    query: Value, key: Value, value: Value, mask: Value | None, dropout_p: float, is_causal: bool, **options: Any
) -> Ruling:
    tensors([*options.values()])
    if dropout_p:
        raise CannotSplit("it draws random numbers: their order would depend on the split")
    carriers = (query, key, value)
    if any(v is not None and v.is_local for v in (*carriers, mask)):
        raise CannotSplit("it attends to rows of a microbatch that are in an order of their own")
    dims = {v.dim for v in carriers}
    if len(dims) > 1 or len({v.sizes[0] for v in carriers}) > 1:
        raise CannotSplit("its queries, keys and values do not carry tokens alike")
    if dims == {None}:
        raise CannotSplit("its mask carries tokens, but its queries, keys and values do not")
    is_sequence = all(v.ndim == len(DIMS) and v.dim == 2 and v.sizes[2] == TOKENS for v in carriers)
    if is_sequence and (mask is None or _is_of_all_tokens(mask)):
        is_causal = is_causal or (mask is not None and mask.is_causal)
        return Ruling(Split(2), prefix=(1, 2)) if is_causal else Ruling(Split(2), whole=(1, 2))
    if query.dim != 0 or query.ndim != len(DIMS):
        raise CannotSplit(f"its tokens are in the {DIMS[carried(query) - query.ndim]} dim, and it relates them")
    _check_mask(query, mask)
    return Ruling(Split(0))


def _with(ruling: Ruling, *others: Placement) -> Ruling:
    """The ruling of an op that gives the output, the sums behind it (as long as the output), and `others`."""
    assert not isinstance(ruling.place, tuple)
    return replace(ruling, place=(ruling.place, ruling.place, *others))


def _is_of_all_tokens(mask: Value) -> bool:
    """Whether a mask has a row and a column for each token of the step."""
    is_square = mask.sizes[-2:] == (TOKENS, TOKENS)
    return is_square and isinstance(mask.place, Shared) and not any(s.has(TOKENS) for s in mask.sizes[:-2])


def _check_mask(query: Value, mask: Value | None) -> None:
    """A mask is broadcast against (batch, heads, queries, keys)."""
    if mask is None:
        return
    if isinstance(mask.place, Shared) and any(size.has(TOKENS) for size in mask.sizes[-3:]):
        raise CannotSplit(f"its mask {list(mask.sizes)} has a size that counts the tokens of all microbatches")
    if mask.dim is None and mask.ndim == query.ndim and mask.sizes[0] != 1:
        raise CannotSplit(f"its mask has size {mask.sizes[0]} in the token dim 0, but no tokens")
    if mask.dim is not None and (mask.dim != 0 or mask.ndim != query.ndim or mask.sizes[0] != query.sizes[0]):
        raise CannotSplit(f"its mask {list(mask.sizes)} carries tokens in dim {mask.dim}, not in the batch dim alone")


@rule(aten.scaled_dot_product_attention.default, reads_whole=True)
def attention(
    query: Value, key: Value, value: Value, attn_mask: Value | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, **options: Any,
) -> Ruling:  # fmt: skip
    return _attend(query, key, value, attn_mask, dropout_p, is_causal, **options)


@rule(
    aten._scaled_dot_product_attention_math.default, aten._scaled_dot_product_attention_math_for_mps.default,
    reads_whole=True,
)  # fmt: skip
def attention_math(
    query: Value, key: Value, value: Value, attn_mask: Value | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, dropout_mask: Value | None = None, **options: Any,
) -> Ruling:  # fmt: skip
    """Gives the output and the attention weights."""
    if dropout_mask is not None:
        raise CannotSplit("it drops elements by a mask")
    return _with(_attend(query, key, value, attn_mask, dropout_p, is_causal, **options))


@rule(aten._scaled_dot_product_flash_attention_for_cpu.default, reads_whole=True)
def flash_for_cpu(
    query: Value, key: Value, value: Value, dropout_p: float = 0.0, is_causal: bool = False, *,
    attn_mask: Value | None = None, **options: Any,
) -> Ruling:  # fmt: skip
    """Gives the output and the log of the sums."""
    return _with(_attend(query, key, value, attn_mask, dropout_p, is_causal, **options))


@rule(aten._scaled_dot_product_flash_attention.default, reads_whole=True)
def flash(
    query: Value, key: Value, value: Value, dropout_p: float = 0.0, is_causal: bool = False,
    return_debug_mask: bool = False, **options: Any,
) -> Ruling:  # fmt: skip
    return _fused(_attend(query, key, value, None, dropout_p, is_causal, **options), return_debug_mask)


@rule(aten._scaled_dot_product_cudnn_attention.default, reads_whole=True)
def cudnn(
    query: Value, key: Value, value: Value, attn_bias: Value | None, compute_log_sumexp: bool, dropout_p: float = 0.0,
    is_causal: bool = False, return_debug_mask: bool = False, **options: Any,
) -> Ruling:  # fmt: skip
    return _fused(_attend(query, key, value, attn_bias, dropout_p, is_causal, **options), return_debug_mask)


@rule(aten._scaled_dot_product_fused_attention_overrideable.default, reads_whole=True)
def overrideable(
    query: Value, key: Value, value: Value, attn_bias: Value | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, return_debug_mask: bool = False, **options: Any,
) -> Ruling:  # fmt: skip
    return _fused(_attend(query, key, value, attn_bias, dropout_p, is_causal, **options), return_debug_mask)


def _fused(ruling: Ruling, return_debug_mask: bool) -> Ruling:
    """The output, the log of the sums; sequence offsets, lengths, the state of a generator and a mask for debugging."""
    if return_debug_mask:
        raise CannotSplit("it returns a mask for debugging")
    return _with(ruling, *(Shared(),) * 7)


@rule(aten._scaled_dot_product_efficient_attention.default, reads_whole=True)
def efficient(
    query: Value, key: Value, value: Value, attn_bias: Value | None, compute_log_sumexp: bool, dropout_p: float = 0.0,
    is_causal: bool = False, **options: Any,
) -> Ruling:  # fmt: skip
    """Gives the output, the log of the sums, and the state of a generator."""
    return _with(_attend(query, key, value, attn_bias, dropout_p, is_causal, **options), Shared(), Shared())


@rule(
    aten._softmax.default, aten._log_softmax.default, aten._safe_softmax.default, aten.softmax.int,
    aten.log_softmax.int,
)  # fmt: skip
def softmax(x: Value, dim: int, *_: Any, **__: Any) -> Placement:
    return _normalised(x, [dim])


@rule(aten.glu.default)
def glu(x: Value, dim: int = -1) -> Placement:
    """Multiplies one half of a dim by the sigmoid of the other half."""
    return _normalised(x, [dim], verb="folds")


def _normalised(x: Value, dims: Sequence[int], verb: str = "normalises over") -> Split | Local:
    """`x` after an op that relates the elements along `dims`."""
    own = [d % max(x.ndim, 1) for d in dims]
    if x.dim in own:
        raise CannotSplit(f"it {verb} the token dim {x.dim}")
    if isinstance(x.place, Local):
        if any(x.is_rows(d) for d in own if x.ndim):
            raise CannotSplit(f"it {verb} rows of a microbatch that are in an order of their own")
        if 0 in own:
            return Local(position=x.is_position)
    return renewed(x)


def _layer_norm(x: Value, shape: Sequence[Size], *weights: Any) -> Split | Local:
    """`x` normalised over its last dims, as many as `shape` has."""
    tensors(shape)
    refuse_tokens("weight", *weights)
    return _normalised(x, range(-len(shape), 0))


@rule(aten.layer_norm.default, aten.rms_norm.default)
def norm(x: Value, shape: Sequence[Size], *weights: Any, **more_weights: Any) -> Placement:
    return _layer_norm(x, shape, *weights, *more_weights.values())


@rule(aten.native_layer_norm.default)
def native_layer_norm(x: Value, shape: Sequence[Size], *weights: Any) -> tuple[Placement, ...]:
    """Gives the result, and mean and deviation with as many dims."""
    return (_layer_norm(x, shape, *weights),) * 3


@rule(aten._fused_rms_norm.default)
def fused_rms_norm(x: Value, shape: Sequence[Size], *weights: Any) -> tuple[Placement, ...]:
    return (_layer_norm(x, shape, *weights),) * 2


@rule(aten.native_group_norm.default)
def native_group_norm(
    x: Value, weight: Value | None, bias: Value | None, rows: Size, channels: Size, inner: Size, *how: Any
) -> tuple[Placement, ...]:
    """Gives the result, and mean and deviation of each group in each of the rows of dim 0."""
    tensors(channels, inner, how)
    refuse_tokens("weight", weight, bias)
    return (_normalised(x, range(1, x.ndim)),) * 3


@rule(aten.native_batch_norm.default, aten._native_batch_norm_legit.default)
def batch_norm(
    x: Value, weight: Any, bias: Any, mean: Any, var: Any, training: bool, *how: Any
) -> tuple[Placement, ...]:
    tensors(how)
    if training or mean is None:
        raise CannotSplit("it takes statistics over all tokens")
    return _batch_norm(x, weight, bias, mean, var)


@rule(aten._native_batch_norm_legit_functional.default)
def batch_norm_functional(x: Value, weight: Any, bias: Any, mean: Any, var: Any, training: bool, *_: Any) -> Placement:
    """Returns new running statistics too, which only training has."""
    raise CannotSplit("it takes statistics over all tokens")


@rule(aten._native_batch_norm_legit_no_training.default)
def batch_norm_no_training(x: Value, weight: Any, bias: Any, mean: Any, var: Any, *how: Any) -> tuple[Placement, ...]:
    tensors(how)
    return _batch_norm(x, weight, bias, mean, var)


def _batch_norm(x: Value, *weights: Any) -> tuple[Placement, ...]:
    """Gives the result, and without training two empty tensors."""
    refuse_tokens("weight", *weights)
    return _normalised(x, [1], verb="has a weight for each row of"), Shared(), Shared()
