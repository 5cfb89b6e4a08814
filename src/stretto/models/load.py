"""From a checkpoint directory to a decoder, one fused weight at a time: no weight is ever held twice.

Owns how the tensors of a family are stacked into the weights the kernels want. Reads safetensors only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from stretto.errors import CheckpointError
from stretto.kernels import Attention, Geometry, Kernels, Linear, Packed
from stretto.models import families, rope
from stretto.models.blocks import Feed, Join, Mixer, Mixture, Mlp
from stretto.models.checkpoint import DTYPES, Checkpoint, Entry
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
Source = tuple[list[Part], tuple[int, ...], str]
"""Tensors that are read as one, their shape but for the rows, and what their names end in."""


class Store(Protocol):
    """Packed weights of this very checkpoint from an earlier start, by the name of their first tensor."""

    def take(self, name: str) -> Packed | None: ...

    def keep(self, name: str, packed: Packed) -> None: ...


def load(
    path: Path,
    *,
    dtype: torch.dtype,
    device: torch.device,
    kernels: Kernels,
    progress: Progress | None = None,
    store: Store | None = None,
) -> Decoder:
    """Load the model in directory `path`, its weights held as `dtype` on `device`.

    `progress("weights", done, total)` counts bytes. What `store` has is not read from the checkpoint; what it
    lacks is given to it. Raises CheckpointError for a config that is not understood (see `families.read`) and
    for tensors that are missing, misshapen, unexpected or cut short.
    """
    spec = families.read(path)
    with Checkpoint(path) as checkpoint:
        reader = _Reader(checkpoint, kernels, dtype, device, progress)
        reader.store = store
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
        self.store: Store | None = None
        self.unread = set(checkpoint.entries)
        self.done = self.nbytes = self.parameters = 0

    def has(self, name: str) -> bool:
        return name in self.checkpoint.entries

    def find(self, parts: list[Part], shape: tuple[int, ...], suffix: str) -> list[Entry]:
        """Where the parts lie, [rows, *shape] each."""
        names = [f"{part}.{suffix}" for part, _ in parts]
        self.unread.difference_update(names)
        return [self.checkpoint.find(name, (n, *shape)) for name, (_, n) in zip(names, parts, strict=True)]

    def stack(self, parts: list[Part], shape: tuple[int, ...], suffix: str = "weight") -> Tensor:
        """A new tensor [rows of all parts, *shape], each part read into its own rows."""
        # All parts are found before memory is asked for: a config may lie about sizes.
        entries, rows = self.find(parts, shape, suffix), [rows for _, rows in parts]
        dtype = self._as_stored(entries) or self.dtype
        held = torch.empty((sum(rows), *shape), dtype=dtype, device=self.device)
        for entry, into in zip(entries, held.split(rows), strict=True):
            self.checkpoint.read(entry, into)
            self.count(entry)
        return held

    def count(self, entry: Entry) -> None:
        self.done += entry.nbytes
        self.parameters += prod(entry.shape)
        if self.progress is not None:
            self.progress("weights", self.done, self.checkpoint.nbytes)

    def packed(self, name: str, sources: list[Source], pack: Callable[[], Packed]) -> Packed:
        """What the store has under `name`, or else what `pack` makes of the sources."""
        packed = None if self.store is None else self.store.take(name)
        if packed is not None:
            for source in sources:
                for entry in self.find(*source):
                    self.count(entry)
        else:
            packed = pack()
            if self.store is not None:
                self.store.keep(name, packed)
        self.nbytes += packed.nbytes
        return packed

    def linear(self, parts: list[Part], columns: int, bias: bool = False) -> Linear:
        sources: list[Source] = [(parts, (columns,), "weight"), *([(parts, (), "bias")] if bias else [])]

        def pack() -> Packed:
            weight, *others = [self.stack(*source) for source in sources]
            return self.kernels.pack(weight, others[0] if others else None)

        return self.packed(parts[0][0], sources, pack)

    def embedding(self, name: str, spec: ModelSpec) -> Tensor:
        """Where the kernels take it so, as it lies in the file: a step reads few of its rows."""
        part = (name, spec.vocab)
        (entry,) = self.find([part], (spec.hidden,), "weight")
        if self._as_stored([entry]) is None:
            embedding = self.stack([part], (spec.hidden,))
        else:
            embedding = self.checkpoint.map(entry)
            self.count(entry)
        self.nbytes += embedding.nbytes
        return embedding

    def _as_stored(self, entries: list[Entry]) -> torch.dtype | None:
        """The dtype of these tensors in the checkpoint, if the kernels take them in it and it is no wider."""
        stored = {DTYPES[entry.dtype] for entry in entries}
        if len(stored) > 1 or not stored <= self.kernels.takes:
            return None
        (dtype,) = stored
        return dtype if dtype.itemsize <= self.dtype.itemsize else None

    def norm(self, names: list[Part], offset: bool) -> Tensor:
        weight = self.stack(names, ())
        weight = (weight.float().add_(1.0) if offset else weight).to(self.dtype)
        self.nbytes += weight.nbytes
        return weight

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
    embedding = reader.embedding(f"{root}embed_tokens", spec)
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
        dtype=reader.dtype,
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
    pack_tied = reader.kernels.pack_tied or (lambda embedding: reader.kernels.pack(embedding, None))
    head = reader.packed(name, [], lambda: pack_tied(embedding))
    if head.shares(embedding):
        reader.nbytes -= head.nbytes
    return head


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
        inner=inner,
        gate_up=reader.linear(_parts(at, names.gate_up, (inner, inner)), spec.hidden, spec.mlp_bias),
        down=reader.linear([(at + names.down, spec.hidden)], inner, spec.mlp_bias),
    )


def _mixture(reader: _Reader, spec: ModelSpec, routing: Routing, names: Names, at: str) -> Mixture:
    inner, count, hidden = routing.intermediate, routing.count, spec.hidden
    router = reader.linear([(at + names.router, count)], hidden)
    ups = [(at + name.format(i), inner) for i in range(count) for name in names.expert_gate_up]
    downs = [(at + names.expert_down.format(i), hidden) for i in range(count)]

    def pack() -> Packed:
        gate_up = reader.stack(ups, (hidden,)).view(count, 2 * inner, hidden)
        down = reader.stack(downs, (inner,)).view(count, hidden, inner)
        return reader.kernels.pack_experts(gate_up, down, spec.activation)

    sources: list[Source] = [(ups, (hidden,), "weight"), (downs, (inner,), "weight")]
    packed = reader.packed(ups[0][0], sources, pack)
    return Mixture(reader.kernels, router, packed, routing.chosen, routing.normalise)
