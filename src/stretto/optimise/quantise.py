"""The step `quantise`: a format for the weights, and which matrices to leave in a wider one.

The variant shares its parent's checkpoint, because weights are quantised while they are loaded.
"""

from __future__ import annotations

from typing import Any

from stretto.models.checkpoint import Checkpoint
from stretto.models.families import FAMILIES
from stretto.models.load import ROOTS
from stretto.optimise.answers import mean_kl, read_scores
from stretto.optimise.job import StepJob, load_decoder
from stretto.optimise.recipe import QuantiseStep

MEASURED = 24  # texts of the validation split on which KL is measured


def quantise(job: StepJob, step: QuantiseStep) -> dict[str, Any]:
    """The excluded matrices and the KL from the parent. Raises StartError when this device has no kernels for
    the format."""
    texts = job.texts(job.corpus.validation[:MEASURED])
    reference = load_decoder(job.parent, job.session.device)

    def kl(exclude: tuple[str, ...]) -> float:
        decoder = load_decoder(job.parent, job.session.device, step.format, exclude)
        return mean_kl(list(read_scores(reference, decoder, texts)))

    whole = found = kl(())
    exclude: tuple[str, ...] = ()
    if step.max_kl is not None and whole > step.max_kl:
        # Leaving a matrix out is measured alone: what helps most comes first.
        names = linear_names(job)
        gains: dict[str, float] = {}
        for done, name in enumerate(names, 1):
            gains[name] = whole - kl((name,))
            job.session.progress("matrices", done, len(names))
        order = sorted(gains, key=lambda name: (-gains[name], name))
        while found > step.max_kl and len(exclude) < min(step.exclude, len(order)):
            exclude = (*exclude, order[len(exclude)])
            found = kl(exclude)
    return {"format": step.format, "exclude": exclude, "kl": found, "kl_without_exclusions": whole}


def linear_names(job: StepJob) -> list[str]:
    """The matrices of the layers by the name that excludes them: that of their first tensor."""
    spec, names = job.spec, FAMILIES[job.spec.family].names
    with Checkpoint(job.parent) as checkpoint:
        root = next((root for root in ROOTS if f"{root}embed_tokens.weight" in checkpoint.entries), "model.")
    dense = (names.qkv[0], names.out, names.gate_up[0], names.down)
    sparse = (names.qkv[0], names.out)
    return [
        f"{root}layers.{number}.{name}"
        for number, layer in enumerate(spec.layers)
        for name in (sparse if layer.experts else dense)
    ]
