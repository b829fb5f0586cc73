"""A sequence of one, `[1, S]`: a microbatch attends to keys and values of earlier ones, or of all."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from dbo_compile.axes import Tokens
from dbo_compile.errors import InvalidProgram, InvalidSchedule
from dbo_compile.ir.program import Free, Join, Run
from dbo_compile.ir.proof import verify_program
from dbo_compile.ir.verify import verify_schedule
from dbo_compile.passes.order import POLICIES
from tests.serving.player import Player, symbolic

attend = nn.functional.scaled_dot_product_attention
HEADS, KV_HEADS, SIZE = 4, 2, 3


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(7, (HEADS + 2 * KV_HEADS) * SIZE)
        self.out = nn.Linear(HEADS * SIZE, 7)
        self.mlp = nn.Linear(7, 7)

    def forward(self, x: torch.Tensor, **options) -> torch.Tensor:
        heads = self.qkv(x).view(*x.shape[:2], -1, SIZE).transpose(1, 2)
        q, k, v = heads.split([HEADS, KV_HEADS, KV_HEADS], 1)
        y = attend(q, k, v, enable_gqa=True, **options)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.mlp(x).tanh()


class Model(nn.Module):
    def __init__(self, **options) -> None:
        super().__init__()
        self.embed = nn.Embedding(31, 7)
        self.layers = nn.ModuleList(Layer() for _ in range(2))
        self.options = options

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        rows = torch.arange(ids.shape[1])
        x = self.embed(ids) + rows[None, :, None] * 0.1
        options = dict(self.options)
        if window := options.pop("window", 0):
            behind = rows[:, None] - rows
            options["attn_mask"] = ((behind >= 0) & (behind < window))[None, None]
        for layer in self.layers:
            x = layer(x, **options)
        return x


def split_and_not(rows, **options):
    model, ids = Model(**options).double(), torch.randint(0, 31, (1, sum(rows)))
    player = Player({"ids": Tokens(1)}, rows=rows)
    symbolic((ids, 1))
    with torch.no_grad():
        got = torch.compile(model, backend=player, fullgraph=True)(ids)
        torch.testing.assert_close(got, model(ids), rtol=0, atol=1e-12)
    return player.graphs[0]


@pytest.mark.parametrize("rows", [(5, 8), (1, 12), (12, 1), (4, 6, 3), (13,)])
def test_it_is_what_the_whole_sequence_gives(rows):
    graph = split_and_not(rows, is_causal=True)
    assert not graph.placed.barriers
    assert len(graph.placed.prefixes) == 2


@pytest.mark.parametrize("rows", [(5, 8), (12, 1), (4, 6, 3)])
def test_a_causal_mask_of_all_tokens_is_cut_for_each_microbatch(rows):
    """A window of four tokens, made inside the graph: made once for all tokens, which is the only barrier."""
    graph = split_and_not(rows, window=4)
    assert len(graph.placed.prefixes) == 2
    assert not graph.placed.obligations
    assert not any("attention" in str(n.target) for n in graph.placed.barriers)


def test_the_first_microbatch_waits_for_nothing_of_the_second():
    graph = split_and_not((5, 8), is_causal=True)
    program = graph.programs[2, True]
    joins = [i for i, instr in enumerate(program.instrs) if isinstance(instr, Join)]
    first = next(i for i, instr in enumerate(program.instrs) if " = layers_0_2#0(" in str(instr))
    assert first < joins[0]


@pytest.mark.parametrize("rows", [(5, 8), (12, 1), (4, 6, 3)])
def test_attention_that_is_not_causal_reads_keys_of_all_microbatches(rows):
    graph = split_and_not(rows, is_causal=False)
    assert not graph.placed.barriers
    assert len(graph.placed.wholes) == 2


def test_no_microbatch_attends_before_all_have_keys():
    graph = split_and_not((5, 8), is_causal=False)
    for policy in POLICIES:
        graph.program(graph.schedule(2, policy=policy))
    one_by_one = " ".join(sorted(str(graph.schedule(2)).split(), key=lambda step: step[-1]))
    with pytest.raises(InvalidSchedule, match=r"layers_0_2#0 must come after layers_0#1: it makes"):
        verify_schedule(graph.schedule(2).with_steps(one_by_one))


@pytest.mark.parametrize("is_causal", [True, False])
def test_attention_to_keys_of_too_few_tokens_is_no_valid_program(is_causal):
    graph = split_and_not((5, 8), is_causal=is_causal)
    program = graph.programs[2, True]
    instrs = [i for i in program.instrs if not isinstance(i, Free)]
    at, run = next((i, r) for i, r in enumerate(instrs) if isinstance(r, Run) and "layers_0_2#1" in str(r))
    segment = program.segments[run.segment]
    key = segment.inputs.index((segment.prefix or segment.whole)[0])
    spoilt = replace(run, ins=(*run.ins[:key], f"{run.ins[key]}#1", *run.ins[key + 1 :]))
    with pytest.raises(InvalidProgram, match=r"reads .*#1, which is not .* for (microbatches 0 to 1|all tokens)"):
        verify_program(replace(program, instrs=(*instrs[:at], spoilt, *instrs[at + 1 :])))
