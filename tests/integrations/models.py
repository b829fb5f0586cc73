"""Tiny Hugging Face MoE models with random weights, whose routing is as diverse as that of trained ones."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCAB = 101

COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 40,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "use_cache": False,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}

MLA = {"num_key_value_heads": 4, "q_lora_rank": 12, "kv_lora_rank": 20, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8}

MODELS: dict[str, dict[str, Any]] = {
    "qwen2_moe": {"num_experts": 8, "shared_expert_intermediate_size": 24},
    "qwen3_moe": {"num_experts": 8, "norm_topk_prob": True},
    "mixtral": {"num_local_experts": 8, "intermediate_size": 24},
    "deepseek_v2": {
        "n_routed_experts": 8,
        "first_k_dense_replace": 1,
        "v_head_dim": 8,
        "n_group": 2,
        "topk_group": 1,
        "topk_method": "greedy",
        "n_shared_experts": 1,
    }
    | MLA,
    "deepseek_v3": {"n_routed_experts": 8, "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1, "v_head_dim": 8}
    | MLA,
    "olmoe": {"num_experts": 8, "intermediate_size": 24},
    "glm4_moe": {"n_routed_experts": 8, "first_k_dense_replace": 1},
    "ernie4_5_moe": {"moe_num_experts": 8, "moe_k": 2, "moe_num_shared_experts": 1, "moe_layer_start_index": 0},
    "phimoe": {"num_local_experts": 8, "intermediate_size": 24},
    "granitemoe": {"num_local_experts": 8, "intermediate_size": 24},
    "dots1": {
        "n_routed_experts": 8,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
        "n_shared_experts": 1,
    },
}
"""The name of the architecture, and how its config says what `COMMON` does not."""


def tiny_model(name: str, *, experts: str, dtype: torch.dtype = torch.float64, **config: Any) -> PreTrainedModel:
    """Return the model for evaluation; the same weights on every call and every rank."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **COMMON | MODELS[name] | config), dtype=dtype)
    for weight in model.parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=weight.size(-1) ** -0.5)
    model.set_experts_implementation(experts)
    return model.eval()
