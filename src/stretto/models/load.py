"""From a checkpoint directory to a decoder, one fused weight at a time: no weight is held twice.

Owns how the tensors of a family are stacked into the weights that the kernels want. Reads safetensors only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Protocol

import torch
from msgspec import structs
from torch import Tensor

from stretto.disk.files import loading
from stretto.errors import CheckpointError
from stretto.kernels import (
    AnyKernels,
    Attention,
    DecoderLayer,
    Geometry,
    LayerStack,
    MixtureOfExperts,
    Mlp,
    Packed,
)
from stretto.models import families, layouts, rope
from stretto.models.checkpoint import DTYPES, Checkpoint, Entry
from stretto.models.decoder import Decoder, ModelWeights
from stretto.models.families import FAMILIES, Names
from stretto.models.source import ProgressCallback
from stretto.models.spec import Layer, ModelSpec, Routing

# The prefix of the decoder's tensors -> the name of its head. The decoder is alone in a checkpoint, or beside
# an image encoder, for which two layouts are in use.
ROOTS = {
    "model.": "lm_head",
    "language_model.model.": "language_model.lm_head",
    "model.language_model.": "lm_head",
}
# Tensors that are not the decoder's, by their prefix.
BESIDE = ("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector.")

StackedPart = tuple[str, int]
"""A tensor's name without `.weight`, and how many rows it has."""
StackedTensor = tuple[list[StackedPart], tuple[int, ...], str]
"""Tensors that are read as one: their parts, their shape without the rows, and the suffix of their names."""


class PackedStore(Protocol):
    """Packed weights of this checkpoint that an earlier start kept, by the name of their first tensor."""

    def take(self, name: str) -> Packed | None: ...

    def keep(self, name: str, packed: Packed) -> None: ...


@dataclass(frozen=True, slots=True)
class MixedKernels:
    """A table that quantises, and one of the same device that packs some matrices in a wider format.

    `names`: those matrices, each by its first tensor, without `.weight`: `model.layers.0.self_attn.q_proj`.
    """

    kernels: AnyKernels
    wider: AnyKernels
    names: frozenset[str]


def load(
    path: Path,
    *,
    dtype: torch.dtype,
    device: torch.device,
    kernels: AnyKernels | MixedKernels,
    progress: ProgressCallback | None = None,
    store: PackedStore | None = None,
) -> Decoder:
    """Load the model in directory `path`, its weights held as `dtype` on `device`.

    `progress("weights", done, total)` counts bytes. Weights that `store` has are not read from the
    checkpoint; the others are given to it. Raises CheckpointError for a config that is not supported (see
    `families.read`), and for tensors that are missing, misshapen, unexpected or truncated.
    """
    spec = families.read(path)
    with loading(f"the model in {path}"), Checkpoint(path) as checkpoint:
        checkpoint.name_anew(layouts.usual(checkpoint.entries, spec.family, len(spec.layers), tied=spec.tied))
        spec = _with_own_head(spec, checkpoint)
        reader = WeightReader(checkpoint, kernels, dtype, device, progress, store)
        decoder = Decoder(spec, reader.kernels, read_weights(reader, spec))
        reader.finish()
    return decoder


def _with_own_head(spec: ModelSpec, checkpoint: Checkpoint) -> ModelSpec:
    """The spec, without the tie when the checkpoint holds a head that differs from the embedding: the config
    is wrong then, as transformers too decides."""
    for root, head in ROOTS.items():
        pair = [checkpoint.entries.get(f"{name}.weight") for name in (f"{root}embed_tokens", head)]
        stored = [entry for entry in pair if entry is not None and entry.dtype in DTYPES]
        if spec.tied and len(stored) == 2 and stored[0].shape == stored[1].shape:
            embedding, own = map(checkpoint.map, stored)
            if embedding.dtype != own.dtype or not torch.equal(embedding, own):
                return structs.replace(spec, tied=False)
    return spec


