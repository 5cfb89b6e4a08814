"""The access log: one JSON line for each HTTP request, without content, keys or text that a client made up.

The request id is the one exception: its characters and its length are limited (`http.exchange`).
"""

from __future__ import annotations

from msgspec import Struct


class Access(Struct, frozen=True, kw_only=True):
    """One request. None: there was no such thing, for example no model in a request for `/metrics`.

    `time`: the end of the response. `route`: the template, like `/v1/models/{name}`. `status`: 499 when the
    client left before a response. `outcome`: `ok`, `client_gone` or an error's code, which a stream may have
    after status 200. `bytes_in` and `bytes_out`: of the bodies. The other names are those that answers have.
    """

    time: str
    request_id: str
    tenant: str | None
    method: str
    route: str | None
    model: str | None
    tier: str | None
    variant: str | None
    status: int
    outcome: str
    finish_reason: str | None
    queue_ms: float | None
    ttft_ms: float | None
    itl_p99_ms: float | None
    total_ms: float
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    bytes_in: int
    bytes_out: int
