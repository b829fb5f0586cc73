"""Random graphs through order, lower and sync: proven, free of races by brute force, and equal to what they mean."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from random import Random

from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from dbo_compile.errors import InvalidProgram
from dbo_compile.ir.proof import verify_program
from dbo_compile.ir.schedule import ROWS, START, Lane, Segment
from dbo_compile.ir.tokens import Local, Placement, Shared, Split
from dbo_compile.ir.verify import verify_schedule
from dbo_compile.passes.order import POLICIES, order
from tests.ir.moe import moe, moe_places, program_of
from tests.ir.oracle import evaluate, races, reference


@dataclass
class Graph:
    """Segments as they are drawn, with all that the passes must be told about them."""

    segments: dict[str, Segment] = field(default_factory=dict)
    places: dict[str, Placement] = field(default_factory=lambda: {"x": Split(0), "kv": Split(1), "w": Shared()})
    inputs: tuple[str, ...] = ("x", "kv", "w")
    per_microbatch: set[str] = field(default_factory=set)
    threaded: set[str] = field(default_factory=set)

    def is_joined(self, value):
        return value in self.per_microbatch and isinstance(self.places[value], Split)

    def readable(self, per_microbatch):
        if per_microbatch:
            return [v for v in self.places if v in self.per_microbatch or not isinstance(self.places[v], Local)]
        return [v for v in self.places if not (v in self.per_microbatch and isinstance(self.places[v], Local))]


@st.composite
def graphs(draw):
    graph = Graph()
    for i in range(draw(st.integers(1, 11))):
        add_segment(draw, graph, f"s{i}")
    return graph


def add_segment(draw, graph, name):
    per_microbatch = draw(st.integers(0, 3)) > 0
    lane = draw(st.sampled_from(Lane))
    inputs = draw(st.lists(st.sampled_from(graph.readable(per_microbatch)), min_size=1, max_size=4, unique=True))
    in_place = [v for v in inputs if per_microbatch or not graph.is_joined(v)]
    writes = draw(st.lists(st.sampled_from(in_place), max_size=2, unique=True)) if in_place else []
    outputs, aliases = [f"{name}_{j}" for j in range(draw(st.integers(0, 2)))], {}
    for value in outputs:
        fresh = (Split(0), Local()) if per_microbatch else (Split(0), Shared())
        graph.places[value] = draw(st.sampled_from(fresh))
        if in_place and draw(st.integers(0, 3)) == 0:
            aliases[value] = draw(st.sampled_from(in_place))
            graph.places[value] = graph.places[aliases[value]]
    if per_microbatch:
        graph.per_microbatch.update(outputs)
        if any(isinstance(graph.places[v], Shared) for v in writes):
            graph.threaded.add(name)
    numbers = draw(st.lists(st.sampled_from([ROWS, START]), max_size=2, unique=True))
    graph.segments[name] = Segment(
        name,
        lane,
        (*inputs, *numbers),
        tuple(outputs),
        per_microbatch,
        group=draw(st.sampled_from(["ep", "tp"])) if lane is Lane.COMM else "",
        host=lane is Lane.COMPUTE and draw(st.integers(0, 4)) == 0,
        writes=tuple(writes),
        aliases=aliases,
        after=tuple(draw(st.lists(st.sampled_from(list(graph.segments)), max_size=1))) if graph.segments else (),
    )


COSTS = st.lists(st.integers(0, 7), min_size=11, max_size=11)


@settings(max_examples=200, deadline=None)
@given(graphs(), st.integers(1, 4), st.sampled_from(list(POLICIES)), COSTS)
def test_random_graphs_are_proven_and_right_under_every_policy(graph, n, policy, costs):
    schedule = order(
        graph.segments,
        n,
        policy,
        cost=lambda step: float(costs[int(step.segment[1:])]),
        threaded=frozenset(graph.threaded),
    )
    verify_schedule(schedule)
    outputs = tuple(v for v in graph.readable(per_microbatch=False) if v not in {"x", "w"})
    program = program_of(schedule, graph.places, graph.inputs, outputs)
    verify_program(program)
    assert races(program) == []
    assert evaluate(program, graph.places) == reference(graph.segments, graph.places, graph.inputs, outputs, n)


@settings(
    max_examples=100, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate]
)  # shrinking takes minutes
@given(graphs(), st.integers(1, 3), st.sampled_from(list(POLICIES)), st.integers(0))
def test_whatever_slip_in_a_random_program_is_accepted_is_harmless(graph, n, policy, seed):
    random = Random(seed)
    schedule = order(graph.segments, n, policy, threaded=frozenset(graph.threaded))
    outputs = tuple(v for v in graph.readable(per_microbatch=False) if v not in {"x", "w"})
    program = program_of(schedule, graph.places, graph.inputs, outputs)
    expected = evaluate(program, graph.places)
    for _ in range(20):
        instrs = list(program.instrs)
        for _ in range(random.randint(1, 2)):
            instr = instrs.pop(random.randrange(len(instrs)))
            if random.random() < 0.8:
                instrs.insert(random.randrange(len(instrs) + 1), instr)
        mutant = replace(program, instrs=tuple(instrs))
        try:
            verify_program(mutant)
        except InvalidProgram:
            continue
        assert races(mutant) == [], str(mutant)
        assert evaluate(mutant, graph.places) == expected, str(mutant)


def test_the_oracle_agrees_on_a_real_stack():
    segments, places, inputs = moe(2), moe_places(2), ("h0", "w", "seen", "kv0", "kv1")
    expected = reference(segments, places, inputs, ("y", "seen", "kv1"), 3)
    for policy in POLICIES:
        schedule = order(segments, 3, policy, threaded=frozenset({"attn0", "attn1"}))
        assert evaluate(program_of(schedule, places, inputs, ("y", "seen", "kv1")), places) == expected
