"""What the engine knows of the arguments and results of a graph: where tokens are, what is written in place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch

from dbo_compile.runtime.given import RequestInputs
from dbo_compile.runtime.padding import check_value, pad, unpad_outputs


@dataclass(frozen=True, slots=True)
class TokenInput:
    """An argument of the graph that carries tokens: its position, its token dim, its name for people.

    `pad_value` is what rows of padding hold.
    """

    index: int
    dim: int
    name: str
    pad_value: float = 0


@dataclass(frozen=True, slots=True)
class Signature:
    """Positions among the arguments: of token inputs, of numbers of tokens, of the other symbols, and of what is
    written in place. `output_dims` has the token dim of each result, None for one that has none.

    `unpaddable` says why rows of padding could change the other rows ("": they cannot). `same_size` says that ranks
    must all have as many rows, because what they exchange is as long. `requests` are the arguments that tell of
    requests, None if there are none; with `whole_requests` none of these may have tokens in two microbatches.
    """

    token_inputs: tuple[TokenInput, ...]
    token_numbers: tuple[int, ...] = ()
    symbol_inputs: Mapping[sympy.Symbol, int] | None = None
    written: tuple[int, ...] = ()
    output_dims: tuple[int | None, ...] = ()
    unpaddable: str = ""
    same_size: bool = False
    draws_random_numbers: bool = False
    requests: RequestInputs | None = None
    whole_requests: bool = False

    def sizes(self, args: Sequence[Any]) -> list[int]:
        """The number of tokens, as each token input has it, and then each number that counts them."""
        return [*(args[t.index].shape[t.dim] for t in self.token_inputs), *(args[i] for i in self.token_numbers)]

    def listed(self, sizes: Sequence[int]) -> str:
        """What `sizes` found, for people: each token input, and the numbers that are not those of one of these."""
        own = [f"{t.name}: {size}" for t, size in zip(self.token_inputs, sizes, strict=False)]
        others = dict.fromkeys(size for size in sizes[len(own) :] if size not in sizes[: len(own)])
        return ", ".join([*own, *(f"a size of another input: {size}" for size in others)])

    def others(self, args: Sequence[Any]) -> tuple[int, ...]:
        """The values of the symbols that do not count tokens."""
        return tuple(args[i] for i in (self.symbol_inputs or {}).values())

    @property
    def kind(self) -> str:
        """What tells graphs of one model apart that Dynamo traced for other sizes."""
        traits = self.same_size, not self.unpaddable, self.requests is None, self.whole_requests
        return f"{len(self.symbol_inputs or {})} {self.output_dims} {traits}"

    def may_differ(self, *, pads: bool) -> str:
        """Why ranks may play a step in other sizes than each other ("": they do not), where steps are padded to
        buckets or not."""
        if self.requests is not None:
            return "ranks may have other requests in a step"
        if self.symbol_inputs:
            return f"{', '.join(map(str, self.symbol_inputs))} may be another size on each rank"
        if not self.same_size and (self.unpaddable or not pads):
            return "ranks may have other numbers of tokens in a step, and are not padded to the same one"
        return ""

    def check(self, args: Sequence[Any]) -> None:
        """Raise `ValueError` for a pad value that the dtype of its input cannot hold."""
        for t in self.token_inputs:
            check_value(t.name, args[t.index].dtype, t.pad_value)

    def padded(self, args: Sequence[Any], num_rows: int) -> list[Any]:
        """The arguments with `num_rows` rows of tokens."""
        if all(args[t.index].shape[t.dim] == num_rows for t in self.token_inputs):
            return list(args)
        args = list(args)
        for t in self.token_inputs:
            args[t.index] = pad(args[t.index], t.dim, num_rows, t.pad_value)
        for i in self.token_numbers:
            args[i] = num_rows
        return args

    def write_back(self, args: Sequence[Any], padded: Sequence[Any]) -> None:
        """Bring what was written into padded arguments, which are copies, back to the caller's."""
        for t in self.token_inputs:
            if t.index in self.written and (mine := args[t.index]) is not padded[t.index]:
                mine.copy_(padded[t.index].narrow(t.dim, 0, mine.shape[t.dim]))

    def unpadded(self, results: Sequence[Any], num_rows: int, num_tokens: int) -> Sequence[Any]:
        if num_rows == num_tokens:
            return results
        return unpad_outputs(results, self.output_dims, num_rows, num_tokens)


class State:
    """A copy of all that a play changes besides its results: what it writes in place, and random numbers it draws."""

    def __init__(self, signature: Signature, args: Sequence[Any]) -> None:
        self.written = [args[i] for i in signature.written]
        self.values = [x.clone() for x in self.written]
        draws = signature.draws_random_numbers
        self.cpu_rng = torch.get_rng_state() if draws else None
        self.device_rng = torch.cuda.get_rng_state_all() if draws and torch.cuda.is_initialized() else []

    def apart(self, results: Sequence[Any]) -> list[Any]:
        """The results, copied where they share memory with what is written in place."""
        kept = {x.untyped_storage().data_ptr() for x in self.written}
        tensors = (x for x in results if isinstance(x, torch.Tensor))
        shared = {id(x) for x in tensors if x.untyped_storage().data_ptr() in kept}
        return [x.clone() if id(x) in shared else x for x in results]

    def restore(self) -> None:
        for x, value in zip(self.written, self.values, strict=True):
            x.copy_(value)
        if self.cpu_rng is not None:
            torch.set_rng_state(self.cpu_rng)
        if self.device_rng:
            torch.cuda.set_rng_state_all(self.device_rng)
