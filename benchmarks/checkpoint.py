"""Makes a checkpoint of a known shape with random weights, for benchmarks that need no sensible answers.

It has desk's tokenizer, extended by invented words to the size of the vocabulary, so it can be served.
`python benchmarks/checkpoint.py qwen3-0.6b DIR`
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportArgumentType=false
from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

import stretto

QWEN = {
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "vocab_size": 151936,
}
SHAPES = {
    "qwen3-0.6b": {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "head_dim": 128,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "max_position_embeddings": 40960,
        "num_attention_heads": 16,
        "num_hidden_layers": 28,
        "num_key_value_heads": 8,
    },
    "qwen3-8b": {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "head_dim": 128,
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "max_position_embeddings": 40960,
        "num_attention_heads": 32,
        "num_hidden_layers": 36,
        "num_key_value_heads": 8,
    },
    "qwen2.5-1.5b": {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "max_position_embeddings": 32768,
        "num_attention_heads": 12,
        "num_hidden_layers": 28,
        "num_key_value_heads": 2,
    },
}
SPREAD = 0.02


def tensors(config: dict[str, int]) -> dict[str, tuple[int, ...]]:
    """The name and shape of every tensor of a qwen2 or qwen3 checkpoint."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    head = config.get("head_dim", hidden // config["num_attention_heads"])
    queries, keys = head * config["num_attention_heads"], head * config["num_key_value_heads"]
    named = {"model.embed_tokens.weight": (config["vocab_size"], hidden), "model.norm.weight": (hidden,)}
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        for name, rows in (("q", queries), ("k", keys), ("v", keys)):
            named[f"{at}self_attn.{name}_proj.weight"] = (rows, hidden)
            if config["model_type"] == "qwen2":
                named[f"{at}self_attn.{name}_proj.bias"] = (rows,)
        named[f"{at}self_attn.o_proj.weight"] = (hidden, queries)
        if config["model_type"] == "qwen3":
            named[f"{at}self_attn.q_norm.weight"] = named[f"{at}self_attn.k_norm.weight"] = (head,)
        named |= {f"{at}mlp.{name}_proj.weight": (inner, hidden) for name in ("gate", "up")}
        named[f"{at}mlp.down_proj.weight"] = (hidden, inner)
        named |= {f"{at}{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}
    return named


def make(shape: str, path: Path, seed: int = 0) -> None:
    """Write the checkpoint into the new directory `path`."""
    path.mkdir(parents=True)
    config = QWEN | SHAPES[shape]
    # A GPU draws the 8 billion numbers of the largest shape in a second.
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(seed)
    held: dict[str, torch.Tensor] = {}
    for name, size in tensors(config).items():
        random = torch.empty(size, dtype=torch.bfloat16, device=device)
        random = random.normal_(0, SPREAD, generator=generator).cpu()
        held[name] = random + 1 if name.endswith("norm.weight") else random
    save_file(held, path / "model.safetensors", metadata={"format": "pt"})
    (path / "config.json").write_text(json.dumps(config, indent=2))
    desk = Path(stretto.__file__).parent / "desk"
    shutil.copy(desk / "tokenizer_config.json", path)
    tokenizer = json.loads((desk / "tokenizer.json").read_text())
    known = tokenizer["model"]["vocab"]
    known |= {f"\u0120w{number}": number for number in range(len(known), config["vocab_size"])}
    (path / "tokenizer.json").write_text(json.dumps(tokenizer))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("directory", type=Path)
    options = parser.parse_args()
    make(options.shape, options.directory)
    print(options.directory)


if __name__ == "__main__":
    main()
