"""The serving shape: random steps of many requests, split anywhere, against one request at a time."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from dbo_compile.errors import InvalidProgram
from dbo_compile.ir.proof import verify_program
from dbo_compile.passes.emit import emit
from tests.serving.model import AXES, VOCAB, Model, Pages, caches, step_of
from tests.serving.player import Player, symbolic


def twin(model, group):
    """A model with the same weights, and caches of its own."""
    other = Model(group).double()
    other.load_state_dict(model.state_dict())
    return other


def compiled(model, player):
    """The compiled model, after its first call, as it was before it."""
    ids, positions, m = step = step_of(mixed())
    symbolic((ids, 0), (positions, 0), (m.slots, 0), (m.cu_seqlens, 0), (m.seq_lens, 0))
    symbolic((m.block_table, 0), (m.block_table, 1))
    run = torch.compile(model, backend=player, fullgraph=True)
    run(*step)
    for cache in caches(model):
        cache.zero_()
    return run


def random_steps(rng, num_steps):
    """For each step the requests that are played, and how many tokens of each: prefill in pieces, then decode."""
    pages, running = Pages(), []
    for _ in range(num_steps):
        while len(running) < 3 or rng.random() < 0.3:
            running.append(pages.request([rng.randrange(VOCAB) for _ in range(rng.choice([3, 9, 17]))]))
        work = []
        for r in rng.sample(running, rng.randint(1, min(len(running), 5))):
            left = len(r.tokens) * 2 // 3 - r.cached
            work.append((r, rng.randint(1, left) if left > 0 else 1))
        yield work
        for r, n in work:
            r.cached += n
        for r in [r for r in running if r.cached == len(r.tokens)]:
            running.remove(r)
            pages.free[:0] = r.blocks


def mixed():
    """A step of three requests, the second with 5 tokens, rows 2 to 7, behind 4 that are cached (with zeros)."""
    pages = Pages()
    first, second, third = (pages.request(list(range(n))) for n in (2, 9, 6))
    second.cached = 4
    return [(first, 2), (second, 5), (third, 6)]


def test_200_random_steps_are_what_one_request_at_a_time_gives(group):
    rng = random.Random(3)
    model = Model(group).double()
    plain = twin(model, group)
    player = Player(AXES)
    with torch.no_grad():
        run = compiled(model, player)
        for work in random_steps(rng, 200):
            step = step_of(work)
            num_tokens = len(step[0])
            player.rows = None
            if num_tokens > 1 and rng.random() < 0.8:
                cut = rng.randint(1, num_tokens - 1)
                player.rows = (cut, num_tokens - cut)
            want = torch.cat([plain(*step_of([one])) for one in work])
            assert torch.equal(run(*step), want)
            assert all(map(torch.equal, caches(model), caches(plain)))
    assert sum(len(rows) == 2 for rows in player.played) > 150


def played_once(group, rows):
    """A model after one split step, its graph, and the arguments that the graph got."""
    model, player = Model(group).double(), Player(AXES, rows=rows)
    with torch.no_grad():
        got = compiled(model, player)(*step_of(mixed()))
    return model, player.graphs[0], player.args, got


SECOND_FIRST = {
    "layers_0#0 ": "", "layers_0_all_to_all#0 ": "", "layers_0#1 layers_0_all_to_all#1":
    "layers_0#1 layers_0_all_to_all#1 layers_0#0 layers_0_all_to_all#0",
}  # fmt: skip


def test_the_cache_write_of_microbatch_0_comes_before_the_attention_of_microbatch_1(group):
    """Where a request straddles the microbatches; else any order is right, and the proof allows it."""
    model, graph, args, got = played_once(group, (5, 8))
    text = str(graph.schedule(2))
    for old, new in SECOND_FIRST.items():
        text = text.replace(old, new)
    wrong = graph.schedule(2).with_steps(text)
    assert wrong.steps[0].microbatch == 1
    with pytest.raises(InvalidProgram, match=r"writes .* after microbatch 1; expected microbatch 0 first"):
        graph.program(wrong)
    program = graph.program(wrong, straddles=False)
    with pytest.raises(InvalidProgram, match="expected microbatch 0 first"):
        verify_program(replace(program, straddles=True))

    graph.modules[2, True] = graph.modules[2, False] = emit(program, graph.fns, graph.segments.outputs)
    with torch.no_grad():
        assert torch.equal(replayed(model, graph, (7, 6), args), got)
        assert not torch.equal(replayed(model, graph, (5, 8), args), got)  # what a gate would see


def replayed(model, graph, rows, args):
    for cache in caches(model):
        cache.zero_()
    return graph.play(rows, args, straddles=False)[0]


def test_without_a_straddling_request_the_edge_is_not_there(group):
    _, graph, _, _ = played_once(group, (7, 6))
    assert all(s.paged == s.writes for s in graph.segments.segments.values())
    assert [s.name for s in graph.segments.segments.values() if s.writes] == ["layers_0", "layers_1"]
    assert not graph.placed.whole_requests


def test_metadata_of_another_step_is_refused_before_anything_is_written(group):
    model, player, (ids, positions, m) = Model(group).double(), Player(AXES), step_of(mixed())
    with torch.no_grad():
        run = compiled(model, player)
    m.cu_seqlens[-1] = 12
    with torch.no_grad(), pytest.raises(ValueError, match="cu_seqlens ends at 12, but the step has 13 tokens"):
        run(ids, positions, m)
    assert not any(cache.any() for cache in caches(model))
