"""FlexAttention of the rows of one microbatch to those of all: what code calls where the graph has the op."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from dbo_compile import compat

FLEX = torch.ops.higher_order.flex_attention
NUM_LENGTHS, NUM_BLOCKS, NUM_SIZES = 2, 4, 2
"""A block mask, as the op takes it: the number of queries and of keys; for each block of queries how many blocks of
keys they see, and which; the same for blocks that are seen whole; the like of keys, for backward; the sizes of a block;
the function of the mask."""

Attend = Callable[..., torch.Tensor]


def attend_in_blocks(before: int, query: torch.Tensor, *args: Any) -> torch.Tensor:
    """The first result of FlexAttention for queries [batch, heads, rows, size] that are behind `before` others.

    `args` are the op's other arguments, for all rows of the step: the block mask is that of all queries, and its
    functions count from the first of them.
    """
    return _in_blocks(_attend, before, query, *args)


def compiled_attention() -> Attend:
    """A new `attend_in_blocks`, compiled when it is first called: in eager the op holds a score for each two rows."""
    compiled = compat.compiled_apart(_attend)

    def attend(start: torch.Tensor, *args: Any) -> torch.Tensor:
        query, key, value, _, blocks, _, _, score_buffers, mask_buffers = args
        for x in (query, key, value):
            compat.ask_for_dynamic(x, 2)
        for x in filter(torch.is_tensor, (*blocks[:NUM_BLOCKS], *score_buffers, *mask_buffers)):
            for dim in range(x.ndim):
                compat.ask_for_dynamic(x, dim)
        made: torch.Tensor = compiled(start, *args)
        return made

    def attend_in_blocks(before: int, query: torch.Tensor, *args: Any) -> torch.Tensor:
        return _in_blocks(attend, before, query, *args)

    return attend_in_blocks


def _in_blocks(
    attend: Attend, before: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    score_mod: Callable[..., Any], block_mask: Sequence[Any], scale: float, options: dict[str, Any],
    score_buffers: Sequence[Any] = (), mask_buffers: Sequence[Any] = (),
) -> torch.Tensor:  # fmt: skip
    """Where the queries begin inside of a block, they are moved to their place in it: the rows before them are zeros,
    and what becomes of these is thrown away."""
    blocks = list(block_mask[NUM_LENGTHS:])
    rows, inside = query.shape[2], 0
    if blocks[0].shape[2] > 1:  # else all queries are in one block, however many they are
        queries_per_block = blocks[-1 - NUM_SIZES]
        first, inside = divmod(before, queries_per_block)
        num_blocks = -(-(inside + rows) // queries_per_block)
        blocks[:NUM_BLOCKS] = [b if b is None else b.narrow(2, first, num_blocks) for b in blocks[:NUM_BLOCKS]]
    for_backward = slice(NUM_BLOCKS, -1 - NUM_SIZES)
    blocks[for_backward] = [None] * len(blocks[for_backward])
    start = torch.full((), before - inside, device=query.device)
    moved = _moved(query, inside)
    made = attend(start, moved, key, value, score_mod, tuple(blocks), scale, options, score_buffers, mask_buffers)
    return _laid_out_like(query, made.narrow(2, inside, rows))


def _attend(
    start: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, score_mod: Callable[..., Any],
    blocks: Sequence[Any], scale: float, options: dict[str, Any], score_buffers: Sequence[Any],
    mask_buffers: Sequence[Any],
) -> torch.Tensor:  # fmt: skip
    def score(score: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
        return score_mod(score, b, h, q + start, k, *score_buffers)

    def mask(b: Any, h: Any, q: Any, k: Any) -> Any:
        return blocks[-1](b, h, q + start, k, *mask_buffers)

    block_mask = (query.shape[2], key.shape[2], *blocks[:-1], mask)
    made: torch.Tensor = FLEX(query, key, value, score, block_mask, scale, options)[0]
    return made


def _moved(query: torch.Tensor, inside: int) -> torch.Tensor:
    """`query` behind so many rows of zeros, its dims in the same order in memory."""
    batch, heads, rows, size = query.shape
    sizes = (batch, heads, inside + rows, size)
    moved = torch.empty_permuted(sizes, _order(query), dtype=query.dtype, device=query.device)
    moved.narrow(2, 0, inside).zero_()
    moved.narrow(2, inside, rows).copy_(query)
    return moved


def _laid_out_like(query: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    order = _order(query)
    return x.permute(order).contiguous().permute([*map(order.index, range(len(order)))])


def _order(x: torch.Tensor) -> list[int]:
    """The dims, the outermost in memory first."""
    return sorted(range(x.ndim), key=x.stride, reverse=True)
