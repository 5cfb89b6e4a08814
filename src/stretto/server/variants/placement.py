"""Where a request goes: to its model, or to the variant of a ladder that is chosen for it.

It turns the router's answer into one of the pipeline: a placement, or an error that names the field.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from stretto.errors import CannotBeOnTime, QualityOutOfReach, UnsupportedField
from stretto.server.objectives import ServiceLevel
from stretto.server.state import Call, ReadAhead, Server
from stretto.server.validation import AnswerSpec, EncodedPrompt
from stretto.server.variants.router import LadderRequest, VariantPlacement, VariantRouter

FLOOR, PREFER, CASCADE = "$.objective.min_quality", "$.objective.prefer", "$.objective.cascade"


def place(call: Call, spec: AnswerSpec, slo: ServiceLevel, prompts: list[EncodedPrompt]) -> VariantPlacement:
    """The model that answers all prompts of a call. Nothing is chosen for a model without variants, nor for
    an answer that another worker began: the variant that began it goes on.

    Raises UnsupportedField for a floor, a preference or a cascade that was not measured for this model,
    QualityOutOfReach and CannotBeOnTime for a request that rather wants a refusal.
    """
    model, floor = spec.model, slo.objective.min_quality
    if call.continuation is not None:
        begun = (begun_with(call, model.name, index) for index in range(spec.answers))
        if name := next(filter(None, begun), ""):
            return VariantPlacement(name)
    router = call.server.router(model.name)
    if slo.asks_cascade:
        _check_cascade(model.name, router, slo)
    if router is None:
        if floor is not None:
            raise UnsupportedField(
                f"{FLOOR}: the quality of {model.name} was not measured; serve a ladder, as docs/ladder.md"
                " says, or leave it out",
                param=FLOOR,
            )
        return VariantPlacement(model.info.name)
    only = None if model.name == router.ladder.name else model.info.name
    if floor is None and (only is not None or len(router.ladder.models) == 1):
        return VariantPlacement(model.info.name)
    if slo.prefer == "energy" and not router.measures_energy:
        raise UnsupportedField(
            f"{PREFER}: energy was not measured for the variants of {router.ladder.name}; prefer quality or"
            " latency",
            param=PREFER,
        )
    return _chosen(call, router, _asked(call, spec, slo, prompts, only))


def begun_with(call: Call, model: str, index: int) -> str:
    """The variant with which another worker began the answer `index`; empty if there is none, or it is not
    served here."""
    if call.continuation is None:
        return ""
    variant, router = call.emitted(index).variant, call.server.router(model)
    served = router is not None and any(variant == each.name for each in router.ladder.models.values())
    return variant if served else ""


@dataclass(frozen=True, slots=True)
class TypedRequest:
    """What a message that is being typed would be asked by, if it were sent now.

    `read_ahead` is nothing: what is read so far shall not decide who reads the rest. Else the choice for the
    first words would stay.
    """

    server: Server
    tenant: str
    arrival: float
    user: str = ""
    read_ahead: ReadAhead = ReadAhead()  # noqa: RUF009 - it is immutable


def foresee(typed: TypedRequest, spec: AnswerSpec, slo: ServiceLevel, prompt: EncodedPrompt) -> str:
    """The model that would answer a prompt if it were sent now."""
    router = typed.server.router(spec.model.name)
    if router is None or spec.model.name != router.ladder.name or len(router.ladder.models) == 1:
        return spec.model.info.name
    return router.foresee(_asked(typed, spec, slo, [prompt], None), typed.arrival)


def _check_cascade(model: str, router: VariantRouter | None, slo: ServiceLevel) -> None:
    """Raises UnsupportedField for a cascade where none can be."""
    if router is None or model != router.ladder.name or not router.measures_cascade:
        problem = f"no cascade was measured for {model}: ask a ladder that has one by its own name"
    elif slo.prefer != "quality":
        problem = f"it needs the preference quality, and this is {slo.prefer}"
    else:
        return
    raise UnsupportedField(f"{CASCADE}: {problem}, or leave it out", param=CASCADE)


def _asked(
    call: Call | TypedRequest,
    spec: AnswerSpec,
    slo: ServiceLevel,
    prompts: list[EncodedPrompt],
    only: str | None,
) -> LadderRequest:
    """All answers of a call come from one variant, so their prompts count as one."""
    reader = call.read_ahead.model
    cached = sum(call.read_ahead.common(reader, prompt.ids) for prompt in prompts)
    return LadderRequest(
        question=spec.question(),
        prompt_tokens=sum(len(prompt.ids) for prompt in prompts),
        longest_prompt=max(len(prompt.ids) for prompt in prompts),
        arrival=call.arrival,
        max_tokens=spec.sampling.max_tokens,
        objective=slo.objective,
        tier=slo.tier,
        tenant=call.tenant,
        prefer=slo.prefer,
        cascade=slo.cascade,
        user=call.user,
        only=only,
        cached={reader: cached} if cached else {},
    )


def _chosen(call: Call, router: VariantRouter, asked: LadderRequest) -> VariantPlacement:
    placed = router.place(asked, time.monotonic())
    if placed.model is None and placed.late:
        raise CannotBeOnTime(
            "no variant of this model can meet $.objective now; try again later, or ask for more time",
            retry_after=placed.retry_after,
        )
    if placed.model is None:
        raise QualityOutOfReach(
            f"{FLOOR} is {asked.objective.min_quality:g}, and {placed.best_quality:.3g} is the most that a"
            " variant of this model is sure to reach for this prompt; lower it, or send on_miss: degrade",
            param=FLOOR,
        )
    return placed


def reprice(call: Call, model: str) -> None:
    """Lets the price of machine time follow the load after a choice, once the request is on its way."""
    router = call.server.router(model)
    if router is not None and call.placement.made is not None:
        router.reprice(time.monotonic())


def learn_lengths(call: Call, model: str) -> None:
    """Lets the ladder of a model learn from the lengths of a call's answers, which are complete."""
    router = call.server.router(model)
    if router is not None:
        for output in call.outputs:
            cut = output.finish_reason == "length"
            router.lengths.observe(call.tenant, output.tokens, call.placement.fitted, cut=cut)
