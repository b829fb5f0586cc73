"""Which way of playing a size is the fastest: timed on the calls of the user, agreed between ranks, kept.

Every rank times the same ways in the same order, and the slowest rank counts.
"""

from __future__ import annotations

import json
import math
import os
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

Share = Callable[[Sequence[int]], list[tuple[int, ...]]]

Costs = Mapping[str, tuple[float, float]]
"""The seconds of each code for the rows of a microbatch, and for all rows."""

TRIALS = 5
"""How often each way is timed; the first time, when memory and code are cold, does not count."""
MOST_UNSTEADY = 8
"""How many times of a way do not count, because it was about to be captured; sizes that never come again are never
captured, and then all count."""
MORE_TRIALS = 12
"""How often those ways are timed that come close to the fastest."""
CLOSE = 1.2
"""Times the fastest: what noise of a few trials may hide."""
LEAST_GAIN = 0.03
"""The fastest way must be faster by this share than what users had before, and by more than the noise of the trials
leaves open; else that is kept."""


WAYS = SPLIT, REFINED, UNSPLIT, INDUCTOR = "split", "refined", "unsplit", "inductor"
"""The ways to play a step: split in the order of modelled costs, or of measured ones; the same segments on all rows;
the whole graph as Inductor compiles it."""


class Size(NamedTuple):
    """What is tuned for: padded tokens, and elements of the first token input, both rounded up to four bits."""

    tokens: int
    elements: int

    def __str__(self) -> str:
        return f"{self.tokens}/{self.elements}"

    @classmethod
    def parse(cls, text: str) -> Size:
        tokens, elements = text.split("/")
        return cls(int(tokens), int(elements))


@dataclass(frozen=True, slots=True)
class Decision:
    """The seconds that each way of playing a size took on the slowest rank, and the one that is played.

    `errors` are standard errors of the seconds, as shares of them, on the rank with the most noise. `costs` are what
    the program of the way `refined` was made for; empty if there is none.
    """

    seconds: Mapping[str, float]
    chosen: str
    costs: Costs = field(default_factory=dict)
    errors: Mapping[str, float] = field(default_factory=dict)

    def fastest(self, ways: Iterable[str]) -> str:
        """The way that is played if there are only these."""
        return fastest({way: self.seconds[way] for way in ways}, self.errors)

    def __str__(self) -> str:
        times = ", ".join(f"{way} {seconds * 1e3:.2f} ms" for way, seconds in self.seconds.items())
        return f"{self.chosen} ({times})"


def fastest(seconds: Mapping[str, float], errors: Mapping[str, float]) -> str:
    """The way that is played, if these are the times of all that can be, and their errors."""
    best = min(seconds, key=seconds.__getitem__)
    simplest = next((way for way in (INDUCTOR, UNSPLIT) if way in seconds), best)
    noise = math.hypot(errors.get(best, 0.0), errors.get(simplest, 0.0))
    return best if seconds[best] < (1 - max(LEAST_GAIN, noise)) * seconds[simplest] else simplest


def standard_error(taken: Sequence[float]) -> float:
    """Of the median, as a share of it: of normal times about the distance of the quartiles over sqrt(n)."""
    low, median, high = statistics.quantiles(taken, n=4, method="inclusive")
    return (high - low) / median / math.sqrt(len(taken))


@dataclass(slots=True)
class _Trials:
    """The seconds of each way so far, and the ways that are still timed (None: all of them)."""

    taken: dict[str, list[float]] = field(default_factory=dict)
    unsteady: Counter[str] = field(default_factory=Counter)
    close: frozenset[str] | None = None

    def among(self, ways: Sequence[str]) -> list[str]:
        """Those of the ways that are still timed; they take turns, so all have been about as often."""
        return [way for way in ways if self.close is None or way in self.close] or list(ways)


