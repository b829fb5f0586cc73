"""Host cost: what it takes to play two microbatches of a model whose segments do nothing.

    python -m benchmarks.bench_host [--layers 2 4 8 16 32 64] [--quick] [--write]

Three ways to play the same segments: the emitted program of dbo; two threads that hand over at every exchange, with an
event for each thread, as vLLM's `ubatching.py` does; two coroutines on an asyncio loop, as DynaFlow's executor does. A
segment is a function that returns its argument. The threads are started anew for each step, as in vLLM, or kept; the
loop is kept, which is the best case for it.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Mapping
from functools import partial

import torch

from benchmarks.results import Table, Timing, alternating, options, publish
from dbo_compile.ir.program import Program
from dbo_compile.ir.proof import verify_program
from dbo_compile.ir.schedule import Lane, Segment
from dbo_compile.ir.tokens import Local, Placement, Split
from dbo_compile.passes.emit import emit
from dbo_compile.passes.lower import lower
from dbo_compile.passes.order import order
from dbo_compile.passes.sync import sync
from dbo_compile.runtime.lanes import WorkLanes

EXCHANGES = 2
"""Of a layer: dispatch and combine."""
KEPT = "two threads, kept"
Step = Callable[[], object]
Took = Mapping[int, Mapping[str, Timing]]


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 4, 8, 16, 32, 64])
    args = parser.parse_args()
    torch.set_num_threads(1)
    repeats = 20 if args.quick else 400
    took: dict[int, dict[str, Timing]] = {}
    switches: dict[int, dict[str, int]] = {}
    for n in args.layers:
        ways, switches[n] = ways_to_play(n)
        for step in ways.values():
            step()
        took[n] = alternating(ways, repeats)
    about = (
        f"Medians of {repeats} steps in turn, ± half the distance of the quartiles. A switch is a change of lane in "
        "the program of dbo, a hand-over between threads or coroutines elsewhere. An exchange of a microbatch has two "
        "of the former and one of the latter, so the ways are compared by exchange. No way touches a device or a "
        "stream here."
    )
    tables = [each_step(took, switches), slopes(took, switches)]
    publish("host", "Host cost of a step", tables, about=about, write=args.write)


def each_step(took: Took, switches: Mapping[int, Mapping[str, int]]) -> Table:
    columns = ("layers", "way", "us a step", "switches", "us a switch", "us an exchange", "threads, kept / this")
    rows = [
        (n, way, t.us(), switches[n][way], micro(t.median / switches[n][way]), micro(t.median / num_exchanges(n)),
         f"{ways[KEPT].median / t.median:.1f}")
        for n, ways in took.items()
        for way, t in ways.items()
    ]  # fmt: skip
    return Table(columns, rows, title="Whole steps")


def slopes(took: Took, switches: Mapping[int, Mapping[str, int]]) -> Table:
    """What a further switch costs: the step of most layers less that of fewest, without what every step has once."""
    few, many = min(took), max(took)
    further = {way: took[many][way].median - took[few][way].median for way in took[few]}
    num_more = num_exchanges(many) - num_exchanges(few)
    a_switch = {way: s / max(1, switches[many][way] - switches[few][way]) for way, s in further.items()}
    rows = [
        (way, micro(a_switch[way]), f"{a_switch[KEPT] / a_switch[way]:.1f}", micro(s / max(1, num_more)),
         f"{further[KEPT] / s:.1f}") if s else (way, *"----")
        for way, s in further.items()
    ]  # fmt: skip
    columns = ("way", "us a further switch", "threads, kept / this", "us a further exchange", "threads, kept / this")
    return Table(columns, rows, title=f"From {few} to {many} layers")


def num_exchanges(num_layers: int) -> int:
    """Of both microbatches."""
    return 2 * EXCHANGES * num_layers


def micro(seconds: float) -> str:
    return f"{seconds * 1e6:.2f}"


def ways_to_play(num_layers: int) -> tuple[dict[str, Step], dict[str, int]]:
    """Each way as a function, and how often it switches in a step."""
    program = program_of(num_layers)
    module = emit(program, {"compute": same, "comm": sent}, ("h_last",))
    x = torch.zeros(2, 1)
    num_lane_switches = sum(n.name.startswith("switch_to") for n in module.graph.nodes)
    kept, loop = Threads(num_layers), asyncio.new_event_loop()
    ways: dict[str, Step] = {
        "dbo": partial(play, module, x),
        "two threads": lambda: Threads(num_layers).once(x),
        KEPT: partial(kept.step, x),
        "asyncio": partial(two_coroutines, loop, num_layers, x),
    }
    return ways, {name: num_lane_switches if name == "dbo" else num_exchanges(num_layers) for name in ways}


# -- dbo --------------------------------------------------------------------------------------------------------------


def same(x: torch.Tensor) -> tuple[torch.Tensor]:
    return (x,)


def sent(_lanes: object, x: torch.Tensor) -> tuple[torch.Tensor]:
    return (x,)


def program_of(num_layers: int) -> Program:
    """Attention, dispatch, experts, combine in each layer, two microbatches, in the order that dbo chooses."""
    segments: dict[str, Segment] = {}
    value, places = "x", dict[str, Placement](x=Split(0))
    for i in range(num_layers):
        for name, lane in (("attn", "compute"), ("send", "comm"), ("experts", "compute"), ("back", "comm")):
            out = "h_last" if (i, name) == (num_layers - 1, "back") else f"{name}{i}_out"
            segments[f"{name}{i}"] = Segment(
                f"{name}{i}", Lane(lane), (value,), (out,), per_microbatch=True, code=lane, group="ep"
            )
            places[out] = Local() if name in ("send", "experts") else Split(0)
            value = out
    schedule = order(segments, 2)
    program = Program(sync(lower(schedule, places, ("x",), ("h_last",)), segments), segments, 2)
    verify_program(program)
    return program


def play(module: Callable[..., object], x: torch.Tensor) -> object:
    with WorkLanes((1, 1)) as lanes:
        return module(lanes, x)


# -- two threads ------------------------------------------------------------------------------------------------------


class Threads:
    """Two threads of which one runs at a time; an event of each says that it is its turn."""

    def __init__(self, num_layers: int) -> None:
        self.num_layers = num_layers
        self.turns = (threading.Event(), threading.Event())
        self.done = threading.Event()
        self.go: list[threading.Event] | None = None
        self.over = [False, False]
        self.x = torch.empty(0)

    def once(self, x: torch.Tensor) -> None:
        """A step with threads of its own."""
        self.begin()
        threads = [threading.Thread(target=self.run, args=(me, x)) for me in range(2)]
        for thread in threads:
            thread.start()
        self.turns[0].set()
        for thread in threads:
            thread.join()

    def step(self, x: torch.Tensor) -> None:
        """A step with threads that wait for the next one."""
        if self.go is None:
            self.go = [threading.Event(), threading.Event()]
            for me in range(2):
                threading.Thread(target=self.stay, args=(me, self.go[me]), daemon=True).start()
        self.begin()
        self.x = x
        for go in self.go:
            go.set()
        self.turns[0].set()
        self.done.wait()

    def begin(self) -> None:
        self.over = [False, False]
        self.done.clear()
        for turn in self.turns:
            turn.clear()

    def stay(self, me: int, go: threading.Event) -> None:
        while True:
            go.wait()
            go.clear()
            self.run(me, self.x)

    def run(self, me: int, x: torch.Tensor) -> None:
        """The model, for one microbatch."""
        self.wait(me)
        for _ in range(EXCHANGES * self.num_layers):
            (x,) = same(x)
            (x,) = sent(self, x)
            if not self.over[1 - me]:
                self.turns[1 - me].set()
                self.wait(me)
        self.over[me] = True
        (self.done if self.over[1 - me] else self.turns[1 - me]).set()

    def wait(self, me: int) -> None:
        self.turns[me].wait()
        self.turns[me].clear()


# -- asyncio ----------------------------------------------------------------------------------------------------------


def two_coroutines(loop: asyncio.AbstractEventLoop, num_layers: int, x: torch.Tensor) -> None:
    async def microbatch(x: torch.Tensor) -> torch.Tensor:
        for _ in range(EXCHANGES * num_layers):
            (x,) = same(x)
            (x,) = sent(None, x)
            await asyncio.sleep(0)
        return x

    async def step() -> None:
        await asyncio.gather(microbatch(x), microbatch(x))

    loop.run_until_complete(step())


if __name__ == "__main__":
    main()
