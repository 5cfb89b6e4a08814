"""`/v1/feedback`: takes rewards for answers, shows a tenant its own, exports corrected answers, erases."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from msgspec import json
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from stretto.errors import InvalidRequest, UnknownRequest
from stretto.ladder.learning.feedback import KeptChoice, NoPromptKept, NoSuchChoice, Reward
from stretto.ladder.learning.learner import summary
from stretto.protocol.extensions.feedback import (
    CorrectedSample,
    ErasedFeedback,
    FeedbackReceipt,
    FeedbackRequest,
    FeedbackSummary,
    VariantFeedback,
)
from stretto.protocol.parsing import JSON, parse
from stretto.server.feedback.choices import user_key
from stretto.server.objectives import DEFAULT
from stretto.server.state import Call, Server

DECODER = json.Decoder(FeedbackRequest)
PATH = "/v1/feedback"
THUMBS = {"up": 1.0, "down": 0.0}
PREFIXES = ("chatcmpl-", "cmpl-", "msg_")  # of the ids of answers, before that of their request
LINES = "application/jsonl"
TASK = "feedback"


@dataclass(frozen=True, slots=True)
class FeedbackRoutes:
    """The handlers, for one server. A tenant sees and changes only what is its own."""

    server: Server

    def routes(self) -> list[Route]:
        """The routes that read and erase."""
        return [
            Route(PATH, self.show, methods=["GET"]),
            Route(PATH, self.erase_all, methods=["DELETE"]),
            Route(f"{PATH}/export", self.export, methods=["GET"]),
            Route(f"{PATH}/users/{{user}}", self.erase_user, methods=["DELETE"]),
            Route(f"{PATH}/{{id}}", self.erase_request, methods=["DELETE"]),
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

    async def show(self, request: Request) -> Response:
        """The tenant's rewards by model and variant."""
        tenant, learner = self.server.tenant(request.headers), self.server.learner
        found = {
            model: {
                name: VariantFeedback(rewards=each.count, mean_reward=each.mean, mean_expected=each.expected)
                for name, each in variants.items()
            }
            for model, variants in summary(learner.rewarded(tenant)).items()
        }
        return _json(FeedbackSummary(waiting=learner.waiting(tenant), models=found))

    async def export(self, request: Request) -> Response:
        """The tenant's corrected answers with their prompts, as lines that `stretto optimise` trains on."""
        tenant = self.server.tenant(request.headers)
        samples = [sample for kept in self.server.learner.rewarded(tenant) if (sample := sample_of(kept))]
        lines = b"".join(json.encode(sample) + b"\n" for sample in samples)
        return Response(lines, media_type=LINES, headers={"Cache-Control": "no-store"})

    async def erase_all(self, request: Request) -> Response:
        """Erases all choices and rewards of the tenant."""
        return _json(ErasedFeedback(erased=self._erased(request, lambda kept: True)))

    async def erase_user(self, request: Request) -> Response:
        """Erases the choices and rewards of one of the tenant's users."""
        user = user_key(request.path_params["user"])
        return _json(ErasedFeedback(erased=self._erased(request, lambda kept: kept.choice.user == user)))

    async def erase_request(self, request: Request) -> Response:
        """Erases the choice and the reward of one request. Raises UnknownRequest."""
        id = request.path_params["id"]
        ids = ids_of(id)
        erased = self._erased(request, lambda kept: kept.request_id in ids)
        if not erased:
            raise _unknown(id, request.url.path)
        return _json(ErasedFeedback(erased=erased))

    def _erased(self, request: Request, wanted: Callable[[KeptChoice], bool]) -> int:
        tenant = self.server.tenant(request.headers)
        return self.server.learner.erase(tenant, wanted, time.monotonic())


def ids_of(written: str) -> list[str]:
    """The request ids that an id may stand for: a request's own, or that of the answer to a chat."""
    found = [written]
    found += [written.removeprefix(prefix) for prefix in PREFIXES if written.startswith(prefix)]
    return found


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
