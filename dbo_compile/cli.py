"""The command line: `dbo-compile`, also `python -m dbo_compile`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status: 0 if everything it promises holds."""
    parser = argparse.ArgumentParser("dbo-compile", description="Dual-batch overlap for any PyTorch model.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    demo = commands.add_parser("demo", help="run Qwen3-MoE on two ranks of this machine, show and check what happens")
    demo.add_argument("--folder", type=Path, default=Path("dbo-demo"), help="where dumps go (default: dbo-demo)")
    demo.set_defaults(run=_demo)
    args = parser.parse_args(argv)
    status: int = args.run(args)
    return status


def _demo(args: argparse.Namespace) -> int:
    # transformers is an optional dependency: without it the other commands still work
    status: int = import_module("dbo_compile.demo").demo(args.folder)
    return status
