"""A llama-shaped decoder for packed documents, made for training speed; `export` writes the HF layout.

Weights of all layers are stacked: one compiled layer serves all, and the optimiser works on few tensors.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention.varlen import varlen_attn

from recipes.desk.tokenizer import CONTEXT, END_ID, PAD_ID

EPSILON = 1e-5
THETA = 10_000.0


@dataclass(frozen=True, slots=True)
class Size:
    """Shape of the decoder."""

    vocabulary: int
    hidden: int = 512
    layers: int = 6
    heads: int = 8
    kv_heads: int = 2
    head: int = 64
    inner: int = 512


# (q, k, v, starts) -> attention output; q [N, heads, head], k and v [N, kv_heads, head], starts [D + 1].
Attend = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def attend_each(q: Tensor, k: Tensor, v: Tensor, starts: Tensor) -> Tensor:
    """Causal attention, one document after the other. Readable, and used on the CPU."""
    bounds = starts.tolist()
    parts: list[Tensor] = []
    for first, last in pairwise(bounds):
        if last > first:
            row = [part[first:last].transpose(0, 1).unsqueeze(0) for part in (q, k, v)]
            out = F.scaled_dot_product_attention(row[0], row[1], row[2], is_causal=True, enable_gqa=True)
            parts.append(out[0].transpose(0, 1))
    return torch.cat(parts)


def attend_packed(q: Tensor, k: Tensor, v: Tensor, starts: Tensor) -> Tensor:
    """The same in one kernel over all documents (CUDA, bf16)."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    out = varlen_attn(q, k, v, starts, starts, CONTEXT, CONTEXT, window_size=(-1, 0))
    return cast(Tensor, out)


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), weight, EPSILON)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding in the layout of halves.

    Shapes: x [N, heads, head], cos and sin [N, 1, head // 2] float32.
    """
    left, right = x.float().chunk(2, -1)
    return torch.cat((left * cos - right * sin, right * cos + left * sin), -1).to(x.dtype)


def layer(
    x: Tensor, weights: tuple[Tensor, ...], cos: Tensor, sin: Tensor, starts: Tensor, attend: Attend
) -> Tensor:
    """One decoder layer. The residual x [N, hidden] stays float32; products run in the matrices' dtype."""
    first, second, wq, wk, wv, wo, gate, up, down = weights
    count, head = len(x), 2 * cos.shape[-1]
    h = rms_norm(x, first).to(wq.dtype)
    q, k, v = (F.linear(h, w).view(count, -1, head) for w in (wq, wk, wv))
    mixed = attend(rotate(q, cos, sin), rotate(k, cos, sin), v, starts)
    x = x + F.linear(mixed.reshape(count, -1), wo)
    h = rms_norm(x, second).to(wq.dtype)
    return x + F.linear(F.silu(F.linear(h, gate)) * F.linear(h, up), down)


def head_loss(x: Tensor, norm: Tensor, embedding: Tensor, labels: Tensor, spans: Tensor) -> Tensor:
    """Mean cross-entropy of the rows x [M, hidden]. Rows with a negative label do not count.

    The weight of a row is 1 / sqrt(length of its reply). Otherwise long workings outweigh short answers.
    """
    logits = F.linear(rms_norm(x, norm).to(embedding.dtype), embedding).float()
    losses = F.cross_entropy(logits, labels, ignore_index=-100, reduction="none")
    weights = spans.float().rsqrt() * (labels >= 0)
    return (losses * weights).sum() / weights.sum()


class Decoder(nn.Module):
    """Parameters, stacked over the layers in the first dimension."""

    cos: Tensor
    sin: Tensor

    def __init__(self, size: Size, generator: torch.Generator) -> None:
        super().__init__()
        self.size = size
        kv, q = size.kv_heads * size.head, size.heads * size.head

        def drawn(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(shape, generator=generator) * 0.02)

        self.embedding = drawn(size.vocabulary, size.hidden)
        self.norm = nn.Parameter(torch.ones(size.hidden))
        self.norms = nn.Parameter(torch.ones(size.layers, 2, size.hidden))
        self.q = drawn(size.layers, q, size.hidden)
        self.k = drawn(size.layers, kv, size.hidden)
        self.v = drawn(size.layers, kv, size.hidden)
        self.o = nn.Parameter(torch.zeros(size.layers, size.hidden, q))
        self.gate = drawn(size.layers, size.inner, size.hidden)
        self.up = drawn(size.layers, size.inner, size.hidden)
        self.down = nn.Parameter(torch.zeros(size.layers, size.hidden, size.inner))
        angles = torch.outer(torch.arange(CONTEXT), THETA ** -(torch.arange(0, size.head, 2) / size.head))
        self.register_buffer("cos", angles.cos().unsqueeze(1), persistent=False)
        self.register_buffer("sin", angles.sin().unsqueeze(1), persistent=False)
        self.layer: Callable[..., Tensor] = layer
        self.head_loss: Callable[..., Tensor] = head_loss

    def compile(self) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        self.layer = torch.compile(layer, dynamic=False, fullgraph=True)
        self.head_loss = torch.compile(head_loss, dynamic=False, fullgraph=True)

    @property
    def matrices(self) -> list[nn.Parameter]:
        return [self.q, self.k, self.v, self.o, self.gate, self.up, self.down]

    def hidden(self, tokens: Tensor, positions: Tensor, starts: Tensor) -> Tensor:
        """The residual after the last layer, [N, hidden], before the final norm."""
        fast = tokens.is_cuda
        dtype = torch.bfloat16 if fast else torch.float32
        attend = attend_packed if fast else attend_each
        x = self.embedding[tokens]
        cos, sin = self.cos[positions], self.sin[positions]
        norms = [pair.unbind(0) for pair in self.norms.unbind(0)]
        stacks = [stack.to(dtype).unbind(0) for stack in self.matrices]
        for number, (first, second) in enumerate(norms):
            weights = (first, second, *(stack[number] for stack in stacks))
            x = self.layer(x, weights, cos, sin, starts, attend)
        return x

    def forward(self, batch: Sequence[Tensor]) -> Tensor:
        """The loss of a packed batch. `batches` gives its parts and shapes."""
        tokens, positions, starts, rows, labels, spans = batch
        x = self.hidden(tokens, positions, starts)[rows]
        table = self.embedding.to(torch.bfloat16 if x.is_cuda else torch.float32)
        return self.head_loss(x, self.norm, table, labels, spans)

    def parameter_count(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())


def named(model: Decoder) -> dict[str, Tensor]:
    """Views of the weights under the names of transformers' LlamaForCausalLM."""
    stacks = {
        "self_attn.q_proj": model.q,
        "self_attn.k_proj": model.k,
        "self_attn.v_proj": model.v,
        "self_attn.o_proj": model.o,
        "mlp.gate_proj": model.gate,
        "mlp.up_proj": model.up,
        "mlp.down_proj": model.down,
        "input_layernorm": model.norms[:, 0],
        "post_attention_layernorm": model.norms[:, 1],
    }
    tensors: dict[str, Tensor] = {
        "model.embed_tokens.weight": model.embedding,
        "model.norm.weight": model.norm,
    }
    for name, stack in stacks.items():
        for number, weight in enumerate(stack.unbind(0)):
            tensors[f"model.layers.{number}.{name}.weight"] = weight
    return tensors


@torch.no_grad()
def restore(model: Decoder, folder: Path) -> None:
    """Reads the weights that `export` wrote."""
    stored = load_file(folder / "model.safetensors")
    for name, weight in named(model).items():
        weight.copy_(stored[name])


def export(model: Decoder, folder: Path) -> None:
    """config.json, generation_config.json and model.safetensors (bf16), as transformers' LlamaForCausalLM."""
    plain = {
        name: weight.detach().to("cpu", torch.bfloat16).contiguous() for name, weight in named(model).items()
    }
    folder.mkdir(parents=True, exist_ok=True)
    # A killed run leaves a whole file.
    save_file(plain, folder / "model.partial", {"format": "pt"})
    (folder / "model.partial").replace(folder / "model.safetensors")
    size = model.size
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": size.vocabulary,
        "hidden_size": size.hidden,
        "intermediate_size": size.inner,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.kv_heads,
        "head_dim": size.head,
        "hidden_act": "silu",
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": EPSILON,
        "rope_theta": THETA,
        "rope_scaling": None,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": END_ID,
        "pad_token_id": PAD_ID,
        "dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    generation = {"do_sample": False, "eos_token_id": END_ID, "pad_token_id": PAD_ID}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
