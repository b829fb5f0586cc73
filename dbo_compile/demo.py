"""The demo: Qwen3-MoE, its experts on two ranks of this machine, compiled by the `dbo` backend, shown and checked.

Every promise is checked on both ranks; the exit status is not 0 if one does not hold.
"""

from __future__ import annotations

import os
import socket
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from dbo_compile import compat
from dbo_compile.dump import finish_dumps
from dbo_compile.integrations.transformers import expert_parallel
from dbo_compile.ir.schedule import Lane
from dbo_compile.measure import measured
from dbo_compile.report import Report, reports
from dbo_compile.runtime.clock import Timeline, chart, hidden_text

WORLD_SIZE = 2
BATCH, LENGTH = 8, 64
REPEATS = 7
TOLERANCE = 1e-4
CONFIG: dict[str, Any] = {
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 512,
    "moe_intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "use_cache": False,
}


def demo(folder: Path) -> int:
    """Run the demo on two gloo ranks and leave a dump in `folder`."""
    say(f"Qwen3-MoE, {CONFIG['num_hidden_layers']} layers, random weights, float32; {CONFIG['num_experts']} experts")
    say(f"shared by {WORLD_SIZE} gloo ranks on this machine, {BATCH} x {LENGTH} tokens and one thread a rank.")
    say("Compiling takes about a minute the first time ...")
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "OMP_NUM_THREADS": "1"}
    try:
        mp.start_processes(_rank, (folder,), WORLD_SIZE, start_method="spawn")  # type: ignore[attr-defined,no-untyped-call]
    except (mp.ProcessRaisedException, mp.ProcessExitedException) as error:  # type: ignore[attr-defined]
        say(f"\nThe demo failed.\n{error}")
        return 1
    say(f"\nWritten to {folder.resolve()}: for each rank every level from placements to the rewritten graph")
    say(f"(5_graph.py), and the lane chart (lanes.svg). dbo-compile trace {folder} opens the page.")
    return 0


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
        return port


def _rank(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=WORLD_SIZE)
    with torch.no_grad():
        texts = _show(rank, folder)
    for turn in range(WORLD_SIZE):  # one rank after the other, so that lines do not mix
        _barrier()
        if turn == rank:
            say("\n".join(["", f"--- rank {rank} ".ljust(100, "-"), *texts]))
    _barrier()
    dist.destroy_process_group()


def _barrier() -> None:
    dist.barrier()


def _show(rank: int, folder: Path) -> list[str]:
    model = _model()
    torch.manual_seed(100 + rank)
    ids = torch.randint(0, CONFIG["vocab_size"], (BATCH, LENGTH))
    alone = model(ids).logits
    expert_parallel(model, ep_implementation="dbo")
    options: dict[str, Any] = {"split": "always", "dump": str(folder)}
    with compat.host_reads_in_graph():
        split: Any = torch.compile(model, backend="dbo", options=options, fullgraph=True)
        whole: Any = torch.compile(model, backend="inductor", fullgraph=True)
        logits = split(ids).logits
        report = reports()[-1]
        variants = {"eager": model, "Inductor": whole, "dbo": split}
        times = _medians({name: partial(fn, ids) for name, fn in variants.items()})
    with measured() as timelines:
        split(ids)
    finish_dumps()
    difference = (logits - alone).abs().max().item() / alone.abs().max().item()
    _check(report, difference)
    return _lines(report, difference, times, timelines[-1])


def _model() -> Any:
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(Qwen3MoeConfig(**CONFIG))  # type: ignore[no-untyped-call]
    return model.eval()


def _medians(variants: Mapping[str, Callable[[], Any]]) -> dict[str, float]:
    """Median seconds of each variant, called in turn so that drift of the machine hits all alike."""
    taken: dict[str, list[float]] = {name: [] for name in variants}
    for repeat in range(REPEATS + 1):
        for name, call in variants.items():
            _barrier()
            start = time.perf_counter()
            call()
            if repeat:  # the first call compiles
                taken[name].append(time.perf_counter() - start)
    return {name: statistics.median(seconds) for name, seconds in taken.items()}


def _check(report: Report, difference: float) -> None:
    """What the demo promises; an AssertionError here is the demo's exit status."""
    assert difference <= TOLERANCE, f"dbo differs from one process in eager mode by {difference:.2e}"
    assert report.split, f"the graph was not split: {report.reason}"
    assert report.calls_split == report.calls, f"calls were not split: {report.decline_counts}"
    assert report.levels is not None
    lanes = {s.lane for s in report.levels.outline.segments.values() if "all_to_all" in s.name}
    assert lanes == {Lane.COMM}, f"all-to-alls on {lanes}"
    assert len(report.barriers) == 0, f"unexpected barriers: {report.barriers}"


def _lines(report: Report, difference: float, times: Mapping[str, float], timeline: Timeline) -> list[str]:
    return [
        f"equal to one process in eager mode: largest difference {difference:.1e} of the largest logit",
        f"split in {report.num_microbatches} microbatches of {BATCH // 2} sequences: {report.num_segments} segments, "
        f"{report.num_unique_segments} of them compiled, {report.num_comm_ops} all-to-alls, all on the comm lane",
        f"not split: {report.barriers or 'nothing'}; program {report.fingerprint}",
        f"on trust, {len(report.obligations)} times: {next(iter(report.obligations.values()), 'nothing')}",
        hidden_text(predicted=report.hidden_comm, measured=timeline.hidden_comm),
        "step: " + ", ".join(f"{name} {seconds * 1e3:.1f} ms" for name, seconds in times.items()),
        f'split="auto", which times this for every size, would play {min(times, key=times.__getitem__)} here',
        "(two ranks on one machine talk through memory: communication is computing there, and little is gained by",
        "hiding it; benchmarks/ has the same model on a real link)",
        "measured lanes of one step:",
        chart(timeline),
    ]
