"""Where the tokens of a step are in a value: the one fact that splitting rests on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import sympy
import torch
from torch import fx

TOKENS = sympy.Symbol("T", integer=True, positive=True)
"""The number of tokens in every size that a rule sees, however many symbols the graph has for it."""


@dataclass(frozen=True, slots=True)
class Split:
    """A microbatch has its own rows of `dim`, in the order of the tokens.

    The size of `dim` is k * TOKENS: each token owns k neighbouring rows (k = top_k, or the sequence length of a batch
    folded into it). Splitting means: computing on a microbatch's rows gives that microbatch's rows of the result.
    With `position`, every element is the number of its own row, counted from the first row of the whole step, as
    `arange(T)` makes it.
    """

    dim: int
    position: bool = False

    def __str__(self) -> str:
        return f"Split({self.dim}{', position' if self.position else ''})"


@dataclass(frozen=True, slots=True)
class Local:
    """Made of a microbatch's own tokens, but arranged its own way: sorted by expert, received from peers, counted.

    There is no joining such values, and no relation between what a microbatch has and what the whole step would have,
    until rows return to their tokens. With `position`, the numbers count or number rows (a permutation, offsets,
    positions inside an expert): comparing them with a capacity would depend on the split. `order` names the value
    that arranged the rows, or the arrangement where several ops make the same one ("" if unknown); with `inverse`, the
    numbers lead from the tokens' own order into `order`, so that gathering rows of that order by them returns rows to
    tokens.
    """

    order: str = ""
    position: bool = False
    inverse: bool = False

    def __str__(self) -> str:
        facts = [*([f"order={self.order}"] if self.order else []), *(["position"] if self.position else [])]
        return f"Local({', '.join(facts + (['inverse'] if self.inverse else []))})"


@dataclass(frozen=True, slots=True)
class Count:
    """A number that counts tokens: each microbatch has its own."""

    def __str__(self) -> str:
        return "Count"


@dataclass(frozen=True, slots=True)
class Shared:
    """The same for every microbatch: a weight, a constant, a result over all tokens. Computed once."""

    def __str__(self) -> str:
        return "Shared"


@dataclass(frozen=True, slots=True)
class Given:
    """An argument of which every microbatch has a value of its own, made before the step; barriers read the whole one.

    `order` is what its rows are in the order of, as of `Local`: that is how rules see it.
    """

    order: str = ""

    def __str__(self) -> str:
        return f"Given({f'order={self.order}' if self.order else ''})"


Placement = Split | Local | Count | Shared | Given
Places = Mapping[fx.Node, Placement | tuple[Placement, ...]]
"""The placement of each value; a tuple for an op with several results."""

REQUESTS = "requests"
"""The order of the requests of a microbatch: what lengths, bounds and block tables are in."""
FRESH = "?"
"""A rule returns `Local(order=FRESH)` for rows that its op arranges anew; the analysis puts the op's name there."""


@dataclass(frozen=True, slots=True)
class Value:
    """What a rule may see of a tensor argument. Sizes are sympy expressions over `TOKENS` and other symbols.

    `is_causal`: as an attention mask [.., T, T] it is known to hide all later tokens from each token. `is_given`: it is
    an argument of which every microbatch has a value of its own, as it was made.
    """

    sizes: tuple[sympy.Expr, ...]
    place: Placement
    dtype: torch.dtype = torch.float32
    is_causal: bool = False
    is_given: bool = False

    @property
    def ndim(self) -> int:
        return len(self.sizes)

    @property
    def dim(self) -> int | None:
        """The token dim, or None if this value has no rows in the order of the tokens."""
        return self.place.dim if isinstance(self.place, Split) else None

    @property
    def is_local(self) -> bool:
        return isinstance(self.place, Local)

    @property
    def is_position(self) -> bool:
        return isinstance(self.place, Split | Local) and self.place.position

    @property
    def is_integer(self) -> bool:
        """Integers and booleans: adding them up over rows counts, and is exact in any order."""
        return not (self.dtype.is_floating_point or self.dtype.is_complex)

    def is_rows(self, dim: int) -> bool:
        """Whether `dim` counts rows that come of tokens: its size is not a plain number."""
        return bool(self.sizes[dim].free_symbols)


@dataclass(frozen=True, slots=True)
class Number:
    """What a rule may see of a symbolic integer argument (plain integers arrive as `int`)."""

    expr: sympy.Expr
    place: Placement


@dataclass(frozen=True, slots=True)
class Function:
    """What a rule may see of a function that a higher-order op calls: the positions of the arguments that it reads."""

    reads: frozenset[int]


@dataclass(frozen=True, slots=True)
class Ruling:
    """A rule's answer where a placement alone does not say enough.

    `assumes`: what splitting takes on trust, a clause that completes "splitting it assumes that ...".
    `local_positions`: the op reads its `Split(position)` arguments as row numbers inside the microbatch.
    `paged`: what the op writes into state that all tokens share belongs to its own requests, so that microbatches that
    have none in common may do so in any order. `whole_requests`: it is right only if they have none in common.
    `prefix`: the positions of arguments of which it needs the rows of earlier microbatches, too; `whole`: of which it
    needs the rows of all.
    """

    place: Placement | tuple[Placement, ...]
    assumes: str = ""
    local_positions: bool = False
    paged: bool = False
    whole_requests: bool = False
    prefix: tuple[int, ...] = ()
    whole: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class TokenMap:
    """The result of the analysis: a table beside the graph.

    `places` has a placement for each value (a tuple for an op with several results), `barriers` the reason for each
    op that is played once on all tokens, `obligations` what is taken on trust and by which op, `localised` the ops
    that read positions as row numbers inside the microbatch, `paged` those that write to places of their own requests
    only, `whole_requests` those for whose sake no request may have tokens in two microbatches. `prefixes` has for an op
    the values of which it reads the rows of its own and of all earlier microbatches, `wholes` those of which it reads
    the rows of all.
    """

    places: Places
    barriers: Mapping[fx.Node, str]
    obligations: Mapping[fx.Node, str]
    localised: Mapping[fx.Node, None]
    paged: Mapping[fx.Node, None] = field(default_factory=dict)
    whole_requests: Mapping[fx.Node, None] = field(default_factory=dict)
    prefixes: Mapping[fx.Node, tuple[fx.Node, ...]] = field(default_factory=dict)
    wholes: Mapping[fx.Node, tuple[fx.Node, ...]] = field(default_factory=dict)

    def reads_others(self, node: fx.Node) -> bool:
        """Whether an op reads rows of other microbatches, too."""
        return node in self.prefixes or node in self.wholes
