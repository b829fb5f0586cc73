"""Step times of every way to run the model, and what of the communication is hidden."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import torch

from benchmarks.gpu_setting import Call, Setting
from benchmarks.gpu_ways import GRAPH_OF, Step, calls_of, captured, compiled_ways, dbo_players
from benchmarks.host_link import host_link, link_down
from benchmarks.results import Timing
from dbo_compile import reports
from dbo_compile.runtime.capture import CapturePlayer
from dbo_compile.runtime.gate import MOST_ROUNDED, difference
from dbo_compile.runtime.graphs import Player

NONE = "-"
HIDDEN = {"hidden by two threads": "two threads", "hidden by dbo": "dbo"}
"""What of the shorter one of computing and communicating is hidden behind the other."""


def steps(phase: str, setting: Setting) -> Iterator[str]:
    """A table with a row for each size, as soon as it is measured."""
    compiled = compiled_ways(setting, phase)
    names = ["eager", "Inductor", "two threads", "dbo"]
    names += [*GRAPH_OF.values(), "dbo, graph"] if setting.on_gpu else []
    yield "Milliseconds a step, and half of the distance between their quartiles."
    yield ""
    yield row("tokens", *names, "compute alone", "comm alone", *HIDDEN, "others / dbo", "host, dbo / graph")
    yield row(*["---"] * (len(names) + 3 + len(HIDDEN) + 2))
    for num_tokens in setting.sizes_in_time(phase):
        with setting.going_on(f"{phase} of {num_tokens} tokens"):
            yield row(str(num_tokens), *measured(setting, phase, compiled, names, num_tokens))
    if "dbo" in compiled and (why := reports()[-1].reason or reports()[-1].decline_counts):
        setting.fault(f"dbo did not split every step: {why}")


def row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def measured(
    setting: Setting, phase: str, compiled: Mapping[str, Step], names: Sequence[str], num_tokens: int
) -> list[str]:
    """The cells of one size."""
    x = setting.inputs(phase, num_tokens)
    took, host = raced(setting, compiled, x, num_tokens)
    compute = comm = math.nan
    with setting.going_on(f"compute and communication of {num_tokens} tokens alone"):
        compute, comm = alone(setting, compiled["Inductor"], x, num_tokens)
    return [
        *(took[name].ms(2) if name in took else NONE for name in names),
        *(f"{seconds * 1e3:.2f}" for seconds in (compute, comm)),
        *(f"{(compute + comm - best(took, [name])) / min(compute, comm):.0%}" for name in HIDDEN.values()),
        f"{best(took, ['eager', 'Inductor', 'two threads']) / best(took, ['dbo']):.2f}",
        " / ".join(timing.ms(2) for timing in host) or NONE,
    ]


def raced(
    setting: Setting, compiled: Mapping[str, Step], x: Sequence[torch.Tensor], num_tokens: int
) -> tuple[dict[str, Timing], list[Timing]]:
    """Of all ways, and how long dbo keeps the host; the graphs of this size are gone afterwards."""
    players = dbo_players(setting)
    calls = equal_ones(setting, calls_of(setting, compiled, players, x), num_tokens)
    took = setting.timings(calls)
    note_captures(setting, players, num_tokens)
    return took, [setting.host_timing(calls[name]) for name in players if name in calls]


def equal_ones(setting: Setting, calls: Mapping[str, Call], num_tokens: int) -> dict[str, Call]:
    """Those of the ways that run, warm; notes how many rows of each differ from those of eager.

    Rounding flips the choice of an expert here and there and then a whole row differs, so rows are judged, as by the
    gate of dbo.
    """
    want, shares = calls["eager"](), {}
    for name, call in calls.items():
        with setting.going_on(f"{name} on {num_tokens} tokens"):
            off = difference([setting.warm_up(call)], [want])
            shares[name] = off.bad_rows[0] / off.num_rows[0]
            if shares[name] > MOST_ROUNDED:
                setting.fault(f"{name} on {num_tokens} tokens is off in {off.bad_rows[0]} of {off.num_rows[0]} rows")
    listed = ", ".join(f"{name} {share:.1%}" for name, share in shares.items() if name != "eager")
    setting.notes.append(f"{num_tokens} tokens: rows that differ from eager's by more than rounding: {listed}.")
    return {name: calls[name] for name in shares}


def note_captures(setting: Setting, players: Mapping[str, Player], num_tokens: int) -> None:
    """Say so if what counts as captured was not, or copies arguments into its graph at every step."""
    for name, player in players.items():
        if not isinstance(player, CapturePlayer):
            continue
        if not player.graphs:
            setting.fault(f"{name} on {num_tokens} tokens was not captured: {[*player.refused.values()]}")
        if copied := sum(x.nbytes for c in player.graphs.values() for x in c.copied.values()):
            setting.notes.append(f"{num_tokens} tokens: {name} copies {copied / 2**20:.1f} MiB of arguments a step.")


def alone(setting: Setting, step: Step, x: Sequence[torch.Tensor], num_tokens: int) -> tuple[float, float]:
    """Seconds of the step without communication, and of its communication without anything else, both captured.

    While the link is down an exchange is a copy: rows of another content would be routed to other experts. What the
    copies take by themselves is taken off.
    """
    s = setting.sizes
    rows = torch.randn(num_tokens * s.top_k, s.hidden, device=setting.device, dtype=torch.bfloat16)

    def exchange_all() -> list[torch.Tensor]:
        for _ in range(2 * s.num_layers):
            last = host_link(rows)
        return [last]

    def timings(calls: Mapping[str, Call]) -> dict[str, float]:
        calls = {name: captured(setting, call) for name, call in calls.items()}
        for call in calls.values():
            setting.warm_up(call)
        return {name: timing.median for name, timing in setting.timings(calls).items()}

    with link_down():
        took = timings({"step": partial(step, *x), "copies": exchange_all})
    return took["step"] - took["copies"], timings({"comm": exchange_all})["comm"]


def best(took: Mapping[str, Timing], ways: Sequence[str]) -> float:
    """The seconds of the fastest of the ways, captured or not; not a number if none of them ran."""
    both = [name for way in ways for name in (way, f"{way}, graph") if name in took]
    return min((took[name].median for name in both), default=math.nan)
