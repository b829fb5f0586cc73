"""`with dbo_compile.debug("dir")`: every level of every graph compiled in the block, as files to look at."""

from __future__ import annotations

import os
import warnings
from collections.abc import Generator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path

from dbo_compile.dump import finish_dumps
from dbo_compile.log import rank, warn_once

VARIABLE = "DBO_DUMP"


@contextmanager
def debug(folder: str | os.PathLike[str], *, bytecode: bool = True) -> Generator[Path]:
    """Dump every graph that is compiled in the block to `folder`, and time its first calls; open `folder/index.html`.

    The same as the environment variable `DBO_DUMP` for the time of the block, so it covers all threads. What cannot be
    written is a warning, no error. With `bytecode`, depyf writes the decompiled bytecode and the guards of what is
    compiled to `folder/rank0/bytecode`, if it is installed.
    """
    path = Path(folder).absolute()
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = str(path)
    try:
        with _decompiling(path / f"rank{rank() or 0}" / "bytecode") if bytecode else nullcontext():
            yield path
    finally:
        finish_dumps()
        if before is None:
            os.environ.pop(VARIABLE, None)
        else:
            os.environ[VARIABLE] = before


@contextmanager
def _decompiling(folder: Path) -> Generator[None]:
    """Have depyf watch the block. Whatever goes wrong in it is a warning."""
    stack = ExitStack()
    with _warned(folder):
        import depyf

        folder.mkdir(parents=True, exist_ok=True)
        with warnings.catch_warnings(action="ignore"):
            stack.enter_context(depyf.prepare_debug(str(folder)))
    try:
        yield
    finally:
        with _warned(folder), warnings.catch_warnings(action="ignore"):
            stack.close()


@contextmanager
def _warned(folder: Path) -> Generator[None]:
    try:
        yield
    except ImportError:
        warn_once("depyf", "the dump has no decompiled bytecode: that needs depyf (pip install 'dbo-compile[debug]')")
    except Exception as error:
        warn_once(str(folder), "cannot dump bytecode to %s: %s", folder, error)
