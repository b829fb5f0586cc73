"""Ops that multiply and add up along dims; strings as in `einsum` say along which.

Adding up rows of tokens, or a microbatch's own rows (`Local`), would need all tokens at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from string import ascii_lowercase
from typing import Any

import torch

from dbo_compile.errors import CannotSplit
from dbo_compile.ir.tokens import TOKENS, Local, Placement, Ruling, Shared, Split, Value
from dbo_compile.rules.pointwise import combined, renewed, tensors
from dbo_compile.rules.registry import rule

aten = torch.ops.aten

Terms = Sequence[tuple[str, Value]]


def contract(spec: str, *operands: Value) -> Value:
    """The result of an einsum, e.g. "mk,kn->mn". The letter of the token dim must stay, and be no other operand's."""
    *ins, out = spec.replace("->", ",").split(",")
    terms = list(zip(ins, operands, strict=True))
    sizes = {letter: size for term, v in terms for letter, size in zip(term, v.sizes, strict=True)}
    place: Split | Local | Shared = Shared()
    if any(v.is_local for v in operands):
        place = _contracted_local(terms, out)
    elif any(v.dim is not None for v in operands):
        place = _contracted_split(terms, out, spec)
    return Value(tuple(sizes[letter] for letter in out), place, operands[0].dtype)


def _contracted_split(terms: Terms, out: str, spec: str) -> Split:
    letters = {term[v.dim]: v.sizes[v.dim] for term, v in terms if v.dim is not None}
    if len(letters) != 1:
        raise CannotSplit(f"its operands carry tokens in different dims of {spec}")
    ((letter, size),) = letters.items()
    if letter not in out:
        raise CannotSplit(f"it sums over the tokens ({letter} of {spec})")
    for term, v in terms:
        if letter in term and (v.dim is None or v.sizes[v.dim] != size):
            raise CannotSplit(f"an operand has the token dim ({letter} of {spec}), but not the tokens")
    return Split(out.index(letter))


def _contracted_local(terms: Terms, out: str) -> Local:
    rows = {term[d] for term, v in terms if v.is_local for d in range(v.ndim) if v.is_rows(d)}
    if not rows <= set(out):
        raise CannotSplit("it sums over rows of a microbatch that are in an order of their own")
    for term, v in terms:
        if v.dim is not None:
            raise CannotSplit("it multiplies tokens by rows of a microbatch that are in an order of their own")
        if not v.is_local and (rows & set(term) or any(size.has(TOKENS) for size in v.sizes)):
            raise CannotSplit(f"it multiplies a value {list(v.sizes)} of all tokens by a microbatch's own rows")
    own = [(term, v.place) for term, v in terms if isinstance(v.place, Local)]
    holders = [term for term, _ in terms if out[:1] in term]
    kept = out and len(own) == 1 and holders == [own[0][0]] and holders[0].startswith(out[0])
    return Local(own[0][1].order if kept else "", position=any(place.position for _, place in own))


@rule(aten.mm.default, aten.mm.dtype, aten._int_mm.default)
def mm(a: Value, b: Value, *_: Any) -> Placement:
    return contract("mk,kn->mn", a, b).place


@rule(aten.bmm.default, aten.bmm.dtype)
def bmm(a: Value, b: Value, *_: Any) -> Placement:
    return contract("bmk,bkn->bmn", a, b).place


@rule(aten.mv.default)
def mv(a: Value, b: Value) -> Placement:
    return contract("mk,k->m", a, b).place


@rule(aten.dot.default, aten.vdot.default)
def dot(a: Value, b: Value) -> Placement:
    return contract("k,k->", a, b).place


@rule(aten.addmm.default, aten.addmm.dtype, aten._addmm_activation.default)
def addmm(bias: Value, a: Value, b: Value, *_: Any, **scales: Any) -> Ruling:
    return _plus(bias, contract("mk,kn->mn", a, b), scales)


@rule(aten.baddbmm.default, aten.baddbmm.dtype)
def baddbmm(bias: Value, a: Value, b: Value, *_: Any, **scales: Any) -> Ruling:
    return _plus(bias, contract("bmk,bkn->bmn", a, b), scales)


@rule(aten.addbmm.default)
def addbmm(bias: Value, a: Value, b: Value, **scales: Any) -> Ruling:
    return _plus(bias, contract("bmk,bkn->mn", a, b), scales)


@rule(aten.addmv.default)
def addmv(bias: Value, a: Value, b: Value, **scales: Any) -> Ruling:
    return _plus(bias, contract("mk,k->m", a, b), scales)


