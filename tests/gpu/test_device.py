"""On a real GPU: what is replayed is what was played, both lanes are at work at once, and nothing leaks or races."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.distributed as dist

from benchmarks.gpu_model import Sizes
from benchmarks.host_link import link_down
from dbo_compile import compat
from dbo_compile.integrations.device_exchange import exchange_device
from dbo_compile.integrations.expert_parallel import exchange_static
from dbo_compile.runtime.cuda import is_capturing
from dbo_compile.runtime.sms import BudgetPlayer, sm_budget
from dbo_compile.runtime.streams import Accelerator, StreamPlayer
from tests.gpu.played import Played, capture_player


@pytest.fixture(scope="module")
def played():
    return Played(torch.device("cuda", torch.cuda.current_device()))


def tokens_of(play, num_tokens):
    """Which arguments have a row for each token."""
    tensors = {i: x for i, x in enumerate(play.args) if isinstance(x, torch.Tensor)}
    return [i for i, x in tensors.items() if x.ndim == 3 and x.shape[0] == num_tokens]


def with_tokens(play, num_tokens, seed):
    generator = torch.Generator("cuda").manual_seed(seed)
    args = list(play.args)
    for i in tokens_of(play, num_tokens):
        args[i] = torch.randn(args[i].shape, dtype=args[i].dtype, device="cuda", generator=generator)
    return play._replace(args=args)


def test_streams_are_switched_and_the_comm_lane_has_priority(device):
    accelerator = Accelerator(device)
    before, comm = accelerator.current(), accelerator.new_stream()
    accelerator.switch(comm)
    assert accelerator.current() == comm
    accelerator.switch(before)
    assert accelerator.current() == before
    as_cuda = torch.cuda.Stream(stream_id=comm.stream_id, device_index=comm.device_index, device_type=comm.device_type)
    assert as_cuda.priority < 0


@torch.no_grad()
def test_a_program_on_streams_equals_eager(played, device):
    split, unsplit = played.plays(14)
    x = [split.args[i] for i in tokens_of(split, 14)]
    want = played.stack(*sorted(x, key=lambda t: t.shape[1]))
    player = StreamPlayer(Accelerator(device))
    for play in (split, unsplit):
        for _ in range(5):
            torch.testing.assert_close(player(*play)[0], want, rtol=3e-2, atol=3e-2)


@torch.no_grad()
def test_a_replay_is_bitwise_what_is_played_uncaptured(played, device):
    player, plain = capture_player(device), StreamPlayer(Accelerator(device))
    for play in played.plays(14):
        for seed in range(6):
            play = with_tokens(play, 14, seed)
            assert torch.equal(player(*play)[0], plain(*play)[0])
    assert (len(player.graphs), player.refused) == (2, {})


@torch.no_grad()
def test_a_thousand_replays_do_not_drift_and_leak_nothing(played, device):
    player, plain = capture_player(device, clone=False), StreamPlayer(Accelerator(device))
    split, _ = played.plays(14)
    for seed in range(4):
        player(*with_tokens(split, 14, seed))
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for seed in range(1000):
        result = player(*with_tokens(split, 14, seed))
        if seed % 250 == 249:
            assert torch.equal(result[0], plain(*with_tokens(split, 14, seed))[0])
    del result
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() <= before


@torch.no_grad()
def test_sizes_share_one_pool_and_may_be_replayed_in_any_order(played, device):
    player, plain = capture_player(device), StreamPlayer(Accelerator(device))
    plays = {n: played.plays(n) for n in (22, 10, 14)}
    player.capture_all([play for both in plays.values() for play in both])
    assert [sum(key.rows) for key in player.graphs] == [22, 22, 14, 14, 10, 10]
    for seed, n in enumerate((10, 22, 14, 22, 10, 10, 14)):
        for play in plays[n]:
            play = with_tokens(play, n, seed)
            assert torch.equal(player(*play)[0], plain(*play)[0])


# -- overlap ---------------------------------------------------------------------------------------


def branches(graph):
    """`(copy, kernel)` pairs of a captured graph of which neither waits for the other."""
    cudart = pytest.importorskip("cuda.bindings.runtime")
    raw = cudart.cudaGraph_t(graph.raw_cuda_graph())
    *_, num_nodes = cudart.cudaGraphGetNodes(raw)
    _, nodes, _ = cudart.cudaGraphGetNodes(raw, num_nodes)
    *_, num_edges = cudart.cudaGraphGetEdges(raw)
    _, sources, targets, *_ = cudart.cudaGraphGetEdges(raw, num_edges)
    index = {int(node): i for i, node in enumerate(nodes[:num_nodes])}
    kinds = [cudart.cudaGraphNodeGetType(node)[1] for node in nodes[:num_nodes]]
    after = [[] for _ in index]
    waits = [0] * len(index)
    for source, target in zip(sources[:num_edges], targets[:num_edges], strict=True):
        after[index[int(source)]].append(index[int(target)])
        waits[index[int(target)]] += 1
    before, ready = [0] * len(index), [i for i, n in enumerate(waits) if not n]
    while ready:
        i = ready.pop()
        for j in after[i]:
            before[j] |= before[i] | 1 << i
            waits[j] -= 1
            if not waits[j]:
                ready.append(j)
    kind = cudart.cudaGraphNodeType
    copies = [i for i, k in enumerate(kinds) if k == kind.cudaGraphNodeTypeMemcpy]
    kernels = [i for i, k in enumerate(kinds) if k == kind.cudaGraphNodeTypeKernel]
    return [(c, k) for c in copies for k in kernels if not (before[c] >> k & 1 or before[k] >> c & 1)]


@torch.no_grad()
def test_the_split_graph_has_communication_beside_compute_and_the_unsplit_one_less(played, device):
    counts = []
    for play in played.plays(14):
        player = capture_player(device)
        player.device.keep_graph = True
        for _ in range(2):
            player(*play)
        counts.append(len(branches(next(iter(player.graphs.values())).graph)))
    assert counts[0] > counts[1]


@torch.no_grad()
def test_a_step_is_shorter_than_its_parts_one_after_the_other(device):
    """Compute and communication of about the same length, far above what launching takes."""
    wide = replace(Sizes(), num_layers=2, num_heads=32, cache_length=128)
    split, unsplit = Played(device, wide).plays(2048)
    with link_down():
        compute = seconds(partial(capture_player(device, clone=False), *unsplit))
    whole = seconds(partial(capture_player(device, clone=False), *unsplit))
    overlapped = seconds(partial(capture_player(device, clone=False), *split))
    comm = whole - compute
    hidden = (whole - overlapped) / min(comm, compute)
    assert hidden > 0.3, f"compute {compute * 1e3:.2f}, comm {comm * 1e3:.2f}, split {overlapped * 1e3:.2f} ms"


def seconds(step, calls=10):
    for _ in range(4):
        step()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(calls):
        step()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / calls


@torch.no_grad()
def test_a_replay_costs_the_host_little_of_what_playing_does(played, device):
    split, _ = played.plays(14)
    took = []
    for player in (StreamPlayer(Accelerator(device)), capture_player(device, clone=False)):
        for _ in range(5):
            player(*split)
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(10):
            player(*split)
        took.append(time.perf_counter() - start)
        torch.cuda.synchronize()
    assert took[1] < 0.5 * took[0], took


# -- bad input -------------------------------------------------------------------------------------


@torch.no_grad()
def test_inside_another_capture_a_program_becomes_part_of_that(played, device):
    split, _ = played.plays(14)
    player, plain = capture_player(device), StreamPlayer(Accelerator(device))
    for _ in range(3):
        player(*split)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        assert is_capturing()
        result = player(*split)[0]
    graph.replay()
    assert torch.equal(result, plain(*split)[0])


@torch.no_grad()
def test_a_tensor_of_the_cpu_among_the_inputs_is_named_and_nothing_breaks(played, device):
    player = capture_player(device, names={0: "scale"})

    def program(lanes, scale, x):
        return (x * scale,)

    for n in range(1, 5):
        (result,) = player(program, (3,), [torch.tensor(float(n)), torch.ones(3, device=device)])
        assert result.tolist() == [float(n)] * 3
    assert next(iter(player.refused.values())).startswith("scale is on cpu and the others on cuda:0")


@torch.no_grad()
def test_a_program_that_reads_on_the_host_is_played_uncaptured(device):
    def program(lanes, x):
        return (x * x.sum().item(),)

    player = capture_player(device)
    for n in range(1, 6):
        assert player(program, (3,), [torch.full((3,), float(n), device=device)])[0].tolist() == [3.0 * n * n] * 3
    assert len(player.refused) == 1


@torch.no_grad()
def test_after_a_capture_that_failed_others_are_captured(device):
    def reads(lanes, x):
        return (x * x.sum().item(),)

    def adds(lanes, x):
        return (x + 1,)

    player = capture_player(device)
    for program in (reads, adds):
        for n in range(1, 6):
            (result,) = player(program, (3,), [torch.full((3,), float(n), device=device)])
        assert result.tolist() == [75.0 if program is reads else 6.0] * 3
    assert (len(player.graphs), len(player.refused)) == (1, 1)
    assert torch.rand(3, device=device).shape == (3,)  # random numbers and the allocator have recovered
    torch.cuda.empty_cache()


@torch.no_grad()
def test_a_pool_out_of_memory_is_played_uncaptured(device):
    fits = torch.cuda.mem_get_info(device)[0] // 3

    def program(lanes, x):
        if is_capturing():  # what a capture needs more than a play: nothing of it can be used again meanwhile
            kept = [torch.empty(fits, dtype=torch.uint8, device=x.device) for _ in range(4)]
            del kept
        return (x + 1,)

    player = capture_player(device)
    for n in range(1, 5):
        assert player(program, (3,), [torch.full((3,), float(n), device=device)])[0].tolist() == [n + 1.0] * 3
    assert "out of memory" in next(iter(player.refused.values()))


@torch.no_grad()
def test_over_the_bound_a_graph_is_not_kept(played, device):
    split, _ = played.plays(22)
    player = capture_player(device, most_bytes=1)
    for _ in range(4):
        player(*split)
    assert (player.graphs, len(player.refused)) == ({}, 1)


# -- budget, device-side sizes, memory checker -----------------------------------------------------


@torch.no_grad()
def test_a_budget_of_multiprocessors_holds_in_play_and_capture_and_is_restored(played, device):
    split, _ = played.plays(14)
    told = []
    player = BudgetPlayer(StreamPlayer(Accelerator(device)), 20, [told.append])
    want = StreamPlayer(Accelerator(device))(*split)[0]
    torch.testing.assert_close(player(*split)[0], want, rtol=3e-2, atol=3e-2)
    with sm_budget(20, []):
        assert compat.gemm_sms_left_free() == 20
    assert (compat.gemm_sms_left_free(), told) == (None, [20, None])


@torch.no_grad()
def test_an_exchange_with_sizes_on_the_device_equals_the_static_one_and_is_captured(device):
    """On one rank nothing is sent: this is about shapes and capture, `tests/integrations` has several ranks."""
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1, device_id=device)
    try:
        weights = torch.randn(4, 64, 64, device=device)

        def experts(rows, which):
            return torch.einsum("nh,nho->no", rows, weights[which.clamp(max=3)]).tanh()

        hidden, scores = torch.randn(9, 64, device=device), torch.rand(9, 4, device=device)
        values, index = scores.topk(3, dim=1)
        call = {"num_experts": 4, "group": dist.group.WORLD}
        want = exchange_static(hidden, index, values, experts, **call)
        torch.testing.assert_close(
            exchange_device(hidden, index, values, experts, **call), want, rtol=1e-4, atol=1e-4
        )
        player = capture_player(device)

        def program(lanes, *tokens):
            return (exchange_device(*tokens, experts, **call),)

        for _ in range(4):
            index = torch.rand(9, 4, device=device).topk(3, dim=1).indices
            want = exchange_static(hidden, index, values, experts, **call)
            torch.testing.assert_close(player(program, (9,), [hidden, index, values])[0], want, rtol=1e-4, atol=1e-4)
        assert (len(player.graphs), player.refused) == (1, {})
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_compute_sanitizer_finds_nothing(tool):
    if (sanitizer := shutil.which("compute-sanitizer")) is None:
        pytest.skip("there is no compute-sanitizer")
    watched = [sys.executable, "-X", "faulthandler", "-m", "tests.gpu.played"]
    command = [sanitizer, "--tool", tool, "--error-exitcode", "9", *watched]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    if "Device not supported" in done.stdout + done.stderr:
        pytest.skip("compute-sanitizer does not support this device")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "4 graphs" in done.stdout
