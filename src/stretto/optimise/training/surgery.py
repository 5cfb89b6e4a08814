"""Cuts a checkpoint: fewer layers, narrower feed-forward blocks, a narrower residual stream.

Works on the tensors and the config.json of a directory in the Hugging Face layout, by the names that
`stretto.models.families` has for its family. It knows no importance and trains nothing.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from stretto.errors import StartError
from stretto.models import families
from stretto.models.checkpoint import INDEX, weight_files
from stretto.models.families import FAMILIES, FULL, SLIDING, Names
from stretto.models.load import ROOTS
from stretto.models.spec import ModelSpec

KeptIndex = Tensor
"""int64, rising: which rows or columns stay."""


@dataclass(frozen=True, slots=True)
class Cut:
    """What stays of a checkpoint.

    `layers`: their numbers. `neurons`: for each kept layer, which neurons of its feed-forward block.
    `hidden`: which dimensions of the residual stream. None: all.
    """

    layers: tuple[int, ...]
    neurons: tuple[KeptIndex, ...] | None = None
    hidden: KeptIndex | None = None


def cut(source: Path, target: Path, what: Cut) -> None:
    """Write what stays of the checkpoint in `source` to the new directory `target`.

    Raises StartError for a checkpoint that also holds an image encoder, for neurons
    of experts, and for the hidden dimensions of a model with longrope.
    """
    spec = families.read(source)
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    if config.get("model_type") != spec.family:
        raise StartError(
            f"{source} holds more than a text model ({config.get('model_type')}): only text models are cut"
        )
    if spec.routing is not None and (what.neurons is not None):
        raise StartError(
            f"{source} is a mixture of experts, whose width is not pruned: prune its layers instead"
        )
    if what.hidden is not None and any(rope.kind == "longrope" for rope in spec.ropes):
        raise StartError(
            f"{source} has a longrope embedding, which fixes its `hidden`: cut its layers instead"
        )
    target.mkdir(parents=True)
    tensors = {
        name: tensor for old, held in _tensors(source) for name, tensor in _kept(spec, what, old, held)
    }
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    (target / "config.json").write_text(
        json.dumps(config | _changes(spec, what), indent=2) + "\n", encoding="utf-8"
    )
    copy_beside(source, target)


def copy_beside(source: Path, target: Path) -> None:
    """Copy everything but weights, config.json and a manifest: tokenizer, template, generation."""
    for file in sorted(source.iterdir()):
        beside = file.suffix in (".json", ".jinja", ".model", ".txt") and file.name not in (
            "config.json",
            INDEX,
        )
        if beside and file.is_file() and file.name != "manifest.json":
            shutil.copyfile(file, target / file.name)


def _tensors(source: Path) -> Iterator[tuple[str, Tensor]]:
    for file in weight_files(source):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():
                yield name, opened.get_tensor(name)


def _kept(spec: ModelSpec, what: Cut, name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The tensor under its new name with what stays of it; nothing if its layer goes."""
    root = next((root for root in ROOTS if name.startswith(f"{root}layers.")), None)
    if root is None:
        keeps = tensor.dim() and tensor.shape[-1] == spec.hidden and what.hidden is not None
        yield name, (tensor[..., what.hidden].contiguous() if keeps else tensor)
        return
    number, _, rest = name.removeprefix(f"{root}layers.").partition(".")
    if int(number) in what.layers:
        place = what.layers.index(int(number))
        neurons = None if what.neurons is None else what.neurons[place]
        module, _, kind = rest.rpartition(".")
        part = _part(FAMILIES[spec.family].names, spec, module, neurons, what.hidden)
        yield (
            f"{root}layers.{place}.{rest}",
            _indexed(tensor, *part, vector=kind != "weight" or tensor.dim() == 1),
        )


def _part(
    names: Names, spec: ModelSpec, module: str, neurons: KeptIndex | None, hidden: KeptIndex | None
) -> tuple[KeptIndex | None, KeptIndex | None]:
    """Which rows and columns of a layer's weight stay."""
    generic = ".".join("{}" if part.isdecimal() else part for part in module.split("."))
    if generic in names.gate_up:
        if len(names.gate_up) == 1 and neurons is not None:
            neurons = torch.cat((neurons, neurons + spec.intermediate))
        return neurons, hidden
    if generic == names.down:
        return hidden, neurons
    if generic in (*names.qkv, names.router, *names.expert_gate_up):
        return None, hidden
    if generic in (names.out, names.expert_down):
        return hidden, None
    norms = (names.pre_attention_norm, names.post_attention_norm, names.pre_mlp_norm, names.post_mlp_norm)
    return (hidden, None) if generic in norms else (None, None)


def _indexed(tensor: Tensor, rows: KeptIndex | None, columns: KeptIndex | None, *, vector: bool) -> Tensor:
    if rows is not None:
        tensor = tensor[rows]
    if columns is not None and not vector:
        tensor = tensor[:, columns]
    return tensor.contiguous()


def _changes(spec: ModelSpec, what: Cut) -> dict[str, Any]:
    """The fields of config.json that the cut changes. What depends on a layer's number is written out."""
    layers = [spec.layers[number] for number in what.layers]
    changes: dict[str, Any] = {"num_hidden_layers": len(layers), "head_dim": spec.head_dim}
    if FAMILIES[spec.family].uses_layer_types:
        changes["layer_types"] = [SLIDING if layer.window else FULL for layer in layers]
    if spec.routing is not None:
        changes["mlp_only_layers"] = [place for place, layer in enumerate(layers) if not layer.experts]
        changes["decoder_sparse_step"] = 1
    if what.neurons is not None:
        changes["intermediate_size"] = len(what.neurons[0])
    if what.hidden is not None:
        changes["hidden_size"] = len(what.hidden)
    return changes
