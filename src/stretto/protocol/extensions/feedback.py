"""The types of `/v1/feedback`: rewards for answers, what became of them, what is erased; and the ids
of answers that a reward may name."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, Struct

from stretto.protocol.limits import up_to
from stretto.protocol.openai import Wire

PREFIXES = ("chatcmpl-", "cmpl-", "msg_")  # of the ids of answers, before that of their request


class FeedbackRequest(Wire, frozen=True, kw_only=True):
    """What somebody thinks of an answer: a reward or thumbs, exactly one of them. A second one for the same
    request takes the place of the first.

    `corrected_answer` needs the setting `feedback_prompts`, because without its prompt nobody can learn it.
    """

    request_id: Annotated[str, up_to("request_id", min_length=1)]
    reward: Annotated[float, Meta(ge=0, le=1)] | None = None
    thumbs: Literal["up", "down"] | None = None
    corrected_answer: Annotated[str, up_to("corrected_answer", min_length=1)] | None = None


class FeedbackReceipt(Struct, frozen=True, kw_only=True):
    """The reward as it was kept. `learnt`: whether later choices among variants depend on it."""

    object: Literal["feedback"] = "feedback"
    request_id: str
    model: str
    variant: str
    reward: float
    learnt: bool


class VariantFeedback(Struct, frozen=True, kw_only=True):
    """The rewards of one variant. `mean_expected`: the quality that was measured, for these prompts.

    `correction`: what the rewards add to the estimate of its quality, from -1 to 1, for the mean of the
    tenant's rated prompts; `correction_low`: what they add to its lower bound. Null: they teach nothing.
    """

    rewards: int
    mean_reward: float
    mean_expected: float | None = None
    correction: float | None = None
    correction_low: float | None = None


class FeedbackSummary(Struct, frozen=True, kw_only=True):
    """A tenant's rewards, by model and then by variant. `waiting`: answers that have none yet."""

    object: Literal["feedback.summary"] = "feedback.summary"
    waiting: int
    models: dict[str, dict[str, VariantFeedback]]


class PolicyEstimate(Struct, frozen=True, kw_only=True):
    """A mean reward, with its 95 % confidence interval."""

    mean: float
    low: float
    high: float


class PolicyFeedback(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What another way to choose would have been worth, by three estimators; or why nothing is known of it.

    `effective`: how many rewards with equal weights would say as much as the `rewards` that there are.
    `worker`: behind a gateway, whose choices and rewards it is about. Each worker learns for itself, so the
    estimates of several workers are not joined.
    """

    policy: str
    worker: str = ""
    rewards: int = 0
    effective: float = 0.0
    ips: PolicyEstimate | None = None
    snips: PolicyEstimate | None = None
    dr: PolicyEstimate | None = None
    refused: str = ""


class FeedbackPolicies(Struct, frozen=True, kw_only=True):
    """What other ways to choose would have been worth for a tenant, by ladder."""

    object: Literal["feedback.policies"] = "feedback.policies"
    models: dict[str, list[PolicyFeedback]]


class ErasedFeedback(Struct, frozen=True, kw_only=True):
    """`erased`: how many choices and rewards are gone."""

    object: Literal["feedback.erased"] = "feedback.erased"
    erased: int


class CorrectedSample(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A line of the export: a prompt, and the answer that would have been right. A recipe of `stretto
    optimise` can train on it."""

    messages: list[dict[str, str]] = []
    prompt: str | None = None
    answer: str
    task: str = ""


def ids_of(written: str) -> list[str]:
    """The request ids that an id may stand for: a request's own, or that of the answer to a chat."""
    found = [written]
    found += [written.removeprefix(prefix) for prefix in PREFIXES if written.startswith(prefix)]
    return found
