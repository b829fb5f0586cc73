"""Bench: eager, Inductor and this backend on one model, called in turn."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from dbo_compile import compat
from dbo_compile.backend import dbo
from dbo_compile.report import new_reports, reports
from dbo_compile.subject import Subject

WARM_UP = 20
"""`split="auto"` tries its ways on the first calls: the calls before these are not timed."""


def bench(subject: Subject, options: dict[str, Any], repeats: int) -> dict[str, Any]:
    """Median seconds of a call of each variant, and the least and most; every rank must call this alike."""
    before = reports()
    variants = _variants(subject, options)
    taken: dict[str, list[float]] = {name: [] for name in variants}
    with torch.no_grad(), compat.host_reads_in_graph():
        for call in variants.values():
            for _ in range(WARM_UP):
                call()
        for _ in range(repeats):
            for name, call in variants.items():  # in turn: a drift of the machine hits all alike
                taken[name].append(_seconds(call))
    return {
        "seconds": {
            name: {"median": statistics.median(s), "least": min(s), "most": max(s)} for name, s in taken.items()
        },
        "repeats": repeats,
        "graphs": [report.to_dict() for report in new_reports(before)],
    }


def _variants(subject: Subject, options: dict[str, Any]) -> Mapping[str, Callable[[], Any]]:
    compiled = {
        "eager": subject.model,
        "inductor": torch.compile(subject.model, backend="inductor"),
        "dbo": torch.compile(subject.model, backend=dbo, options=options),
    }
    return {name: partial(fn, *args, **kwargs) for name, fn in compiled.items() for args, kwargs in (_own(subject),)}


def _own(subject: Subject) -> Any:
    """Arguments of a variant's own: this backend marks the token dims of those it gets."""
    return compat.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, torch.Tensor) else leaf,
                           (subject.args, dict(subject.kwargs)))  # fmt: skip


def _seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter() - start
