"""The exchange whose sizes stay on the device, with PyTorch's kernels for it played by gloo on the CPU."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from dbo_compile import compat, reports
from dbo_compile.integrations import device_exchange
from dbo_compile.integrations.device_exchange import exchange_device
from dbo_compile.integrations.transformers import expert_parallel
from dbo_compile.passes.capturable import why_not_captured
from tests.integrations.models import VOCAB, tiny_model
from tests.integrations.test_expert_parallel import Layer, close, some_tokens
from tests.ranks import Ranks

GAP = 1  # rows that the kernels leave for an expert to whom nobody sends


class PretendMemory:
    def __init__(self, group_name, device):
        self.num = 0

    def empty(self, sizes, dtype):
        return torch.full(sizes, 77, dtype=dtype)


def all_to_all_vdev_2d(source, out, sizes, where, group):
    """Rows by (rank, expert) to rows by (expert, rank), as PyTorch documents it."""
    num_ranks = dist.get_world_size()
    sent = sizes.view(num_ranks, -1)
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent)
    rows = source.new_empty(int(received.sum()), source.size(1))
    dist.all_to_all_single(rows, source[: int(sent.sum())], received.sum(1).tolist(), sent.sum(1).tolist())
    pieces = [list(of.split(n.tolist())) for of, n in zip(rows.split(received.sum(1).tolist()), received, strict=True)]
    at = 0
    for expert in range(sent.size(1)):
        begin = at
        for rank in range(num_ranks):
            piece = pieces[rank][expert]
            where.view(2, -1, num_ranks)[:, expert, rank] = torch.tensor([len(piece), at])
            out[at : at + len(piece)] = piece
            at += len(piece)
        at = max(at, begin + GAP)


def all_to_all_vdev_2d_offset(source, out, where, _where_out, group):
    """Rows by (expert, rank), with gaps, back to rows by (rank, expert)."""
    num_ranks = dist.get_world_size()
    sizes, offsets = (w.view(-1, num_ranks).t().contiguous() for w in where)
    returned = torch.empty_like(sizes)
    dist.all_to_all_single(returned, sizes)
    chosen = [source[o : o + n] for n, o in zip(sizes.flatten().tolist(), offsets.flatten().tolist(), strict=True)]
    rows = out[: int(returned.sum())]
    dist.all_to_all_single(rows, torch.cat(chosen), returned.sum(1).tolist(), sizes.sum(1).tolist())


def pretend() -> None:
    device_exchange._all_buffers.clear()
    compat.Symmetric = PretendMemory
    device_exchange.symm_mem = SimpleNamespace(
        all_to_all_vdev_2d=all_to_all_vdev_2d, all_to_all_vdev_2d_offset=all_to_all_vdev_2d_offset
    )


class DeviceLayer(Layer):
    """Expects its rows sorted by expert, and the mark for "no row" on all others."""

    def shard(self, rows, local_experts):
        mine = self.weights.chunk(dist.get_world_size())[dist.get_rank()]
        real = local_experts[local_experts < len(mine)]
        self.received.append(real.tolist())
        return super().shard(rows, local_experts)

    def exchanged(self, how, *tokens):
        return exchange_device(*tokens, self.shard, num_experts=self.num_experts, group=dist.group.WORLD)


def matches(num_tokens, num_experts, top_k):
    pretend()
    layer = DeviceLayer(num_experts)
    outcomes = []
    for size in (num_tokens, num_tokens + 4, num_tokens):  # into new memory, into larger memory, into some of that
        tokens = some_tokens(size, num_experts, top_k)
        outcomes.append(close(layer.exchanged("", *tokens), layer.whole(*tokens)))
    real = layer.received[::2]
    return outcomes, [r == sorted(r) for r in real], [len(r) for r in real]


def to_one_expert():
    pretend()
    layer = DeviceLayer(8)
    hidden, _, weights = some_tokens(7, 8, 3)
    tokens = (hidden, torch.tensor([[5, 5, 5]] * 6 + [[2, 5, 7]]), weights)
    return close(layer.exchanged("", *tokens), layer.whole(*tokens))


@pytest.fixture(scope="module")
def ranks():
    with Ranks(2) as ranks:
        yield ranks


@pytest.mark.ranks
@pytest.mark.parametrize(("num_tokens", "num_experts", "top_k"), [(7, 8, 3), (1, 6, 1), (5, 2, 2), (0, 4, 3)])
def test_it_equals_the_layer_on_one_process(ranks, num_tokens, num_experts, top_k):
    answers = ranks.run(matches, num_tokens, num_experts, top_k)
    assert [answer[:2] for answer in answers] == [([True] * 3, [True] * 3)] * 2
    arrived = [sum(numbers) for numbers in zip(*(answer[2] for answer in answers), strict=True)]
    assert arrived == [2 * n * top_k for n in (num_tokens, num_tokens + 4, num_tokens)]


@pytest.mark.ranks
def test_all_rows_may_go_to_one_expert_and_none_to_most(ranks):
    assert ranks.run(to_one_expert) == [True, True]


# -- on one rank ----------------------------------------------------------------------------------


@pytest.fixture
def one_rank(monkeypatch):
    """What `pretend` replaces is put back; the group is there for one test."""
    monkeypatch.setattr(compat, "Symmetric", compat.Symmetric)
    monkeypatch.setattr(device_exchange, "symm_mem", device_exchange.symm_mem)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    device_exchange._all_buffers.clear()
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_rank")
def test_a_compiled_layer_is_split_with_both_ops_on_the_comm_lane_and_nothing_on_the_host():
    pretend()
    layer = DeviceLayer(4)
    layer.shard = lambda rows, experts: torch.einsum(
        "nh,nho->no", rows, layer.weights.detach()[experts.clamp(max=3)]
    ).tanh()

    def fn(hidden, scores):
        weights, index = scores.topk(3, dim=1)
        return layer.exchanged("", hidden.sin(), index, weights)

    hidden, scores = torch.randn(9, 6, dtype=torch.float64), torch.rand(9, 4, dtype=torch.float64)
    options = {"inner": "eager", "split": "always"}
    compiled = torch.compile(fn, backend="dbo", options=options, fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(hidden, scores), fn(hidden, scores), rtol=0, atol=1e-12)
    report = reports()[-1]
    segments = report.levels.outline.segments.values()
    assert [s.name for s in segments if s.lane.value == "comm"] == ["dispatch_rows", "combine_rows"]
    assert all(s.per_microbatch and not s.host for s in segments if s.lane.value == "comm")
    assert (report.barriers, report.calls_split) == ({}, 1)
    assert why_not_captured(report.levels.graph) == ""


@pytest.mark.usefixtures("one_rank")
@torch.no_grad()
def test_transformers_knows_it_by_name():
    pretend()
    ids = torch.randint(VOCAB, (3, 5))
    want = tiny_model("qwen3_moe", experts="batched_mm")(ids).logits
    model = expert_parallel(tiny_model("qwen3_moe", experts="batched_mm"), ep_implementation="dbo_device")
    torch.testing.assert_close(model(ids).logits, want, rtol=0, atol=1e-12)


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize(("num_tokens", "num_experts", "top_k"), [(7, 8, 3), (1, 33, 2), (0, 4, 3)])
def test_one_rank_needs_no_kernels(num_tokens, num_experts, top_k, monkeypatch):
    monkeypatch.setattr(compat.symmetric_memory, "is_nvshmem_available", lambda: False)
    layer = DeviceLayer(num_experts)
    tokens = some_tokens(num_tokens, num_experts, top_k)
    assert close(layer.exchanged("", *tokens), layer.whole(*tokens))
    received, *_ = layer.received
    assert received == sorted(tokens[1].flatten().tolist())


TOKENS = torch.randn(7, 6), torch.zeros(7, 3).long(), torch.rand(7, 3)


def exchanged_by(ranks, num_experts, monkeypatch):
    """On one rank of several, which are not there."""
    monkeypatch.setattr(device_exchange, "num_ranks_of", lambda _group: len(ranks))
    monkeypatch.setattr(device_exchange.dist, "get_process_group_ranks", lambda _group: ranks)
    return exchange_device(*TOKENS, lambda rows, _: rows, num_experts=num_experts, group=dist.group.WORLD)


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize(
    ("ranks", "num_experts", "why"),
    [
        (range(2), 34, "2 ranks with 17 experts each: the kernels take 16 and 16 at most"),
        (range(17), 34, "17 ranks with 2 experts each: the kernels take 16 and 16 at most"),
        ([0, 2, 3], 6, r"ranks \[0, 2, 3\] are not equally far apart"),
    ],
)
def test_what_the_kernels_do_not_take_is_refused(ranks, num_experts, why, monkeypatch):
    with pytest.raises(ValueError, match=why):
        exchanged_by(ranks, num_experts, monkeypatch)


@pytest.mark.usefixtures("one_rank")
def test_without_nvshmem_it_says_so(monkeypatch):
    monkeypatch.setattr(compat.symmetric_memory, "is_nvshmem_available", lambda: False)
    with pytest.raises(RuntimeError, match="this PyTorch has no NVSHMEM for cpu"):
        exchanged_by([1, 3, 5, 7], 4, monkeypatch)


@pytest.mark.usefixtures("one_rank")
def test_memory_is_never_made_while_something_is_captured(monkeypatch):
    pretend()
    monkeypatch.setattr(device_exchange, "is_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="play the largest size once before"):
        exchanged_by([0, 1], 4, monkeypatch)


def test_memory_that_slow_peers_may_still_read_is_not_written_by_the_next_exchange():
    buffers = device_exchange._Buffers(PretendMemory("", None), 5, 14, 4, 3, torch.float32)
    for of in (buffers.next_source, buffers.next_back, buffers.next_where):
        first, second, third = of(), of(), of()
        assert first is third
        assert first is not second
