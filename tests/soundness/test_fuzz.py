"""Random functions, compiled once and called with several numbers of tokens, do what they do in eager."""

from __future__ import annotations

import os

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dbo_compile import reports
from tests.soundness.programs import arguments, constants, functions

NUM_EXAMPLES = int(os.environ.get("SOUNDNESS_EXAMPLES", "20"))
TOKEN_DIMS = {"v0": 0, "v1": 0, "v2": 0, "buf": 0}


@pytest.fixture(scope="module", autouse=True)
def _one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def function(source):
    scope = constants(dist.group.WORLD)
    exec(source, scope)
    return scope["fn"]


def check(source, sizes, num_microbatches=2):
    """Compiled and eager agree, in what they return and in what they write; gives the report."""
    torch._dynamo.reset()
    eager = function(source)
    options = {"split": "always", "inner": "eager", "num_microbatches": num_microbatches, "token_dims": TOKEN_DIMS}
    compiled = torch.compile(function(source), backend="dbo", options=options, fullgraph=True)
    for n in sizes:
        mine, its = arguments(n), arguments(n)
        with torch.no_grad():
            try:
                want = eager(*mine)
            except (RuntimeError, IndexError):  # experts are too many to be numbers of so few rows
                continue
            got = compiled(*its)
        for i, (a, b) in enumerate(zip((*got, *its), (*want, *mine), strict=True)):
            assert a.shape == b.shape, f"{n} tokens, result or argument {i}"
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)
    return reports()[-1]


@settings(
    max_examples=NUM_EXAMPLES, deadline=None, database=None, derandomize="SOUNDNESS_EXAMPLES" not in os.environ,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
@given(data=st.data())
def test_a_random_function_does_what_it_does_in_eager(data):
    source = data.draw(functions(dist.group.WORLD))
    num_microbatches = data.draw(st.sampled_from([2, 2, 3]))
    first = data.draw(st.sampled_from([11, 8, 7]))
    check(source, (first, 7, 5, 10, 3, 2), num_microbatches)
