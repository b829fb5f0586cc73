"""What stands in the way of a capture, and that it does so on all ranks if on one."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import TypeVar

from dbo_compile.runtime.agree import Agreement
from dbo_compile.runtime.comparison import listed

T = TypeVar("T")


class Obstacle(Exception):
    """Why there is no graph of a play; the message completes "it is played uncaptured: "."""


class Busy(Obstacle):
    """Not now: another capture runs."""


class TooMuchMemory(Obstacle):
    """Not as long as there are all the others. Also completes "it is the least useful size, and "."""


class Uncapturable(Obstacle):
    """Not ever."""


KINDS: tuple[type[Obstacle], ...] = (Busy, TooMuchMemory, Uncapturable)
"""The worst last: it is what counts of those of several ranks."""


def on_all_ranks(ranks: Agreement, make: Callable[[], T], drop: Callable[[T], object] = lambda _made: None) -> T:
    """What `make` returns if it raises nothing on any rank. Otherwise the worst `Obstacle` of all is raised on all of
    them, and what was made here is dropped; any other error counts as `Uncapturable`."""
    made: list[T] = []
    mine: Obstacle | None = None
    try:
        made.append(make())
    except Obstacle as obstacle:
        mine = obstacle
    except Exception as error:
        mine = Uncapturable(str(error) or type(error).__name__)
    found = [how_bad for (how_bad,) in ranks.share([1 + KINDS.index(type(mine)) if mine else 0])]
    if not (worst := max(found)):
        return made[0]
    for one in made:
        drop(one)
    if mine and isinstance(mine, KINDS[worst - 1]):
        raise mine
    raise KINDS[worst - 1](f"{listed([r for r, n in enumerate(found) if n == worst])} cannot capture it, and says why")


_capturing = threading.Lock()


@contextmanager
def one_at_a_time() -> Generator[bool]:
    """Two captures at once in a process would end both: tells whether this is the only one."""
    is_free = _capturing.acquire(blocking=False)
    try:
        yield is_free
    finally:
        if is_free:
            _capturing.release()