class Tuner:
    """Says which way to play next, is told how long it took, and decides: after `TRIALS` of each way, or after
    `MORE_TRIALS` of those that are close to the fastest then.

    `share` exchanges numbers between ranks, which all call it at the same place.
    """

    def __init__(self, share: Share, decisions: Mapping[Size, Decision]) -> None:
        self.decisions = dict(decisions)
        self._share = share
        self._trials: dict[Size, _Trials] = defaultdict(_Trials)

    def way(self, size: Size, ways: Sequence[str]) -> tuple[str, bool]:
        """How to play a step that can be played in these `ways`, and whether it is to be timed."""
        decision = self.decisions.get(size)
        if len(ways) == 1:
            return ways[0], False
        if decision and decision.seconds.keys() >= set(ways):
            return decision.fastest(ways), False
        trials = self._trials[size]
        if trials.taken.keys() != set(ways):  # another way has come, or one is not there any more
            self._trials[size] = trials = _Trials({way: trials.taken.get(way, []) for way in ways}, trials.unsteady)
        return min(trials.among(ways), key=lambda way: len(trials.taken[way])), True

    def num_trials(self, size: Size) -> int:
        """How often a size was timed that is not decided yet."""
        return sum(map(len, self._trials[size].taken.values())) if size in self._trials else 0

    def took(self, size: Size, way: str, seconds: float, costs: Costs, *, is_steady: bool = True) -> None:
        """Note a time; after the last trial, ranks agree on the slowest of them for each way.

        A time is not steady if the next ones will be others: it was that of a warm-up, or of a capture.
        """
        trials = self._trials[size]
        if not is_steady and trials.unsteady[way] < MOST_UNSTEADY:
            trials.unsteady[way] += 1
            return
        trials.taken[way].append(seconds)
        needed = TRIALS if trials.close is None else MORE_TRIALS
        if any(len(trials.taken[way]) < needed for way in trials.among(list(trials.taken))):
            return
        agreed, errors = self._agreed(trials.taken)
        close = frozenset(way for way, s in agreed.items() if s <= CLOSE * min(agreed.values()))
        if trials.close is None and len(close) > 1:
            trials.close = close
            return
        self.decisions[size] = Decision(agreed, fastest(agreed, errors), costs, errors)
        del self._trials[size]

    def _agreed(self, taken: Mapping[str, Sequence[float]]) -> tuple[dict[str, float], dict[str, float]]:
        """The median of each way, and its error, on the worst rank."""
        found = [of(times[1:]) for of in (statistics.median, standard_error) for times in taken.values()]
        worst = [max(of) / 1e9 for of in zip(*self._share([round(x * 1e9) for x in found]), strict=True)]
        return dict(zip(taken, worst, strict=False)), dict(zip(taken, worst[len(taken) :], strict=True))

    def forget(self) -> None:
        self.decisions.clear()
        self._trials.clear()


# -- decisions in a file ----------------------------------------------------------------------------------------------

_loaded: dict[str, dict[Size, Decision]] = {}
"""What `load_decisions` read, for programs to be compiled."""


def known_decisions(fingerprint: str) -> dict[Size, Decision]:
    """What a file said of the program of this fingerprint."""
    return dict(_loaded.get(fingerprint, {}))


def load_decisions(path: str | os.PathLike[str]) -> None:
    """Take the decisions of `split="auto"` from a file, so that graphs compiled from now on are not timed again.

    Every rank must load the same file. Decisions of another version of PyTorch, or of other programs, are passed over.
    Raises `OSError` if there is no such file, `ValueError` if it is none of ours.
    """
    try:
        content = json.loads(Path(path).read_text())
        version, graphs = content["torch"], content["graphs"]
        found = {
            fingerprint: {Size.parse(size): _parsed(d) for size, d in table.items()}
            for fingerprint, table in graphs.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} has no decisions in it ({error!r}); dbo_compile.save_decisions writes them") from None
    if version == torch.__version__:
        _loaded.update(found)


def _parsed(d: Mapping[str, Any]) -> Decision:
    costs = {str(code): (float(part), float(whole)) for code, (part, whole) in d["costs"].items()}
    seconds, errors = ({str(way): float(s) for way, s in d[name].items()} for name in ("seconds", "errors"))
    return Decision(seconds, str(d["chosen"]), costs, errors)


def decisions_text(graphs: Mapping[str, Mapping[Size, Decision]]) -> str:
    """The content of a file for `load_decisions`: decisions by fingerprint and size."""
    tables = {
        fingerprint: {str(size): asdict(d) for size, d in table.items()}
        for fingerprint, table in graphs.items()
    }
    return json.dumps({"torch": torch.__version__, "graphs": tables})
