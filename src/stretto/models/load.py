"""From a checkpoint directory to a decoder, one fused weight at a time: no weight is ever held twice.

Owns how the tensors of a family are stacked into the weights the kernels want. Reads safetensors only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from stretto.errors import CheckpointError
from stretto.kernels import Attention, Geometry, Kernels, Linear, Packed
from stretto.models import families, rope
from stretto.models.blocks import Feed, Join, Mixer, Mixture, Mlp
from stretto.models.checkpoint import Checkpoint
from stretto.models.decoder import Decoder, DecoderLayer, Weights
from stretto.models.families import FAMILIES, Names
from stretto.models.spec import Layer, ModelSpec, Routing

Progress = Callable[[str, int, int], None]
# Where the decoder and its head sit: alone in a checkpoint, or beside an image encoder (in two layouts).
ROOTS = {
    "model.": "lm_head",
    "language_model.model.": "language_model.lm_head",
    "model.language_model.": "lm_head",
}
# Tensors that may lie beside the decoder's without being part of it.
BESIDE = ("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector.")
COMPUTED = ".rotary_emb.inv_freq"

Part = tuple[str, int]
"""A tensor's name without `.weight`, and its rows."""


def load(
    path: Path,
    *,
    dtype: torch.dtype,
    device: torch.device,
    kernels: Kernels,
    progress: Progress | None = None,
) -> Decoder:
    """Load the model in directory `path`, its weights held as `dtype` on `device`.

    `progress("weights", done, total)` counts bytes. Raises CheckpointError for a config that is not
    understood (see `families.read`) and for tensors that are missing, misshapen, unexpected or cut short.
    """
    spec = families.read(path)
    with Checkpoint(path) as checkpoint:
        reader = _Reader(checkpoint, kernels, dtype, device, progress)
        decoder = Decoder(spec, kernels, _weights(reader, spec))
        reader.finish()
    return decoder


