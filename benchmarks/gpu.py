"""What dual-batch overlap brings on one GPU: a stack of DeepSeek-V3-like layers whose exchange is a way to the host.

    python -m benchmarks.gpu [prefill] [decode] [capture] [auto] [--out FILE]

Every part runs alone; all of them write docs/results/gpu-<date>.md. The exchange is a stand-in that moves the bytes
over PCIe, see `host_link`. Needs no network and no transformers. `--device cpu --tiny` goes through the motions.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_model import TINY, Sizes, Stack, inputs, make_stack
from benchmarks.host_link import host_link, link_down
from benchmarks.two_threads import TwoThreads
from dbo_compile import reports
from dbo_compile.runtime.capture import CapturePlayer
from dbo_compile.runtime.cuda import CudaGraphs
from dbo_compile.runtime.graphs import Limits, Play
from dbo_compile.runtime.streams import Accelerator, StreamPlayer

PREFILL, DECODE = (1024, 2048, 4096, 8192, 16384), (32, 64, 128, 256, 512)
REPEATS = 7
Step = Callable[..., Any]


class Setting:
    """The model, where it is, and which sizes are measured."""

    def __init__(self, device: str, *, tiny: bool) -> None:
        self.device = torch.device(device, 0) if device == "cuda" else torch.device(device)
        self.sizes = TINY if tiny else Sizes()
        self.length = 4 if tiny else 256
        self.num_tokens = {"prefill": (16, 24) if tiny else PREFILL, "decode": (6, 10) if tiny else DECODE}
        self.stack: Stack = make_stack(self.sizes, device)
        self.options = {"inner": "eager"} if tiny else {}
        self.inductor = "eager" if tiny else "inductor"

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def inputs(self, phase: str, num_tokens: int) -> tuple[torch.Tensor, ...]:
        made = inputs(self.sizes, phase, num_tokens, str(self.device), self.length)
        for x in made:
            torch._dynamo.maybe_mark_dynamic(x, 0)
        return made

    def synchronize(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()

    def seconds(self, step: Callable[[], Any], calls: int = 1) -> float:
        """Of one call: on the GPU between two events, elsewhere by the clock."""
        self.synchronize()
        if not self.on_gpu:
            start = time.perf_counter()
            for _ in range(calls):
                step()
            return (time.perf_counter() - start) / calls
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(calls):
            step()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / calls

    def host_seconds(self, step: Callable[[], Any]) -> float:
        """How long the host is busy with one call, while the device has nothing else to do."""
        taken = []
        for _ in range(2 * REPEATS):
            self.synchronize()
            start = time.perf_counter()
            step()
            taken.append(time.perf_counter() - start)
        self.synchronize()
        return statistics.median(taken)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help=f"some of {', '.join(PARTS)}; all of them if none is named")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small sizes, nothing compiled: to see that it runs")
    parser.add_argument("--out", type=Path, help="the report; docs/results/gpu-<date>.md if all parts are run")
    args = parser.parse_args()
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"there is no part {', '.join(sorted(unknown))}")
    if args.device == "cuda" and not torch.cuda.is_available():
        print("skipped: there is no CUDA device")
        return
    setting = Setting(args.device, tiny=args.tiny)
    lines = header(setting)
    with torch.no_grad():
        for part in args.parts or PARTS:
            start = time.perf_counter()
            section = PARTS[part](setting)
            lines += ["", f"## {part}", "", *section, "", f"({time.perf_counter() - start:.0f} s)"]
            print("\n".join(lines[-len(section) - 5 :]), flush=True)
    whole = Path(f"docs/results/gpu-{date.today():%Y-%m-%d}.md") if not args.parts and setting.on_gpu else None
    if path := args.out or whole:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(lines) + "\n")


def header(setting: Setting) -> list[str]:
    name = torch.cuda.get_device_name() if setting.on_gpu else f"{platform.machine()} CPU"
    return [
        f"# One GPU, {date.today():%Y-%m-%d}",
        "",
        f"`python -m benchmarks.gpu {' '.join(sys.argv[1:])}`".replace(" `", "`"),
        "",
        f"{name}, torch {torch.__version__}, CUDA {torch.version.cuda}, Python {platform.python_version()}",
        "",
        f"{setting.sizes}, bf16; prefill in sequences of {setting.length}. Medians of {REPEATS} rounds in turn.",
        "",
        "The exchange is a **stand-in for one GPU**: rows go to pinned host memory and back on the copy engines. It",
        "moves the bytes of an evenly routed exchange, takes no multiprocessors, and knows no rank that might be late.",
        *([] if setting.inductor == "inductor" else ["", "Nothing is compiled here: these figures say nothing."]),
    ]


# -- steps ------------------------------------------------------------------------------------------------------------


def steps(phase: str, setting: Setting) -> list[str]:
    """Step times of every way to run the model, and what of the communication dbo hides."""
    compiled = compiled_ways(setting, phase)
    rows: list[list[str]] = []
    names: list[str] = []
    for num_tokens in reversed(setting.num_tokens[phase]):  # largest first: pinned memory and pools are made once
        x = setting.inputs(phase, num_tokens)
        ways = {name: partial(fn, *x) for name, fn in compiled.items()}
        if setting.on_gpu:
            ways |= {f"{name}, graph": captured(ways[name]) for name in ("Inductor", "two threads")}
            ways |= {"dbo, graph": partial(with_player, compiled["dbo"], capture_player(setting), *x)}
        names = names or list(ways)
        took = medians(setting, ways)
        compute, comm = alone(setting, compiled["Inductor"], x, num_tokens)
        best = min(took["dbo"], took.get("dbo, graph", took["dbo"]))
        hidden = (compute + comm - best) / min(compute, comm)
        cells = [*(f"{took[name] * 1e3:.2f}" for name in names), f"{compute * 1e3:.2f}", f"{comm * 1e3:.2f}"]
        launches = [f"{setting.host_seconds(ways[n]) * 1e3:.2f}" for n in ("dbo", "dbo, graph") if n in ways]
        rows.append([str(num_tokens), *cells, f"{hidden:.0%}", " / ".join(launches)])
        del ways
    extra = ["compute alone", "comm alone", "hidden by dbo", "host, dbo / graph"]
    return ["Milliseconds a step.", "", *table(["tokens", *names, *extra], rows[::-1])]


def compiled_ways(setting: Setting, phase: str) -> dict[str, Step]:
    """Each compiled as one graph, at the largest size, with a dynamic batch."""
    torch._dynamo.reset()
    whole = torch.compile(setting.stack, backend=setting.inductor, fullgraph=True)
    threads = TwoThreads(torch.compile(setting.stack, backend=setting.inductor, fullgraph=True), setting.device)
    dbo = dbo_step(setting, "always")
    ways: dict[str, Step] = {"eager": setting.stack, "Inductor": whole, "two threads": threads, "dbo": dbo}
    x = setting.inputs(phase, setting.num_tokens[phase][-1])
    want = setting.stack(*x)
    for name, fn in ways.items():
        worst = (fn(*x).float() - want.float()).abs().max().item()
        scale = want.float().abs().max().item()
        assert worst < 0.1 * scale, f"{name} is off by {worst}, where the largest value is {scale}"
    return ways


def dbo_step(setting: Setting, split: str) -> Step:
    """The compiled stack; on a GPU its programs are played on streams, uncaptured, until `with_player` says more."""
    step = torch.compile(setting.stack, backend="dbo", options=setting.options | {"split": split}, fullgraph=True)
    player = StreamPlayer(Accelerator(setting.device)) if setting.on_gpu else None

    def call(*x: torch.Tensor) -> Any:
        return with_player(step, player, *x)

    return call


def with_player(step: Step, player: Any, *x: torch.Tensor) -> Any:
    """Call `step` with another player of programs in the last engine that was made, if there is one yet."""
    engine = reports()[-1].engine if reports() else None
    if engine is None or player is None:
        return step(*x)
    usual, engine.player = engine.player, player
    try:
        return step(*x)
    finally:
        engine.player = usual


def capture_player(setting: Setting) -> CapturePlayer:
    player = StreamPlayer(Accelerator(setting.device))
    return CapturePlayer(player, CudaGraphs(setting.device), setting.device, Limits(clone=False))


def captured(step: Callable[[], Any]) -> Callable[[], Any]:
    """One CUDA graph of a step, as somebody would make it by hand."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
        out = step()

    def replay() -> Any:
        graph.replay()
        return out

    return replay


