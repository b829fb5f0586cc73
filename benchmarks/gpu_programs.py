"""What CUDA graphs cost, and what `split="auto"` decides."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from benchmarks.gpu_setting import Setting
from benchmarks.gpu_steps import row
from benchmarks.gpu_ways import Step, capture_player, dbo_step, last_engine, uncaptured, with_player
from dbo_compile.runtime.capture import CapturePlayer
from dbo_compile.runtime.graphs import Limits, Play

PHASES = "decode", "prefill"
"""What takes longer comes last."""
MOST_CALLS = 100
"""Of one size that is to be decided. The closest race takes 57: one call for the gate, 8 measured, 4 ways 12 times."""


# -- capture ----------------------------------------------------------------------------------------------------------


def capture(setting: Setting) -> Iterator[str]:
    """What graphs cost: of the unsplit program alone, as without us, and of both."""
    if not setting.on_gpu:
        yield "There is nothing to capture on a CPU."
        return
    yield row("phase", "programs", "graphs", "MiB in all", "seconds in all", "seconds, longest")
    yield row(*["---"] * 6)
    for phase in PHASES:
        with setting.going_on(f"capturing {phase}"):
            torch._dynamo.reset()
            step = dbo_step(setting, "always")
            both = [play for n in setting.sizes_in_time(phase) for play in plays(setting, step, phase, n)]
            yield captured_row(setting, phase, "unsplit alone", [play for play in both if len(play.rows) == 1])
            yield captured_row(setting, phase, "both", both)


def captured_row(setting: Setting, phase: str, what: str, chosen: Sequence[Play]) -> str:
    """All arguments are read where they lie, so that only what the graphs need counts."""
    player = capture_player(setting, Limits(static=frozenset(range(len(chosen[0].args))), clone=False))
    player.capture_all(chosen)
    seconds = [c.seconds for c in player.graphs.values()]
    mib, num_graphs = player.num_bytes / 2**20, len(player.graphs)
    for key, reason in player.refused.items():
        setting.fault(f"{phase}: {key} was not captured: {reason}")
    player.release()
    return row(phase, what, str(num_graphs), f"{mib:.0f}", f"{sum(seconds):.2f}", f"{max(seconds, default=0):.2f}")


def plays(setting: Setting, step: Step, phase: str, num_tokens: int) -> list[Play]:
    """How the split program and the unsplit one are played for a size."""
    seen: list[Play] = []
    player = uncaptured(setting)

    def spy(module: Any, rows: Sequence[int], args: Sequence[Any]) -> tuple[Any, ...]:
        seen.append(Play(module, rows, args))
        return player(module, rows, args)

    x = setting.inputs(phase, num_tokens)
    step(*x)
    with_player(step, spy, *x)
    split = seen[-1]
    return [split, Play(last_engine().ways.programs.modules[1], (sum(split.rows),), split.args)]


# -- auto -------------------------------------------------------------------------------------------------------------


def auto(setting: Setting) -> Iterator[str]:
    """What `split="auto"` decides, size by size, with nothing set by hand."""
    yield row("phase", "tokens", "decision", "calls that it took")
    yield row(*["---"] * 4)
    for phase in PHASES:
        torch._dynamo.reset()
        step = dbo_step(setting, "auto")
        for num_tokens in setting.sizes_in_time(phase):
            with setting.going_on(f"deciding {phase} of {num_tokens} tokens"):
                yield row(phase, str(num_tokens), *decided(step, setting.inputs(phase, num_tokens)))
        with setting.going_on(f"releasing the graphs of {phase}"):
            player = last_engine().player
            if isinstance(player, CapturePlayer):
                setting.notes += [f"{phase}: {key} was not captured: {why}" for key, why in player.refused.items()]
                player.release()  # reports keep the engine


def decided(step: Step, x: Sequence[torch.Tensor]) -> tuple[str, str]:
    """The decision for this size, and how many calls it took."""
    step(*x)  # the first call of all compiles; one call decides nothing
    engine = last_engine()
    known = set(engine.decisions)
    for num_calls in range(2, MOST_CALLS + 1):
        step(*x)
        if new := [decision for size, decision in engine.decisions.items() if size not in known]:
            return str(new[0]), str(num_calls)
    return f"none yet; not split so far: {dict(engine.calls.declined)}", f"{MOST_CALLS}, the most"
