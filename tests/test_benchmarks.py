"""Benchmarks: tables say what was measured, the simulation is right where it can be counted, baselines are equal."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.distributed as dist

from benchmarks import bench_host, bench_link, bench_memory, bench_scale, results
from benchmarks.baselines import TwoThreads
from benchmarks.bench_scale import Setting, gemm
from benchmarks.results import Table, Timing, alternating
from dbo_compile.ir.schedule import Lane
from tests.ranks import Ranks
from tests.soak.__main__ import faults
from tests.soak.steps import RECOMPILED, Sample


def test_a_timing_is_the_median_and_half_of_the_distance_of_the_quartiles():
    assert Timing.of([9.0, 1.0, 2.0, 100.0, 5.0]) == Timing(median=5.0, noise=(9.0 - 2.0) / 2)
    assert Timing.of([3.0]) == Timing(3.0, 0.0)
    assert (Timing(0.00123, 0.00004).ms(2), Timing(0.00123, 0.00004).us()) == ("1.23 ±0.04", "1230.0 ±40.0")


def test_calls_are_timed_in_turn_and_none_always_follows_the_same_one():
    played = []
    took = alternating({n: lambda n=n: played.append(n) for n in "abc"}, 8, before=lambda: played.append("|"))
    assert (played[::2], list(took)) == (["|"] * 24, ["a", "b", "c"])
    turns = "".join(played[1::2])
    assert all(sorted(turns[i : i + 3]) == ["a", "b", "c"] for i in range(0, 24, 3))
    followed = {(x, y) for x, y in pairwise(turns) if x != y}
    assert len(followed) == 6


def test_a_table_is_markdown():
    assert str(Table(("size", "ms"), [(7, "1.5"), (11, "2.0")], title="T", note="N")).splitlines() == [
        "## T", "", "| size | ms |", "|---|---|", "| 7 | 1.5 |", "| 11 | 2.0 |", "", "N",
    ]  # fmt: skip
    with pytest.raises(ValueError, match="1 cells"):
        str(Table(("size", "ms"), [(7,)]))


def test_results_are_written_only_when_asked(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    monkeypatch.setattr("sys.argv", ["x", "--sizes", "3", "--write"])
    table = Table(("a",), [(5,)])
    results.publish("thing", "A thing", [table], about="About.", write=False)
    assert list(tmp_path.iterdir()) == []
    results.publish("thing", "A thing", [table], about="About.", write=True)
    text = (tmp_path / "thing.md").read_text()
    assert capsys.readouterr().out == 2 * text
    assert "`python -m benchmarks.bench_thing --sizes 3`" in text
    assert f"torch {torch.__version__}" in text


def test_cells_of_a_step_tell_what_was_hidden():
    took, inductor = Timing(0.7, 0.0), Timing(1.0, 0.0)
    assert bench_link.cells(took, inductor, compute=0.6, comm=0.4) == ("700.0 ±0.0", "0.70", "75%", "1.17")
    assert bench_link.cells(inductor, inductor, compute=0.6, comm=0.4)[1:] == ("1.00", "0%", "1.67")


def test_the_peak_is_the_highest_running_sum():
    assert bench_memory.highest([3, 5, -5, 4, -3, 3, -7]) == 8
    assert bench_memory.highest([]) == 0


def test_peak_memory_of_a_call_counts_what_lives_at_one_time():
    def call(x):
        y = x + 1
        del y
        return [x + 2, x + 3]

    assert bench_memory.peak_bytes(call, torch.zeros(300_000)) == pytest.approx(2 * 4 * 300_000, abs=64)


# -- host cost --------------------------------------------------------------------------------------------------------


def test_all_ways_play_all_segments_of_both_microbatches_every_time(monkeypatch):
    count = [0, 0]

    def counted(at):
        def call(*args):
            count[at] += 1
            return (args[-1],)

        return call

    monkeypatch.setattr(bench_host, "same", counted(0))
    monkeypatch.setattr(bench_host, "sent", counted(1))
    ways, switches = bench_host.ways_to_play(3)
    for way in ways.values():
        for _ in range(3):
            count[:] = 0, 0
            way()
            assert count == [12, 12]
    assert switches == {"dbo": 24, "two threads": 12, "two threads, kept": 12, "asyncio": 12}


# -- simulation -------------------------------------------------------------------------------------------------------


def test_four_layers_of_equal_times_hide_all_but_the_ends():
    """Every layer has 2 compute and 2 comm ticks; a half takes half: only what comes first and last is alone."""
    whole = bench_scale.play({"attn": 2.0, "dispatch": 2.0, "experts": 2.0, "combine": 2.0}, 1)
    halves = bench_scale.play({"attn": 1.0, "dispatch": 1.0, "experts": 1.0, "combine": 1.0}, 2)
    assert (whole.makespan, whole.hidden_comm) == (32.0, 0.0)
    assert (halves.makespan, halves.busy(Lane.COMPUTE), halves.busy(Lane.COMM)) == (17.0, 16.0, 16.0)


def test_a_product_is_bound_by_operations_or_by_its_weights():
    weights = 1e6
    many, one = gemm(1e6, weights), gemm(1, weights, copies=3)
    assert many == pytest.approx(2 * 1e12 / (1550e12 * 0.7))
    assert one == pytest.approx(3 * 1e6 / 3000e9)


def test_halves_of_a_small_decode_read_all_weights_again():
    small, large = (Setting("decode", 8, t, 4096) for t in (64, 16384))
    for setting, halved in ((small, 1.0), (large, 0.5)):
        whole, half = (setting.experts(setting.num_tokens * share) for share in (1, 1 / 2))
        assert half / whole == pytest.approx(halved)


def test_published_latencies_come_back_for_the_published_size():
    assert Setting("decode", 128, 128, 4096).exchange(128) == pytest.approx((192e-6, 369e-6))
    assert Setting("decode", 320, 128, 4096).exchange(128) == pytest.approx((194e-6, 360e-6))


# -- soak -------------------------------------------------------------------------------------------------------------


def samples(num_tensors, num_bytes=lambda i: 5, off=lambda i: 0.0, steps=7):
    return [Sample(steps * i, off(i), num_tensors(i), num_bytes(i)) for i in range(24)]


def test_a_soak_that_only_warms_up_has_no_faults():
    assert faults(samples(lambda i: min(i, 9) + 3 * (i % 2), lambda i: min(i, 9) * 2**26)) == []


def test_pytorch_may_keep_a_little_of_each_compilation():
    assert faults(samples(lambda i: 11, lambda i: i * 2**23, steps=RECOMPILED)) == []


@pytest.mark.parametrize(
    ("grown", "fault"),
    [
        (samples(lambda i: 11 + i), "live tensors grew from 23 to 31"),
        (samples(lambda i: 11, lambda i: i * 2**23), "memory grew by 64 MiB"),
        (samples(lambda i: 11, lambda i: i * 2**24, steps=RECOMPILED), "memory grew by 128 MiB"),
        (samples(lambda i: 11, off=lambda i: 0.5 * (i == 13)), "step 91: 5.0e-01 from eager"),
    ],
)
def test_a_soak_finds_what_grows_or_differs(grown, fault):
    found = faults(grown)
    assert len(found) == 1
    assert found[0].startswith(fault)


# -- baselines --------------------------------------------------------------------------------------------------------


def baselines_off(config):
    """How far the logits of each baseline are from those of the plain exchange, played in eager mode."""
    torch.manual_seed(5 + dist.get_rank())
    ids = torch.randint(0, config["vocab_size"], (5, 7))
    with torch.no_grad():
        want = bench_link.make_model(config)(ids).logits
        two = bench_link.logits_of(bench_link.make_model(config, "two_threads"))
        by_hand = bench_link.make_model(config, "by_hand")
        with torch.compiler.set_stance("force_eager"):
            got = {
                "two threads": TwoThreads(two)(ids),
                "at counts": TwoThreads(two, at_counts=True)(ids),
                "one thread": two(ids),
                "by hand": by_hand(ids).logits,
                "in halves": bench_link.in_halves(bench_link.make_model(config), ids).logits,
                "not exchanged": bench_link.in_place_of_exchange(bench_link.make_model(config), ids).logits,
            }
    return {name: (x - want).abs().max().item() for name, x in got.items()}


@pytest.mark.ranks
def test_baselines_give_equal_results_and_leaving_the_exchange_out_does_not():
    config = bench_link.SMALL | {"num_experts": 6, "num_experts_per_tok": 3}
    with Ranks(2) as ranks:
        for off in ranks.run(baselines_off, config):
            assert off.pop("not exchanged") > 1e-3
            assert all(x < 1e-5 for x in off.values()), off
