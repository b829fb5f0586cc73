"""The GPU benchmark goes through its motions on a CPU, so that a session with a GPU finds figures and no bugs."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from benchmarks import gpu, gpu_programs, gpu_setting, gpu_ways
from benchmarks.gpu_model import TINY, inputs, make_stack
from benchmarks.gpu_setting import Setting
from benchmarks.gpu_steps import alone, equal_ones, note_captures
from benchmarks.host_link import LINK, host_link, link_down
from benchmarks.results import Timing
from benchmarks.two_threads import TwoThreads
from dbo_compile.runtime.capture import CapturePlayer
from dbo_compile.runtime.graphs import Limits
from dbo_compile.runtime.ways import played
from tests.runtime.fake_device import FakeDevice
from tests.runtime.test_capture_graphs import FakeGraphs

WAYS = ["eager", "Inductor", "two threads", "dbo"]
HIDDEN = ["hidden by two threads", "hidden by dbo"]
OTHERS = ["compute alone", "comm alone", *HIDDEN, "others / dbo", "host, dbo / graph"]


class FakeEvent:
    """Of a device that computes while it is told to."""

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.at = time.perf_counter()

    def synchronize(self):
        pass

    def elapsed_time(self, end):
        return (end.at - self.at) * 1e3


@pytest.fixture
def like_a_gpu(monkeypatch):
    """What the benchmark asks of a GPU, on the CPU; a list of the devices that captured."""
    devices = []
    monkeypatch.setattr(gpu_setting, "REPEATS", 1)
    monkeypatch.setattr(gpu_setting.Setting, "on_gpu", True)
    monkeypatch.setattr(gpu_ways, "Accelerator", lambda device: FakeDevice())
    monkeypatch.setattr(gpu_ways, "CudaGraphs", lambda device: devices.append(FakeGraphs()) or devices[-1])
    monkeypatch.setattr("torch.cuda.Event", FakeEvent)
    for name in ("synchronize", "empty_cache", "get_device_name"):
        monkeypatch.setattr(f"torch.cuda.{name}", lambda name=name: name)
    return devices


def report_of(monkeypatch, path, *args):
    """The lines that a run writes."""
    monkeypatch.setattr("sys.argv", ["gpu", *args, "--device", "cpu", "--tiny", "--out", str(path)])
    gpu.main()
    return path.read_text().splitlines()


def row_of(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


@pytest.mark.slow
def test_parts_run_and_their_report_is_written(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gpu_setting, "REPEATS", 1)
    lines = report_of(monkeypatch, tmp_path / "report.md", "decode", "capture")
    assert [line for line in lines if line.startswith("## ")] == ["## decode", "## capture"]
    heads = [row_of(line) for line in lines if line.startswith("| tokens |")]
    assert heads == [["tokens", *WAYS, *OTHERS]]
    assert "stand-in" in "".join(lines[:12])
    assert "## capture" in capsys.readouterr().out


@pytest.mark.slow
def test_all_parts_run_as_on_a_gpu(monkeypatch, tmp_path, like_a_gpu):
    lines = report_of(monkeypatch, tmp_path / "report.md")
    assert [line for line in lines if line.startswith("## ")] == [f"## {name}" for name in gpu.PARTS]
    rows = [row_of(line) for line in lines if line.startswith("| ") and "---" not in line]
    heads, sizes = (rows[0], rows[3]), rows[1:3] + rows[4:6]
    assert heads == 2 * (["tokens", *WAYS, "Inductor, graph", "two threads, graph", "dbo, graph", *OTHERS],)
    assert [row[0] for row in sizes] == ["24", "16", "10", "6"]
    assert not any(cell == "-" or "nan" in cell for row in sizes for cell in row)
    assert [row[:3] for row in rows[7:11]] == [
        [phase, what, num] for phase in ("decode", "prefill") for what, num in (("unsplit alone", "2"), ("both", "4"))
    ]
    assert [row[:2] for row in rows[12:]] == [["decode", "10"], ["decode", "6"], ["prefill", "24"], ["prefill", "16"]]
    assert all("split" in decision and num_calls.isdigit() for _, _, decision, num_calls in rows[12:])
    assert not any("**" in line for line in lines[12:])


@torch.no_grad()
def test_every_way_of_dbo_is_played_by_its_own_player(monkeypatch):
    setting = Setting("cpu", tiny=True)
    x = setting.inputs("decode", 10)
    by = []

    def named(name):
        return lambda module, rows, args: by.append((name, rows)) or played(module, rows, args)

    step = gpu_ways.dbo_step(setting, "always")
    step(*x)
    calls = gpu_ways.calls_of(setting, {"dbo": step}, {name: named(name) for name in ("dbo", "dbo, graph")}, x)
    for name in ("dbo, graph", "dbo", "dbo, graph"):
        calls[name]()
    assert by == [("dbo, graph", (5, 5)), ("dbo", (5, 5)), ("dbo, graph", (5, 5))]
    split, unsplit = gpu_programs.plays(setting, step, "decode", 6)
    assert (split.rows, unsplit.rows) == ((3, 3), (6,))
    assert len(by) == 3


# -- what goes wrong --------------------------------------------------------------------------------------------------


def lines_of(monkeypatch, path, seconds=100.0, **parts):
    """The report of these parts, and what failed."""
    monkeypatch.setattr(gpu, "PARTS", {name: gpu.Part(lines, 1) for name, lines in parts.items()})
    setting = Setting("cpu", tiny=True)
    gpu.run(list(parts), setting, gpu.Report(path), time.monotonic() + seconds)
    return [line for line in path.read_text().splitlines() if line and not line.startswith("(")], setting.faults


def test_a_part_that_fails_keeps_what_it_measured_and_the_next_one_runs(monkeypatch, tmp_path):
    path = tmp_path / "report.md"

    def fails(setting):
        yield "measured"
        assert path.read_text().endswith("measured\n")
        raise KeyError("mine")

    lines, faults = lines_of(monkeypatch, path, first=fails, second=lambda setting: iter(["well"]))
    assert lines == ["## first", "measured", "**first failed: KeyError: 'mine'**", "## second", "well"]
    assert faults == ["first failed: KeyError: 'mine'"]


def test_what_fails_makes_the_run_fail(monkeypatch, tmp_path):
    broken = gpu.Part(lambda setting: setting.fault("it is broken") or iter([]), 1)
    monkeypatch.setattr(gpu, "PARTS", {"broken": broken})
    with pytest.raises(SystemExit, match="it is broken"):
        report_of(monkeypatch, tmp_path / "report.md")


def test_out_of_time_the_largest_size_is_measured_and_the_others_are_named(monkeypatch, tmp_path):
    def part(setting):
        for n in setting.sizes_in_time("decode"):
            yield f"{n} tokens"
            setting.deadline = 0.0

    lines, faults = lines_of(monkeypatch, tmp_path / "report.md", first=part)
    assert lines == ["## first", "10 tokens", "Out of time: decode of 6 tokens was left out."]
    lines, _ = lines_of(monkeypatch, tmp_path / "report.md", seconds=-1.0, first=part, second=part)
    assert lines == ["Out of time: first, second left out."]
    assert not faults


def test_parts_have_their_shares_of_the_time_that_is_left(monkeypatch, tmp_path):
    deadlines = []
    monkeypatch.setattr("time.monotonic", lambda: 100.0)  # parts that take no time leave all of it to the next ones

    def part(setting):
        deadlines.append(setting.deadline)
        yield ""

    lines_of(monkeypatch, tmp_path / "report.md", seconds=90.0, first=part, second=part, third=part)
    assert deadlines == [130, 145, 190]


def test_a_flipped_choice_is_rounding_and_a_wrong_quarter_of_the_rows_is_not(capsys):
    setting, want = Setting("cpu", tiny=True), torch.randn(20, 3)

    def off(num_rows):
        return lambda: torch.cat([want[:num_rows] + want.abs().max(), want[num_rows:]])

    def fails():
        raise RuntimeError("out of memory\nand so on")

    calls = {"eager": lambda: want, "flipped": off(5), "wrong": off(6), "broken": fails}
    kept = equal_ones(setting, calls, 20)
    assert list(kept) == ["eager", "flipped", "wrong"]
    assert setting.faults == [
        "wrong on 20 tokens is off in 6 of 20 rows",
        "broken on 20 tokens failed: RuntimeError: out of memory",
    ]
    assert "flipped 25.0%, wrong 30.0%." in setting.notes[-1]


def test_what_is_not_captured_is_not_passed_off_as_captured():
    graphs, setting = FakeGraphs(), Setting("cpu", tiny=True)
    graphs.error = RuntimeError("it waits for the device")
    player = CapturePlayer(played, graphs, setting.device, Limits())

    def program(lanes, x):
        return (x + 1,)

    for _ in range(3):
        player(program, (3,), [torch.ones(3)])
    note_captures(setting, {"dbo": played, "dbo, graph": player}, 3)
    assert setting.faults == ["dbo, graph on 3 tokens was not captured: ['it waits for the device']"]


# -- compute and communication alone ----------------------------------------------------------------------------------


def test_both_are_captured_and_what_stands_for_the_exchange_is_taken_off(monkeypatch, like_a_gpu):
    took = {"step": 0.5, "copies": 0.1, "comm": 0.3}
    ups = {}

    def timings(setting, calls):
        ups.update(dict.fromkeys(calls, LINK.is_up))
        return {name: Timing(took[name], 0.0) for name in calls}

    monkeypatch.setattr(Setting, "timings", timings)
    compute, comm = alone(Setting("cpu", tiny=True), lambda x: [x + 1], [torch.ones(5, 3)], 5)
    assert (compute, comm) == pytest.approx((0.4, 0.3))
    assert ups == {"step": False, "copies": False, "comm": True}
    assert [graphs.log.count("capture") for graphs in like_a_gpu] == [1, 1, 1]


# -- auto -------------------------------------------------------------------------------------------------------------


class Deciding:
    """An engine that decides at some call."""

    def __init__(self, at):
        self.at, self.num_calls, self.decisions = at, 0, {"another": "split (1 ms)"}
        self.calls = SimpleNamespace(declined={"too few": 3})

    def __call__(self):
        self.num_calls += 1
        if self.num_calls == self.at:
            self.decisions["this"] = "unsplit (2 ms)"


@pytest.mark.parametrize(
    ("at", "told", "num_calls"),
    [
        (45, ("unsplit (2 ms)", "45"), 45),
        (200, ("none yet; not split so far: {'too few': 3}", "100, the most"), 100),
    ],
)
def test_a_size_is_called_until_it_is_decided(monkeypatch, at, told, num_calls):
    engine = Deciding(at)
    monkeypatch.setattr(gpu_programs, "last_engine", lambda: engine)
    assert gpu_programs.decided(engine, []) == told
    assert engine.num_calls == num_calls


# -- the command line, two threads, the link --------------------------------------------------------------------------


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


@torch.no_grad()
def test_two_threads_are_compiled_once_for_all_sizes():
    compiled = CompileCounter()
    threads = TwoThreads(torch.compile(make_stack(TINY, "cpu"), backend=compiled, fullgraph=True), torch.device("cpu"))
    setting = Setting("cpu", tiny=True)
    for num_tokens in (10, 6):
        threads(*setting.inputs("decode", num_tokens))
    assert compiled.frame_count == 1


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
