"""Tiny random checkpoints of every family, made by transformers, which is the reference for the decoder.

`make("qwen3", path)` saves one and returns the transformers model.
"""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from transformers import PreTrainedModel

VOCAB = 160
TINY: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0 + 0.1 * i for i in range(6)],
    "long_factor": [2.0 + i for i in range(6)],
    "partial_rotary_factor": 0.75,
}
GEMMA_WINDOWS = ["sliding_attention", "full_attention"] * 2
# Name -> (transformers class, config class, differences from TINY). The part before a dash is the family.
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", {}),
    "llama-3": (
        "LlamaForCausalLM",
        "LlamaConfig",
        {"rope_parameters": LLAMA3, "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    ),
    "llama-linear": (
        "LlamaForCausalLM",
        "LlamaConfig",
        {
            "rope_parameters": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 4.0},
            "num_key_value_heads": 4,
            "hidden_act": "gelu",
        },
    ),
    "mistral": ("MistralForCausalLM", "MistralConfig", {"sliding_window": 12}),
    "mistral-full": ("MistralForCausalLM", "MistralConfig", {"sliding_window": None}),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", {"tie_word_embeddings": True}),
    "qwen2-window": (
        "Qwen2ForCausalLM",
        "Qwen2Config",
        {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 2, "rope_parameters": YARN},
    ),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {"head_dim": 32, "tie_word_embeddings": True}),
    "qwen3-bias": ("Qwen3ForCausalLM", "Qwen3Config", {"attention_bias": True, "rope_parameters": YARN}),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", {"sliding_window": 20}),
    "phi3-long": (
        "Phi3ForCausalLM",
        "Phi3Config",
        {"rope_parameters": LONGROPE, "original_max_position_embeddings": 128},
    ),
    "gemma2": (
        "Gemma2ForCausalLM",
        "Gemma2Config",
        {"sliding_window": 10, "query_pre_attn_scalar": 24, "attn_logit_softcapping": 3.0},
    ),
    "gemma3": (
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        {
            "sliding_window": 10,
            "query_pre_attn_scalar": 24,
            "layer_types": GEMMA_WINDOWS,
            "final_logit_softcapping": 20.0,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
                "full_attention": {"rope_type": "linear", "rope_theta": 1000000.0, "factor": 8.0},
            },
        },
    ),
    "gemma3-image": ("Gemma3ForConditionalGeneration", "Gemma3Config", {"sliding_window": 10}),
    "olmo2": ("Olmo2ForCausalLM", "Olmo2Config", {}),
    "mixtral": (
        "MixtralForCausalLM",
        "MixtralConfig",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 14},
    ),
    "qwen3_moe": (
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        {
            "num_experts": 6,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 48,
            "norm_topk_prob": True,
            "mlp_only_layers": [0],
        },
    ),
    "qwen3_moe-step": (
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "decoder_sparse_step": 2,
            "use_sliding_window": True,
            "sliding_window": 11,
        },
    ),
}
IMAGES = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}


def make(
    family: str, path: Path, *, dtype: torch.dtype = torch.float32, seed: int = 0, **overrides: Any
) -> PreTrainedModel:
    """Save a random checkpoint of `family`, a key of FAMILIES, in `path` and return the transformers model.

    `overrides` replaces fields of the config. The model computes in eager float32. Norms and biases are
    random too, so that a decoder that ignores them fails."""
    model_class, config_class, differs = FAMILIES[family]
    fields = {**TINY, **differs, **overrides}
    if config_class == "Olmo2Config":
        del fields["head_dim"]
    if family == "gemma3-image":
        fields = {"text_config": fields, "vision_config": IMAGES, "mm_tokens_per_image": 4}
    torch.manual_seed(seed)
    config = getattr(transformers, config_class)(**fields)
    config._attn_implementation = "eager"
    model: PreTrainedModel = getattr(transformers, model_class)(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(torch.randn_like(parameter) * 0.2)
    if dtype != torch.float32:
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype).float()
    cast(Any, deepcopy(model)).to(dtype).save_pretrained(path)
    return model.eval()


def rewrite(path: Path, *drop: str, **fields: Any) -> None:
    """Change config.json: remove the fields in `drop` and set the others."""
    file = path / "config.json"
    config = json.loads(file.read_text())
    for name in drop:
        config.pop(name, None)
    file.write_text(json.dumps(config | fields))


def expected(model: PreTrainedModel, tokens: list[int]) -> torch.Tensor:
    """The reference's logits after every token, [len(tokens), vocab]."""
    with torch.inference_mode():
        return model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0]