class _Reader:
    """Reads tensors into place and packs them; knows what was read, and how much is held because of it."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        kernels: Kernels,
        dtype: torch.dtype,
        device: torch.device,
        progress: Progress | None,
    ) -> None:
        self.checkpoint, self.kernels = checkpoint, kernels
        self.dtype, self.device, self.progress = dtype, device, progress
        self.unread = set(checkpoint.entries)
        self.done = self.nbytes = self.parameters = 0

    def has(self, name: str) -> bool:
        return name in self.checkpoint.entries

    def stack(self, parts: list[Part], shape: tuple[int, ...], suffix: str = "weight") -> Tensor:
        """A new tensor [rows of all parts, *shape], each part read into its own rows."""
        # All parts are found before memory is asked for: a config may lie about sizes.
        names, rows = [f"{part}.{suffix}" for part, _ in parts], [rows for _, rows in parts]
        entries = [self.checkpoint.find(name, (n, *shape)) for name, n in zip(names, rows, strict=True)]
        held = torch.empty((sum(rows), *shape), dtype=self.dtype, device=self.device)
        for entry, into in zip(entries, held.split(rows), strict=True):
            self.checkpoint.read(entry, into)
            self.done += entry.nbytes
            if self.progress is not None:
                self.progress("weights", self.done, self.checkpoint.nbytes)
        self.unread.difference_update(names)
        self.parameters += held.numel()
        return held

    def hold(self, packed: Packed) -> Packed:
        self.nbytes += packed.nbytes
        return packed

    def linear(self, parts: list[Part], columns: int, bias: bool = False) -> Linear:
        weight = self.stack(parts, (columns,))
        return self.hold(self.kernels.pack(weight, self.stack(parts, (), "bias") if bias else None))

    def norm(self, names: list[Part], offset: bool) -> Tensor:
        weight = self.stack(names, ())
        self.nbytes += weight.nbytes
        return weight.float().add_(1.0).to(self.dtype) if offset else weight

    def finish(self) -> None:
        """Raises CheckpointError when the checkpoint holds tensors nobody asked for: the numbers would be
        wrong."""
        strange = sorted(n for n in self.unread if not n.startswith(BESIDE) and not n.endswith(COMPUTED))
        if strange:
            raise CheckpointError(
                f"{self.checkpoint.path} holds {len(strange)} tensors its config.json does not explain, "
                f"such as {strange[0]}"
            )
        if self.progress is not None:
            self.progress("weights", self.checkpoint.nbytes, self.checkpoint.nbytes)


@dataclass(frozen=True, slots=True)
class _Halves:
    """A layer as it is read: its blocks, and the norms around them."""

    before: Tensor | None
    mixer: Mixer
    to_feed: Join
    feed: Feed
    after: Tensor | None


def _weights(reader: _Reader, spec: ModelSpec) -> Weights:
    root = next((root for root in ROOTS if reader.has(f"{root}embed_tokens.weight")), "model.")
    embedding = reader.stack([(f"{root}embed_tokens", spec.vocab)], (spec.hidden,))
    reader.nbytes += embedding.nbytes
    halves = [_layer(reader, spec, f"{root}layers.{i}.", layer) for i, layer in enumerate(spec.layers)]
    final = reader.norm([(f"{root}norm", spec.hidden)], spec.unit_offset)
    befores = [*(half.before for half in halves[1:]), final]
    return Weights(
        embedding=embedding,
        first=halves[0].before,
        layers=[
            DecoderLayer(
                half.mixer, half.to_feed, half.feed, Join(reader.kernels, spec.eps, half.after, before)
            )
            for half, before in zip(halves, befores, strict=True)
        ],
        head=_head(reader, spec, ROOTS[root], embedding),
        geometry=Geometry(
            tuple(rope.rotation(each, reader.device) for each in spec.ropes),
            tuple(sorted({layer.window for layer in spec.layers})),
        ),
        nbytes=reader.nbytes,
        parameters=reader.parameters,
    )


def _head(reader: _Reader, spec: ModelSpec, name: str, embedding: Tensor) -> Linear:
    if not spec.tied:
        return reader.linear([(name, spec.vocab)], spec.hidden)
    reader.unread.discard(f"{name}.weight")
    head = reader.kernels.pack(embedding, None)
    return head if head.shares(embedding) else reader.hold(head)


def _layer(reader: _Reader, spec: ModelSpec, at: str, layer: Layer) -> _Halves:
    names = FAMILIES[spec.family].names

    def norm(name: str | None) -> Tensor | None:
        return None if name is None else reader.norm([(at + name, spec.hidden)], spec.unit_offset)

    return _Halves(
        before=norm(names.before_attention),
        mixer=_mixer(reader, spec, names, at, layer),
        to_feed=Join(reader.kernels, spec.eps, norm(names.after_attention), norm(names.before_mlp)),
        feed=_mixture(reader, spec, spec.routing, names, at)
        if layer.experts and spec.routing
        else _mlp(reader, spec, names, at),
        after=norm(names.after_mlp),
    )


def _mixer(reader: _Reader, spec: ModelSpec, names: Names, at: str, layer: Layer) -> Mixer:
    queries, keys = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    norms = None
    if spec.query_norm == "row":
        norms = reader.norm([(at + names.query_norm, queries), (at + names.key_norm, keys)], spec.unit_offset)
    elif spec.query_norm == "head":
        parts = [(at + names.query_norm, spec.head_dim), (at + names.key_norm, spec.head_dim)]
        query, key = reader.norm(parts, spec.unit_offset).view(2, spec.head_dim)
        norms = torch.cat((query.repeat(spec.heads), key.repeat(spec.kv_heads)))
    return Mixer(
        kernels=reader.kernels,
        kind=Attention(
            heads=spec.heads,
            kv_heads=spec.kv_heads,
            head_dim=spec.head_dim,
            scale=spec.scale,
            window=layer.window,
            softcap=spec.attention_cap,
            rotation=layer.rope,
            norm=spec.query_norm,
            eps=spec.eps,
        ),
        qkv=reader.linear(_parts(at, names.qkv, (queries, keys, keys)), spec.hidden, spec.qkv_bias),
        out=reader.linear([(at + names.out, spec.hidden)], queries, spec.out_bias),
        norms=norms,
    )


def _parts(at: str, names: tuple[str, ...], rows: tuple[int, ...]) -> list[Part]:
    """One part per name; a single name means that the checkpoint has them stacked already."""
    if len(names) == 1:
        return [(at + names[0], sum(rows))]
    return [(at + name, count) for name, count in zip(names, rows, strict=True)]


def _mlp(reader: _Reader, spec: ModelSpec, names: Names, at: str) -> Mlp:
    inner = spec.intermediate
    return Mlp(
        kernels=reader.kernels,
        activation=spec.activation,
        gate_up=reader.linear(_parts(at, names.gate_up, (inner, inner)), spec.hidden, spec.mlp_bias),
        down=reader.linear([(at + names.down, spec.hidden)], inner, spec.mlp_bias),
    )


def _mixture(reader: _Reader, spec: ModelSpec, routing: Routing, names: Names, at: str) -> Mixture:
    inner, count, hidden = routing.intermediate, routing.count, spec.hidden
    router = reader.linear([(at + names.router, count)], hidden)
    ups = [(at + name.format(i), inner) for i in range(count) for name in names.expert_gate_up]
    downs = [(at + names.expert_down.format(i), hidden) for i in range(count)]
    gate_up = reader.stack(ups, (hidden,)).view(count, 2 * inner, hidden)
    down = reader.stack(downs, (inner,)).view(count, hidden, inner)
    packed = reader.hold(reader.kernels.pack_experts(gate_up, down, spec.activation))
    return Mixture(reader.kernels, router, packed, routing.chosen, routing.normalise)
