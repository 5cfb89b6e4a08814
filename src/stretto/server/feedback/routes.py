"""`/v1/feedback`: takes rewards for answers, shows a tenant its own, exports corrected answers, erases."""

from __future__ import annotations

import time
from dataclasses import dataclass

from msgspec import json
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from stretto.errors import InvalidRequest, UnknownRequest
from stretto.ladder.learning.feedback import KeptChoice, NoPromptKept, NoSuchChoice, Reward
from stretto.ladder.learning.learner import LearntCorrection, VariantRewards, summary
from stretto.ladder.learning.policies import EvaluatedPolicy, policies
from stretto.protocol.extensions.feedback import (
    CorrectedSample,
    ErasedFeedback,
    FeedbackPolicies,
    FeedbackReceipt,
    FeedbackRequest,
    FeedbackSummary,
    PolicyEstimate,
    PolicyFeedback,
    VariantFeedback,
    ids_of,
)
from stretto.protocol.parsing import JSON, parse
from stretto.protocol.relay import FEEDBACK, FeedbackErasure, OperationName
from stretto.server.feedback.choices import user_key
from stretto.server.generation import Handler
from stretto.server.objectives import DEFAULT
from stretto.server.state import Call, Server

DECODER = json.Decoder(FeedbackRequest)
ERASURE = json.Decoder(FeedbackErasure)
THUMBS = {"up": 1.0, "down": 0.0}
LINES = "application/jsonl"
TASK = "feedback"


@dataclass(frozen=True, slots=True)
class FeedbackRoutes:
    """The handlers, for one server. A tenant sees and changes only what is its own."""

    server: Server

    def routes(self) -> list[Route]:
        """The routes that read and erase."""
        return [
            Route(FEEDBACK, self.show, methods=["GET"]),
            Route(FEEDBACK, self.erase_all, methods=["DELETE"]),
            Route(f"{FEEDBACK}/export", self.export, methods=["GET"]),
            Route(f"{FEEDBACK}/policies", self.policies, methods=["GET"]),
            Route(f"{FEEDBACK}/users/{{user}}", self.erase_user, methods=["DELETE"]),
            Route(f"{FEEDBACK}/{{id}}", self.erase_request, methods=["DELETE"]),
        ]

    async def give(self, call: Call) -> None:
        """Keeps a reward. Raises InvalidRequest, and UnknownRequest for an id that is none of the tenant's,
        whether or not another tenant has it."""
        request = parse(DECODER, call.body)
        reward = Reward(_reward(request), request.corrected_answer)
        learner, now = self.server.learner, time.monotonic()
        for id in ids_of(request.request_id):
            try:
                kept = learner.reward(call.tenant, id, reward, now)
                break
            except NoSuchChoice:
                continue
            except NoPromptKept:
                raise _no_prompt() from None
        else:
            raise _unknown(request.request_id, "$.request_id")
        choice = kept.choice
        call.label(choice.model, DEFAULT)
        self.server.metrics.rewarded(choice.model, choice.variant, reward.value)
        receipt = FeedbackReceipt(
            request_id=request.request_id,
            model=choice.model,
            variant=choice.variant,
            reward=reward.value,
            learnt=learner.teaches(kept),
        )
        await call.respond(_json(receipt))

    def relayed(self) -> dict[OperationName, Handler]:
        """What a gateway may ask for a tenant."""
        return {
            "feedback": self.give,
            "show_feedback": self.show_relayed,
            "feedback_policies": self.policies_relayed,
            "export_feedback": self.export_relayed,
            "erase_feedback": self.erase_relayed,
        }

    async def show(self, request: Request) -> Response:
        """The tenant's rewards by model and variant."""
        return self._shown(self.server.tenant(request.headers))

    async def show_relayed(self, call: Call) -> None:
        """The same for a gateway."""
        await call.respond(self._shown(call.tenant))

    async def export(self, request: Request) -> Response:
        """The tenant's corrected answers with their prompts, as lines that `stretto optimise` trains on."""
        return self._exported(self.server.tenant(request.headers))

    async def export_relayed(self, call: Call) -> None:
        """The same for a gateway."""
        await call.respond(self._exported(call.tenant))

    async def policies(self, request: Request) -> Response:
        """What other ways to choose would have been worth, by the tenant's rewards."""
        return self._evaluated(self.server.tenant(request.headers))

    async def policies_relayed(self, call: Call) -> None:
        """The same for a gateway."""
        await call.respond(self._evaluated(call.tenant))

    async def erase_all(self, request: Request) -> Response:
        """Erases all choices and rewards of the tenant."""
        return self._erased(self.server.tenant(request.headers), FeedbackErasure())

    async def erase_user(self, request: Request) -> Response:
        """Erases the choices and rewards of one of the tenant's users."""
        wanted = FeedbackErasure(user=request.path_params["user"])
        return self._erased(self.server.tenant(request.headers), wanted)

    async def erase_request(self, request: Request) -> Response:
        """Erases the choice and the reward of one request. Raises UnknownRequest."""
        wanted = FeedbackErasure(request_id=request.path_params["id"])
        return self._erased(self.server.tenant(request.headers), wanted)

    async def erase_relayed(self, call: Call) -> None:
        """Erases what a gateway asks for. Raises UnknownRequest as `erase_request` does."""
        await call.respond(self._erased(call.tenant, parse(ERASURE, call.body)))

    def _shown(self, tenant: str) -> Response:
        learner, now = self.server.learner, time.monotonic()
        found: dict[str, dict[str, VariantFeedback]] = {}
        for model, variants in summary(learner.rewarded(tenant)).items():
            taught = learner.taught(tenant, model, now)
            found[model] = {name: _variant(each, taught.get(name)) for name, each in variants.items()}
        return _json(FeedbackSummary(waiting=learner.waiting(tenant), models=found))

    def _evaluated(self, tenant: str) -> Response:
        rewarded = self.server.learner.rewarded(tenant)
        found = {model: [_policy(each) for each in rows] for model, rows in policies(rewarded).items()}
        return _json(FeedbackPolicies(models=found))

    def _exported(self, tenant: str) -> Response:
        samples = [sample for kept in self.server.learner.rewarded(tenant) if (sample := sample_of(kept))]
        lines = b"".join(json.encode(sample) + b"\n" for sample in samples)
        return Response(lines, media_type=LINES, headers={"Cache-Control": "no-store"})

    def _erased(self, tenant: str, erasure: FeedbackErasure) -> Response:
        id = erasure.request_id
        ids = None if id is None else ids_of(id)
        user = None if erasure.user is None else user_key(erasure.user)

        def wanted(kept: KeptChoice) -> bool:
            return (ids is None or kept.answers_to(ids)) and (user is None or kept.choice.user == user)

        erased = self.server.learner.erase(tenant, wanted, time.monotonic())
        if id is not None and not erased:
            raise _unknown(id, f"{FEEDBACK}/{id}")
        return _json(ErasedFeedback(erased=erased))


