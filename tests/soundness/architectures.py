"""Every architecture of transformers' causal language models, so small that many of them can be tried."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

NAMES = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
VOCAB = 101
MOST_WEIGHTS = 30_000_000
LAYERS, HIDDEN, HEADS, FEED_FORWARD, EXPERTS, LENGTH = 2, 32, 4, 40, 8, 64
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "word_embed_proj_dim", "embedding_size"), HIDDEN),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "decoder_layers", "encoder_layers"), LAYERS),
    **dict.fromkeys(("num_attention_heads", "n_head", "num_heads", "attention_heads"), HEADS),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads", "mamba_n_heads"), HEADS),
    **dict.fromkeys(("intermediate_size", "n_inner", "d_ff", "ffn_dim"), FEED_FORWARD),
    **dict.fromkeys(("decoder_ffn_dim", "encoder_ffn_dim"), FEED_FORWARD),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), EXPERTS),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len"), LENGTH),
    **dict.fromkeys(("head_dim", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "rotary_dim", "d_kv"), 8),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "mamba_d_state", "state_size"), 8),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 24),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "mamba_expand", "linear_num_key_heads", "index_n_heads"), 2),
    **dict.fromkeys(("mamba_chunk_size", "time_step_rank", "linear_num_value_heads", "index_topk"), 4),
    **dict.fromkeys(("mamba_d_head", "index_head_dim"), 16),
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace", "mamba_n_groups", "n_shared_experts"), 1),
    "num_key_value_heads": 2, "q_lora_rank": 12, "kv_lora_rank": 20, "use_cache": False,
}  # fmt: skip
"""What fields of a config are called that say how large the model is, and their values here."""
WITHOUT = ((), ("num_key_value_heads",), ("head_dim",), ("num_key_value_heads", "head_dim"))
"""Fields that some models compute from others, and then refuse."""


class CannotBuild(Exception):
    """No small model of an architecture could be made; the text says why."""


def small_model(name: str, *, experts: str) -> PreTrainedModel:
    """In float64, ready to be called with `prompts`; the same weights on every call."""
    reasons = []
    for left_out in WITHOUT:
        try:
            sizes = _sizes(AutoConfig.for_model(name), left_out)
            return _made(AutoConfig.for_model(name, **sizes), experts)
        except Exception as error:
            reasons.append(f"{type(error).__name__}: {' '.join(str(error).split())}")
    raise CannotBuild(reasons[0])


def prompts(batch: int) -> torch.Tensor:
    return torch.randint(0, VOCAB, (batch, 7), generator=torch.Generator().manual_seed(batch))


def _sizes(default: PretrainedConfig, left_out: tuple[str, ...]) -> dict[str, Any]:
    """The fields of a config that are other than by default: sizes, tokens beyond the vocabulary, kinds of layers."""
    known = {*default.to_dict(), *default.attribute_map}
    sizes = {name: size for name, size in SIZES.items() if name in known and name not in left_out}
    ids = {n: v for n in known if n.endswith("_token_id") and isinstance(v := getattr(default, n), int) and v >= VOCAB}
    kinds = list(dict.fromkeys(default.to_dict().get("layer_types") or ()))
    if kinds:  # one layer of each kind
        sizes["layer_types"] = kinds * (1 if len(kinds) > 1 else LAYERS)
        sizes["num_hidden_layers"] = len(sizes["layer_types"])
    return {**sizes, **dict.fromkeys(ids, 0)}


def _made(config: PretrainedConfig, experts: str) -> PreTrainedModel:
    with torch.device("meta"):
        num_weights = sum(w.numel() for w in AutoModelForCausalLM.from_config(config).parameters())
    if num_weights > MOST_WEIGHTS:
        raise CannotBuild(f"its other parts make it {num_weights:.1e} weights large")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float64).eval()
    for weight in model.parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=weight.size(-1) ** -0.5)
    _play_experts(model, "eager")
    with torch.no_grad():
        logits = model(prompts(5)).logits
    if not logits.isfinite().all():
        raise CannotBuild("with random weights its logits are not finite")
    _play_experts(model, experts)
    return model


def _play_experts(model: PreTrainedModel, how: str) -> None:
    with suppress(ValueError):  # what it has for experts is its own
        model.set_experts_implementation(how)