def alone(setting: Setting, step: Step, x: Sequence[torch.Tensor], num_tokens: int) -> tuple[float, float]:
    """Seconds of the step without communication, and of its communication without anything else."""
    s = setting.sizes
    rows = torch.randn(num_tokens * s.top_k, s.hidden, device=setting.device, dtype=torch.bfloat16)

    def communicate() -> None:
        for _ in range(2 * s.num_layers):
            host_link(rows)

    with link_down():
        compute = partial(step, *x)
        compute = captured(compute) if setting.on_gpu else compute
        took = medians(setting, {"compute": compute})
    return took["compute"], medians(setting, {"comm": communicate})["comm"]


def medians(setting: Setting, ways: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Median seconds of each, called in turn, so that a drift of the clock hits all alike."""
    calls = {}
    for name, step in ways.items():
        for _ in range(3):
            step()
        calls[name] = max(1, min(20, int(0.02 / max(1e-6, setting.seconds(step)))))
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(REPEATS):
        for name, step in ways.items():
            taken[name].append(setting.seconds(step, calls[name]))
    return {name: statistics.median(t) for name, t in taken.items()}


# -- capture ----------------------------------------------------------------------------------------------------------


def capture(setting: Setting) -> list[str]:
    """What graphs cost: of the unsplit program alone, as without us, and of both."""
    if not setting.on_gpu:
        return ["There is nothing to capture on a CPU."]
    lines = []
    for phase in ("prefill", "decode"):
        torch._dynamo.reset()
        split = [play for n in setting.num_tokens[phase] for play in plays(setting, phase, n)]
        unsplit = [play for play in split if len(play.rows) == 1]
        rows = []
        for what, chosen in (("unsplit alone", unsplit), ("both", split)):
            player = capture_player(setting)
            player.capture_all(chosen)
            each = list(player.graphs.values())
            seconds = [c.seconds for c in each]
            mib = f"{player.num_bytes / 2**20:.0f}"
            rows.append([phase, what, str(len(each)), mib, f"{sum(seconds):.2f}", f"{max(seconds):.2f}"])
            lines += [f"    {key}: {reason}" for key, reason in player.refused.items()]
            player.release()
        head = ["phase", "programs", "graphs", "MiB in all", "seconds in all", "seconds, longest"]
        lines += [*table(head, rows), ""]
    return lines


def plays(setting: Setting, phase: str, num_tokens: int) -> list[Play]:
    """How both programs are played for a size."""
    seen: list[Play] = []
    x = setting.inputs(phase, num_tokens)
    step = dbo_step(setting, "always")
    step(*x)
    engine = reports()[-1].engine
    assert engine is not None, reports()[-1].reason

    def spy(module: Any, rows: Sequence[int], args: Sequence[Any]) -> Any:
        seen.append(Play(module, rows, args))
        return StreamPlayer(Accelerator(setting.device))(module, rows, args)

    with_player(step, spy, *x)
    module, rows, args = seen[-1]
    return [Play(module, rows, args), Play(engine.ways.programs.modules[1], (sum(rows),), args)]


# -- auto -------------------------------------------------------------------------------------------------------------


def auto(setting: Setting) -> list[str]:
    """What `split="auto"` decides, size by size, with nothing set by hand."""
    lines = []
    for phase in ("prefill", "decode"):
        torch._dynamo.reset()
        options = setting.options | {"split": "auto"}
        step = torch.compile(setting.stack, backend="dbo", options=options, fullgraph=True)
        for num_tokens in reversed(setting.num_tokens[phase]):
            x = setting.inputs(phase, num_tokens)
            for _ in range(30):
                step(*x)
            setting.synchronize()
        engine = reports()[-1].engine
        assert engine is not None, reports()[-1].reason
        rows = [[phase, str(size), str(decision)] for size, decision in sorted(engine.decisions.items())]
        rows = rows or [[phase, "none", f"nothing was timed: {dict(engine.calls.declined)}"]]
        lines += [*table(["phase", "tokens/elements", "decision"], rows), ""]
    return lines


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]


PARTS: dict[str, Callable[[Setting], list[str]]] = {
    "prefill": partial(steps, "prefill"),
    "decode": partial(steps, "decode"),
    "capture": capture,
    "auto": auto,
}


if __name__ == "__main__":
    main()
