"""Every causal language model of transformers: split in two, it gives what it gives in eager.

`SOUNDNESS_ARCHITECTURES` is `all`, or the names of some with commas between.
"""

from __future__ import annotations

import os
import platform
import signal
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import pytest
import torch
import transformers
from transformers import PreTrainedModel

from dbo_compile import compat, reports
from dbo_compile.report import new_reports
from tests.soundness.architectures import NAMES, CannotBuild, prompts, small_model

WANTED = os.environ.get("SOUNDNESS_ARCHITECTURES", "")
RESULTS = Path(__file__).parents[2] / "docs" / "results" / "architectures.md"
ALWAYS = {"split": "always", "inner": "eager"}
MOST_SECONDS = 300
CLOSE = 1e-5
"""Of logits of float64, as a share of the largest: many models route, or turn positions, in float32."""


@dataclass(frozen=True, slots=True)
class Outcome:
    name: str
    why_not_tried: str = ""
    error: str = ""
    off: float = 0.0
    graphs: int = 0
    calls: int = 0
    calls_split: int = 0
    barriers: list[str] = field(default_factory=list)
    why_not_split: list[str] = field(default_factory=list)


def test_some_architectures_are_split_whole():
    for outcome in map(tried, ("qwen2", "gpt2", "llama4_text")):
        assert (outcome.why_not_tried, outcome.error, outcome.calls_split, outcome.barriers) == ("", "", 3, [])
        assert outcome.off < 1e-12


@pytest.mark.slow
@pytest.mark.skipif(not WANTED, reason="many minutes: make soundness")
def test_every_architecture_gives_what_it_gives_in_eager():
    outcomes = [tried(name) for name in (NAMES if WANTED == "all" else WANTED.split(","))]
    text = report(outcomes)
    print(text)
    if WANTED == "all":
        RESULTS.write_text(text)
    assert [o for o in outcomes if o.error or o.off > CLOSE] == []


def tried(name: str) -> Outcome:
    torch._dynamo.reset()
    before = reports()
    try:
        eager, model = (small_model(name, experts=how) for how in ("eager", "grouped_mm"))
        with at_most(MOST_SECONDS):
            off = furthest(eager, model)
    except (CannotBuild, TooSlow) as why:
        return Outcome(name, why_not_tried=str(why))
    except Exception as error:  # ours: the others are tried all the same
        return Outcome(name, error=f"{type(error).__name__}: {error}")
    made = new_reports(before)
    return Outcome(
        name,
        off=off,
        graphs=len(made),
        calls=sum(r.calls for r in made),
        calls_split=sum(r.calls_split for r in made),
        barriers=[f"{op}: {why}" for r in made for op, why in r.barriers.items()],
        why_not_split=list(dict.fromkeys(why for r in made for why in (r.reason, *r.decline_counts) if why)),
    )


def furthest(eager: PreTrainedModel, model: PreTrainedModel) -> float:
    """How far the logits of the compiled model are from those of eager, as a share of the largest."""
    compiled = torch.compile(model, backend="dbo", options=ALWAYS)
    off = 0.0
    with torch.no_grad(), compat.host_reads_in_graph():
        for batch in (5, 2, 8):
            want, got = eager(prompts(batch)).logits, compiled(prompts(batch)).logits
            off = max(off, ((got - want).abs().max() / want.abs().max()).item())
    return off


class TooSlow(BaseException):
    """No `Exception`: Dynamo would take it for one of the model's."""


@contextmanager
def at_most(seconds: int) -> Generator[None]:
    """Raise `TooSlow` in what takes longer: recurrences are traced step by step."""

    def stop(*_: object) -> None:
        raise TooSlow(f"it takes longer than {seconds} s to trace")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


REPORT = """\
# Which architectures are split

`SOUNDNESS_ARCHITECTURES={wanted} pytest tests/soundness/test_architectures.py`, on {today}, PyTorch {torch},
transformers {transformers}, Python {python}. `make soundness` does it for all of them.

Every causal language model of transformers with random weights, so small that it can be traced here, one layer of each
kind, experts by `grouped_mm`; `split="always"`, no mask, numbers read on the host kept in the graph (as
`fullgraph=True` does), batches of 5, 2 and 8 prompts. Logits are compared with eager on all rows, in float64: what is
not about 1e-16 routes, or turns positions, in float32, where a product of fewer rows rounds differently.

{whole} of {tried} are split whole, {barriers} with barriers alone, {partly} in part (models that break their graph),
{never} not at all. {untried} could not be tried.

| architecture | graphs | calls split | barriers | furthest logit | what is not split, and why |
|---|---|---|---|---|---|
{rows}

## Not tried

| architecture | why |
|---|---|
{others}
"""


def report(outcomes: list[Outcome]) -> str:
    done = [o for o in outcomes if not o.why_not_tried and not o.error]
    split = [o for o in done if o.calls_split == o.calls > 0 and not o.why_not_split]
    never = [o for o in done if o.calls_split == 0]
    others = [o for o in outcomes if o.why_not_tried]
    return REPORT.format(
        wanted=WANTED,
        today=f"{datetime.now(UTC):%Y-%m-%d}",
        torch=torch.__version__,
        transformers=transformers.__version__,
        python=platform.python_version(),
        whole=sum(not o.barriers for o in split),
        barriers=sum(bool(o.barriers) for o in split),
        partly=len(done) - len(split) - len(never),
        never=len(never),
        tried=len(done),
        untried=len(others),
        rows="\n".join(map(row, done)),
        others="\n".join(f"| {o.name} | {cell(o.why_not_tried)} |" for o in others),
    )


def row(o: Outcome) -> str:
    why = cell("; ".join([*o.why_not_split, *o.barriers[:2]]))
    return f"| {o.name} | {o.graphs} | {o.calls_split} of {o.calls} | {len(o.barriers)} | {o.off:.0e} | {why} |"


def cell(text: str) -> str:
    inside = text.replace(str(Path(transformers.__file__).parent), "transformers").replace("|", "\\|")
    return inside if len(inside) < 300 else inside[:297] + "..."