class WeightReader:
    """Reads tensors of a checkpoint and packs them. Counts what was read and the memory it takes."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        kernels: AnyKernels | MixedKernels,
        dtype: torch.dtype,
        device: torch.device,
        progress: ProgressCallback | None = None,
        store: PackedStore | None = None,
    ) -> None:
        self._mixed = kernels if isinstance(kernels, MixedKernels) else None
        self._wide: set[str] = set()
        self.kernels = kernels.kernels if isinstance(kernels, MixedKernels) else kernels
        self.checkpoint = checkpoint
        self.dtype, self.device = dtype, device
        self._progress, self._store = progress, store
        self.unread = set(checkpoint.entries)
        self.done = self.nbytes = self.parameters = 0

    def has(self, name: str) -> bool:
        return name in self.checkpoint.entries

    def find(self, parts: list[StackedPart], shape: tuple[int, ...], suffix: str) -> list[Entry]:
        """Where the parts are in the checkpoint, [rows, *shape] each."""
        names = [f"{part}.{suffix}" for part, _ in parts]
        self.unread.difference_update(names)
        return [self.checkpoint.find(name, (n, *shape)) for name, (_, n) in zip(names, parts, strict=True)]

    def stack(self, parts: list[StackedPart], shape: tuple[int, ...], suffix: str = "weight") -> Tensor:
        """A new tensor [rows of all parts, *shape], each part read into its own rows."""
        # All parts are found before memory is allocated, because a config may give wrong sizes.
        entries, rows = self.find(parts, shape, suffix), [rows for _, rows in parts]
        dtype = self._stored_dtype(entries) or self.dtype
        held = torch.empty((sum(rows), *shape), dtype=dtype, device=self.device)
        start = 0
        for entry, count in zip(entries, rows, strict=True):
            self.checkpoint.read(entry, held[start : start + count])
            self.count(entry)
            start += count
        return held

    def count(self, entry: Entry) -> None:
        """Note that a tensor is read."""
        self.done += entry.nbytes
        self.parameters += prod(entry.shape)
        if self._progress is not None:
            self._progress("weights", self.done, self.checkpoint.nbytes)

    def packed(self, name: str, sources: list[StackedTensor], pack: Callable[[], Packed]) -> Packed:
        """The store's weights under `name`, or else what `pack` makes of the sources."""
        packed = None if self._store is None else self._store.take(name)
        if packed is not None:
            for source in sources:
                for entry in self.find(*source):
                    self.count(entry)
        else:
            packed = pack()
            if self._store is not None:
                self._store.keep(name, packed)
        self.nbytes += packed.nbytes
        return packed

    def linear(self, parts: list[StackedPart], columns: int, bias: bool = False) -> Packed:
        """The weights [rows of all parts, columns] of one linear layer."""
        sources: list[StackedTensor] = [
            (parts, (columns,), "weight"),
            *([(parts, (), "bias")] if bias else []),
        ]

        name = parts[0][0]
        wide = self._mixed is not None and name in self._mixed.names
        if wide:
            self._wide.add(name)
        kernels = self._mixed.wider if self._mixed is not None and wide else self.kernels

        def pack() -> Packed:
            weight, *others = [self.stack(*source) for source in sources]
            return kernels.pack(weight, others[0] if others else None)

        return self.packed(name, sources, pack)

    def embedding(self, name: str, spec: ModelSpec) -> Tensor:
        """The embedding [vocab, hidden]. It stays mapped from the file where the kernels can read it as it is
        stored, because a step reads few of its rows."""
        part = (name, spec.vocab)
        (entry,) = self.find([part], (spec.hidden,), "weight")
        if self._stored_dtype([entry]) is None:
            embedding = self.stack([part], (spec.hidden,))
        else:
            embedding = self.checkpoint.map(entry)
            self.count(entry)
        self.nbytes += embedding.nbytes
        return embedding

    def _stored_dtype(self, entries: list[Entry]) -> torch.dtype | None:
        """The dtype of these tensors in the checkpoint, if the kernels accept it and it is no wider
        than ours."""
        stored = {DTYPES[entry.dtype] for entry in entries}
        if len(stored) > 1 or not stored <= self.kernels.weight_dtypes:
            return None
        (dtype,) = stored
        return dtype if dtype.itemsize <= self.dtype.itemsize else None

    def norm(self, names: list[StackedPart], offset: bool) -> Tensor:
        """The weights of a norm. `offset`: the checkpoint holds them minus one."""
        weight = self.stack(names, ())
        weight = (weight.float().add_(1.0) if offset else weight).to(self.dtype)
        self.nbytes += weight.nbytes
        return weight

    def finish(self) -> None:
        """Raises CheckpointError when the checkpoint holds tensors that were not read: without them the
        numbers would be wrong. Also when it lacks a matrix that is to be packed in a wider format."""
        if self._mixed is not None and (missing := sorted(self._mixed.names - self._wide)):
            raise CheckpointError(
                f"{self.checkpoint.path} has no matrix {missing[0]}, which is to be left out of quantisation"
            )
        strange = sorted(n for n in self.unread if not n.startswith(BESIDE))
        if strange:
            raise CheckpointError(
                f"{self.checkpoint.path} holds {len(strange)} tensors its config.json does not explain, "
                f"such as {strange[0]}"
            )
        if self._progress is not None:
            self._progress("weights", self.checkpoint.nbytes, self.checkpoint.nbytes)


def read_weights(reader: WeightReader, spec: ModelSpec) -> ModelWeights:
    """All weights of the model that `spec` describes. Raises CheckpointError when one is missing
    or misshapen."""
    root = next((root for root in ROOTS if reader.has(f"{root}embed_tokens.weight")), "model.")
    embedding = reader.embedding(f"{root}embed_tokens", spec)
    layers = [_layer(reader, spec, f"{root}layers.{i}.", layer) for i, layer in enumerate(spec.layers)]
    final = reader.norm([(f"{root}norm", spec.hidden)], spec.unit_offset)
    head = _head(reader, spec, ROOTS[root], embedding)
    return ModelWeights(
        embedding=embedding,
        dtype=reader.dtype,
        stack=LayerStack(layers, final, spec.eps),
        head=head,
        geometry=Geometry(
            tuple(rope.rotation(each, reader.device) for each in spec.ropes),
            tuple(sorted({layer.window for layer in spec.layers})),
        ),
        nbytes=reader.nbytes,
        parameters=reader.parameters,
    )


