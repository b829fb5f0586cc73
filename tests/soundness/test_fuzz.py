"""Random functions, compiled once and called with several numbers of tokens, do what they do in eager.

`SOUNDNESS_EXAMPLES=1000 pytest -s` draws so many, longer ones among them, by a seed that it prints; `SOUNDNESS_SEED` is
that of another run.
"""

from __future__ import annotations

import os
from random import Random, randrange

import hypothesis
import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dbo_compile import compilation, reports
from dbo_compile.passes.cost import CostModel
from dbo_compile.passes.cut import Kind
from dbo_compile.passes.order import POLICIES
from tests.soundness.mutations import accepted
from tests.soundness.programs import arguments, constants, functions

LONG = "SOUNDNESS_EXAMPLES" in os.environ
NUM_EXAMPLES = int(os.environ.get("SOUNDNESS_EXAMPLES", "12"))
SEED = int(os.environ.get("SOUNDNESS_SEED", randrange(2**32) if LONG else 0))
TOKEN_DIMS = {"v0": 0, "v1": 0, "v2": 0, "buf": 0}


pytestmark = pytest.mark.usefixtures("group")


def function(source, regions=()):
    """The function; those of `regions` that it calls are nested compile regions."""
    scope = constants(dist.group.WORLD)
    scope |= {name: torch.compiler.nested_compile_region(scope[name]) for name in regions}
    exec(source, scope)
    return scope["fn"]


def check(source, sizes, num_microbatches=2, policy="list", regions=()):
    """Compiled and eager agree, in what they return and in what they write; gives the report."""
    torch._dynamo.reset()
    eager = function(source)
    options = {"split": "always", "inner": "eager", "num_microbatches": num_microbatches, "token_dims": TOKEN_DIMS}
    options["policy"] = policy
    compiled = torch.compile(function(source, regions), backend="dbo", options=options, fullgraph=True)
    for n in sizes:
        mine, its = arguments(n), arguments(n)
        with torch.no_grad(), torch._dynamo.config.patch(capture_scalar_outputs=True):
            try:
                want = eager(*mine)
            except (RuntimeError, IndexError):  # experts are too many to be numbers of so few rows
                continue
            got = compiled(*its)
        for i, (a, b) in enumerate(zip((*got, *its), (*want, *mine), strict=True)):
            assert a.shape == b.shape, f"{n} tokens, result or argument {i}"
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)
    check_order(reports()[-1])
    return reports()[-1]


def check_order(report):
    """Where nothing is split, collectives are in the order of the graph: another rank may play that."""
    if report.levels is None:
        return
    at = {node: i for i, node in enumerate(report.levels.graph.nodes)}
    steps = report.engine.ways.programs.modules[1].steps.values()
    played = [report.levels.outline.groups[step.segment] for step in steps]
    order = [at[group.nodes[0]] for group in played if group.mode.kind is Kind.COMM]
    assert order == sorted(order)


class RandomCosts(CostModel):
    """Costs that have nothing to do with what is done, the same for each code in every run of a seed."""

    seed = 0

    def seconds(self, group):
        return Random(f"{self.seed} {[n.name for n in group.nodes]}").choice([0.0, 1e-6, 1e-5, 1e-4, 1e-3])


@hypothesis.seed(SEED)
@settings(
    max_examples=NUM_EXAMPLES, deadline=None, database=None, print_blob=True, suppress_health_check=list(HealthCheck)
)
@given(data=st.data())
def test_a_random_function_does_what_it_does_in_eager(data):
    source = data.draw(functions(dist.group.WORLD, most=60 if LONG else 30))
    num_microbatches = data.draw(st.sampled_from([2, 2, 3, 4]))
    first = data.draw(st.sampled_from([11, 8, 7]))
    regions = data.draw(st.sets(st.sampled_from(["block", "experts"])))
    policy = data.draw(st.sampled_from(list(POLICIES)))
    RandomCosts.seed = data.draw(st.integers(0, 9))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compilation, "CostModel", RandomCosts)
        report = check(source, (first, 7, 5, 10, 3, 2), num_microbatches, policy, regions)
    if report.levels is not None:
        _, let_pass = accepted(report.levels.program, report.levels.schedule)
        assert let_pass == []


@pytest.mark.skipif(not LONG, reason="only of a run with SOUNDNESS_EXAMPLES")
def test_the_seed_is_printed():
    print(f"SOUNDNESS_SEED={SEED} SOUNDNESS_EXAMPLES={NUM_EXAMPLES}")


EXCHANGES = """
def fn(v0, v1, v2, buf, cache):
    order = v1.argsort(stable=True)
    sent = funcol.all_to_all_single(v0[order], None, None, G)
    shared = torch.tanh(v0 @ W)
    summed = funcol.all_reduce(v0 @ V, 'sum', G)
    back = funcol.all_to_all_single(torch.relu(sent @ W), None, None, G)
    return torch.zeros_like(v0).index_add(0, order, back) + shared, summed
"""


@pytest.mark.parametrize("num_microbatches", [2, 3, 4])
@pytest.mark.parametrize("policy", list(POLICIES))
def test_every_slip_in_a_program_with_exchanges_is_caught(policy, num_microbatches):
    report = check(EXCHANGES, (11, 9), num_microbatches, policy)
    tried, let_pass = accepted(report.levels.program, report.levels.schedule)
    assert let_pass == []
    assert tried > 10 * num_microbatches
