"""Stretto's own object in every answer: what was measured of it, and which variants gave it."""

from __future__ import annotations

from typing import Literal

from msgspec import UNSET, Struct, UnsetType

from stretto.types import VariantReason


class AnswerPart(Struct, frozen=True, kw_only=True):
    """The tokens that one variant wrote, one part after another, and why it was this variant."""

    variant: str
    tokens: int
    reason: VariantReason | None = None


class AnswerReport(Struct, frozen=True, kw_only=True):
    """Stretto's measurements of one answer, all in milliseconds or tokens. An unknown value is null.

    `variant`: which variant of the model answered; `variant_reason`: why this one. `parts`: of an answer that
    several variants wrote, of which `variant` was the last. `on_time`: every token met
    its deadline. `queue_ms`: from arrival to the sequence's first step, measured by the engine. The API
    server measures the other times. `schema_relaxed`: paths of the parts of a schema that could not be
    enforced. `cached`: a gateway had kept the answer, to this request (`exact`) or to one that asks the
    same (`semantic`). `site`: where the worker is that answered a gateway. `degraded`: why the gateway took
    one of lesser quality: the workers of the better variant did not answer (`unreachable`), or would have
    been late (`deadline`).
    """

    variant: str
    on_time: bool | None = None
    queue_ms: float | None = None
    ttft_ms: float | None = None
    itl_p99_ms: float | None = None
    cached_tokens: int | None = None
    energy_j: float | None = None
    energy_source: str | None = None
    schema_relaxed: list[str] | UnsetType = UNSET
    cached: Literal["exact", "semantic"] | UnsetType = UNSET
    variant_reason: VariantReason | UnsetType = UNSET
    parts: list[AnswerPart] | UnsetType = UNSET
    site: str | UnsetType = UNSET
    degraded: Literal["unreachable", "deadline"] | UnsetType = UNSET
