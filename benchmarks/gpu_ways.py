"""The ways to run the model of the GPU benchmark: eager, by Inductor, in two threads, and by dbo; captured or not."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from typing import Any

import torch

from benchmarks.gpu_setting import Call, Setting
from benchmarks.two_threads import TwoThreads
from dbo_compile import reports
from dbo_compile.runtime.capture import CapturePlayer
from dbo_compile.runtime.cuda import CudaGraphs
from dbo_compile.runtime.engine import Engine
from dbo_compile.runtime.graphs import Limits, Player
from dbo_compile.runtime.streams import Accelerator, StreamPlayer
from dbo_compile.runtime.ways import played

Step = Callable[..., Any]
GRAPH_OF = {"Inductor": "Inductor, graph", "two threads": "two threads, graph"}
"""What somebody would capture by hand."""


def compiled_ways(setting: Setting, phase: str) -> dict[str, Step]:
    """Each compiled as one graph, at the largest size, with a dynamic batch; a way that does not compile is left out.

    "dbo" plays with the players of dbo until `with_player` says more.
    """
    torch._dynamo.reset()
    inductor = partial(torch.compile, setting.stack, backend=setting.inductor, fullgraph=True)
    ways: dict[str, Step] = {
        "eager": setting.stack,
        "Inductor": inductor(),
        "two threads": TwoThreads(inductor(), setting.device),
        "dbo": dbo_step(setting, "always"),
    }
    x = setting.inputs(phase, max(setting.num_tokens[phase]))
    compiled = {}
    for name, step in ways.items():
        with setting.going_on(f"the first call of {name}"):
            step(*x)
            compiled[name] = step
    return compiled


def dbo_step(setting: Setting, split: str) -> Step:
    options = setting.options | {"split": split}
    step: Step = torch.compile(setting.stack, backend="dbo", options=options, fullgraph=True)
    return step


def calls_of(
    setting: Setting, compiled: Mapping[str, Step], players: Mapping[str, Player], x: Sequence[torch.Tensor]
) -> dict[str, Call]:
    """Every way on these inputs; "dbo" by each of the players."""
    calls: dict[str, Call] = {name: partial(step, *x) for name, step in compiled.items()}
    if setting.on_gpu:
        calls |= {graph: captured(setting, calls[name]) for name, graph in GRAPH_OF.items() if name in calls}
    if "dbo" in compiled:
        calls |= {name: partial(with_player, compiled["dbo"], player, *x) for name, player in players.items()}
    return calls


def dbo_players(setting: Setting) -> dict[str, Player]:
    """What plays the programs of dbo, by the name of the way. Results of a graph stay in it, as with the other ways."""
    players: dict[str, Player] = {"dbo": uncaptured(setting)}
    return players | {"dbo, graph": capture_player(setting, Limits(clone=False))} if setting.on_gpu else players


def uncaptured(setting: Setting) -> Player:
    return StreamPlayer(Accelerator(setting.device)) if setting.on_gpu else played


def capture_player(setting: Setting, limits: Limits) -> CapturePlayer:
    return CapturePlayer(uncaptured(setting), CudaGraphs(setting.device), setting.device, limits)


def with_player(step: Step, player: Player, *x: torch.Tensor) -> Any:
    """Call `step`, which was compiled last and called before, with another player of programs."""
    engine = last_engine()
    usual, engine.player = engine.player, player
    try:
        return step(*x)
    finally:
        engine.player = usual


def last_engine() -> Engine:
    report = reports()[-1]
    assert report.engine is not None, report.reason
    return report.engine


def captured(setting: Setting, call: Call) -> Call:
    """One CUDA graph of `call`, made at the first replay; `call` itself where there are no CUDA graphs."""
    if not setting.on_gpu:
        return call

    @cache
    def recorded() -> tuple[torch.cuda.CUDAGraph, Any]:
        call()
        return CudaGraphs(setting.device).capture(call)

    def replay() -> Any:
        graph, result = recorded()
        graph.replay()
        return result

    return replay
