"""What else a serving engine hands over: several positions per token, embeddings, intermediate tensors, last tokens."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn

from dbo_compile.axes import CuSeqlens, MaxSeqlen, Requests, Tokens
from dbo_compile.errors import NotSplit
from dbo_compile.rules.requests import register_attention_op
from tests.serving.model import AXES, HIDDEN, VOCAB, Layer, Metadata, Pages, step_of, times
from tests.serving.player import Player, symbolic


def step():
    """Requests of 2, 5 and 6 tokens."""
    pages = Pages()
    return step_of([(pages.request(list(range(n))), n) for n in (2, 5, 6)])


def rotate(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Each third of the features turned by positions of its own, as in vision-language models."""
    angles = positions.double().repeat_interleave(HIDDEN // 3, 0).T * 0.1
    return x * angles.cos() + x.flip(-1) * angles.sin()


class Stage(nn.Module):
    """A stage of a pipeline: intermediate tensors in and out, or the first, or the last."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, HIDDEN)
        self.layer = Layer(group)
        self.head = nn.Parameter(torch.randn(HIDDEN, VOCAB))

    def forward(self, input_ids, positions, metadata: Metadata, *, inputs_embeds=None, stage=None, last=False):
        if stage is not None:
            hidden, residual = stage["hidden_states"], stage["residual"]
        else:
            hidden = self.embed(input_ids) if inputs_embeds is None else inputs_embeds
            residual = hidden * 0.5
        hidden = self.layer(rotate(hidden + residual, positions), metadata)
        if not last:
            return {"hidden_states": hidden, "residual": residual + 1}
        return times(hidden[metadata.cu_seqlens[1:] - 1], self.head)


def run_split(group, args, kwargs, tensors, rows=(5, 8)):
    """The results of a split call and of an eager one, and the graph; `tensors` have symbols in dim 0."""
    model, plain = Stage(group).double(), Stage(group).double()
    plain.load_state_dict(model.state_dict())
    axes = AXES | dict.fromkeys(("inputs_embeds", "hidden_states", "residual"), Tokens(0)) | {"positions": Tokens(1)}
    player = Player(axes, rows=rows)
    m = args[2]
    symbolic((args[1], 1), *((x, 0) for x in (m.slots, m.cu_seqlens, m.seq_lens, m.block_table, *tensors)))
    with torch.no_grad():
        got = torch.compile(model, backend=player, fullgraph=True)(*args, **kwargs)
        want = plain(*args, **kwargs)
    assert player.played == [rows]
    assert torch.equal(model.layer.k_cache, plain.layer.k_cache)
    return got, want, player.graphs[0]


def positions_3d(m):
    return torch.stack([torch.arange(13), torch.arange(13) % 5, torch.arange(13) * 2])


def test_three_positions_for_each_token(group):
    ids, _, m = step()
    got, want, graph = run_split(group, (ids, positions_3d(m), m), {}, [ids])
    assert {k: torch.equal(got[k], want[k]) for k in want} == {"hidden_states": True, "residual": True}
    assert not graph.placed.barriers


def test_embeddings_instead_of_ids(group):
    _, _, m = step()
    embeds = torch.randn(13, HIDDEN, dtype=torch.float64)
    got, want, graph = run_split(group, (None, positions_3d(m), m), {"inputs_embeds": embeds}, [embeds])
    assert torch.equal(got["hidden_states"], want["hidden_states"])
    assert not graph.placed.barriers


def test_intermediate_tensors_of_a_pipeline_stage(group):
    _, _, m = step()
    stage = {name: torch.randn(13, HIDDEN, dtype=torch.float64) for name in ("hidden_states", "residual")}
    got, want, graph = run_split(group, (None, positions_3d(m), m), {"stage": stage}, stage.values())
    assert {k: torch.equal(got[k], want[k]) for k in want} == {"hidden_states": True, "residual": True}
    assert not graph.placed.barriers


def test_the_last_token_of_each_request_is_taken_of_all_tokens(group):
    """A request that straddles has its last token in the second microbatch alone: a barrier, but not for attention."""
    ids, _, m = step()
    got, want, graph = run_split(group, (ids, positions_3d(m), m), {"last": True}, [ids])
    assert got.shape == (3, VOCAB)
    assert torch.equal(got, want)
    barriers = [str(n.target) for n in graph.placed.barriers]
    assert "dbo_test.paged_attention.default" not in barriers
    assert "aten.index.Tensor" in barriers


@torch.library.custom_op("dbo_test::sum_requests", mutates_args=())
def sum_requests(x: torch.Tensor, bounds: torch.Tensor, last: torch.Tensor, longest: torch.Tensor) -> torch.Tensor:
    """The sum of the rows of each request in each of its rows; `last` has the last row of each."""
    lengths = bounds.diff()
    assert (bounds[1:] - 1).tolist() == last.tolist(), "metadata of different microbatches"
    assert lengths.max() == longest, "the longest request of another microbatch"
    sums = torch.stack([rows.sum(0) for rows in x.split(lengths.tolist())])
    return sums.repeat_interleave(lengths, 0)


@sum_requests.register_fake
def _(x, *_):
    return torch.empty_like(x)


register_attention_op(torch.ops.dbo_test.sum_requests.default, tokens=["x"], requests=["bounds", "last", "longest"])


def test_an_attention_op_takes_what_a_function_made_and_the_longest_length():
    """Requests of 5, 2 and 6 tokens."""
    x, bounds = torch.randn(13, HIDDEN, dtype=torch.float64), torch.tensor([0, 5, 7, 13])

    def last_of(last, rows):
        return torch.tensor([row - rows.start for row in last.tolist() if row in rows])

    def fn(x, bounds, last, longest):
        return torch.ops.dbo_test.sum_requests(x * 2, bounds, last, longest)

    axes = {"x": Tokens(0), "bounds": CuSeqlens(), "last": last_of, "longest": MaxSeqlen()}
    player, args = Player(axes, rows=(7, 6)), (x, bounds, bounds[1:] - 1, torch.tensor(6))
    symbolic((x, 0), (bounds, 0), (args[2], 0))
    assert torch.equal(torch.compile(fn, backend=player, fullgraph=True)(*args), fn(*args))
    assert not player.graphs[0].placed.barriers


def test_a_number_of_requests_that_is_another_size_is_refused():
    x, lens, table = torch.randn(5, 6), torch.arange(3), torch.randn(3)

    def fn(x, lens, table):
        return x + (lens * table).sum()

    player = Player({"x": Tokens(0), "lens": Requests(0)}, rows=(2, 3))
    with pytest.raises(NotSplit, match="counts requests: call it first with a number of requests that is no other"):
        player.check(torch.compile(fn, backend=player, dynamic=True, fullgraph=True), x, lens, table)


def test_an_input_of_which_each_microbatch_has_its_own_is_not_written():
    x, longest = torch.randn(5, 6), torch.tensor(3)

    def fn(x, longest):
        longest.add_(1)
        return x * longest

    player = Player({"x": Tokens(0), "longest": MaxSeqlen()}, rows=(2, 3))
    symbolic((x, 0))
    with pytest.raises(NotSplit, match=r"writes its input .* in place, of which each microbatch has its own"):
        player.check(torch.compile(fn, backend=player, fullgraph=True), x, longest)
