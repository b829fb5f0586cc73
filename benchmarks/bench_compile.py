"""Compile cost: the first call of a model of 2 to 64 layers, with dbo and with Inductor on the whole graph.

    python -m benchmarks.bench_compile [--layers 2 8 32 64] [--quick] [--write]

Qwen3-MoE with expert parallelism (exact splits) over a group of one rank: the graph is that of any number of ranks, and
no other rank's compilation is waited for. Each figure is of a process of its own with empty caches: the first call
less the third. Of the ways with regions, the layer is a `torch.compiler.nested_compile_region`. Where the seconds go is
what PyTorch counts itself, and for our passes what the call of them took. How long these take up to 50,000 nodes is
`bench_levels`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from typing import Any

import torch
import torch.distributed as dist
from torch._dynamo.utils import compilation_time_metrics

from benchmarks.bench_levels import clocked
from benchmarks.bench_link import CONFIG, SMALL, make_model
from benchmarks.bench_sizes import MOST_TRIALS
from benchmarks.results import Table, options, publish
from dbo_compile import backend, compat, compilation, reports

VARIANTS: dict[str, dict[str, Any]] = {
    "Inductor": {"backend": "inductor"},
    "dbo": {"backend": "dbo", "options": {"split": "always", "gate": "never"}},
    "dbo, auto": {"backend": "dbo"},
}
VARIANTS |= {f"{name}, regions": kwargs for name, kwargs in VARIANTS.items()}
MOST_AUTO_LAYERS = 32
"""With more layers auto is left out: it takes as long as dbo and Inductor together."""
PARTS = "Dynamo", "AOTAutograd", "our passes", "Inductor"


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--layers", type=int, nargs="+")
    parser.add_argument("--one", nargs=2, metavar=("VARIANT", "LAYERS"), help="measure one figure, in this process")
    args = parser.parse_args()
    if args.one:
        print(json.dumps(first_call(args.one[0], int(args.one[1]), small=args.quick)))
        return
    torch.set_num_threads(1)  # as in the processes that measure: the report names it
    layers = args.layers or ([2, 4] if args.quick else [2, 8, 32, 64])
    found = {n: {v: in_fresh_process(v, n, small=args.quick) for v in VARIANTS if is_measured(v, n)} for n in layers}
    about = (
        'Seconds of the first call, empty caches, one thread. `dbo`: split="always", so each distinct segment is '
        "compiled once. `dbo, auto`: until the trials are over; they compile the whole graph with Inductor as well, as "
        "one of the ways to play it. `regions`: each layer is a `torch.compiler.nested_compile_region`."
    )
    tables = [seconds(found), growth(found), parts(found)]
    publish("compile", "Compile cost", tables, about=about, write=args.write)


def is_measured(variant: str, num_layers: int) -> bool:
    return "auto" not in variant or num_layers <= MOST_AUTO_LAYERS


Found = dict[int, dict[str, dict[str, float]]]


def seconds(found: Found) -> Table:
    rows = [
        (n, *(f"{each[v]['seconds']:.1f}" if v in each else "" for v in VARIANTS),
         *(f"{each[v]['seconds'] / each['Inductor']['seconds']:.2f}" for v in ("dbo", "dbo, regions")),
         int(each["dbo"]["segments"]), int(each["dbo"]["codes"]))
        for n, each in found.items()
    ]  # fmt: skip
    ratios = "dbo / Inductor", "dbo, regions / Inductor"
    return Table(("layers", *VARIANTS, *ratios, "segments", "distinct"), rows, title="First call")


def growth(found: Found) -> Table:
    few = min(found)
    rows = [
        (n, *(f"{each[v]['seconds'] / found[few][v]['seconds']:.2f}" if v in each else "" for v in VARIANTS))
        for n, each in found.items()
    ]
    return Table(("layers", *VARIANTS), rows, title=f"In units of {few} layers")


def parts(found: Found) -> Table:
    """Where the seconds of the first call go; after it, auto compiles the whole graph with Inductor, too."""
    rows = [
        (n, variant, *(f"{each[variant][part]:.1f}" for part in PARTS))
        for n, each in found.items()
        for variant in VARIANTS
        if "auto" not in variant
    ]
    note = (
        "Dynamo traces twice for dbo: the first time it does not know yet which dim counts tokens (`mark_dynamic` or "
        "the decorator say so beforehand). AOTAutograd is what is left: it runs the graph twice on fake tensors."
    )
    return Table(("layers", "first call", *PARTS), rows, title="Where it goes", note=note)


def in_fresh_process(variant: str, num_layers: int, *, small: bool) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as cache:
        one = dict.fromkeys(("OMP_NUM_THREADS", "TORCHINDUCTOR_COMPILE_THREADS"), "1")
        env = os.environ | one | {"TORCHINDUCTOR_CACHE_DIR": cache}
        quick = ["--quick"] if small else []
        command = [sys.executable, "-m", "benchmarks.bench_compile", *quick, "--one", variant, str(num_layers)]
        out = subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE, text=True).stdout
    found: dict[str, float] = json.loads(out.splitlines()[-1])
    return found


def first_call(variant: str, num_layers: int, *, small: bool) -> dict[str, float]:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    config = (SMALL if small else CONFIG) | {"num_hidden_layers": num_layers}
    model = make_model(config)
    if "regions" in variant:
        layer = type(model.model.layers[0])
        layer.forward = torch.compiler.nested_compile_region(layer.forward)
    compiled = torch.compile(model, fullgraph=True, **VARIANTS[variant])
    ids = torch.zeros(6, 32, dtype=torch.long)
    ours = {"all": 0.0, "codes": 0.0}
    backend.compile_graph = clocked(backend.compile_graph, "all", ours)
    compilation.inner.compile_codes = clocked(compilation.inner.compile_codes, "codes", ours)
    with torch.no_grad(), compat.host_reads_in_graph():
        took = [timed(compiled, ids)]
        went = where_it_went(ours["all"] - ours["codes"])
        took += [timed(compiled, ids) for _ in range(MOST_TRIALS - 1 if "auto" in variant else 2)]
    report = reports()[-1] if reports() else None
    segments, codes = (report.num_segments, report.num_unique_segments) if report else (0, 0)
    compiling = sum(t - took[-1] for t in took)
    return {"seconds": compiling, "segments": segments, "codes": codes, **went}


def where_it_went(our_passes: float) -> dict[str, float]:
    """The seconds of each of `PARTS` so far, by PyTorch's own clocks."""
    spent = {name: sum(seconds) for name, seconds in compilation_time_metrics.items()}
    in_backend = spent["OutputGraph.call_user_compiler"]
    inductor = spent["compile_fx.<locals>.fw_compiler_base"]
    dynamo = spent["_compile.compile_inner"] - in_backend
    return dict(zip(PARTS, (dynamo, in_backend - our_passes - inductor, our_passes, inductor), strict=True))


def timed(compiled: Any, ids: torch.Tensor) -> float:
    start = time.perf_counter()
    compiled(ids)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
