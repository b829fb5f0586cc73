"""Sizes that steps are padded to, rows of padding for inputs, and their way out of the results."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch

from dbo_compile import compat
from dbo_compile.axes import checked_dim

Number = int | float


class Buckets:
    """The sizes that steps are padded to: those given, ones that grow with the size (`auto`), or every size (None).

    A bucket never shrinks as the number of tokens grows, and is the same on every rank.
    """

    def __init__(self, pad_to: Sequence[int] | Literal["auto"] | None) -> None:
        self.pad_to = pad_to if pad_to is None or isinstance(pad_to, str) else tuple(sorted(set(pad_to)))
        self.uses: Counter[int] = Counter()
        """How many steps came to each bucket so far: what a warm-up or a capture learns of the sizes in use."""

    def bucket(self, num_tokens: int) -> int:
        """The size that a step is padded to. Raises `ValueError` if it is over the largest of the sizes given."""
        size = self._find(num_tokens)
        self.uses[size] += 1
        return size

    @property
    def sizes(self) -> tuple[int, ...]:
        """All sizes given, or those learnt so far; ascending."""
        return self.pad_to if isinstance(self.pad_to, tuple) else tuple(sorted(self.uses))

    def __str__(self) -> str:
        return ", ".join(f"{size} ({self.uses[size]} steps)" for size in self.sizes)

    def _find(self, num_tokens: int) -> int:
        if self.pad_to is None or num_tokens == 0:
            return num_tokens
        if isinstance(self.pad_to, str):
            return coarse(num_tokens)
        for size in self.pad_to:
            if size >= num_tokens:
                return size
        raise ValueError(
            f"{num_tokens} tokens are more than the largest size in pad_to, {self.pad_to[-1]}: give pad_to a larger "
            "size, or fewer tokens to a step"
        )


def coarse(num_tokens: int) -> int:
    """Rounded up to four significant bits: less than 12.5 % of padding, eight sizes in each doubling.

    From 64 on these are multiples of 8, on which matrix multiplications are fast.
    """
    step = 1 << max(0, num_tokens.bit_length() - 4)
    return -(-num_tokens // step) * step


class Padding:
    """Pads the token inputs of a step, by name, with the value of each (0 where none is given).

    `token_dims` has the token dim of each input; negative ones count from the end. An input that is written in place
    must be read back from what `pad` returned: padding copies.
    """

    def __init__(self, token_dims: Mapping[str, int], values: Mapping[str, Number]) -> None:
        self.token_dims = dict(token_dims)
        self.values = {name: values.get(name, 0) for name in token_dims}

    def check(self, inputs: Mapping[str, Any]) -> None:
        """Raise `ValueError` for a value that the dtype of its input cannot hold.

        To be called before ranks agree: one that fails after that leaves the others waiting.
        """
        for name, x in self._tensors(inputs).items():
            check_value(name, x.dtype, self.values[name])

    def num_tokens(self, inputs: Mapping[str, Any]) -> int:
        """The size of the token dims. Raises `ValueError` if inputs differ in it, or have none."""
        sizes = {n: x.shape[checked_dim(n, self.token_dims[n], x.shape)] for n, x in self._tensors(inputs).items()}
        if len(set(sizes.values())) != 1:
            others = {name: _no_tensor(inputs, name) for name in self.token_dims if name not in sizes}
            listed = ", ".join([f"{name}: {size}" for name, size in sizes.items()] + [*others.values()])
            raise ValueError(f"token inputs must have one number of tokens ({listed}); see token_dims")
        return next(iter(sizes.values()))

    def pad(self, inputs: Mapping[str, Any], num_rows: int) -> dict[str, Any]:
        """All inputs, the token inputs padded to `num_rows`; those of that size, and all others, as they are."""
        padded = {
            name: pad(x, self.token_dims[name], num_rows, self.values[name])
            for name, x in self._tensors(inputs).items()
        }
        return {**inputs, **padded}

    def empty(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """The same inputs without tokens."""
        none = {name: x.narrow(self.token_dims[name], 0, 0) for name, x in self._tensors(inputs).items()}
        return {**inputs, **{name: x.new_empty(x.shape) for name, x in none.items()}}

    def _tensors(self, inputs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """The token inputs; an optional one may be missing, or None."""
        return {name: x for name in self.token_dims if isinstance(x := inputs.get(name), torch.Tensor)}


def _no_tensor(inputs: Mapping[str, Any], name: str) -> str:
    if name not in inputs:
        return f"{name} is missing"
    x = inputs[name]
    return f"{name} is None" if x is None else f"{name} is a {type(x).__name__}, not a tensor"


def pad(x: torch.Tensor, dim: int, num_rows: int, value: Number = 0) -> torch.Tensor:
    """`x` with rows of `value` behind its own, `num_rows` in all; `x` itself if it has that many."""
    return x if x.shape[dim] == num_rows else fill(_room(x, dim % x.ndim, num_rows), x, dim, value)


def fill(out: torch.Tensor, x: torch.Tensor, dim: int, value: Number = 0) -> torch.Tensor:
    """Write the rows of `x` into the first ones of `out`, a static buffer perhaps, and `value` into the others."""
    num_rows = x.shape[dim]
    to = out
    for d, stride in enumerate(out.stride()):
        if stride == 0 and out.shape[d] > 1:  # an expanded dim: one row is all there is in memory
            to, x = to.narrow(d, 0, 1), x.narrow(d, 0, 1)
    to.narrow(dim, 0, num_rows).copy_(x)
    to.narrow(dim, num_rows, out.shape[dim] - num_rows).fill_(value)
    return out


def _room(x: torch.Tensor, dim: int, num_rows: int) -> torch.Tensor:
    """Memory for `num_rows`, laid out like `x`: compiled code has strides in it, and those over rows grow with them."""
    size, step = x.shape[dim], x.stride(dim)
    sizes = [*x.shape[:dim], num_rows, *x.shape[dim + 1 :]]
    if not size or not step:
        return x.new_empty(sizes)
    strides = [s * num_rows // size if d != dim and s >= size * step else s for d, s in enumerate(x.stride())]
    return torch.empty_strided(sizes, strides, dtype=x.dtype, device=x.device)


def unpad(x: torch.Tensor, dim: int, num_rows: int, num_tokens: int) -> torch.Tensor:
    """The rows of the `num_tokens` first of `num_rows` tokens, as a view; each may own several rows of `dim`."""
    if num_tokens == num_rows:
        return x
    return x.narrow(dim, 0, x.shape[dim] // num_rows * num_tokens)


def view_dim(x: torch.Tensor, of: Any, dim: int) -> int | None:
    """The dim of `x` that walks through memory as `dim` of the tensor `of` does; None if `x` is no view of it."""
    if not isinstance(of, torch.Tensor) or x.untyped_storage().data_ptr() != of.untyped_storage().data_ptr():
        return None
    wanted = of.shape[dim], of.stride(dim)
    return next((d for d, at in enumerate(zip(x.shape, x.stride(), strict=True)) if at == wanted), None)


def unpad_outputs(
    outputs: Sequence[Any], dims: Iterable[int | None], num_rows: int, num_tokens: int
) -> tuple[Any, ...]:
    """A flat list of results without padding; `dims` has the token dim of each, None for one that has none."""
    return tuple(
        x if dim is None else unpad(x, dim, num_rows, num_tokens) for x, dim in zip(outputs, dims, strict=True)
    )


def unpad_tree(outputs: Any, dim: int, num_rows: int, num_tokens: int) -> Any:
    """Results of any structure without padding, where nobody knows more than that `dim` is their token dim.

    Only tensors with exactly `num_rows` rows there are cut. One that has as many for another reason is cut as well:
    where the token dims of results are known, `unpad_outputs` is right.
    """

    def cut(x: Any) -> Any:
        has_dim = isinstance(x, torch.Tensor) and -x.ndim <= dim < x.ndim
        return unpad(x, dim, num_rows, num_tokens) if has_dim and x.shape[dim] == num_rows else x

    return compat.tree_map(cut, outputs)


def check_value(name: str, dtype: torch.dtype, value: Number) -> None:
    """Raise `ValueError` if the input of this name cannot be padded with `value`."""
    if not can_hold(dtype, value):
        raise ValueError(f"pad_values[{name!r}]={value!r} is no value of {dtype}, its dtype")


def can_hold(dtype: torch.dtype, value: Number) -> bool:
    """Whether `value` is one of `dtype`, rounded if it is a fraction: a large one must not become infinite."""
    if dtype is torch.bool:
        return value in {0, 1}
    if not (dtype.is_floating_point or dtype.is_complex):
        return value == value // 1 and torch.iinfo(dtype).min <= value <= torch.iinfo(dtype).max
    if abs(value) == math.inf:
        return bool(torch.tensor(value).to(dtype).to(torch.complex128).isinf())  # some types of 8 bits have none
    return value != value or abs(value) <= torch.finfo(dtype).max


def is_decode(token_inputs: Iterable[tuple[torch.Tensor, int]]) -> bool:
    """Whether a step brings one token a sequence: `[batch, 1]` ids or positions. Flat tokens do not tell."""
    ids = [(x, dim) for x, dim in token_inputs if x.ndim == 2 and not x.is_floating_point()]
    return bool(ids) and all(x.shape[1 - dim % 2] == 1 for x, dim in ids)
