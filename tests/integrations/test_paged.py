"""Continuous batching of transformers as the client: `CompileConfig(backend="dbo")` simply works."""

from __future__ import annotations

import logging

import pytest
import torch
from transformers import AttentionInterface, CompileConfig, GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.continuous_batching.cache import PagedAttentionCache
from transformers.generation.continuous_batching.input_outputs import ContinuousBatchingIOs
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from dbo_compile import reports
from dbo_compile.integrations.paged import TOKEN_DIMS, continuous_batching
from dbo_compile.integrations.transformers import expert_parallel
from dbo_compile.report import new_reports
from tests.integrations.models import VOCAB, tiny_model

pytestmark = pytest.mark.usefixtures("group")


@pytest.fixture
def _one_op():
    """Paged attention as one op, for one test."""
    get_model_kwargs, update = ContinuousBatchingIOs.get_model_kwargs, PagedAttentionCache.update
    continuous_batching()
    yield
    ContinuousBatchingIOs.get_model_kwargs, PagedAttentionCache.update = get_model_kwargs, update
    AttentionInterface.register("sdpa", sdpa_attention_forward)


def generated(fullgraph=None, num_layers=2, name="qwen3_moe", **config):
    """What four requests get; prompts are longer than a step, so that they are played in pieces."""
    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.CRITICAL)
    model = tiny_model(name, experts="batched_mm", num_hidden_layers=num_layers, **config)
    expert_parallel(model)
    model.config._attn_implementation = "sdpa"
    compiling = None
    if fullgraph is not None:
        options = {"split": "always", "inner": "eager", "token_dims": TOKEN_DIMS}
        compiling = CompileConfig(backend="dbo", mode=None, fullgraph=fullgraph, dynamic=None, options=options)
    batching = ContinuousBatchingConfig(
        max_batch_tokens=16, num_blocks=64, page_size=4, varlen_compile_config=compiling
    )
    prompts = [[(7 * i * i + 3 * n) % VOCAB for i in range(n)] for n in (3, 21, 4, 13)]
    wanted = GenerationConfig(max_new_tokens=5, do_sample=False, eos_token_id=-1, pad_token_id=0)
    done = model.generate_batch(inputs=prompts, generation_config=wanted, continuous_batching_config=batching)
    tokens = [done[f"req_{i}"].generated_tokens for i in range(len(prompts))]
    assert [len(t) for t in tokens] == [5] * len(prompts)
    return tokens


@pytest.mark.usefixtures("_one_op")
def test_a_step_is_one_graph_and_every_step_is_split():
    want, before = generated(), reports()
    assert generated(fullgraph=True) == want
    made = new_reports(before)
    assert [(r.reason, r.decline_counts) for r in made] == [("", {})] * len(made)
    assert sum(r.calls for r in made) == sum(r.calls_split for r in made) > 5
    assert len(made) <= 2
    levels = made[-1].levels
    assert [bool(s.paged) for s in levels.outline.segments.values() if s.writes and s.per_microbatch] == [True, True]
    barriers = [str(n.target) for n in levels.tokens.barriers]
    assert barriers == ["aten.index.Tensor"]  # the last token of each request


def test_without_the_op_every_piece_between_graph_breaks_is_right():
    want = generated(num_layers=1)
    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        assert generated(fullgraph=False, num_layers=1) == want


def test_sliding_windows_are_as_they_were(request):
    want = generated(name="mixtral", sliding_window=5)
    request.getfixturevalue("_one_op")
    assert generated(name="mixtral", sliding_window=5) == want


@pytest.mark.usefixtures("_one_op")
def test_attention_without_a_paged_cache_is_as_it_was():
    model = tiny_model("qwen3_moe", experts="batched_mm")
    ids = torch.randint(0, VOCAB, (3, 7))
    with torch.no_grad():
        model.config._attn_implementation = "sdpa"
        got = model(ids).logits
        AttentionInterface.register("sdpa", sdpa_attention_forward)
        assert torch.equal(model(ids).logits, got)
