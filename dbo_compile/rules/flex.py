"""FlexAttention: what it attends to is said by functions of positions, and by blocks of rows.

Tokens in the batch dim are split if no function asks which sequence it is in. With tokens in the sequence dim the
queries of a microbatch attend to the keys of all, and functions and blocks go on counting from the first token of the
step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dbo_compile.errors import CannotSplit
from dbo_compile.ir.tokens import TOKENS, Function, Number, Ruling, Shared, Split, Value
from dbo_compile.rules.pointwise import tensors
from dbo_compile.rules.registry import rule

SEQUENCE = {"score_mod": 1, "mask_mod": 0}
"""Which argument of each function is the number of the sequence."""
BUFFERS = {"score_mod": 5, "mask_mod": 4}
"""Which argument of each function is the first of the values that it reads by positions."""

Functions = Mapping[str, tuple[Function, Sequence[Any]]]


@rule("flex_attention", reads_whole=True)
def flex_attention(
    query: Value, key: Value, value: Value, score_mod: Function, block_mask: Sequence[Any], scale: float, options: Any,
    score_mod_buffers: Sequence[Any] = (), mask_mod_buffers: Sequence[Any] = (),
) -> Ruling:  # fmt: skip
    """Gives the output, the log of the sums, and the largest scores."""
    *lengths_and_blocks, mask_mod = block_mask
    functions = {"score_mod": (score_mod, score_mod_buffers), "mask_mod": (mask_mod, mask_mod_buffers)}
    if all(v.dim == 0 and v.sizes[0] == query.sizes[0] for v in (query, key, value)):
        _check_sequences(tensors(lengths_and_blocks), functions)
        return Ruling((Split(0),) * 3)
    if all(v.dim == 2 and v.sizes[2] == TOKENS for v in (query, key, value)):
        _check_rows(lengths_and_blocks, functions)
        return Ruling((Split(2),) * 3, whole=(1, 2, 7, 8))
    raise CannotSplit("its queries, keys and values do not all have a token in each row of the batch, or the sequence")


def _check_sequences(blocks: Sequence[Value], functions: Functions) -> None:
    for name, (function, buffers) in functions.items():
        if SEQUENCE[name] in function.reads:
            raise CannotSplit(f"its {name} asks for the number of a sequence, and each microbatch counts its own")
        if not all(_is_shared(v) for v in tensors(buffers)):
            raise CannotSplit(f"its {name} reads rows of tokens")
    if not all(v.dim == 0 or _is_shared(v) for v in blocks):
        raise CannotSplit("its block mask has no row for each sequence, nor one for all")


def _check_rows(lengths_and_blocks: Sequence[Any], functions: Functions) -> None:
    for name, (function, buffers) in functions.items():
        for i, v in enumerate(buffers, BUFFERS[name]):
            if isinstance(v, Value) and not isinstance(v.place, Split | Shared):
                raise CannotSplit(f"its {name} reads values that each microbatch has its own of")
            if isinstance(v, Number) and i in function.reads and not isinstance(v.place, Shared):
                raise CannotSplit(f"its {name} computes with the number of tokens")
    num_queries, num_keys, *blocks = lengths_and_blocks
    values = [b for b in blocks if isinstance(b, Value)]
    if not all(isinstance(b.place, Shared) for b in values):
        raise CannotSplit("its block mask is not made for all tokens of the step")
    if values[0].sizes[2] != 1 and not all(_is_all(n) for n in (num_queries, num_keys)):
        raise CannotSplit("its block mask is made for a fixed number of tokens")


def _is_all(length: Any) -> bool:
    return isinstance(length, Number) and length.expr == TOKENS


def _is_shared(v: Value) -> bool:
    return isinstance(v.place, Shared) and not any(size.has(TOKENS) for size in v.sizes)
