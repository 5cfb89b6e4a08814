"""The energy of an answer's tokens on each variant, from what was measured with the ladder. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from stretto.ladder.registry import Variant
from stretto.ladder.serving import ServedLadder
from stretto.types import TokenJoules

ESTIMATE = "estimate"  # how the source of a figure begins that was not measured
CONTEXT = 256  # keys that a usual token of an answer reads


def token_joules(variant: Variant) -> TokenJoules | None:
    """What a token takes on a variant; None: its energy is not known.

    The ladder has one figure, per token of an answer. A token of a prompt takes the part of it that its time
    is of a step at batch 1, by the step times of the machine that measured; nothing if there are none. A
    measured figure is the energy of whole evaluations, so their prompts are taken out of it first.
    """
    energy = variant.energy
    if energy is None:
        return None
    lengths, cost = variant.lengths, next(iter(variant.times.values()), None)
    share = 0.0
    if cost is not None and (step := cost.decodes(1, CONTEXT)) > 0:
        prompt = max(lengths.prompt_p50, 1)
        share = min(cost.prefill(0, prompt) / prompt / step, 1.0)
    output = energy.joules_per_token
    if not energy.source.startswith(ESTIMATE) and lengths.p50:
        output *= lengths.p50 / (lengths.p50 + share * lengths.prompt_p50)
    return TokenJoules(output * share, output, energy.source)


def joules_by_model(ladders: Iterable[ServedLadder]) -> dict[str, TokenJoules]:
    """What a token takes on each variant whose energy is known, by the engine's names."""
    return {
        ladder.models[variant.name].name: found
        for ladder in ladders
        for variant in ladder.variants
        if (found := token_joules(variant)) is not None
    }
