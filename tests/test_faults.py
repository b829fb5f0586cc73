"""One rank of several goes wrong: every other one gets an error that names it, in time, and can go on.

Each trial takes a rank, a step and a place in it at random (seeded). `FAULT_TRIALS=20` has twenty trials instead of
four of the faults that hang or break systems like this one; the others always have four. Several worlds of ranks play
at the same time, since most of it is waiting; trials of a fault that leaves the ranks as they were follow each other on
one compiled model.
"""

from __future__ import annotations

import os
import random
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from queue import Queue
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch import nn

import dbo_compile
from tests.ranks import RankFailed, Ranks

pytestmark = pytest.mark.ranks
FEW_TRIALS = 4
NUM_TRIALS = int(os.environ.get("FAULT_TRIALS", FEW_TRIALS))
NUM_RANKS, NUM_WORLDS = 4, 4
MOST_LOST = 10
IN_A_ROW = max(2, NUM_TRIALS // 5)
TIMEOUT_S = 2.0
LONG_TIMEOUT_S = 30.0
"""For faults that are heard of without waiting: a rank alone may have to compile."""
HIDDEN, MIDDLE, OUT = 6, 10, 4
"""Even, and numbers of tokens are odd: none is mistaken for another."""
STYLES = ("plain", "decorated")
LARGEST = 40
"""The largest size that steps are padded to."""
BEFORE, FIRST, SECOND, COMPILING = "before the step", "in one microbatch", "in the other one", "while it compiles"


# -- what ranks play --------------------------------------------------------------------------------------------------


class Alarm:
    """What befalls this rank when the op `touch` runs, or is traced, for the n-th time from now on."""

    def __init__(self) -> None:
        self.rang_at = 0.0
        self.off()

    def set(self, fault: Callable[[], None], place: str) -> None:
        self.fault, self.traced = fault, place == COMPILING
        self.num_left = {FIRST: 1, SECOND: 2, COMPILING: 3}[place]  # Dynamo traces a model twice before it is compiled

    def off(self) -> None:
        self.fault, self.traced, self.num_left = None, False, 0

    def ring(self, *, traced: bool) -> None:
        self.rang_at = time.monotonic()
        if self.fault is None or traced != self.traced:
            return
        self.num_left -= 1
        if not self.num_left:
            self.fault()


ALARM = Alarm()


@torch.library.custom_op("dbo_faults::touch", mutates_args=())
def touch(x: torch.Tensor) -> torch.Tensor:
    ALARM.ring(traced=False)
    return x.clone()


@touch.register_fake
def _(x):
    ALARM.ring(traced=True)
    return torch.empty_like(x)


@dbo_compile.register_rule(torch.ops.dbo_faults.touch.default)
def _(x):
    return x.place


class Model(nn.Module):
    """Token by token but for a sum over ranks, of token n here and token n there."""

    def __init__(self, group: dist.ProcessGroup, *, num_sums: int = 1) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.up = nn.Parameter(torch.randn(HIDDEN, MIDDLE, dtype=torch.float64, generator=generator))
        self.down = nn.Parameter(torch.randn(MIDDLE, OUT, dtype=torch.float64, generator=generator))
        self.group, self.num_sums = group, num_sums

    def here(self, x, shift):
        return x @ self.up[: x.shape[1]].to(x.dtype) + shift[:, None]

    def forward(self, x, shift):
        y = torch.ops.dbo_faults.touch(self.here(x, shift))
        for _ in range(self.num_sums):
            y = torch.tanh(funcol.all_reduce(y, "sum", self.group))
        return y @ self.down.to(y.dtype)


# -- one trial, as each rank sees it ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trial:
    """`victim` is an index of `members`, the ranks that take part; after `num_good` steps the fault is at `place`."""

    fault: str
    style: str
    place: str
    num_good: int
    victim: int
    members: tuple[int, ...]
    seed: int

    @property
    def kind(self) -> Fault:
        return FAULTS[self.fault]

    @property
    def timeout_s(self) -> float:
        return TIMEOUT_S if self.fault in FAULTS and self.kind.heard == GONE else LONG_TIMEOUT_S

    def sizes(self, step):
        rng = random.Random(97 * self.seed + step)
        return [rng.randrange(3, LARGEST, 2) for _ in self.members]

    def inputs(self, step, member):
        n, generator = self.sizes(step)[member], torch.Generator().manual_seed(97 * self.seed + 7 * step + member)
        x = torch.randn(n, HIDDEN, dtype=torch.float64, generator=generator)
        return x, torch.randint(-3, 4, (n,), generator=generator)

    def expected(self, step, member, among):
        """The result on `member` if only the members `among` take part."""
        model, sizes = Model(None), self.sizes(step)
        total = torch.zeros(max(sizes), MIDDLE, dtype=torch.float64)
        for i in among:
            total[: sizes[i]] += model.here(*self.inputs(step, i))
        return torch.tanh(total[: sizes[member]]) @ model.down


class Told(NamedTuple):
    """What a rank has to say: its error as `type: words`, after how long; the same of a call after that (`None` if it
    was right); threads that stay; whether eager over a new group is right."""

    error: str
    seconds: float
    again: str | None
    seconds_again: float
    threads: tuple[str, ...]
    is_right_after: bool


class Rank:
    """This process in a trial."""

    def __init__(self, trial: Trial) -> None:
        self.trial = trial
        self.group = new_group(trial.members)
        self.me = dist.get_rank(self.group)
        self.everyone = range(len(trial.members))
        self._compiled: dict[str, Any] = {}
        self.play = self.compiled(1)

    def compiled(self, num_sums: int, **options: Any) -> Any:
        """The model with options of its own, compiled once for all trials."""
        key = f"{num_sums} {options}"
        if key not in self._compiled:
            self._compiled[key] = self._compile(Model(self.group, num_sums=num_sums), options)
        return self._compiled[key]

    def _compile(self, model: nn.Module, options: dict[str, Any]) -> Any:
        trial = self.trial
        options = {
            "inner": "eager", "split": "always", "gate": "first-call" if trial.seed % 4 // 2 else "never",
            "timeout_s": trial.timeout_s, "dp_group": self.group, "pad_to": (LARGEST // 2, LARGEST), **options,
        }  # fmt: skip
        if trial.style == "plain":
            return torch.compile(model, backend="dbo", options=options)
        return dbo_compile.dbo(model, token_dims={"x": 0, "shift": 0}, **options)

    def inputs(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.trial.inputs(step, self.me)

    def step(self, i: int) -> None:
        """A step that must go well."""
        expected = self.trial.expected(i, self.me, self.everyone)
        torch.testing.assert_close(self.play(*self.inputs(i)), expected)

    def meets_the_fault(self) -> None:
        """The step in which the victim goes wrong."""
        trial = self.trial
        if self.me == trial.victim:
            trial.kind.play(self, self.noted)
        else:
            trial.kind.others(self)

    def noted(self, fault: Callable[[], Any] = lambda: None) -> Any:
        """Say when it happens, since a rank that is killed tells no more."""
        self.group.get_group_store().set(f"fault {self.trial.seed}", str(time.monotonic()))
        return fault()

    def fault_at(self) -> float:
        return float(self.group.get_group_store().get(f"fault {self.trial.seed}"))


def new_group(ranks: Sequence[int]) -> dist.ProcessGroup:
    return dist.new_group(list(ranks), use_local_synchronization=True, timeout=timedelta(seconds=30))


def tells(trials: Sequence[Trial]) -> list[Told]:
    """What this rank has to say of trials that follow each other."""
    torch._dynamo.reset()
    rank, told = Rank(trials[0]), []
    for trial in trials:
        rank.trial = trial
        with torch.no_grad():
            told.append(tells_of_one(rank))
    return told


def tells_of_one(rank: Rank) -> Told:
    for i in range(rank.trial.num_good):
        rank.step(i)
    threads = {t.ident for t in threading.enumerate()}
    came_at = time.monotonic()
    error, raised_at = error_of(rank.meets_the_fault)
    ALARM.off()
    seconds = raised_at - max(came_at, ALARM.rang_at, rank.fault_at())
    began = time.monotonic()
    again, ended = error_of(lambda: rank.step(rank.trial.num_good + 1))
    return Told(error, seconds, again, ended - began, threads_beside(threads), eager_is_right(rank))


def warm_up() -> None:
    """Compile a first time, which takes so long that ranks would have to wait for each other."""
    for style in STYLES:
        trial = Trial("", style, BEFORE, 0, 0, tuple(range(NUM_RANKS)), 2)
        with torch.no_grad():
            Rank(trial).step(0)


def error_of(play: Callable[[], Any]) -> tuple[str | None, float]:
    try:
        play()
    except Exception as error:
        return f"{type(error).__name__}: {error}", time.monotonic()
    return None, time.monotonic()


def threads_beside(before: set[int | None]) -> tuple[str, ...]:
    """The threads that are still there a while after a fault and were not before it."""
    until = time.monotonic() + 4.0
    while left := [t for t in threading.enumerate() if t.ident not in before and type(t) is threading.Thread]:
        if time.monotonic() > until:
            break
        time.sleep(0.02)
    return tuple(t.name for t in left)


def eager_is_right(rank: Rank) -> bool:
    """Whether a step in eager, over a new group of the ranks that are left, is right."""
    trial = rank.trial
    left = [i for i in rank.everyone if not trial.kind.ends or (i == trial.victim) == (rank.me == trial.victim)]
    model = Model(new_group([trial.members[i] for i in left]))
    x, shift = (torch.cat([t, t.new_zeros(LARGEST - len(t), *t.shape[1:])]) for t in rank.inputs(0))
    expected = trial.expected(0, rank.me, left)
    return torch.allclose(model(x, shift)[: len(expected)], expected)


# -- the faults -------------------------------------------------------------------------------------------------------


Noted = Callable[..., Any]


@dataclass(frozen=True)
class Fault:
    """`play` is what the victim does instead of a step, `others` what the others do. Then it has an error of its own
    (None: it has ended, or need not have one), they have `heard`. Later steps are right if the fault is `passing`: then
    so many trials follow each other `in_a_row`."""

    play: Callable[[Rank, Noted], Any]
    own: str | None
    heard: str
    others: Callable[[Rank], Any] = lambda rank: rank.play(*rank.inputs(rank.trial.num_good))
    styles: tuple[str, ...] = STYLES
    places: tuple[str, ...] = (BEFORE,)
    num_good: tuple[int, ...] = (0, 1, 2, 3)
    ends: bool = False
    passing: bool = True
    num_trials: int = FEW_TRIALS
    in_a_row: int = IN_A_ROW


class OutOfLuck(Exception):
    pass


def out_of_luck() -> None:
    raise OutOfLuck("no dice")


def stall() -> None:
    time.sleep(TIMEOUT_S + 2.5)


def befallen(fault: Callable[[], None]) -> Callable[[Rank, Noted], None]:
    def play(rank: Rank, noted: Noted) -> None:
        if rank.trial.place == BEFORE:
            noted(fault)
        else:
            ALARM.set(lambda: noted(fault), rank.trial.place)
        rank.play(*rank.inputs(rank.trial.num_good))

    return play


def signalled(number: signal.Signals) -> Callable[[Rank, Noted], None]:
    return befallen(lambda: os.kill(os.getpid(), number))


def with_inputs(change: Callable[..., Any]) -> Callable[[Rank, Noted], None]:
    def play(rank: Rank, noted: Noted) -> None:
        noted()
        rank.play(*change(*rank.inputs(rank.trial.num_good)))

    return play


def another_model(rank: Rank, noted: Noted) -> None:
    other = rank.compiled(2)
    noted()
    other(*rank.inputs(rank.trial.num_good))


def other_options(rank: Rank, noted: Noted) -> None:
    choices: list[dict[str, Any]] = [{"num_microbatches": 3}, {"min_tokens": 7}, {"pad_to": "auto"}]
    if rank.trial.style == "decorated":  # else it is not ours any more, and never comes
        choices.append({"split": "never"})
    other = rank.compiled(1, **random.Random(rank.trial.seed).choice(choices))
    noted()
    other(*rank.inputs(rank.trial.num_good))


def wrong_pad_value(rank: Rank, noted: Noted = lambda: None) -> None:
    other = rank.compiled(1, pad_values={"shift": 0.5})
    noted()
    other(*rank.inputs(rank.trial.num_good))


def left_out(rank: Rank, noted: Noted = lambda: None) -> None:
    is_victim = rank.me == rank.trial.victim
    group = new_group([m for i, m in enumerate(rank.trial.members) if (i == rank.trial.victim) == is_victim])
    noted()
    dp_group = dist.GroupMember.NON_GROUP_MEMBER if is_victim else group
    rank.compiled(1, dp_group=dp_group)(*rank.inputs(rank.trial.num_good))


def idles(rank: Rank, noted: Noted) -> None:
    noted()
    rank.play.forward.idle_step()


GONE = r"RankLost: rank {v} did not (agree|finish \S+) (on|in|of) step \d+ within \d+\.\d s( \(.*\))?$"
DIFFERS = r"Disagreement: ranks must play the same (program|config), but do not \(.*rank {v}: \w+.*\)\. Compile "
WRONG = r"Disagreement: rank {v} came to this step with wrong inputs; the error there says what is wrong$"
LEFT = r"RankLost: rank {v} left: (it|compiling) raised "
NO_VALUE = r"ValueError: pad_values\['shift'\]=0.5 is no value of torch.int64, its dtype$"
LEFT_OUT = r"\w+: .*dp_group leaves out rank \d of the world, with whom the model communicates: "
EVERYWHERE = (BEFORE, FIRST, SECOND, COMPILING)

FAULTS = {
    "is killed": Fault(
        signalled(signal.SIGKILL), None, GONE, places=EVERYWHERE, ends=True, passing=False, num_trials=NUM_TRIALS,
    ),
    "is stopped": Fault(
        signalled(signal.SIGSTOP), None, GONE, places=EVERYWHERE, ends=True, passing=False, num_trials=NUM_TRIALS,
    ),
    "raises": Fault(
        befallen(out_of_luck), "OutOfLuck: no dice", LEFT + "OutOfLuck: no dice$", places=(FIRST, SECOND),
        passing=False, num_trials=NUM_TRIALS,
    ),
    "stalls": Fault(befallen(stall), None, GONE, places=(BEFORE, FIRST, SECOND), passing=False),
    "cannot compile": Fault(
        befallen(out_of_luck), r"\w+: .*OutOfLuck", LEFT, places=(COMPILING,), passing=False
    ),
    "brings another hidden size": Fault(
        with_inputs(lambda x, shift: (torch.cat([x, x], 1), shift)), r"\w+: ", LEFT,
        styles=("decorated",), passing=False,
    ),
    "plays another model": Fault(another_model, DIFFERS, DIFFERS, num_trials=NUM_TRIALS),
    "has other options": Fault(other_options, DIFFERS, DIFFERS, num_trials=NUM_TRIALS),
    "brings too many tokens": Fault(
        with_inputs(lambda x, shift: (torch.ones(41, HIDDEN, dtype=x.dtype), shift.new_ones(41))),
        "ValueError: 41 tokens are more than the largest size in pad_to, 40: ", WRONG,
    ),
    "brings inputs that differ": Fault(
        with_inputs(lambda x, shift: (x, shift[1:])), r"ValueError: token inputs must have one number of tokens \(",
        WRONG, styles=("decorated",),
    ),
    "brings another dtype": Fault(
        with_inputs(lambda x, shift: (x.float(), shift)), DIFFERS, DIFFERS
    ),
    "brings too few dims": Fault(
        with_inputs(lambda x, shift: (x, shift.sum())), r"ValueError: token_dims names dim 0 of shift, whose shape is ",
        WRONG, styles=("decorated",),
    ),
    "pads with no value of the dtype": Fault(wrong_pad_value, NO_VALUE, WRONG, styles=("decorated",)),
    "pads like all with no value of the dtype": Fault(wrong_pad_value, NO_VALUE, NO_VALUE, others=wrong_pad_value),
    "is not in dp_group": Fault(left_out, r"(\w+: .*)?ValueError: dp_group=-100 ", LEFT_OUT, others=left_out),
    "idles before its first call": Fault(
        idles, "ValueError: idle_step has seen no call yet", WRONG, styles=("decorated",), num_good=(0,), in_a_row=1
    ),
}  # fmt: skip


# -- worlds of ranks, and what they must say --------------------------------------------------------------------------


class World:
    """Ranks that play one trial after the other; those that are killed are missing from then on."""

    def __init__(self) -> None:
        self.ranks = Ranks(NUM_RANKS, preload=[__name__, "torch._inductor.compile_fx"])
        self.alive: list[int] = []
        self.num_lost = 0

    def members(self) -> tuple[int, ...]:
        """Three ranks at least, so that two of them can compare notes.

        Every group in which a rank was lost leaves Gloo threads that spin: after some, new ranks are quicker.
        """
        if len(self.alive) < 3 or self.num_lost >= MOST_LOST:
            self.ranks.kill()
            self.ranks.run(warm_up, timeout=120.0)
            self.alive, self.num_lost = list(range(NUM_RANKS)), 0
        return tuple(self.alive)

    def play(self, trials: Sequence[Trial]) -> dict[int, list[Told]]:
        """What each member tells, by its rank in the group; a victim that is stopped goes on when all others did."""
        trial = trials[0]
        victim = trial.members[trial.victim]
        self.num_lost += not trial.kind.passing
        self.ranks.ask(trial.members, tells, trials)
        answers = self.ranks.answers([rank for rank in trial.members if rank != victim], 60.0)
        if trial.fault == "is killed":
            self.alive.remove(victim)
        else:
            os.kill(self.ranks.pid(victim), signal.SIGCONT)
            answers |= self.ranks.answers([victim], 30.0)
        silent = [rank for rank in trial.members if rank in self.alive and rank not in answers]
        if errors := [f"rank {rank}: {answer.error}" for rank, answer in answers.items() if answer.error] or silent:
            raise RankFailed(f"{errors}, no answer of {silent}")
        return {trial.members.index(rank): answer.value for rank, answer in answers.items()}


@pytest.fixture(scope="module")
def worlds() -> Iterator[Queue[World]]:
    free: Queue[World] = Queue()
    made = [World() for _ in range(NUM_WORLDS)]
    for world in made:
        world.members()
        free.put(world)
    yield free
    for world in made:
        world.ranks.kill()  # what a lost rank did not come to is still under way, and nothing can end it


@pytest.mark.parametrize("fault", FAULTS)
def test_the_others_hear_of_a_rank_that(worlds, fault):
    def play(seeds: Sequence[int]) -> list[str]:
        world = worlds.get()
        try:
            members = world.members()
            trials = [drawn(fault, seeds[0], seed, members) for seed in seeds]
            told = world.play(trials)
        except (RankFailed, OSError) as error:  # a rank that has died is no process, and its pipe is broken
            world.alive = []
            return [f"seeds {seeds}: {type(error).__name__}: {error}"]
        finally:
            worlds.put(world)
        each = [(trial, {rank: t[i] for rank, t in told.items()}) for i, trial in enumerate(trials)]
        return [f"{trial}: {problem}" for trial, heard in each for problem in problems(trial, heard)]

    kind = FAULTS[fault]
    step = kind.in_a_row if kind.passing else 1
    rows = [range(i, min(i + step, kind.num_trials)) for i in range(0, kind.num_trials, step)]
    with ThreadPoolExecutor(NUM_WORLDS) as pool:
        assert [problem for found in pool.map(play, rows) for problem in found] == []


def drawn(fault: str, first: int, seed: int, members: tuple[int, ...]) -> Trial:
    """The trial of a seed; it has the style of the first one in its row."""
    rng, kind = random.Random(f"{fault} {seed}"), FAULTS[fault]
    place = rng.choice(kind.places)
    num_good = 0 if place == COMPILING else rng.choice(kind.num_good)
    if place == BEFORE and not kind.passing:
        num_good = max(1, num_good)  # a rank that has never connected is waited for ten times as long
    style = kind.styles[first // (kind.in_a_row if kind.passing else 1) % len(kind.styles)]
    return Trial(fault, style, place, num_good, rng.randrange(len(members)), members, seed)


def problems(trial: Trial, told: dict[int, Told]) -> Iterator[str]:
    kind, survivors = trial.kind, {rank: t for rank, t in told.items() if rank != trial.victim}
    if len({re.sub(r"0x\w+", "", str(t.error)) for t in survivors.values()}) != 1:  # but for addresses in memory
        yield f"they do not say the same: {[t.error for t in survivors.values()]}"
    for rank, t in told.items():
        error, want = str(t.error), kind.own if rank == trial.victim else kind.heard.format(v=trial.victim)
        if want and not re.match(want.format(v=trial.victim), error, re.DOTALL):
            yield f"rank {rank} heard {error!r}, not {want!r}"
        if rank != trial.victim and t.seconds > (LONG_TIMEOUT_S if kind.passing else TIMEOUT_S) + 2.0:
            yield f"rank {rank} heard after {t.seconds:.1f} s"
        yield from (f"rank {rank} {what}" for what in problems_after(t, kind, is_victim=rank == trial.victim))


def problems_after(t: Told, kind: Fault, *, is_victim: bool) -> Iterator[str]:
    if kind.passing and t.again is not None:
        yield f"raised in the next step: {t.again}"
    if not kind.passing and not str(t.again).startswith("RankLost: "):
        yield f"heard {t.again!r} when it came again"
    if not kind.passing and not is_victim:  # which may compile before it hears, and has its own words for the first
        if t.again != t.error:
            yield f"first heard {t.error!r}, then {t.again!r}"
        if t.seconds_again > 1.0:
            yield f"heard after {t.seconds_again:.1f} s when it came again"
    if t.threads:
        yield f"has threads left: {t.threads}"
    if not t.is_right_after:
        yield "is wrong in eager"


# -- ranks that are lost before they have met, and with the store of all -----------------------------------------------


def heard(num_steps: int, victim: int, number: signal.Signals, timeout_s: float) -> tuple[str | None, float]:
    """What a rank hears, and when, if `victim` gets a signal before one of its calls."""
    model = torch.compile(Model(dist.group.WORLD), backend="dbo", options={"inner": "eager", "timeout_s": timeout_s})
    x, shift = torch.ones(7, HIDDEN, dtype=torch.float64), torch.ones(7, dtype=torch.int64)
    with torch.no_grad():
        for _ in range(num_steps):
            model(x, shift)
        if dist.get_rank() == victim:
            os.kill(os.getpid(), number)
        began = time.monotonic()
        error, raised_at = error_of(lambda: model(x, shift))
    return error, raised_at - began


def heard_with_the_store_at_rank_0(*args: Any) -> tuple[str | None, float]:
    """As where ranks are started by hand: their store is a thread of rank 0."""
    first, rank = dist.distributed_c10d._get_default_store(), dist.get_rank()
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) if rank == 0 else None
    first.set("port", str(store.port)) if store else None
    store = store or dist.TCPStore("127.0.0.1", int(first.get("port")), is_master=False, wait_for_workers=False)
    dist.destroy_process_group()
    dist.init_process_group("gloo", store=store, rank=rank, world_size=NUM_RANKS)
    return heard(*args)


def survivors(worlds: Queue[World], fn: Callable[..., Any], num_steps: int, victim: int, *args: Any) -> list[Any]:
    """What the others answer, in a world that is of no use after that."""
    world = worlds.get()
    try:
        world.alive = []
        world.members()
        world.alive = []
        world.ranks.ask(range(NUM_RANKS), fn, num_steps, victim, *args)
        answers = world.ranks.answers([rank for rank in range(NUM_RANKS) if rank != victim], 60.0)
    finally:
        worlds.put(world)
    return [answer.value for _, answer in sorted(answers.items())]


def test_a_rank_that_never_connects_is_waited_for_ten_times_as_long(worlds):
    errors = [error for error, _ in survivors(worlds, heard, 0, 2, signal.SIGKILL, 0.3)]
    assert errors == [errors[0]] * 3
    found = re.match(r".*RankLost: rank 2 did not connect within (\d+\.\d) s", errors[0], re.DOTALL)
    assert found, errors[0]
    assert float(found[1]) < 10 * 0.3 + 2.0


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_that_is_lost_with_the_store_of_all_does_not_hold_up_the_error(worlds, number):
    found = survivors(worlds, heard_with_the_store_at_rank_0, 2, 0, number, TIMEOUT_S)
    for error, seconds in found:
        assert error.startswith("RankLost: ranks did not all agree on step 3, nor does their store say who is missing")
        assert seconds < TIMEOUT_S + 2.0
    assert len(found) == NUM_RANKS - 1
