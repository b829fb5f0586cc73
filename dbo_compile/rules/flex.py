"""FlexAttention: what it attends to is said by functions of positions, and by blocks of rows.

Tokens may be in the batch dim, if no function asks which sequence it is in. In the sequence dim it is not split: its
functions and its blocks count from the first token of the step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dbo_compile.errors import CannotSplit
from dbo_compile.ir.tokens import TOKENS, Function, Ruling, Shared, Split, Value
from dbo_compile.rules.pointwise import tensors
from dbo_compile.rules.registry import rule

BATCH = {"score_mod": 1, "mask_mod": 0}
"""Which argument of each function is the number of the sequence."""


@rule("flex_attention", reads_whole=True)
def flex_attention(
    query: Value, key: Value, value: Value, score_mod: Function, block_mask: Sequence[Any], scale: float, options: Any,
    score_mod_buffers: Sequence[Any] = (), mask_mod_buffers: Sequence[Any] = (),
) -> Ruling:  # fmt: skip
    """Gives the output, the log of the sums, and the largest scores."""
    if any(v.dim != 0 or v.sizes[0] != query.sizes[0] for v in (query, key, value)):
        raise CannotSplit(
            "its functions and its block mask count from the first token of the step; with a mask, "
            "scaled_dot_product_attention is split, and torch.nn.attention.varlen with bounds of requests"
        )
    *sizes, mask_mod = block_mask
    for name, function in (("score_mod", score_mod), ("mask_mod", mask_mod)):
        if BATCH[name] in function.reads:
            raise CannotSplit(f"its {name} asks for the number of a sequence, and each microbatch counts its own")
    for v in tensors(score_mod_buffers, mask_mod_buffers):
        if not _is_shared(v):
            raise CannotSplit("its score_mod or mask_mod reads rows of tokens")
    if not all(v.dim == 0 or _is_shared(v) for v in tensors(sizes)):
        raise CannotSplit("its block mask has no row for each sequence, nor one for all")
    return Ruling((Split(0),) * 3)


def _is_shared(v: Value) -> bool:
    return isinstance(v.place, Shared) and not any(size.has(TOKENS) for size in v.sizes)
