"""Tensors that other programs store in another way -> the names under which `load` reads them.

Nothing is copied: an entry says where a tensor lies in a file, so a stacked tensor is several entries.
"""

from __future__ import annotations

import re
from dataclasses import replace

from stretto.models.checkpoint import Entry
from stretto.models.families import FAMILIES, Names

Entries = dict[str, Entry]
# Beside the decoder, and of no use to it: scales of a KV cache in eight bits, the value head of reinforcement
# learning, the modules that predict several tokens, and tensors that config.json determines.
UNUSED = re.compile(
    r"(^|\.)(k_scale|v_scale|kv_scale|rotary_emb\.inv_freq|masked_bias|attn\.bias)$"
    r"|^(v_head|value_head|score_head)\."
    r"|(^|\.)mtp(\.|_)"
)
STACKED = re.compile(r"^(.*layers\.\d+\.)mlp\.experts\.(gate_up_proj|down_proj)$")
ROUTER = re.compile(r"^(.*layers\.\d+\.)mlp\.gate\.weight$")


def usual(entries: Entries, family: str, layers: int, *, tied: bool) -> Entries:
    """The entries with their usual names. `layers`: of the decoder. `tied`: the head shares the embedding.

    A decoder without the prefix `model.` gets it, as embedding models lack it. Experts that transformers 5
    stacks into one tensor become one entry for each. Where only the head of a tied model is stored, it is the
    embedding. Layers beyond `layers` and what the decoder does not use are left out.
    """
    names = FAMILIES[family].names
    found: Entries = {}
    bare = "embed_tokens.weight" in entries and "model.embed_tokens.weight" not in entries
    for name, entry in entries.items():
        if bare and not name.startswith(("lm_head", "model.")):
            name = "model." + name
        if UNUSED.search(name) or _beyond(name, layers):
            continue
        if (stacked := STACKED.match(name)) is not None and FAMILIES[family].experts:
            found |= _experts(stacked[1], stacked[2], entry, names)
        elif (router := ROUTER.match(name)) is not None and FAMILIES[family].experts:
            found[f"{router[1]}{names.router}.weight"] = entry
        else:
            found[name] = entry
    embedding = "model.embed_tokens.weight"
    if tied and "lm_head.weight" in found and not any(name.endswith(embedding) for name in found):
        found[embedding] = found["lm_head.weight"]
    return found


def _beyond(name: str, layers: int) -> bool:
    """Whether a tensor belongs to a layer after the last one, which predicts further tokens."""
    number = re.match(r"^model\.layers\.(\d+)\.(?:eh_proj|enorm|hnorm|shared_head|embed_tokens)", name)
    return number is not None and int(number[1]) >= layers


def _experts(at: str, kind: str, entry: Entry, names: Names) -> Entries:
    """The matrices of all experts: `gate_up_proj` is [experts, 2 * inner, hidden], `down_proj` [experts,
    hidden, inner]. A tensor of another shape stays one entry, which nothing will read."""
    if len(entry.shape) != 3 or not entry.shape[0]:
        return {f"{at}mlp.experts.{kind}": entry}
    count, rows, columns = entry.shape
    parts = names.expert_gate_up if kind == "gate_up_proj" else (names.expert_down,)
    if rows % len(parts):
        return {f"{at}mlp.experts.{kind}": entry}
    shape = (rows // len(parts), columns)
    nbytes = entry.nbytes // (count * len(parts))
    pieces = [part.format(expert) for expert in range(count) for part in parts]
    return {
        f"{at}{piece}.weight": replace(entry, shape=shape, start=entry.start + place * nbytes, nbytes=nbytes)
        for place, piece in enumerate(pieces)
    }
