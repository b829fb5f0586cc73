"""How long our own passes take: from the ATen graph of a DeepSeek-V3-shaped model to the emitted, proven programs.

    python -m benchmarks.bench_levels [--layers 4 16 61 204]

The weights are on the meta device and nothing runs: one rank of a gloo group, expert parallelism with exact splits over
it, 256 experts. Each layer is a nested compile region, or tracing 204 of them would take ten minutes; our passes get
the same graph. Tracing (Dynamo, AOTAutograd) and Inductor are not ours and are listed or left out.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3DecoderLayer

from dbo_compile import backend, compilation, reports
from dbo_compile.integrations.transformers import expert_parallel

PASSES: dict[str, Any] = {
    "inline": (backend, "inline_regions"),
    "reinplace": (backend.compat, "reinplace"),
    "analyze": (compilation, "analyze"),
    "cut": (compilation, "cut"),
    "outline": (compilation, "outline"),
    "order": (compilation, "make_schedule"),
    "lower, sync, prove": (compilation, "make_program"),
    "emit": (compilation, "emit"),
}


class Done(Exception):
    """Everything that is measured is over; the model, whose weights are not there, must not run."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 16, 61, 204])
    sizes = parser.parse_args().layers
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    DeepseekV3DecoderLayer.forward = torch.compiler.nested_compile_region(DeepseekV3DecoderLayer.forward)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; seconds\n")
    names = [*PASSES, "all of it"]
    print(f"| layers | nodes | segments | codes | {' | '.join(names)} | ms per 1000 nodes |")
    print("|" + "---|" * (len(names) + 5))
    for num_layers in sizes:
        nodes, seconds = measure(num_layers)
        report = reports()[-1]
        per_node = seconds["all of it"] / nodes * 1e6
        row = [num_layers, nodes, report.num_segments, report.num_unique_segments]
        print(f"| {' | '.join(map(str, row))} | {' | '.join(f'{seconds[n]:.2f}' for n in names)} | {per_node:.0f} |")


def measure(num_layers: int) -> tuple[int, dict[str, float]]:
    """The number of ATen nodes of a model, and the seconds that each pass takes on them."""
    torch._dynamo.reset()
    seconds = dict.fromkeys(PASSES, 0.0)
    nodes = 0

    def timed(gm: Any, *args: Any) -> tuple[Any, Callable[..., Any]]:
        nonlocal nodes
        start = time.perf_counter()
        made, _ = compile_graph(gm, *args)
        seconds["all of it"] = time.perf_counter() - start
        nodes = len(made.levels.graph.nodes)
        return made, done

    def done(*_: Any) -> None:
        raise Done

    compile_graph, backend.compile_graph = backend.compile_graph, timed
    originals = {name: getattr(*where) for name, where in PASSES.items()}
    for name, (module, attribute) in PASSES.items():
        setattr(module, attribute, clocked(originals[name], name, seconds))
    try:
        compiled = torch.compile(model(num_layers), backend="dbo", options={"inner": "eager"}, fullgraph=True)
        with torch.no_grad():
            compiled(torch.zeros(8, 64, dtype=torch.long, device="meta"))
    except Done:
        pass
    finally:
        backend.compile_graph = compile_graph
        for name, (module, attribute) in PASSES.items():
            setattr(module, attribute, originals[name])
    return nodes, seconds


def clocked(fn: Callable[..., Any], name: str, seconds: dict[str, float]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        result = fn(*args, **kwargs)
        seconds[name] += time.perf_counter() - start
        return result

    return call


def model(num_layers: int) -> Any:
    """DeepSeek-V3 as published, but for the number of layers."""
    with torch.device("meta"):
        made = AutoModelForCausalLM.from_config(DeepseekV3Config(num_hidden_layers=num_layers, use_cache=False))
    return expert_parallel(made.eval())


if __name__ == "__main__":
    main()
