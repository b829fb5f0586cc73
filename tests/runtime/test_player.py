"""What a graph's player is told: which arguments stay where they are, and which ranks capture together."""

from __future__ import annotations

import pytest
import sympy
import torch
import torch.distributed._functional_collectives as funcol
from torch import nn
from torch._inductor import config

from dbo_compile import backend, reports
from dbo_compile.compat import aot
from dbo_compile.runtime.given import RequestInputs
from dbo_compile.runtime.signature import Signature, TokenInput


class Model(nn.Module):
    def __init__(self, group):
        super().__init__()
        self.group = group
        self.up = nn.Linear(5, 5, bias=False)
        self.register_buffer("scale", torch.ones(5))
        self.register_buffer("seen", torch.zeros(5))

    def forward(self, x, cache, table):
        self.seen.add_(1)
        cache.add_(x.sin())
        return funcol.all_reduce(self.up(x), "sum", self.group) * self.scale * table


def test_what_the_model_owns_stays_and_what_is_written_is_written_in_place(group, monkeypatch):
    told, seen = {}, []

    def player_for(_device, *, otherwise, **rest):
        told.update(rest)
        return lambda *play: seen.append(play) or otherwise(*play)

    monkeypatch.setattr(backend, "player_for", player_for)
    model, x, cache, table = Model(group), torch.randn(9, 5), torch.zeros(9, 5), torch.ones(5)
    torch._dynamo.mark_static_address(table, guard=False)
    options = {"inner": "eager", "split": "always", "gate": "never"}
    with torch.no_grad():
        torch.compile(model, backend="dbo", options=options, fullgraph=True)(x, cache, table)
    ((_, _, args),) = seen
    inputs = {"x": x, "cache": cache, "table": table, **dict(model.named_parameters()), **dict(model.named_buffers())}
    name_of = {tensor.data_ptr(): name for name, tensor in inputs.items()}

    def names(indices):
        return sorted(name_of[args[i].data_ptr()] for i in indices)

    limits = told["limits"]
    assert names(limits.static) == ["scale", "table", "up.weight"]
    assert names(limits.written) == ["cache", "seen"]
    assert names(limits.tokens) == ["cache", "x"]
    assert told["ranks"] is None  # it is alone


ALL = (TokenInput(0, 0, "x"),)


@pytest.mark.parametrize(
    ("told", "pads", "why"),
    [
        ({"same_size": True}, False, ""),
        ({}, True, ""),
        ({}, False, "ranks may have other numbers of tokens in a step, and are not padded to the same one"),
        ({"unpaddable": "why"}, True, "ranks may have other numbers of tokens in a step, and are not padded to the"),
        ({"same_size": True, "symbol_inputs": {sympy.Symbol("s7"): 1}}, True, "s7 may be another size on each rank"),
        ({"same_size": True, "requests": RequestInputs({}, {}, {})}, True, "ranks may have other requests in a step"),
    ],
)
def test_ranks_capture_together_where_they_play_the_same_sizes(told, pads, why):
    found = Signature(ALL, **told).may_differ(pads=pads)
    assert found.startswith(why)
    assert bool(found) == bool(why)


def test_segments_are_compiled_without_graphs_of_inductors_own(group, monkeypatch):
    """`TORCHINDUCTOR_CUDAGRAPHS=1` would nest them in ours; for the whole graph in one piece it is the user's wish."""
    compile_fx, seen = aot.compile_fx, []
    monkeypatch.setattr(aot, "compile_fx", lambda *args: seen.append(config.triton.cudagraphs) or compile_fx(*args))
    options = {"split": "always", "gate": "never"}
    with torch.no_grad(), config.patch({"triton.cudagraphs": True}):
        model = torch.compile(Model(group), backend="dbo", options=options, fullgraph=True)
        model(torch.randn(9, 5), torch.zeros(9, 5), torch.ones(5))
        assert (set(seen), len(seen) > 1) == ({False}, True)
        reports()[-1].compilation.compile_whole()
    assert seen[-1] is True
