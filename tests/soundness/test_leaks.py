"""What becomes of a token must not depend on where its row is among those of its microbatch, nor on how many there are.

Each way of using such a place or count says of every row, sorted by expert, whether it is kept: a capacity in one dress
or another. The first call has few tokens, evenly routed, so that it shows nothing; no gate looks at any call.
"""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from dbo_compile import reports

NUM_EXPERTS, WIDTH, CAPACITY = 4, 6, 9
SEED = torch.Generator().manual_seed(0)
ROUTER = torch.randn(WIDTH, NUM_EXPERTS, generator=SEED, dtype=torch.double)
FITS = (torch.arange(256) < CAPACITY).double()
"""Whether the row at a place within its expert is kept."""
TABLE = torch.randn(256, 2, generator=SEED, dtype=torch.double)

# p: the place of each row within its expert; c: how many rows each expert has; e: the expert of each row; o: the token.
LEAKS = {
    # a table of places or counts
    "table[p]": lambda p, c, e, o: FITS[p],
    "table.index_select(p)": lambda p, c, e, o: FITS.index_select(0, p),
    "table.gather(p)": lambda p, c, e, o: FITS.gather(0, p),
    "table.take(p)": lambda p, c, e, o: FITS.take(p),
    "embedding(p)": lambda p, c, e, o: F.embedding(p, TABLE)[:, 0],
    "embedding(c)": lambda p, c, e, o: F.embedding(c, TABLE)[e, 0],
    "table[c]": lambda p, c, e, o: FITS[c[e]],
    "table[o]": lambda p, c, e, o: FITS[o],
    "table[o // 2]": lambda p, c, e, o: FITS[o // 2],
    "table[bincount]": lambda p, c, e, o: FITS[torch.bincount(e, minlength=NUM_EXPERTS)][e],
    "table[offsets]": lambda p, c, e, o: FITS[c.cumsum(0) - c][e],
    "table[places among equals]": lambda p, c, e, o: FITS[e.argsort(stable=True).argsort()],
    "one_hot(p)": lambda p, c, e, o: F.one_hot(p, 256)[:, :CAPACITY].sum(-1),
    # comparing them with a number
    "p < 9": lambda p, c, e, o: p < CAPACITY,
    "p // 9": lambda p, c, e, o: 1.0 - (p // CAPACITY).clamp(max=1),
    "p // 9 == 0": lambda p, c, e, o: p // CAPACITY == 0,
    "p >> 3": lambda p, c, e, o: (p >> 3) == 0,
    "p & 16": lambda p, c, e, o: (p & 16) == 0,
    "relu": lambda p, c, e, o: F.relu(CAPACITY - p).sign(),
    "sigmoid": lambda p, c, e, o: torch.sigmoid(100 * (CAPACITY - 0.5 - p)),
    "bool": lambda p, c, e, o: torch.where((p // CAPACITY).bool(), 0.0, 1.0),
    "isin": lambda p, c, e, o: torch.isin(p, torch.arange(CAPACITY)),
    "bucketize": lambda p, c, e, o: torch.bucketize(p, torch.tensor([CAPACITY]), right=True) == 0,
    "c < 9": lambda p, c, e, o: (c < CAPACITY)[e],
    "max(c) < 9": lambda p, c, e, o: (c.max() < CAPACITY).expand(len(e)),
    "cos(p)": lambda p, c, e, o: torch.cos(p.float()),
    "mean load": lambda p, c, e, o: (c / c.sum())[e],
    # comparing them with each other
    "2 p < c": lambda p, c, e, o: 2 * p < c[e],
    "p % 16 == p": lambda p, c, e, o: p % 16 == p,
    "fmod(p, 16) == p": lambda p, c, e, o: torch.fmod(p, 16) == p,
    "max(p, 9) == 9": lambda p, c, e, o: torch.maximum(p, p * 0 + CAPACITY) == p * 0 + CAPACITY,
    "int8(p) == p": lambda p, c, e, o: (16 * p).to(torch.int8) == 16 * p,
    "the busiest": lambda p, c, e, o: (c == c.max())[e],
    "the busiest, sorted": lambda p, c, e, o: (c.sort()[0] == c)[e],
    "the busiest, by place": lambda p, c, e, o: c.argmax() == e,
    "the two busiest": lambda p, c, e, o: (e[:, None] == c.topk(2)[1]).any(-1),
    # rows by their place
    "e[0]": lambda p, c, e, o: e[0] == e,
    "e[3]": lambda p, c, e, o: e.take(torch.tensor([3])) == e,
    "e[:1]": lambda p, c, e, o: e[:1] == e,
    "rolled": lambda p, c, e, o: e != e.roll(1),
    "flipped": lambda p, c, e, o: e == e.flip(0),
    "shifted": lambda p, c, e, o: F.pad(e, (1, -1)) == e,
    "borders": lambda p, c, e, o: F.pad(e[1:] != e[:-1], (1, 0)),
    "differences": lambda p, c, e, o: F.pad(e.diff(), (1, 0)),
    "overwritten": lambda p, c, e, o: e.index_fill(0, torch.tensor([2]), 0),
    "the first five": lambda p, c, e, o: F.pad(torch.ones_like(e[:5]), (0, len(e) - 5)),
    "the largest": lambda p, c, e, o: e == e.max(),
    "any": lambda p, c, e, o: (e == 3).any().expand(len(e)),
    "seen before": lambda p, c, e, o: (e == 1).long().cumsum(0) > 0,
    "as many as it": lambda p, c, e, o: (e[:, None] == e[None]).sum(-1) > CAPACITY,
    "earlier than it": lambda p, c, e, o: (e[:, None] == e[None]).double().tril().sum(-1),
}  # fmt: skip


def routed(x):
    """`x`, for each way of keeping rows, with none of the others; each routes anew, or all would share one barrier."""
    return {name: kept(x, keep) for name, keep in LEAKS.items()}


def kept(x, keep):
    expert = (x @ ROUTER).argmax(-1)
    order = expert.argsort(stable=True)
    e, rows = expert[order], x[order]
    c = (expert[:, None] == torch.arange(NUM_EXPERTS)).sum(0)
    p = torch.arange(len(x)) - (c.cumsum(0) - c)[e]
    return x.index_copy(0, order, rows * keep(p, c, e, order)[:, None])


def tokens(num_tokens: int, *, even: bool) -> torch.Tensor:
    if not even:
        return torch.randn(num_tokens, WIDTH, dtype=torch.double)
    towards = torch.arange(num_tokens) * NUM_EXPERTS // num_tokens
    return ROUTER.T[towards] * 3


@pytest.mark.usefixtures("group")
def test_no_way_of_keeping_rows_by_their_place_is_split():
    torch.manual_seed(0)
    compiled = torch.compile(routed, backend="dbo", options={"split": "always", "inner": "eager", "gate": "never"})
    wrong = set()
    with torch.no_grad():
        for x in (tokens(8, even=True), tokens(60, even=False), tokens(61, even=False)):
            got, want = compiled(x), routed(x)
            wrong |= {name for name in LEAKS if not torch.allclose(got[name], want[name], rtol=0, atol=1e-12)}
    assert wrong == set()
    assert reports()[-1].calls_split == 3
