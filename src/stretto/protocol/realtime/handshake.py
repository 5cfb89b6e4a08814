"""The handshake of `/v1/realtime`, which worker and gateway read alike, and what a gateway adds to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated
from urllib.parse import parse_qs, urlencode

import msgspec
from msgspec import Meta, Struct

from stretto.errors import InvalidRequest, UnsupportedField

PATH = "/v1/realtime"
PROTOCOL = "realtime"
KEY_PROTOCOL = "openai-insecure-api-key."  # a browser cannot send headers, so the key comes as a protocol
OLDER_PROTOCOL, OLDER_HEADER = "openai-beta.realtime-v1", "realtime=v1"
BETA_HEADER = "openai-beta"
SESSION_ENDPOINT = "realtime_session"  # what metrics and access log call a socket
NORMAL, GOING_AWAY, POLICY, BAD_GATEWAY = 1000, 1001, 1008, 1014  # close codes
AUDIO_ONLY = ("call_id", "intent")


class RelayedSession(Struct, frozen=True, kw_only=True):
    """The query with which a gateway opens a socket at a worker's RELAY path.

    `age_ms`: how long an event has been on its way when it reaches the worker, with the way back of its
    answer. Deadlines count from the gateway.
    """

    tenant: Annotated[str, Meta(max_length=256)]
    model: Annotated[str, Meta(max_length=1024)]
    site: Annotated[str, Meta(max_length=256)] = ""
    age_ms: Annotated[float, Meta(ge=0, le=600_000)] = 0.0

    @property
    def query(self) -> str:
        """As the text after `?`."""
        return urlencode(msgspec.structs.asdict(self))

    @classmethod
    def of(cls, query: str) -> RelayedSession:
        """Reads what `query` wrote. Raises InvalidRequest."""
        given = {name: values[-1] for name, values in parse_qs(query, keep_blank_values=True).items()}
        try:
            return msgspec.convert(given, cls, strict=False)
        except msgspec.ValidationError as error:
            raise InvalidRequest(f"the query of a relayed session is wrong: {error}") from None


def model_of(query: str) -> str | None:
    """The model that a client's query names. Raises UnsupportedField for a session of another kind."""
    given = parse_qs(query)
    for name in AUDIO_ONLY:
        if name in given:
            raise UnsupportedField(f"{name}: this server has no audio; leave it out", param=name)
    return given["model"][-1] if "model" in given else None


def key_of(protocols: Sequence[str]) -> str | None:
    """The API key that a browser sends as a protocol."""
    given = (each.removeprefix(KEY_PROTOCOL) for each in protocols if each.startswith(KEY_PROTOCOL))
    return next(given, None)


def chosen(protocols: Sequence[str]) -> str | None:
    """The protocol to speak: the usual one, or the first that is no key. A browser wants one of its own."""
    if PROTOCOL in protocols:
        return PROTOCOL
    return next((each for each in protocols if not each.startswith(KEY_PROTOCOL)), None)


def is_older(protocols: Sequence[str], headers: Mapping[str, str]) -> bool:
    """Whether the client knows the older names of events."""
    return OLDER_PROTOCOL in protocols or OLDER_HEADER in headers.get(BETA_HEADER, "")
