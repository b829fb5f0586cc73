"""A mixture-of-experts stack as segments, and programs made of it: realistic, and small enough to read."""

from __future__ import annotations

from dbo_compile.ir.program import Program
from dbo_compile.ir.schedule import ROWS, START, Lane, Schedule, Segment
from dbo_compile.ir.tokens import Local, Placement, Shared, Split
from dbo_compile.passes.lower import lower
from dbo_compile.passes.order import order
from dbo_compile.passes.sync import sync


def program_of(
    schedule: Schedule, places: dict[str, Placement], inputs: tuple[str, ...], outputs: tuple[str, ...]
) -> Program:
    instrs = sync(lower(schedule, places, inputs, outputs), schedule.segments)
    return Program(instrs, schedule.segments, schedule.num_microbatches)


def compute(name, inputs, outputs, **kw):
    return Segment(name, Lane.COMPUTE, tuple(inputs.split()), tuple(outputs.split()), True, **kw)


def comm(name, inputs, outputs, **kw):
    return Segment(name, Lane.COMM, tuple(inputs.split()), tuple(outputs.split()), True, group="ep", **kw)


def layer(i):
    """Attention writes a split cache and a shared one; counts are read on the host; a shared expert is the filler."""
    state = {"writes": (f"kv{i}", "seen"), "aliases": {f"k{i}": f"kv{i}"}}
    return [
        compute(f"attn{i}", f"h{i} w {ROWS} {START} kv{i} seen", f"a{i} k{i}", **state),
        comm(f"counts{i}", f"a{i}", f"c{i}"),
        compute(f"sizes{i}", f"c{i}", f"n{i}", host=True),
        comm(f"dispatch{i}", f"a{i} n{i}", f"d{i}"),
        compute(f"shared{i}", f"a{i} w", f"s{i}"),
        compute(f"experts{i}", f"d{i} k{i}", f"e{i}"),
        comm(f"combine{i}", f"e{i} n{i}", f"b{i}"),
        compute(f"add{i}", f"b{i} s{i} a{i}", f"h{i + 1}"),
    ]


def moe(num_layers):
    head = Segment("head", Lane.COMPUTE, (f"h{num_layers}", "w"), ("y",), per_microbatch=False)
    return {s.name: s for i in range(num_layers) for s in layer(i)} | {"head": head}


def moe_places(num_layers):
    per_layer = {"a": Split(0), "s": Split(0), "b": Split(0), "h": Split(0), "kv": Split(1), "k": Split(1)}
    local = dict.fromkeys("cnde", Local())
    names = {f"{v}{i}": p for i in range(num_layers + 1) for v, p in (per_layer | local).items()}
    return names | {"w": Shared(), "seen": Shared(), "y": Shared()}


def moe_schedule(num_layers=3, num_microbatches=2, policy="list"):
    threaded = frozenset(f"attn{i}" for i in range(num_layers))
    return order(moe(num_layers), num_microbatches, policy, threaded=threaded)


def moe_program(num_layers=3, num_microbatches=2, policy="list"):
    schedule = moe_schedule(num_layers, num_microbatches, policy)
    inputs = ("h0", "w", "seen", *(f"kv{i}" for i in range(num_layers)))
    return program_of(schedule, moe_places(num_layers), inputs, ("y",))
