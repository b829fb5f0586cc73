"""The command line: `dbo-compile`, also `python -m dbo_compile`.

A command's exit status is 0 if what it is asked holds, 1 if not, 2 if it was asked wrongly.
"""

from __future__ import annotations

import argparse
import json
import sys
import webbrowser
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from dbo_compile.bench import bench
from dbo_compile.config import Config
from dbo_compile.doctor import as_data, findings, is_well
from dbo_compile.explanation import explain
from dbo_compile.subject import DEFAULT, NoSubject, load, ranks

HELD, DID_NOT_HOLD, ASKED_WRONGLY = 0, 1, 2

SUBJECT = """
SUBJECT is module:function, a function without arguments that returns (model, args) or (model, args, kwargs). Modules
of the current folder are found. A model that communicates gets a process group of one rank, or those of torchrun:

  dbo-compile {command} mymodel:example
  dbo-compile {command} mymodel:example --set split=always --set num_microbatches=3
  torchrun --nproc-per-node 2 -m dbo_compile {command} mymodel:example
"""
DEMO = """
example:

  dbo-compile demo --folder dumps
  dbo-compile trace dumps
"""
TRACE = """
example:

  DBO_DUMP=dumps python serve.py
  dbo-compile trace dumps
"""
DOCTOR = """
example:

  dbo-compile doctor --json
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status."""
    args = _parser().parse_args(argv)
    try:
        status: int = args.run(args)
    except (NoSubject, _WrongOption) as error:
        sys.stderr.write(f"dbo-compile: {error}\n")
        return ASKED_WRONGLY
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "dbo-compile",
        description="Dual-batch overlap for any PyTorch model.",
        epilog="dbo-compile COMMAND --help has examples. Exit status: 0 it holds, 1 it does not, 2 asked wrongly.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    shows = "run Qwen3-MoE on two ranks of this machine, show and check what happens"
    demo = _command(commands, "demo", _demo, shows, DEMO)
    demo.add_argument("--folder", type=Path, default=Path("dbo-demo"), help="where dumps go (default: dbo-demo)")
    told = _command(commands, "explain", _explain, "what is split of a model, what is not and why", SUBJECT)
    _about_subject(told)
    told.add_argument("--dump", metavar="DIR", help="write every level to this folder as well")
    timed = _command(commands, "bench", _bench, "time a model: eager, Inductor and dbo", SUBJECT)
    _about_subject(timed)
    timed.add_argument("--repeats", type=_positive, default=20, help="timed calls of each (default: 20)")
    trace = _command(commands, "trace", _trace, "open the page of a dump", TRACE)
    trace.add_argument("folder", type=Path, metavar="DIR", help="the folder of DBO_DUMP or dbo_compile.debug")
    trace.add_argument("--no-open", action="store_true", help="say where the page is, and open no browser")
    looks = "what is installed here, what works, and what would be missing"
    doctor = _command(commands, "doctor", _doctor, looks, DOCTOR)
    for command in (told, timed, trace, doctor):
        command.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], int], what: str, more: str
) -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    command: argparse.ArgumentParser = commands.add_parser(
        name, help=what, description=what, epilog=more.format(command=name), formatter_class=raw
    )
    command.set_defaults(run=run)
    return command


def _about_subject(command: argparse.ArgumentParser) -> None:
    command.add_argument("subject", nargs="?", default=DEFAULT, metavar="SUBJECT", help=f"default: {DEFAULT}")
    option = "an option of dbo_compile.Config"
    command.add_argument("--set", type=_pair, action="append", default=[], metavar="NAME=VALUE", help=option)


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more, got {number}")
    return number


def _pair(text: str) -> tuple[str, str]:
    name, is_set, value = text.partition("=")
    if not is_set:
        raise argparse.ArgumentTypeError(f"{text!r}: write NAME=VALUE")
    return name, value


class _WrongOption(Exception):
    """What `--set` says is no option, or not of its type."""


def _options(args: argparse.Namespace) -> dict[str, Any]:
    """What `--set` says, read as the environment variables `DBO_<NAME>` are."""
    pairs = dict(args.set)
    names = Config.__dataclass_fields__
    try:
        for name in pairs:
            if name not in names:
                Config.from_options({name: None}, {})  # says which names there are
        config = Config.from_options({}, {f"DBO_{name.upper()}": value for name, value in pairs.items()})
    except ValueError as error:
        raise _WrongOption(error) from None
    return {name: getattr(config, name) for name in pairs}


# -- the commands -----------------------------------------------------------------------------------------------------


def _demo(args: argparse.Namespace) -> int:
    try:
        demo = import_module("dbo_compile.demo").demo
    except ModuleNotFoundError as error:  # an optional dependency: without it the other commands still work
        if error.name is None or error.name.split(".")[0] != "transformers":
            raise
        sys.stderr.write("dbo-compile: the demo needs transformers (pip install 'dbo-compile[hf]')\n")
        return DID_NOT_HOLD
    status: int = demo(args.folder)
    return status


def _explain(args: argparse.Namespace) -> int:
    options = _options(args) | ({"dump": args.dump} if args.dump else {})
    with ranks() as rank:
        subject = load(args.subject)
        found = explain(subject.model, *subject.args, options=options, **subject.kwargs)
        if rank == 0:
            _say(json.dumps(found.to_dict(), indent=1) if args.json else str(found))
    return HELD if found.split else DID_NOT_HOLD


def _bench(args: argparse.Namespace) -> int:
    with ranks() as rank:
        found = bench(load(args.subject), _options(args), args.repeats)
        if rank == 0:
            _say(json.dumps(found, indent=1) if args.json else "\n".join(_bench_lines(found)))
    return HELD


def _bench_lines(found: dict[str, Any]) -> Iterator[str]:
    base = found["seconds"]["inductor"]["median"]
    heads = "".join(f"{head:>12}" for head in ("median", "least", "most"))
    yield f"{'':12}{heads}{'of inductor':>14}   ({found['repeats']} calls each, in turn)"
    for name, s in found["seconds"].items():
        times = "".join(f"{s[key] * 1e3:9.3f} ms" for key in ("median", "least", "most"))
        yield f"{name:12}{times}{s['median'] / base:14.2f}"
    for graph in found["graphs"]:
        calls = graph["calls"]
        yield f"{calls['split']} of {calls['total']} calls were split" if graph["split"] else graph["reason"]


def _trace(args: argparse.Namespace) -> int:
    page = args.folder / "index.html"
    if not page.is_file():
        sys.stderr.write(f"dbo-compile: {page} is not there; DBO_DUMP={args.folder} makes it\n")
        return DID_NOT_HOLD
    graphs = sorted(str(path) for path in args.folder.glob("rank*/graph*/index.html"))
    _say(json.dumps({"index": str(page), "graphs": graphs}, indent=1) if args.json else str(page.resolve()))
    if not args.no_open:
        webbrowser.open(page.resolve().as_uri())
    return HELD


def _doctor(args: argparse.Namespace) -> int:
    found = findings()
    _say(json.dumps(as_data(found), indent=1) if args.json else "\n".join(map(str, found)))
    return HELD if is_well(found) else DID_NOT_HOLD


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