def _head(reader: WeightReader, spec: ModelSpec, name: str, embedding: Tensor) -> Packed:
    if not spec.tied:
        return reader.linear([(name, spec.vocab)], spec.hidden)
    reader.unread.discard(f"{name}.weight")
    kernels = reader.kernels

    def pack() -> Packed:
        return kernels.pack(embedding, None) if kernels.pack_tied is None else kernels.pack_tied(embedding)

    head = reader.packed(name, [], pack)
    if head.shares(embedding):
        reader.nbytes -= head.nbytes
    return head


def _layer(reader: WeightReader, spec: ModelSpec, at: str, layer: Layer) -> DecoderLayer[Any, Any]:
    names = FAMILIES[spec.family].names
    queries, keys = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim

    def norm(name: str | None) -> Tensor | None:
        return None if name is None else reader.norm([(at + name, spec.hidden)], spec.unit_offset)

    return DecoderLayer(
        attention=_attention(spec, layer),
        eps=spec.eps,
        pre_attention_norm=norm(names.pre_attention_norm),
        qkv=reader.linear(_parts(at, names.qkv, (queries, keys, keys)), spec.hidden, spec.qkv_bias),
        query_key_norm=_query_key_norm(reader, spec, names, at),
        out=reader.linear([(at + names.out, spec.hidden)], queries, spec.out_bias),
        post_attention_norm=norm(names.post_attention_norm),
        pre_mlp_norm=norm(names.pre_mlp_norm),
        feed_forward=_experts(reader, spec, spec.routing, names, at)
        if layer.experts and spec.routing
        else _mlp(reader, spec, names, at),
        post_mlp_norm=norm(names.post_mlp_norm),
    )


def _attention(spec: ModelSpec, layer: Layer) -> Attention:
    return Attention(
        heads=spec.heads,
        kv_heads=spec.kv_heads,
        head_dim=spec.head_dim,
        scale=spec.scale,
        window=layer.window,
        softcap=spec.attention_cap,
        rotation=layer.rope,
        norm=spec.query_norm,
        eps=spec.eps,
    )


def _query_key_norm(reader: WeightReader, spec: ModelSpec, names: Names, at: str) -> Tensor | None:
    """Norm weights for the queries of all heads, then the keys. Weights of one head are repeated."""
    if spec.query_norm == "none":
        return None
    heads = (1, 1) if spec.query_norm == "head" else (spec.heads, spec.kv_heads)
    parts = [
        (at + names.query_norm, heads[0] * spec.head_dim),
        (at + names.key_norm, heads[1] * spec.head_dim),
    ]
    weights = reader.norm(parts, spec.unit_offset)
    if spec.query_norm == "row":
        return weights
    query, key = weights.view(2, spec.head_dim)
    return torch.cat((query.repeat(spec.heads), key.repeat(spec.kv_heads)))


def _parts(at: str, names: tuple[str, ...], rows: tuple[int, ...]) -> list[StackedPart]:
    """One part for each name. A single name means that the checkpoint holds them stacked already."""
    if len(names) == 1:
        return [(at + names[0], sum(rows))]
    return [(at + name, count) for name, count in zip(names, rows, strict=True)]


def _mlp(reader: WeightReader, spec: ModelSpec, names: Names, at: str) -> Mlp[Any]:
    inner = spec.intermediate
    return Mlp(
        gate_up=reader.linear(_parts(at, names.gate_up, (inner, inner)), spec.hidden, spec.mlp_bias),
        activation=spec.activation,
        down=reader.linear([(at + names.down, spec.hidden)], inner, spec.mlp_bias),
    )


def _experts(
    reader: WeightReader, spec: ModelSpec, routing: Routing, names: Names, at: str
) -> MixtureOfExperts[Any, Any]:
    inner, count, hidden = routing.intermediate, routing.count, spec.hidden
    router = reader.linear([(at + names.router, count)], hidden)
    ups = [(at + name.format(i), inner) for i in range(count) for name in names.expert_gate_up]
    downs = [(at + names.expert_down.format(i), hidden) for i in range(count)]

    def pack() -> Packed:
        gate_up = reader.stack(ups, (hidden,)).view(count, 2 * inner, hidden)
        down = reader.stack(downs, (inner,)).view(count, hidden, inner)
        return reader.kernels.pack_experts(gate_up, down, spec.activation)

    sources: list[StackedTensor] = [(ups, (hidden,), "weight"), (downs, (inner,), "weight")]
    packed = reader.packed(ups[0][0], sources, pack)
    return MixtureOfExperts(router, packed, routing.top_k, routing.normalise)
