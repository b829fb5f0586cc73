"""What dual-batch overlap brings on one GPU: a stack of DeepSeek-V3-like layers whose exchange is a way to the host.

    python -m benchmarks.gpu [prefill] [decode] [capture] [auto] [--out FILE] [--seconds 450]

Every part runs alone; all of them write docs/results/gpu-<date>.md, line by line, so that a run that is cut off leaves
what it had. What fails is named in the report, ends no more than itself, and makes the exit code 1. A part that has
used its share of the seconds leaves out its smaller sizes. The exchange is a stand-in that moves the bytes over PCIe,
see `host_link`. Needs no network and no transformers. `--device cpu --tiny` goes through the motions.
"""

from __future__ import annotations

import argparse
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import date
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.gpu_programs import auto, capture
from benchmarks.gpu_setting import REPEATS, Setting
from benchmarks.gpu_steps import steps


class Part(NamedTuple):
    """What yields the lines of a section, and its share of the time."""

    lines: Callable[[Setting], Iterator[str]]
    share: float


PARTS = {
    "prefill": Part(partial(steps, "prefill"), 4),
    "decode": Part(partial(steps, "decode"), 3),
    "capture": Part(capture, 1),
    "auto": Part(auto, 2),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help=f"some of {', '.join(PARTS)}; all of them if none is named")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small sizes, nothing compiled: to see that it runs")
    parser.add_argument("--out", type=Path, help="the report; docs/results/gpu-<date>.md if all parts are run")
    parser.add_argument("--seconds", type=float, default=450, help="no size is begun after these")
    args = parser.parse_args()
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"there is no part {', '.join(sorted(unknown))}")
    if args.device == "cuda" and not torch.cuda.is_available():
        print("skipped: there is no CUDA device")
        return
    end = time.monotonic() + args.seconds
    setting = Setting(args.device, tiny=args.tiny)
    whole = Path(f"docs/results/gpu-{date.today():%Y-%m-%d}.md") if not args.parts and setting.on_gpu else None
    report = Report(args.out or whole)
    report.add(*header(setting))
    with torch.no_grad():
        run(args.parts or list(PARTS), setting, report, end)
    if setting.faults:
        sys.exit("\n".join(["failed:", *setting.faults]))


class Report:
    """Lines that are printed, and are in the file as soon as they are added."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.lines: list[str] = []

    def add(self, *lines: str) -> None:
        self.lines += lines
        print(*lines, sep="\n", flush=True)
        if self.path:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text("\n".join(self.lines) + "\n")


def run(parts: Sequence[str], setting: Setting, report: Report, end: float) -> None:
    """Play the parts one after the other; what one leaves of its time, the others have."""
    for i, name in enumerate(parts):
        begun, part = time.monotonic(), PARTS[name]
        if begun > end:
            report.add("", f"Out of time: {', '.join(parts[i:])} left out.")
            return
        setting.deadline = begun + (end - begun) * part.share / sum(PARTS[p].share for p in parts[i:])
        report.add("", f"## {name}", "")
        with setting.going_on(name):
            for line in part.lines(setting):
                report.add(line)
        with setting.going_on(f"freeing the memory of {name}"):
            torch._dynamo.reset()
            setting.free()
        for note in setting.notes:
            report.add("", note)
        setting.notes.clear()
        report.add("", f"({time.monotonic() - begun:.0f} s)")


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


if __name__ == "__main__":
    main()
