"""Attention over a flat row of tokens from many requests: which request a token belongs to is said by metadata.

The metadata must be that of the microbatch itself (`token_dims` says what it is: `CuSeqlens()` and its like). Keys lie
in caches that the op may write in place, or are rows of the same tokens: then no request may straddle two microbatches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dbo_compile.errors import CannotSplit
from dbo_compile.ir.tokens import REQUESTS, Local, Placement, Ruling, Shared, Split, Value
from dbo_compile.rules.pointwise import tensors
from dbo_compile.rules.registry import rule


def register_attention_op(
    op: Any,
    *,
    tokens: Mapping[str, int] | Sequence[str],
    requests: Sequence[str] = (),
    caches: Sequence[str] = (),
    results: Sequence[int | None] | None = None,
) -> None:
    """Say what an attention op, or one that writes a cache, does with its arguments, each named as in its schema.

    `tokens` have a row for each token, in dim 0 or in the dim given; queries, keys and slot mappings do. `requests` are
    metadata of the requests: bounds, lengths, block tables. `caches` hold keys and values of all requests, each request
    in places of its own, and may be written in place; a token must attend to its request up to itself then, since a
    request may be cut in two. `results` has the token dim of each tensor that the op returns, None for one that has
    none; without it, each has tokens in dim 0. All other arguments are the same for every microbatch. Raises
    `ValueError` for a name that the schema of `op` does not have, and for an op with a rule.

        register_attention_op(
            torch.ops.vllm.paged_attention.default, tokens=["query", "key", "value", "slots"],
            requests=["cu_seqlens", "seq_lens", "block_table"], caches=["key_cache", "value_cache"],
        )
    """
    names = [arg.name for arg in op._schema.arguments]
    dims = dict(tokens) if isinstance(tokens, Mapping) else dict.fromkeys(tokens, 0)
    if unknown := [name for name in (*dims, *requests, *caches) if name not in names]:
        raise ValueError(f"{op} has no argument {unknown[0]!r}; its arguments are {', '.join(names)}")
    places = [Split(0)] * len(op._schema.returns) if results is None else [_place(dim) for dim in results]

    def attention(*args: Any, **kwargs: Any) -> Ruling:
        given = dict(zip(names, args, strict=False)) | kwargs
        for name, arg in given.items():
            if name in dims:
                _check_rows(name, arg, dims[name])
            elif name in requests:
                _check_metadata(name, arg)
            else:
                _check_shared(name, arg)
        place = places[0] if len(places) == 1 else tuple(places) or Shared()
        return Ruling(place, paged=bool(caches), whole_requests=not caches)

    rule(op)(attention)


def _place(dim: int | None) -> Placement:
    return Shared() if dim is None else Split(dim)


def _check_rows(name: str, arg: Value | None, dim: int) -> None:
    if arg is not None and arg.dim != dim % arg.ndim:
        raise CannotSplit(f"its {name} has no rows of tokens in dim {dim}")


def _check_metadata(name: str, arg: Any) -> None:
    if not isinstance(arg, Value):  # a number, the longest length say, holds for every microbatch
        _check_shared(name, arg)
        return
    if arg.is_given or (isinstance(arg.place, Local) and arg.place.order == REQUESTS):
        return
    raise CannotSplit(
        f"its {name} is not known to be of the requests of the microbatch: name the input that it is made of in "
        "token_dims, as CuSeqlens(), SeqLens(), Requests(dim), or a function"
    )


def _check_shared(name: str, arg: Any) -> None:
    if any(not isinstance(v.place, Shared) for v in tensors(arg)):
        raise CannotSplit(f"its {name} is not the same for all microbatches")


@rule("torch_attn._varlen_attn.default")
def varlen_attention(*args: Any, **options: Any) -> Ruling:
    """Gives the output, the log of the sums of (heads, tokens), and the state of a generator."""
    return Ruling((Split(0), Split(1), Shared()), whole_requests=_needs_whole_requests(*args, **options))


@rule("torch_attn._varlen_attn_out.default")
def varlen_attention_out(out: Value, *args: Any, **options: Any) -> Ruling:
    """Writes the output, and gives the log of the sums."""
    _check_rows("out", out, 0)
    return Ruling(Split(1), whole_requests=_needs_whole_requests(*args, **options))


def _needs_whole_requests(
    query: Value, key: Value, value: Value, cu_seq_q: Value, cu_seq_k: Value | None, max_q: Any, max_k: Any,
    is_causal: bool = False, scale: float | None = None, window_size: Any = None, enable_gqa: bool = False,
    seqused_k: Value | None = None, block_table: Value | None = None, *more: Any, **options: Any,
) -> bool:  # fmt: skip
    """A request may be cut in two if keys of its earlier tokens lie in pages, and no token attends to later ones."""
    _check_rows("query", query, 0)
    for name, arg in (("key", key), ("value", value)):
        if block_table is None:
            _check_rows(name, arg, 0)
        else:
            _check_shared(name, arg)
    metadata = {"cu_seq_q": cu_seq_q, "cu_seq_k": cu_seq_k, "seqused_k": seqused_k, "block_table": block_table}
    for name, of_requests in metadata.items():
        _check_metadata(name, of_requests)
    _check_shared("options", [window_size, scale, more, *options.values()])
    hides_later = is_causal or (window_size is not None and window_size[1] == 0)
    return block_table is None or not hides_later
