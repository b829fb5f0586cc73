"""Real MoE models, split on the CPU without a process group: prefill with and without a mask, and decode."""

from __future__ import annotations

import pytest
import torch
from transformers import StaticCache

from dbo_compile import reports
from dbo_compile.report import new_reports
from tests.integrations.models import MODELS, VOCAB, tiny_model

ALWAYS = {"split": "always", "inner": "eager"}
EXACT = {"rtol": 0.0, "atol": 1e-12}
# These compute their router in float32 whatever the model's dtype, and a product of fewer rows rounds differently:
# eager on half the rows is as far from eager on all of them.
FLOAT32 = ("deepseek_v3", "dots1", "glm4_moe", "ernie4_5_moe")
ROUTED_IN_FLOAT32 = {"rtol": 0.0, "atol": 2e-6}


def prompts(batch, length=7, seed=1):
    return torch.randint(0, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def the_report():
    return reports()[-1]


@pytest.mark.parametrize("name", sorted(MODELS))
def test_prefill_equals_eager_in_every_size_from_one_compilation(name):
    reference = tiny_model(name, experts="eager")
    compiled = torch.compile(tiny_model(name, experts="grouped_mm"), backend="dbo", options=ALWAYS, fullgraph=True)
    before = reports()
    with torch.no_grad():
        for batch in (5, 2, 8):
            ids = prompts(batch)
            got = compiled(ids).logits
            torch.testing.assert_close(got, reference(ids).logits, **(ROUTED_IN_FLOAT32 if name in FLOAT32 else EXACT))
            in_turn = [reference(rows).logits for rows in ids.split(-(-batch // 2))]
            torch.testing.assert_close(got, torch.cat(in_turn), **EXACT)
    assert len(new_reports(before)) == 1
    assert (the_report().calls, the_report().calls_split) == (3, 3), the_report().decline_counts
    assert the_report().barriers == {}


def test_prefill_through_inductor_equals_eager():
    """Of one model: Inductor gets segments, whatever they come from. Qwen3-MoE goes through it in `test_ranks`."""
    reference = tiny_model("deepseek_v3", experts="eager", dtype=torch.float32)
    model = tiny_model("deepseek_v3", experts="grouped_mm", dtype=torch.float32)
    compiled = torch.compile(model, backend="dbo", options={"split": "always"}, fullgraph=True)
    with torch.no_grad():
        for batch in (5, 4, 8):
            ids = prompts(batch)
            # logits of size 4; Inductor's own whole graph is as far from eager
            torch.testing.assert_close(compiled(ids).logits, reference(ids).logits, rtol=0.0, atol=1e-5)
    assert (the_report().calls, the_report().calls_split) == (3, 3), the_report().decline_counts


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3", "mixtral"])
def test_a_left_padding_mask_is_split_with_its_rows(name):
    reference = tiny_model(name, experts="eager")
    compiled = torch.compile(tiny_model(name, experts="grouped_mm"), backend="dbo", options=ALWAYS, fullgraph=True)
    with torch.no_grad():
        for batch in (6, 5, 9):
            ids = prompts(batch)
            mask = torch.ones_like(ids)
            for row in range(batch):
                mask[row, : row % 4] = 0
            got = compiled(input_ids=ids, attention_mask=mask).logits
            want = reference(input_ids=ids, attention_mask=mask).logits
            torch.testing.assert_close(got[mask.bool()], want[mask.bool()], **EXACT)
    assert the_report().calls_split == 3, the_report().decline_counts


def decode(model, batch, steps):
    """Prefill 5 tokens a row, then `steps` greedy steps; the logits of each step, and the cache."""
    cache = StaticCache(config=model.config, max_cache_len=24)
    plain = getattr(model, "_orig_mod", model)
    with torch.no_grad():
        logits = [plain(prompts(batch, 5), past_key_values=cache, use_cache=True).logits]
        for _ in range(steps):
            ids = logits[-1][:, -1:].argmax(-1)
            logits.append(model(input_ids=ids, past_key_values=cache, use_cache=True).logits)
    return torch.cat([step[:, -1:] for step in logits], 1), cache


@pytest.mark.parametrize(
    ("name", "regions"), [("qwen3_moe", False), ("qwen3_moe", True), ("mixtral", False), ("deepseek_v3", False)]
)
def test_decode_writes_each_cache_once_and_equals_eager_after_8_steps(name, regions, monkeypatch):
    want, want_cache = decode(tiny_model(name, experts="batched_mm"), 6, 8)
    model = tiny_model(name, experts="batched_mm")
    if regions:
        layer = type(model.model.layers[0])
        monkeypatch.setattr(layer, "forward", torch.compiler.nested_compile_region(layer.forward))
    compiled = torch.compile(model, backend="dbo", options=ALWAYS, fullgraph=True)
    got, cache = decode(compiled, 6, 8)
    torch.testing.assert_close(got, want, rtol=0.0, atol=1e-6 if name == "deepseek_v3" else 1e-12)
    for layer, other in zip(cache.layers, want_cache.layers, strict=True):
        torch.testing.assert_close(layer.keys, other.keys, rtol=0.0, atol=1e-6)
        assert torch.equal(layer.cumulative_length, other.cumulative_length)
    report = the_report()
    assert report.calls_split == 8, (report.reason, report.decline_counts)
    cache_size = cache.layers[0].keys.shape[1:]
    assert not [c for c in report.levels.outline.codes.values() if copies(c, cache_size)]


def copies(code, cache_size):
    """Whether a code makes a tensor as large as a cache, other than by writing one in place."""
    names = [str(n.target) for n in code.module.graph.nodes if n.op == "call_function"]
    return any("index_put.default" in n or "index_copy.default" in n for n in names)