def sample_of(kept: KeptChoice) -> CorrectedSample | None:
    """The line of a corrected answer; None for a reward without one."""
    prompt, reward = kept.choice.prompt, kept.reward
    if prompt is None or reward is None or reward.corrected_answer is None:
        return None
    answer = reward.corrected_answer
    if not prompt.messages:
        return CorrectedSample(prompt=prompt.text, answer=answer, task=TASK)
    messages = [{"role": turn.role, "content": turn.content} for turn in prompt.messages]
    return CorrectedSample(messages=messages, answer=answer, task=TASK)


def _variant(each: VariantRewards, taught: LearntCorrection | None) -> VariantFeedback:
    return VariantFeedback(
        rewards=each.count,
        mean_reward=each.mean,
        mean_expected=each.expected,
        correction=None if taught is None else taught.mean,
        correction_low=None if taught is None else taught.low,
    )


def _policy(each: EvaluatedPolicy) -> PolicyFeedback:
    report = each.report
    if report is None:
        return PolicyFeedback(policy=each.name, refused=each.refused)
    ips, snips, dr = (
        PolicyEstimate(mean=value.mean, low=value.low, high=value.high)
        for value in (report.ips, report.snips, report.dr)
    )
    return PolicyFeedback(
        policy=each.name, rewards=report.count, effective=report.effective, ips=ips, snips=snips, dr=dr
    )


def _reward(request: FeedbackRequest) -> float:
    if (request.reward is None) == (request.thumbs is None):
        raise InvalidRequest("send either $.reward, from 0 to 1, or $.thumbs, up or down", param="$.reward")
    return THUMBS[request.thumbs] if request.thumbs is not None else request.reward or 0.0


def _no_prompt() -> InvalidRequest:
    path = "$.corrected_answer"
    return InvalidRequest(
        f"{path}: the prompt of this request was not kept, so nobody could learn the answer; leave it out, or"
        " name your tenant in the setting feedback_prompts and send texts only",
        param=path,
    )


def _unknown(id: str, path: str) -> UnknownRequest:
    return UnknownRequest(
        f"{path}: no request {id!r} of yours waits for feedback: it never was, has been erased, or is too"
        " old; send the x-request-id of its response",
        param=path,
    )


def _json(value: object) -> Response:
    return Response(json.encode(value), media_type=JSON)
