"""The engine: how many rows each microbatch gets, what is played where none will do, what an error leaves behind."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import sympy
import torch
from torch.utils._sympy.functions import FloorDiv, Mod

from dbo_compile.config import Config
from dbo_compile.errors import Disagreement, NotSplit, Unpaddable
from dbo_compile.ir.tokens import TOKENS
from dbo_compile.runtime import ways as ways_module
from dbo_compile.runtime.agree import Agreement
from dbo_compile.runtime.capture import CapturePlayer
from dbo_compile.runtime.comparison import NOT_SPLIT, Comparison
from dbo_compile.runtime.engine import Engine, Follower
from dbo_compile.runtime.force import InForce, in_force
from dbo_compile.runtime.graphs import Limits
from dbo_compile.runtime.lanes import WorkLanes
from dbo_compile.runtime.plan import BatchPlan, Phase
from dbo_compile.runtime.rows import MOST_SHIFT, Guards, find_rows
from dbo_compile.runtime.signature import Signature, TokenInput
from dbo_compile.runtime.ways import Programs, Whole
from tests.runtime.test_capture_graphs import FakeGraphs

LENGTH = sympy.Symbol("s7", integer=True, positive=True)


def engine(
    *guards, n=2, inputs=("x",), symbols=None, modules=None, whole=lambda *_: ("whole",), signature=None,
    agreement=None, comm_codes=(), **options,
):
    """An engine whose programs tell the rows they were played with; `whole` says so."""
    config = Config(**({"num_microbatches": n, "inner": "eager", "split": "always", "gate": "never"} | options))
    token_inputs = tuple(TokenInput(i, 0, name) for i, name in enumerate(inputs))
    modules = modules or {m: told for m in (1, n)}
    return Engine(
        Programs(modules, Guards(guards, list(symbols or {})), "5" * 16, comm_codes=comm_codes),
        Whole(whole),
        Signature(token_inputs, symbol_inputs=symbols or {}, output_dims=(None,), **(signature or {})),
        agreement or Agreement(None, timeout_s=1.0),
        config,
    )


def told(lanes, *_):
    return (lanes.num_rows,)


def rows(tokens, *guards, n=2, least_rows=1):
    return find_rows(tokens, (), Guards(guards, ()), num_microbatches=n, least_rows=least_rows)


def multiple_of(k):
    return sympy.Eq(Mod(TOKENS, k), 0)


@pytest.mark.parametrize(
    ("n", "tokens", "found"),
    [
        (1, 9, (9,)),
        (2, 9, (5, 4)),
        (2, 8, (4, 4)),
        (2, 2, (1, 1)),
        (3, 10, (4, 4, 2)),
        (3, 4, (1, 1, 2)),
        (4, 9, (2, 2, 2, 3)),
        (4, 13, (4, 4, 4, 1)),
    ],
)
def test_rows_are_as_even_as_can_be(n, tokens, found):
    assert rows(tokens, n=n) == found


@pytest.mark.parametrize(
    ("n", "tokens", "found"), [(2, 40, (16, 24)), (2, 16, (8, 8)), (3, 32, (8, 8, 16)), (3, 24, (8, 8, 8))]
)
def test_rows_keep_every_guard(n, tokens, found):
    assert rows(tokens, multiple_of(8), n=n) == found


def test_a_guard_may_speak_of_another_symbol_of_the_call():
    found = engine(sympy.Eq(Mod(TOKENS * LENGTH, 6), 0), symbols={LENGTH: 1})
    assert found.planner.rows_of(18, 5) == (6, 12)
    assert found.planner.rows_of(18, 2) == (9, 9)
    assert found(torch.ones(18, 2), 5) == ((6, 12),)


def test_a_guard_that_divides_by_no_rows_does_not_hold():
    found = engine(sympy.Eq(Mod(TOKENS, FloorDiv(TOKENS, 4)), 0))
    assert found.planner.rows_of(9) == (5, 4)
    with pytest.raises(NotSplit, match="no split of 4 tokens"):
        found.planner.rows_of(4)


@pytest.mark.parametrize(
    ("guards", "options", "tokens", "reason"),
    [
        ((), {"n": 3}, 2, "2 tokens do not make 3 microbatches of at least 1"),
        ((), {"least_rows": 2}, 3, "3 tokens do not make 2 microbatches of at least 2"),
        # half of 9 tokens, rounded down, would keep it
        ((multiple_of(4),), {}, 9, r"no split of 9 tokens keeps what the graph was compiled for: Eq\(Mod\(T, 4\), 0\)"),
        ((multiple_of(2), multiple_of(16)), {}, 18, r"Mod\(T, 2\)"),
        ((multiple_of(4 * MOST_SHIFT),), {}, 12 * MOST_SHIFT, "no split of"),
    ],
)  # fmt: skip
def test_a_size_that_is_not_split_has_a_reason(guards, options, tokens, reason):
    with pytest.raises(NotSplit, match=reason):
        rows(tokens, *guards, **options)


def test_what_is_played_once_needs_all_rows_of_a_step_and_no_microbatch():
    guards = Guards([multiple_of(2)], (), once=[multiple_of(8)])
    assert find_rows(16, (), guards, num_microbatches=2, least_rows=1) == (8, 8)
    assert find_rows(8, (), guards, num_microbatches=2, least_rows=1) == (4, 4)
    with pytest.raises(NotSplit, match="what is played once was not compiled for 12 tokens"):
        find_rows(12, (), guards, num_microbatches=2, least_rows=1)
    assert [n for n in range(7, 18) if guards.broken(n, ()) is None] == [8, 16]
    assert Guards([], [LENGTH], once=[multiple_of(LENGTH)]).know_others


def test_nothing_is_joined_where_code_was_not_compiled_for_all_rows():
    """A refined program plays some code of a microbatch once, on all rows; these ones could not even be timed so."""
    found = engine(sympy.Lt(TOKENS, 6), split="auto")
    assert [found(torch.ones(9, 2)) for _ in range(30)] == [((5, 4),)] * 30


def test_a_graph_that_cannot_be_padded_is_played_as_it_comes():
    found = engine(pad_to=(8, 16), signature={"unpaddable": "it has a mean"})
    assert [found(torch.ones(n, 2)) for n in (9, 7, 16)] == [((5, 4),), ((4, 3),), ((8, 8),)]


def uneven(*, pads):
    """A step in which another rank brings two tokens less."""
    plan = BatchPlan((9, 7), 16, 32, 2, gate=False, phase=Phase.PREFILL, reason="", pads=pads)
    return InForce(plan, num_tokens=9, pads=pads)


def test_what_is_exchanged_over_the_step_is_not_played_by_ranks_that_differ_and_do_not_pad():
    found = engine(signature={"same_size": True})
    with in_force(uneven(pads=True)):
        assert found(torch.ones(16, 2)) == ((8, 8),)
    with in_force(uneven(pads=False)), pytest.raises(Disagreement, match="bring 9, 7 tokens, which have to be padded"):
        found(torch.ones(9, 2))


def test_ranks_that_differ_and_do_not_pad_ask_each_other_whether_they_can_split():
    found = engine(multiple_of(4))
    found.agreement.size = 2
    found.agreement.share = lambda values: [tuple(values), (False,) if len(values) == 1 else tuple(values)]
    with in_force(uneven(pads=False)):
        assert found(torch.ones(8, 2)) == ((8,),)
    assert found.calls.declined == {"another rank cannot split it": 1}


def test_a_step_that_was_padded_before_its_graph_was_known_is_not_played_nor_counted():
    found, step = engine(signature={"unpaddable": "it has a mean"}), uneven(pads=True)
    with in_force(step), pytest.raises(Unpaddable, match=r"^it has a mean$"):
        found(torch.ones(16, 2))
    assert (found.calls.total, step.num_played, step.can_pad) == (0, 0, False)


def test_a_split_point_is_looked_for_as_far_as_said():
    assert rows(3 * MOST_SHIFT, multiple_of(MOST_SHIFT)) == (MOST_SHIFT, 2 * MOST_SHIFT)


def test_calls_are_counted_with_their_reasons():
    found = engine(min_tokens=5)
    played = [found(torch.ones(tokens, 2)) for tokens in (9, 4, 7, 4, 3)]
    assert played == [((5, 4),), ((4,),), ((4, 3),), ((4,),), ((3,),)]
    assert (found.calls.total, found.calls.split) == (5, 2)
    assert found.calls.declined == {
        "it has 4 tokens, and a prefill is split from 5 on (min_tokens)": 2,
        "it has 3 tokens, and a prefill is split from 5 on (min_tokens)": 1,
    }


def test_inputs_that_differ_in_their_tokens_are_played_as_traced_whatever_their_names():
    found = engine(inputs=("xs", "xs"))
    assert found(torch.ones(9, 2), torch.ones(9)) == ((5, 4),)
    assert found(torch.ones(9, 2), torch.ones(7)) == ("whole",)
    assert found.calls.declined == {
        "its inputs differ in their number of tokens (xs: 9, xs: 7); see token_dims": 1
    }


def test_a_call_whose_inputs_differ_comes_as_one_of_a_graph_that_is_not_split():
    """It takes part in no timing, and the other ranks must know."""
    planner = engine(inputs=("x", "y")).planner
    programs = [planner._wish(planner.read([torch.ones(9, 2), torch.ones(n)])).program for n in (9, 7)]
    assert programs == [planner.fingerprint, NOT_SPLIT]


def test_a_size_that_differs_is_listed_though_no_token_input_has_it():
    signature = Signature((TokenInput(0, 0, "x"), TokenInput(1, 0, "y")), token_numbers=(2, 3))
    assert signature.listed([9, 9, 9, 7]) == "x: 9, y: 9, a size of another input: 7"
    assert signature.listed([9, 7, 9, 7]) == "x: 9, y: 7"


def test_a_size_that_no_code_was_compiled_for_is_played_as_traced():
    found = engine(sympy.Le(TOKENS, 10))
    assert found(torch.ones(19, 2)) == ((10, 9),)
    assert found(torch.ones(21, 2)) == ("whole",)
    assert found(torch.ones(21, 2)) == ("whole",)
    assert found.calls.declined == {"no split of 21 tokens keeps what the graph was compiled for: T <= 10": 2}


def test_an_error_in_a_program_passes_through_after_its_collectives_were_finished(monkeypatch):
    made = []

    class Noted(WorkLanes):
        def __init__(self, rows, wait_for):
            super().__init__(rows, wait_for)
            made.append(self)

        def finish(self):
            self.events["finished"] = 1

    def broken(_lanes, *_args):
        raise KeyError("mine")

    monkeypatch.setattr(ways_module, "WorkLanes", Noted)
    found = engine(modules={1: told, 2: broken})
    with pytest.raises(KeyError, match="mine"):
        found(torch.ones(9, 2))
    assert [lanes.events for lanes in made] == [{"finished": 1}]


# -- captured programs ----------------------------------------------------------------------------------------------


class Planned(Agreement):
    """Two ranks, the other of which says the same; a plan has what is in `also`."""

    def __init__(self):
        super().__init__(None, timeout_s=1.0)
        self.also, self.shared = {}, []

    def agree(self, wish, limits):
        return replace(super().agree(wish, limits), **self.also)

    def share(self, values):
        self.shared.append(tuple(values))
        return [tuple(values), tuple(values)]


def capturing_engine(**options):
    found = engine(agreement=Planned(), **options)
    graphs = FakeGraphs()
    found.player = CapturePlayer(
        lambda module, rows, args: told(SimpleNamespace(num_rows=rows)), graphs, torch.device("cpu"), Limits()
    )
    return found, graphs


def test_beside_a_rank_whose_graph_is_not_split_nothing_is_replayed():
    found, graphs = capturing_engine()
    x = torch.ones(9, 2)
    for _ in range(3):
        found(x)
    alone = Comparison(followers=(1,), alike=False)
    found.agreement.also = {"num_microbatches": 1, "reason": alone.why_whole, "compared": alone}
    assert [found(x) for _ in range(3)] == [((9,),)] * 3
    found.agreement.also = {}
    assert found(x) == ((5, 4),)
    assert graphs.log == ["capture", "replay", "replay", "replay"]


def test_ranks_that_communicate_in_other_sizes_than_each_other_replay_nothing():
    found, graphs = capturing_engine(comm_codes=("exchange",))
    x = torch.ones(9, 2)
    with in_force(uneven(pads=False)):
        assert [found(x) for _ in range(3)] == [((5, 4),)] * 3
    assert graphs.log == []
    with in_force(uneven(pads=True)):
        assert [found(torch.ones(16, 2)) for _ in range(3)] == [((8, 8),)] * 3
    assert graphs.log == ["capture", "replay", "replay"]


def test_ranks_that_do_not_communicate_replay_graphs_of_their_own_sizes():
    found, graphs = capturing_engine()
    with in_force(uneven(pads=False)):
        assert [found(torch.ones(9, 2)) for _ in range(3)] == [((5, 4),)] * 3
    assert graphs.log == ["capture", "replay", "replay"]


@pytest.mark.parametrize("is_captured", [True, False])
def test_news_of_a_plan_are_exchanged_once_whatever_plays(is_captured):
    found = capturing_engine()[0] if is_captured else engine(agreement=Planned())
    x = torch.ones(9, 2)
    for has_news in (False, False, True, False):
        found.agreement.also = {"has_news": has_news}
        found(x)
    assert found.agreement.shared == [(0,)]


def test_a_graph_that_is_not_split_is_at_the_exchange_of_news_too():
    follower = Follower(lambda x: x, Planned(), Config(gate="never"))
    for has_news in (False, True, False):
        follower.agreement.also = {"has_news": has_news}
        follower(torch.ones(9, 2))
    assert follower.agreement.shared == [(0,)]


def test_the_graphs_of_ways_that_lost_are_given_back_and_captures_are_not_timed(monkeypatch):
    found, graphs = capturing_engine(modules={1: lambda *_: (), 2: told}, split="auto", policy="alternate")
    timed, took = [], found.tuner.took

    def note(size, way, _seconds, costs, *, is_steady):
        timed.append((way, is_steady))
        took(size, way, 1.0 if way == "split" else 2.0, costs, is_steady=is_steady)

    monkeypatch.setattr(found.tuner, "took", note)
    x = torch.ones(9, 2)
    while not found.decisions:
        found(x)
    assert timed[:6] == [(way, steady) for way in ("split", "unsplit") for steady in (False, False, True)]
    assert graphs.log.count("capture") == 2
    assert [key.rows for key in found.ways.graphs.graphs] == [(5, 4)]
    found.retune()
    assert found.ways.graphs.graphs == {}
