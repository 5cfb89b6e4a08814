"""How much each layer, neuron and dimension of a model matters, measured on texts."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from msgspec import structs
from torch import Tensor

from stretto.models.decoder import Decoder
from stretto.models.families import FAMILIES
from stretto.optimise.answers import Encoded, mean_kl, read_scores
from stretto.optimise.job import StepJob, load_decoder
from stretto.optimise.training.surgery import KeptIndex
from stretto.optimise.training.trainer import load_model


def spread_layers(total: int, count: int) -> tuple[int, ...]:
    """`count` of `total` layers at even distances, the first and the last included."""
    if count == 1:
        return (0,)
    return tuple(round(index * (total - 1) / (count - 1)) for index in range(count))


def least_influential(job: StepJob, texts: Sequence[Encoded], count: int) -> tuple[int, ...]:
    """The `count` layers to keep by block influence (X. Men et al., "ShortGPT", 2024).

    It is 1 - cosine of what a layer reads and what it returns, as a mean over tokens.
    """
    model = load_model(job.parent, job.session.device).eval()
    total = len(job.spec.layers)
    influence = torch.zeros(total)
    for done, text in enumerate(texts, 1):
        with torch.inference_mode():
            ids = torch.tensor([text.ids], device=job.session.device)
            states = model(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states
        # The last state is after the final norm, so the last layer is measured with it.
        for layer in range(total):
            cosine = torch.nn.functional.cosine_similarity(states[layer][0], states[layer + 1][0], dim=-1)
            influence[layer] += 1 - cosine.mean().cpu()
        job.session.progress("influence", done, len(texts))
    return tuple(sorted(influence.argsort(descending=True)[:count].tolist()))


def least_kl(job: StepJob, texts: Sequence[Encoded], count: int) -> tuple[int, ...]:
    """The `count` layers to keep by brute force: again and again, the layer goes without which the model is
    nearest to its parent."""
    whole = load_decoder(job.parent, job.session.device)
    kept = tuple(range(len(whole.spec.layers)))
    total = sum(range(count + 1, len(kept) + 1))
    done = 0
    while len(kept) > count:
        found: dict[int, float] = {}
        for layer in kept:
            rest = tuple(each for each in kept if each != layer)
            found[layer] = mean_kl(list(read_scores(whole, subset(whole, rest), texts)))
            done += 1
            job.session.progress("layers", done, total)
        gone = min(found, key=lambda layer: (found[layer], layer))
        kept = tuple(each for each in kept if each != gone)
    return kept


def subset(decoder: Decoder, layers: Sequence[int]) -> Decoder:
    """The decoder with some of its layers. It shares the weights."""
    weights, spec = decoder.weights, decoder.spec
    stack = replace(weights.stack, layers=[weights.stack.layers[number] for number in layers])
    fewer = structs.replace(spec, layers=tuple(spec.layers[number] for number in layers))
    return Decoder(fewer, decoder.kernels, replace(weights, stack=stack), decoder.kv_dtype)


def neurons(job: StepJob, texts: Sequence[Encoded], count: int) -> tuple[KeptIndex, ...]:
    """For each layer, its `count` most important neurons: mean magnitude, times the norm of their outputs."""
    model = load_model(job.parent, job.session.device).eval()
    down = FAMILIES[job.spec.family].names.down
    modules = {name: each for name, each in model.named_modules() if name.endswith(f".{down}")}
    sums = {name: torch.zeros(each.weight.shape[1]) for name, each in modules.items()}

    def watch(name: str) -> Callable[[Any, tuple[Tensor, ...]], None]:
        def add(_: Any, inputs: tuple[Tensor, ...]) -> None:
            sums[name] += inputs[0].detach().abs().flatten(0, -2).sum(0).cpu()

        return add

    hooks = [each.register_forward_pre_hook(watch(name)) for name, each in modules.items()]
    _read(job, model, texts, "neurons")
    for hook in hooks:
        hook.remove()
    scores = {name: sums[name] * each.weight.detach().norm(dim=0).cpu() for name, each in modules.items()}
    return tuple(_largest(score, count) for score in scores.values())


def dimensions(job: StepJob, texts: Sequence[Encoded], count: int) -> KeptIndex:
    """The `count` dimensions of the residual stream with the largest magnitude, as a mean over all layers."""
    model = load_model(job.parent, job.session.device).eval()
    score = torch.zeros(job.spec.hidden)
    for text in texts:
        with torch.inference_mode():
            ids = torch.tensor([text.ids], device=job.session.device)
            states = model(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states
        for state in states:
            magnitude = state[0].abs().mean(0)
            score += (magnitude / magnitude.mean()).cpu()
    return _largest(score, count)


def _read(job: StepJob, model: Any, texts: Sequence[Encoded], stage: str) -> None:
    for done, text in enumerate(texts, 1):
        with torch.inference_mode():
            model(input_ids=torch.tensor([text.ids], device=job.session.device), use_cache=False)
        job.session.progress(stage, done, len(texts))


def _largest(score: Tensor, count: int) -> KeptIndex:
    return score.argsort(descending=True, stable=True)[:count].sort().values
