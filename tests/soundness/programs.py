"""Random functions, as text: straight lines of ops on rows of tokens, experts, permutations and buffers.

A line is drawn from those whose operands are there. It is tried at once, with two numbers of tokens: if it raises, it
is left out; else its results say what they are, and so which lines may read them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed._functional_collectives as funcol
from hypothesis import strategies as st

SIZES = (7, 11)
"""Two numbers of tokens that no other size of a program is a multiple of."""
RECENT = 5
"""An operand is one of so many made last."""

# Operands and text; {0} is the first operand. A pattern matches dtype and sizes: "float(T,6)", with two rows for each
# token "float(T*2,6)". Integers are one of `expert` (0 to 4), `perm` (a permutation of the rows), `row` (their numbers,
# any of them any number of times) and `count` (others).
X, XY, ANY = r"float\((T|T\*2),6\)", r"float\((T|T\*2),\d\)", r"float\(.*T.*\)"
E, PERM, ROW, VEC = r"expert\((T|T\*2)\)", r"perm\((T|T\*2)\)", r"(row|perm)\((T|T\*2)\)", r"float\((T|T\*2)\)"
INT, NUM, COUNT = r"(row|perm|expert|count)\((T|T\*2)\)", r"(row|perm|expert|count)\(.*\)", r"count\(5\)"

OPS: list[tuple[tuple[str, ...], str]] = [
    # every element alone
    ((ANY,), "{0}.sin()"), ((ANY,), "{0}.tanh() * 2"), ((ANY,), "torch.relu({0} - 0.1)"),
    ((ANY,), "{0}.clone().add_(1)"), ((ANY,), "torch.where({0} > 0, {0}, {0} * 0.5)"), ((ANY,), "{0} * {0}.shape[0]"),
    ((ANY,), "{0} / {0}.numel()"), ((ANY,), "{0} + torch.ones_like({0})"), ((X, X,), "{0} + {1} * 0.5"),
    ((X, X,), "torch.maximum({0}, {1})"), ((X, VEC,), "{0} * {1}[:, None]"), ((X, INT,), "{0} * {1}[:, None].tanh()"),
    ((X,), "{0} + torch.arange({0}.shape[0])[:, None] * 0.1"), ((X,), "{0} + torch.arange(6) * 0.1"),
    ((X,), "{0} * (torch.arange({0}.shape[0]) % 3 == 1)[:, None]"), ((X, PERM,), "{0} * ({1} > 1)[:, None]"),
    ((X, NUM,), "{0} + {1}.sum() * 0.01"),
    # products
    ((X,), "{0} @ W"), ((X,), "torch.nn.functional.linear({0}, W, b)"), ((X,), "{0} @ V"),
    ((X, X,), "({0} @ {1}.T) @ {1} * 0.01"), ((X,), "torch.softmax({0} @ {0}.T, -1) @ {0}"),
    ((X,), "({0} @ {0}.T).tril() @ {0} * 0.01"), ((X,), "torch.einsum('td,de->te', {0}, W)"),
    ((X,), "({0}.T @ {0}) * 0.01 + {0}.sum(0)"), ((X, r"float\(6,6\)",), "{0} @ {1} * 0.01"),
    ((X, E,), "torch.bmm({0}[:, None], We[{1}])[:, 0]"),
    # subgraphs that are there several times
    ((X,), "block({0})"), ((X,), "block(block({0}))"), ((X, E,), "experts({0}, {1})"),
    # along dims
    ((X,), "torch.softmax({0}, {d})"), ((X,), "{0}.cumsum({d})"), ((X,), "{0} - {0}.mean({d}, keepdim=True)"),
    ((X,), "torch.nn.functional.layer_norm({0}, (6,), b, b)"),
    ((X,), "{0} / (1 + {0}.amax({d}, keepdim=True).abs())"), ((X,), "{0}.sum(1)"),
    ((X,), "{0}.std(1, correction={0}.shape[0] - 9)"), ((X,), "{0}.sort({d})[0]"),
    ((X,), "{0} * {0}.norm(dim={d}, keepdim=True)"), ((X,), "{0}.flip({d})"), ((X,), "{0}.roll(1, {d})"),
    ((X,), "torch.var_mean({0}, {d}, keepdim=True)[1] + {0}"), ((X,), "{0}.cummax({d})[0]"),
    ((X,), "{0}.argmax(1) % 5"),
    ((X,), "{0}.topk(2, 1)[1].flatten() % 5"), ((X,), "{0}[:, :5].argmax(1)"), ((X,), "{0} * {0}.argmax(0)"),
    ((X,), "{0} + {0}.median(0)[0]"),
    # dims
    ((X,), "{0}.T.contiguous().T"), ((X,), "{0}.T.reshape(-1).view(6, -1).T"), ((X,), "{0}.T.reshape(-1, 6)"),
    ((X,), "{0}.view(-1, 2, 3).transpose(1, 2).reshape(-1, 6)"),
    ((X,), "{0}.view(-1, 3, 2).permute(2, 0, 1).sum(0).repeat(1, 2)"),
    ((X,), "{0}.view(-1, 2, 3).transpose(0, 1).reshape(-1, 6)"), ((X,), "{0}.flatten().unflatten(0, (-1, 6))"),
    ((X,), "{0}.view(2, -1, 6).transpose(0, 1).reshape(-1, 6)"), ((X,), "{0}[None].squeeze()"),
    ((X,), "{0}[:, None].expand(-1, 2, -1).sum(1)"), ((X,), "{0}.unsqueeze(0).expand(3, -1, -1)[1]"),
    ((X,), "({0}[:, None] - {0}[None]).sum({d})"), ((X,), "{0}.reshape(-1)[:, None].squeeze(1).view(-1, 6)"),
    ((r"float\(T,6\)",), "{0}.repeat_interleave(2, 0)"), ((r"float\(T,6\)",), "{0}.repeat(2, 1)"),
    ((r"float\(T,6\)",), "{0}[:, None].expand(-1, 2, -1).reshape(-1, 6)"),
    ((r"float\(T,6\)",), "{0}.expand(2, -1, -1).reshape(-1, 6)"),
    ((r"float\(T\*2,6\)",), "{0}.view(-1, 2, 6).sum(1)"), ((r"float\(T\*2,6\)",), "{0}.view(2, -1, 6).sum(0)"),
    ((r"float\(T\*2,6\)",), "{0}[::2]"), ((r"float\(T\*2,6\)",), "{0}.chunk(2)[1]"), ((X,), "torch.triu({0})"),
    ((X,), "torch.diagonal({0} @ {0}.T)"),
    # pieces
    ((X,), "torch.cat([{0}[1:], {0}[:1]])"), ((X,), "torch.cat([{0}[:, 2:], {0}[:, :2]], 1)"),
    ((X, r"float\((T|T\*2),4\)",), "torch.cat([{0}[:, :2], {1}], 1)"), ((X,), "{0} + {0}[0]"),
    ((X,), "{0} + {0}[-1:]"), ((X,), "torch.stack(list({0}.unbind(1)), 1)"),
    ((X,), "torch.cat({0}.split([1, 2, 3], 1)[::-1], 1)"),
    ((r"float\(T,6\)", r"float\(T,6\)",), "torch.cat([{0}, {1}])"),
    ((X,), "torch.nn.functional.pad({0}, (0, 0, 1, 0))[:-1]"), ((X,), "{0}[:{0}.shape[0] - 1].sum(0) + {0}"),
    ((r"float\(T,6\)", r"float\(T,6\)",), "torch.stack([{0}, {1}], 1).view(-1, 6)"),
    # numbers of rows
    ((INT,), "{0} + 1"), ((INT,), "({0} * 2 + 1) % 5"), ((E,), "{0}.flip(0)"), ((E,), "{0}.argsort(stable=True)"),
    ((E,), "{0}.sort(stable=True, descending=True)[1]"), ((E,), "{0}.sort(stable=True)[0]"),
    ((PERM,), "{0}.argsort()"), ((PERM,), "{0}.sort()[1]"), ((PERM,), "({0} // 2).argsort(stable=True)"),
    ((PERM,), "({0} * 2).argsort(stable=True)"), ((PERM,), "(-{0}).argsort(stable=True)"), ((PERM,), "{0}.flip(0)"),
    ((PERM,), "{0}.sort(descending=True)[1]"),
    ((PERM,), "torch.empty_like({0}).index_put(({0},), torch.arange({0}.shape[0]))"),
    ((PERM,), "torch.zeros_like({0}).scatter(0, {0}, torch.arange({0}.shape[0]))"),
    ((PERM, PERM,), "{0}[{1} % {0}.shape[0]]"), ((PERM,), "torch.arange({0}.shape[0])"),
    ((X,), "torch.arange({0}.shape[0])"), ((X,), "torch.arange({0}.shape[0]).flip(0)"),
    ((X,), "torch.arange({0}.shape[0]) // 2"), ((X,), "(torch.arange({0}.shape[0]) + 1) % {0}.shape[0]"),
    ((r"float\(T,6\)",), "torch.arange({0}.shape[0]).repeat_interleave(2)"),
    ((r"float\(T,6\)",), "torch.arange({0}.shape[0]).repeat(2)"),
    ((r"float\(T,6\)",), "torch.arange({0}.shape[0])[:, None].expand(-1, 2).reshape(-1)"),
    ((r"perm\(T\*2\)",), "{0} // 2"), ((r"perm\(T\*2\)",), "torch.div({0}, 2, rounding_mode='floor')"),
    ((r"perm\(T\*2\)",), "{0} % ({0}.shape[0] // 2)"), ((r"perm\(T\*2\)",), "{0} >> 1"),
    ((E,), "torch.bincount({0}, minlength=5)"), ((E,), "torch.nn.functional.one_hot({0}, 5).sum(0)"),
    ((E,), "torch.histc({0}.double(), 5, 0, 4).long()"),
    ((E,), "torch.nn.functional.one_hot({0}, 5).cumsum(0).sum(1)"),
    ((E,), "(torch.nn.functional.one_hot({0}, 5).cumsum(0) - 1).gather(1, {0}[:, None]).squeeze(1)"),
    ((COUNT,), "{0}.cumsum(0)"), ((COUNT, X,), "{1} * ({0} > 1).any()"), ((COUNT, E,), "{0}[{1}]"),
    ((COUNT, X,), "{1} + {0}.max()"), ((INT, E,), "{0} * 0 + {1}.sum()"), ((E, ROW,), "{0}[{1} % {0}.shape[0]]"),
    ((r"count\((T|T\*2)\)", X,), "{1} * ({0} < 2)[:, None]"), ((r"count\((T|T\*2)\)",), "{0}.clamp(max=2)"),
    # reading rows
    ((E,), "We[{0}].sum(1)"), ((E,), "b[{0}]"), ((E,), "torch.nn.functional.embedding({0}, W)"),
    ((X, ROW,), "{0}[{1} % {0}.shape[0]]"), ((X, ROW,), "{0}.index_select(0, {1} % {0}.shape[0])"),
    ((X, PERM,), "{0}[{1}]"), ((X, PERM,), "{0}[{1}]"), ((X, ROW,), "{0}[{1}]"), ((X, ROW,), "{0}[{1}]"),
    ((X, ROW,), "{0}.gather(0, {1}[:, None].expand(-1, 6))"), ((X, E,), "{0}.gather(1, {1}[:, None]).squeeze(1)"),
    ((X, ROW,), "{0}.take_along_dim({1}[:, None], 0)"), ((X, E,), "{0}[torch.arange({0}.shape[0]), {1}]"),
    ((X, E,), "{0}[{1} % 2]"), ((X,), "table[torch.arange({0}.shape[0]) % 9] + {0}"),
    ((X, ROW,), "table[{1} % 9] + {0}"), ((VEC, PERM,), "{0}[{1}]"), ((X, PERM,), "{0}[{1}.argsort()]"),
    ((X, PERM,), "({0}[{1}] @ W)[{1}.argsort()]"),
    # writing rows
    ((X, X, ROW,), "{0}.index_add(0, {2}, {1})"), ((X, X, ROW,), "torch.zeros_like({0}).index_add(0, {2}, {1})"),
    ((X, X, ROW,), "{0}.new_zeros({0}.shape[0], 6).index_add_(0, {2}, {1})"),
    ((r"float\(T,6\)", X, r"perm\(T\)",), "torch.empty_like({0}).index_copy(0, {2}, {1})"),  # leaves no row unset
    ((X, X, ROW,), "{0}.clone().index_put_(({2},), {1}, accumulate=True)"),
    ((X, X, PERM,), "torch.zeros_like({0}).index_put(({2},), {1})"),
    ((X, X, PERM,), "torch.zeros_like({0}).scatter(0, {2}[:, None].expand(-1, 6), {1})"),
    ((X, X, ROW,), "torch.zeros_like({0}).scatter_add(0, {2}[:, None].expand(-1, 6), {1})"),
    ((X, E,), "torch.zeros(5, 6, dtype=torch.double).index_add(0, {1}, {0})[{1}]"),
    ((X, E,), "{0}.scatter_add(1, {1}[:, None], {0})"),
    ((X,), "torch.zeros(9, 6, dtype=torch.double).index_add(0, torch.arange({0}.shape[0]) % 9, {0})"),
    ((X, E,), "{0}.masked_fill(({1} == 2)[:, None], 0.5)"),
    ((X, E, X,), "{0}.masked_scatter(({1} == 2)[:, None], {2})"),
    ((X, PERM,), "torch.zeros_like({0}).index_fill(0, {1} // 2, 3.0) + {0}"),
    # buffers in place
    ((X,), "buf.add_({0}[:buf.shape[0]])"), ((r"float\(T,6\)",), "buf.copy_({0})"),
    ((r"float\(T,6\)", r"row\(T\)",), "buf.index_add_(0, {1}, {0})"),
    ((r"float\(T,6\)",), "buf[:, 1:3].mul_({0}[:, 1:3])"),
    ((r"float\(T,6\)", r"expert\(T\)",), "cache.index_copy_(0, {1}, {0})[{1}]"),
    ((X, E,), "cache.index_add_(0, {1}, {0})"), ((X,), "cache.add_({0}.sum(0))"), ((X, E,), "cache[{1}] + {0}"),
    # as many rows as a number says that is read out of data
    ((X,), "read({0}).reshape({0}.shape[0], -1) + {0}"), ((X,), "read({0}).sum(0) + {0}"),
    ((X,), "funcol.all_to_all_single(read({0}), [{0}.shape[0]], [{0}.shape[0]], G) + {0}"),
    # communication on one rank
    ((ANY,), "funcol.all_reduce({0}, 'sum', G)"), ((X,), "funcol.all_to_all_single({0}, None, None, G)"),
    ((X,), "funcol.all_gather_tensor({0}, 0, G)"), ((X,), "funcol.reduce_scatter_tensor({0}, 'sum', 0, G)"),
    ((COUNT,), "funcol.all_reduce({0}, 'sum', G)"), ((INT,), "funcol.all_to_all_single({0}, None, None, G)"),
    # whole ways there and back, right and wrong
    ((X, PERM,), "torch.zeros_like({0}).index_add(0, {1}, {0}[{1}] @ W)"),
    ((r"float\(T,6\)", r"perm\(T\*2\)",), "torch.zeros_like({0}).index_add(0, {1} // 2, {0}[{1} // 2].sin())"),
    ((r"float\(T,6\)", r"perm\(T\*2\)",), "{0}[{1} // 2][{1}.argsort()].view(-1, 2, 6).sum(1)"),
    ((r"float\(T,6\)", r"perm\(T\*2\)",), "{0}[{1} // 2][({1} // 2).argsort(stable=True)].view(-1, 2, 6).sum(1)"),
    ((r"float\(T,6\)", r"perm\(T\*2\)",), "{0}[{1} // 2][({1} // 2).argsort(stable=True)].view(-1, 2, 6)[:, 0]"),
    ((X, PERM,), "funcol.all_to_all_single({0}[{1}], None, None, G)[{1}.argsort()]"),
    ((X, PERM, PERM,), "{0}[{1}][{2}.argsort()]"), ((X, PERM,), "{0}[{1}].cumsum(1)[{1}.argsort()]"),
    ((X, PERM,), "{0}[{1}].flip(0)[{1}.argsort()]"), ((X, PERM,), "({0}[{1}] + {0})[{1}.argsort()]"),
    ((X, E, PERM,), "We[{1}[{2}]].bmm({0}[{2}][:, :, None])[{2}.argsort(), :, 0]"),
]  # fmt: skip


SUBGRAPHS = """
def block(x):
    return torch.tanh(x @ W) + funcol.all_reduce(x * 0.5, 'sum', G)

