"""The package's logger, and `DBO_LOGS`, which shows it on stderr with the rank in every line."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping

import torch.distributed as dist

logger = logging.getLogger("dbo_compile")
"""Modules log to this one or to its children. `TORCH_LOGS="+dbo_compile"` works too: it accepts any module's name."""

LEVELS = ("debug", "info", "warning")


def setup_from_environment(environ: Mapping[str, str] = os.environ) -> None:
    """Show the messages from level `DBO_LOGS` on; without that variable, leave logging as the application has it.

    A logger that has a handler, of the application or of an earlier call, gets no second one. `TORCH_LOGS` with our
    name in it goes first. It must be read here: its handler may come later, as torch imports us before it adds that.
    Raises `ValueError` for a level that there is not.
    """
    level = environ.get("DBO_LOGS", "").strip()
    torch_logs = [name.strip().lstrip("+-") for name in environ.get("TORCH_LOGS", "").split(",")]
    if not level or logger.name in torch_logs:
        return
    if level not in LEVELS:
        raise ValueError(f"DBO_LOGS={level!r}: expected one of {', '.join(LEVELS)}")
    logger.setLevel(level.upper())
    if not logger.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(RankFormatter())
        logger.addHandler(handler)


class RankFormatter(logging.Formatter):
    """`12:34:56 rank 3 INFO dbo_compile.backend: message`; a process that is no rank leaves the rank out."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(rank)s%(levelname)s %(name)s: %(message)s", datefmt="%H:%M:%S")

    def format(self, record: logging.LogRecord) -> str:
        own = rank()
        record.rank = "" if own is None else f"rank {own} "
        return super().format(record)


def rank() -> int | None:
    """The number of this process among the ranks, None for one that is none. It may change at any time."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank()
    given = os.environ.get("RANK", "")
    return int(given) if given.isdecimal() else None


_warned: dict[tuple[object, str], None] = {}


def warn_once(about: object, message: str, *args: object) -> None:
    """Log a warning, but only the first time that `message` comes up `about` the same thing: a graph, a folder."""
    if (about, message) not in _warned:
        _warned[about, message] = None
        logger.warning(message, *args)
