"""What is to be counted of a request that ended: from its choices and how it ended. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from http import HTTPStatus
from math import inf

from stretto.errors import CannotBeOnTime, StrettoError
from stretto.server.state import Run
from stretto.telemetry.metrics import Ended, Verdict
from stretto.text.output import Output

OK, GONE = "ok", "client_gone"


def account(run: Run, endpoint: str, error: StrettoError | None, seconds: float) -> Ended:
    """`error`: what the request ended in, if in one; `seconds` since it arrived."""
    choices = run.choices
    began = [choice.began for choice in choices if choice.began is not None]
    slack = min((choice.times.slack for choice in choices), default=inf)
    return Ended(
        endpoint=endpoint,
        outcome=GONE if run.gone else OK if error is None else error.code,
        seconds=seconds,
        verdict=_verdict(run, error),
        tier=run.tier,
        model=run.model,
        prompt_tokens=sum(choice.prompt_tokens for choice in choices if choice.prompt_counts),
        output_tokens=sum(choice.tokens for choice in choices),
        cached_tokens=sum(start.cached_tokens for start in began),
        queued=max((start.queue_ms / 1e3 for start in began), default=None),
        forecast=max(
            (start.forecast_ms / 1e3 for start in began if start.forecast_ms is not None), default=None
        ),
        first=min((choice.times.ttft for choice in choices if choice.times.ttft is not None), default=None),
        slack=None if slack == inf else slack,
        gaps=_gaps(choices),
    )


def _verdict(run: Run, error: StrettoError | None) -> Verdict | None:
    """None for a request that could not have been answered by any server."""
    turned_away = error is not None and error.status == HTTPStatus.SERVICE_UNAVAILABLE and not run.choices
    if turned_away or isinstance(error, CannotBeOnTime):
        return "refused"
    if any(choice.times.late for choice in run.choices):
        return "late"
    if run.gone:
        return "cancelled"
    if error is None:
        return "on_time"
    return "failed" if error.status >= HTTPStatus.INTERNAL_SERVER_ERROR else None


def _gaps(choices: Sequence[Output]) -> Sequence[float]:
    if len(choices) == 1:
        return choices[0].times.gaps
    return [gap for choice in choices for gap in choice.times.gaps]