def experts(x, e):
    order = e.argsort(stable=True)
    rows = funcol.all_to_all_single(x[order], None, None, G)
    rows = funcol.all_to_all_single(torch.relu(rows @ W), None, None, G)
    return torch.zeros_like(x).index_add(0, order, rows) + torch.tanh(x @ W)

def read(x):
    n = ((x.sum() < 1e9).long() * x.shape[0]).item()
    torch._check(n >= 0)
    torch._check(n <= 99)
    return long[:n]
"""
"""Functions that lines call: layers that are alike, and rows of a constant, as many as `x` has."""


def arguments(num_tokens: int) -> tuple[torch.Tensor, ...]:
    """Rows, experts, factors, a buffer with a row for each token, a cache with nine rows."""
    random = torch.Generator().manual_seed(num_tokens)
    floats = [torch.randn(*sizes, generator=random, dtype=torch.double) for sizes in ((num_tokens, 6), (num_tokens,))]
    experts = torch.randint(0, 5, (num_tokens,), generator=random)
    state = [torch.randn(n, 6, generator=random, dtype=torch.double) for n in (num_tokens, 9)]
    return (floats[0], experts, floats[1], *state)


def constants(group: Any, collectives: Any = funcol) -> dict[str, Any]:
    random = torch.Generator().manual_seed(0)
    shapes = {"W": (6, 6), "V": (6, 4), "b": (6,), "We": (5, 6, 6), "table": (9, 6), "long": (99, 6)}
    weights = {name: torch.randn(*s, generator=random, dtype=torch.double) * 0.5 for name, s in shapes.items()}
    scope = {"torch": torch, "funcol": collectives, "G": group, **weights}
    exec(SUBGRAPHS, scope)
    return scope


@dataclass
class Program:
    """Lines so far, the values that they made at each of `SIZES`, and what these are."""

    group: Any
    collectives: Any = funcol
    lines: list[str] = field(default_factory=list)
    kinds: dict[str, str] = field(default_factory=dict)
    read: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        scope = constants(self.group, self.collectives)
        self.scopes = [scope | dict(zip(ARGS, arguments(n), strict=True)) for n in SIZES]
        for name in ("v0", "v1", "v2"):
            self.kinds[name] = self._kind(name)

    def of(self, pattern: str) -> list[str]:
        return [n for n, kind in self.kinds.items() if re.fullmatch(pattern, kind)][-RECENT:]

    def possible(self) -> list[tuple[tuple[str, ...], str]]:
        """The lines whose operands are there; those that read numbers of rows, rare at random, count three times."""
        ops = [op for op in OPS if all(map(self.of, op[0]))]
        return ops + 2 * [op for op in ops if any("perm" in pattern for pattern in op[0])]

    def add(self, text: str, operands: list[str]) -> None:
        name = f"v{len(self.kinds)}"
        before = [scope | {n: scope[n].clone() for n in ("buf", "cache")} for scope in self.scopes]
        try:
            with torch.no_grad():
                for scope in self.scopes:
                    exec(f"{name} = {text}", scope)
        except (RuntimeError, IndexError, ValueError):
            self.scopes = before
            return
        if not all(scope[name].isfinite().all() and scope[name].abs().max() < 1e6 for scope in self.scopes):
            self.scopes = before
            return
        self.lines.append(f"{name} = {text}")
        self.kinds[name] = self._kind(name)
        self.read.update(operands)

    def source(self) -> str:
        """The function; it returns what is read by nothing else, but for numbers of rows."""
        results = [n for n, kind in self.kinds.items() if n not in self.read and kind.startswith("float")]
        lines = [*self.lines, f"return {', '.join(results or ['v0.exp()'])},"]
        return f"def fn({', '.join(ARGS)}):\n    " + "\n    ".join(lines) + "\n"

    def _kind(self, name: str) -> str:
        values = [scope[name] for scope in self.scopes]
        sizes = ",".join(_size(pair) for pair in zip(*(v.shape for v in values), strict=True))
        return f"{_dtype(values)}({sizes})"


ARGS = ("v0", "v1", "v2", "buf", "cache")


def _size(pair: tuple[int, ...]) -> str:
    if pair[0] == pair[1]:
        return str(pair[0])
    times = pair[0] // SIZES[0]
    if pair != tuple(times * n for n in SIZES):
        return "?"
    return "T" if times == 1 else f"T*{times}"


def _dtype(values: list[torch.Tensor]) -> str:
    if values[0].dtype != torch.int64:
        return "bool" if values[0].dtype == torch.bool else "float"
    if all(v.ndim == 1 and v.sort()[0].equal(torch.arange(len(v))) for v in values):
        return "perm"
    if all(v.min() >= 0 and v.max() < 5 for v in values):
        return "expert"
    return "row" if all(v.min() >= 0 and v.max() < n for v, n in zip(values, SIZES, strict=True)) else "count"


@st.composite
def functions(draw: st.DrawFn, group: Any, least: int = 5, most: int = 30, collectives: Any = funcol) -> str:
    """The source of a function of what `arguments` makes; lines are tried with these `collectives`."""
    program = Program(group, collectives)
    for _ in range(draw(st.integers(least, most))):
        operands, text = draw(st.sampled_from(program.possible()))
        names = [draw(st.sampled_from(program.of(pattern))) for pattern in operands]
        program.add(text.format(*names, d=draw(st.integers(0, 1))), names)
    return program.source()