@rule(aten.addr.default)
def addr(bias: Value, a: Value, b: Value, **scales: Any) -> Ruling:
    return _plus(bias, contract("m,n->mn", a, b), scales)


def _plus(bias: Value | None, product: Value, scales: dict[str, Any]) -> Ruling:
    tensors([*scales.values()])
    return combined([product] if bias is None else [bias, product])


@rule(aten.linear.default)
def linear(x: Value, weight: Value, bias: Value | None = None) -> Ruling:
    batch, out = ascii_lowercase[: x.ndim - 1], "Y"[: weight.ndim - 1]
    return _plus(bias, contract(f"{batch}X,{out}X->{batch}{out}", x, weight), {})


@rule(aten.matmul.default)
def matmul(a: Value, b: Value) -> Placement:
    batch = ascii_lowercase[: max(a.ndim, b.ndim, 2) - 2]
    row, col = "M"[: a.ndim - 1], "N"[: b.ndim - 1]
    of_a, of_b = (batch[len(batch) - max(v.ndim - 2, 0) :] for v in (a, b))
    return contract(f"{of_a}{row}K,{of_b}K{col}->{batch}{row}{col}", a, b).place


@rule(aten._scaled_mm.default)
def scaled_mm(a: Value, b: Value, *scales: Any, **more_scales: Any) -> Ruling:
    """A scale is one number, or one for each row of `a` or column of `b`; a bias may follow them."""
    return combined([contract("mk,kn->mn", a, b), *tensors(scales, [*more_scales.values()])])


@rule(aten._weight_int8pack_mm.default, aten._weight_int4pack_mm.default, aten._weight_int4pack_mm_for_cpu.default)
def packed_mm(x: Value, weight: Value, *packing: Any) -> Placement:
    """Rows times a weight that is packed, with its scales."""
    refuse_tokens("weight", weight, *packing)
    if x.dim == 1:
        raise CannotSplit("it sums over the tokens (k of mk,kn->mn)")
    if x.is_local and x.is_rows(1):
        raise CannotSplit("it sums over rows of a microbatch that are in an order of their own")
    return renewed(x)


def refuse_tokens(name: str, *args: Any) -> None:
    """Weights, statistics and the like are the same for all microbatches."""
    if any(not isinstance(v.place, Shared) for v in tensors(args)):
        raise CannotSplit(f"its {name} carries tokens")


@rule(aten._grouped_mm.default, "transformers.grouped_mm_fallback.default")
def grouped_mm(
    x: Value, weight: Value, offs: Value | None = None, bias: Value | None = None, out_dtype: torch.dtype | None = None
) -> Placement:
    """Rows sorted by group times the weight of their group; `offs` says where groups end. Without it, a `bmm`."""
    refuse_tokens("bias", bias)
    if offs is None:
        return contract("bmk,bkn->bmn", x, weight).place
    refuse_tokens("weight", weight)
    if x.dim is not None:
        raise CannotSplit("its rows are grouped over all tokens")
    if not (x.is_local and offs.is_local):
        raise CannotSplit("either its rows or their groups are those of all tokens")
    if x.ndim != 2 or weight.ndim != 3 or x.is_rows(1):
        raise CannotSplit("it sums over rows of a microbatch that are in an order of their own")
    return Local(x.place.order if isinstance(x.place, Local) else "", position=x.is_position)


@rule(aten.linalg_solve_triangular.default)
def solve_triangular(a: Value, b: Value, **_: Any) -> Ruling:
    """A system of equations for each element of the batch dims."""
    for v in (a, b):
        if v.dim is not None and v.dim >= v.ndim - 2:
            raise CannotSplit(f"it solves equations along the token dim {v.dim}")
        if v.is_local and (v.is_rows(v.ndim - 2) or v.is_rows(v.ndim - 1)):
            raise CannotSplit("it solves equations along rows of a microbatch that are in an order of their own")
    return combined([replace(v, sizes=v.sizes[:-2]) for v in (a, b)])


@rule(aten.convolution.default)
def convolution(x: Value, weight: Value, bias: Value | None, *options: Any) -> Placement:
    """Each row of dim 0 for itself; channels are added up, and neighbours in the dims that follow."""
    refuse_tokens("weight", weight, bias)
    tensors(options)
    if x.ndim != weight.ndim or (x.dim or 0) > 0:
        raise CannotSplit(f"it adds up neighbours or channels along the token dim {x.dim}")
    if x.is_local and any(map(x.is_rows, range(1, x.ndim))):
        raise CannotSplit("it adds up rows of a microbatch that are in an order of their own")
    return renewed(x)
