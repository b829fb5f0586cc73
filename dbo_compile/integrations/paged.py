"""Paged attention of transformers' continuous batching as one op, so that a step of it is one graph.

`continuous_batching()` puts it in the place of "sdpa", and of what that attends to: transformers itself updates the
cache first, and breaks the graph there in every layer, as the caches of all layers are views of one tensor, which
AOTAutograd would copy. The op is given that tensor whole, and writes it in place. Attention over sliding windows, and
over block tables (the fast path of decode, flash attention only), stays as transformers has it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.generation.continuous_batching.cache import PagedAttentionCache
from transformers.generation.continuous_batching.cache_allocators import FULL_ATTENTION
from transformers.generation.continuous_batching.input_outputs import ContinuousBatchingIOs
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from dbo_compile.rules.requests import register_attention_op

TOKEN_DIMS = {"input_ids": 1, "position_ids": 1, "attention_mask": 2, "write_index": 0}
"""The `token_dims` of a step of continuous batching, whatever the model."""
CACHE = "dbo_paged_cache"
"""What attention is given a cache under that is not updated yet."""


@torch.library.custom_op("dbo_compile::paged_attention", mutates_args=("cache",))
def paged_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    cache: torch.Tensor,
    write_index: torch.Tensor,
    read_index: torch.Tensor,
    key_start: int,
    value_start: int,
    scale: float | None,
) -> torch.Tensor:
    """Write `key` and `value`, [1, heads, T, D], to the rows `write_index` of the cache, then attend to `read_index`.

    Rows of the cache are [heads, D]; keys begin at its row `key_start`, values at `value_start`. `mask` is
    [1, 1, T, keys] and added to the scores; `query` is [1, query heads, T, D]. Returns [1, T, query heads, D].
    """
    rows = cache.view(-1, key.shape[1], key.shape[3])
    keys, values = (
        _written(rows[start:], states, write_index).index_select(0, read_index).transpose(0, 1).unsqueeze(0)
        for states, start in ((key, key_start), (value, value_start))
    )
    is_grouped = query.shape[1] != key.shape[1]
    out = nn.functional.scaled_dot_product_attention(query, keys, values, mask, scale=scale, enable_gqa=is_grouped)
    return out.transpose(1, 2).contiguous()


def _written(rows: torch.Tensor, states: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    return rows.index_copy_(0, index, states.squeeze(0).transpose(0, 1))


@paged_attention.register_fake
def _(query: torch.Tensor, *_: Any) -> torch.Tensor:
    return query.new_empty(query.shape[0], query.shape[2], query.shape[1], query.shape[3])


register_attention_op(
    torch.ops.dbo_compile.paged_attention.default,
    tokens={"query": 2, "key": 2, "value": 2, "mask": 2, "write_index": 0},
    caches=["cache"],
    results=[1],
)


def continuous_batching() -> None:
    """Let models with `attn_implementation="sdpa"` do a step of continuous batching in one graph.

    To be called once, before `generate_batch`; what is no continuous batching is done as before. Then, in a
    `ContinuousBatchingConfig`:

        varlen_compile_config=CompileConfig(
            backend="dbo", mode=None, fullgraph=True, dynamic=None, options={"token_dims": TOKEN_DIMS}
        )
    """
    AttentionInterface.register("sdpa", attention)
    for owner, name, around in (
        (ContinuousBatchingIOs, "get_model_kwargs", _with_keys_in_the_cache),
        (PagedAttentionCache, "update", _left_to_the_op),
    ):
        if not getattr(getattr(owner, name), "is_ours", False):
            setattr(owner, name, around(getattr(owner, name)))
            getattr(owner, name).is_ours = True


def attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' "sdpa", with a paged cache as one op."""
    cache, layer = kwargs.pop(CACHE, None), module.layer_idx
    if cache is None:
        made: tuple[torch.Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
        return made
    allocator = cache.layer_to_allocator[layer]
    at = 2 * allocator.layer_indices.index(layer) * allocator.tokens_per_page
    out = torch.ops.dbo_compile.paged_attention(
        query, key, value, attention_mask, allocator.cache_tensor, kwargs["write_index"][allocator.index],
        kwargs["read_index"][allocator.index], at, at + allocator.tokens_per_page, kwargs.get("scaling"),
    )  # fmt: skip
    return out, None


def _left_to_the_op(update: Callable[..., Any]) -> Callable[..., Any]:
    """Where the op is what attends, it updates the cache as well: `kwargs`, which attention is given, take it there."""

    def wrapped(  # no `wraps`: it would copy the mark by which Dynamo leaves transformers' own alone
        self: PagedAttentionCache, key: torch.Tensor, value: torch.Tensor, layer_idx: int, kwargs: dict[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        is_whole = self.layer_to_allocator[layer_idx].layer_type == FULL_ATTENTION and kwargs.get("block_table") is None
        if self.config._attn_implementation == "sdpa" and is_whole:
            kwargs[CACHE] = self
            return key, value
        updated: tuple[torch.Tensor, torch.Tensor] = update(self, key, value, layer_idx, kwargs)
        return updated

    return wrapped


def _with_keys_in_the_cache(get_model_kwargs: Callable[..., Any]) -> Callable[..., Any]:
    """A step without cached tokens attends to its own keys, which transformers does not read back from the cache. A
    microbatch has its own rows of them alone, so here full attention does. (Sliding windows read before they write.)"""

    @wraps(get_model_kwargs)
    def wrapped(self: ContinuousBatchingIOs, *args: Any, **options: Any) -> Any:
        kwargs = get_model_kwargs(self, *args, **options)
        read, write = kwargs["read_index"], kwargs["write_index"]
        for allocator in self.cache.cache_allocators.values():
            if allocator.layer_type == FULL_ATTENTION and not read[allocator.index].numel():
                read[allocator.index] = write[allocator.index].clone()
        return kwargs

    return wrapped
