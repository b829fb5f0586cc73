"""The GPU benchmark goes through its motions on a CPU, so that a session with a GPU finds figures and no bugs."""

from __future__ import annotations

import pytest
import torch

from benchmarks import gpu
from benchmarks.gpu_model import TINY, inputs, make_stack
from benchmarks.host_link import LINK, host_link, link_down
from benchmarks.two_threads import TwoThreads


@pytest.mark.slow
def test_parts_run_and_their_report_is_written(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gpu, "REPEATS", 1)
    argv = ["gpu", "decode", "capture", "--device", "cpu", "--tiny", "--out", str(tmp_path / "report.md")]
    monkeypatch.setattr("sys.argv", argv)
    gpu.main()
    lines = (tmp_path / "report.md").read_text().splitlines()
    assert [line for line in lines if line.startswith("## ")] == ["## decode", "## capture"]
    heads = [line for line in lines if line.startswith("| tokens |")]
    ways = "eager | Inductor | two threads | dbo"
    assert heads == [f"| tokens | {ways} | compute alone | comm alone | hidden by dbo | host, dbo / graph |"]
    assert "stand-in" in "".join(lines[:12])
    assert "## capture" in capsys.readouterr().out


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["gpu"])
    gpu.main()
    assert capsys.readouterr().out == "skipped: there is no CUDA device\n"


@pytest.mark.parametrize("phase", ["prefill", "decode"])
@torch.no_grad()
def test_two_threads_compute_what_one_does(phase):
    stack = make_stack(TINY, "cpu")
    x = inputs(TINY, phase, 21, "cpu", length=3)
    torch.testing.assert_close(TwoThreads(stack, torch.device("cpu"))(*x), stack(*x), rtol=0.02, atol=0.02)


def test_an_error_in_a_thread_reaches_the_caller_and_the_other_ends():
    def broken(x, *, exchange):
        exchange(x)
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        TwoThreads(broken, torch.device("cpu"))(torch.ones(5, 3))


def test_threads_take_turns_at_every_exchange():
    turns = []

    def model(x, *, exchange):
        for step in range(3):
            turns.append((step, len(x)))
            x = exchange(x)
        return x

    TwoThreads(model, torch.device("cpu"))(torch.ones(5, 3))
    assert turns == [(step, size) for step in range(3) for size in (3, 2)]


def test_a_link_that_is_down_moves_nothing_and_comes_up_again():
    x = torch.randn(5, 3)
    with link_down():
        assert not LINK.is_up
        assert torch.equal(host_link(x), x)
    assert LINK.is_up
    assert torch.equal(host_link(x), x)
