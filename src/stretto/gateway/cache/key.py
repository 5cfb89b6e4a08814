"""The keys of answers: HMACs of everything that shapes an answer. Equal keys mean equal answers. Pure.

The gateway has no tokenizer. It covers the request in a canonical form in place of the rendered ids: the
worker's revision covers tokenizer and chat template, so equal requests render to equal ids.
"""

from __future__ import annotations

import hmac
from collections.abc import Sequence
from typing import Any, NamedTuple

from msgspec import json

from stretto.gateway.cache.policy import JsonObject
from stretto.protocol.relay import OperationName
from stretto.types import ModelInfo

FORMAT = b"answer 1"  # changes with the form of what is kept
# These say how an answer is sent, or are repeated in it. Every other field shapes it.
TRANSPORT = frozenset({"stream", "stream_options", "metadata"})
LARGEST = 2.0**53  # floats below have a fraction, or are whole numbers of a client
encode = json.Encoder(order="deterministic").encode


class Source(NamedTuple):
    """Who answers: the model's name, and the revisions under which the workers have it."""

    operation: OperationName
    tenant: str
    model: str
    revisions: tuple[str, ...]


class KeyMaker:
    """Makes keys with a secret, so that nobody who reads a key can tell or guess the request."""

    def __init__(self, secret: bytes) -> None:
        self._secret = secret

    def digest(self, *parts: bytes) -> bytes:
        """32 bytes that depend on each part and on where it ends."""
        sized = [len(part).to_bytes(8, "little") + part for part in parts]
        return hmac.digest(self._secret, b"".join(sized), "sha256")

    def answer(self, source: Source, body: JsonObject) -> bytes:
        """The key of the answer to a request."""
        shaping = {name: value for name, value in body.items() if name not in TRANSPORT}
        return self._of(b"exact", source, shaping)

    def flight(self, source: Source, body: JsonObject) -> bytes:
        """The key of a request whose bytes on the wire may be shared: the answer's, and how it is sent."""
        return self._of(b"flight", source, body)

    def conversation(self, source: Source, rest: JsonObject) -> bytes:
        """The key of all requests that differ only in the text of their question; `rest` is without it."""
        shaping = {name: value for name, value in rest.items() if name not in TRANSPORT}
        return self._of(b"conversation", source, shaping)

    def subject(self, tenant: str, subject: str) -> bytes:
        """The key of whom an answer is about."""
        return self.digest(FORMAT, b"subject", tenant.encode(), subject.encode("utf-8", "surrogatepass"))

    def tenant(self, tenant: str) -> bytes:
        """The key of a tenant."""
        return self.digest(FORMAT, b"tenant", tenant.encode("utf-8", "surrogatepass"))

    def _of(self, kind: bytes, source: Source, body: JsonObject) -> bytes:
        given = {name: _number(value) for name, value in body.items() if value is not None}
        given["model"] = source.model
        head = encode([source.operation, source.tenant, source.revisions])
        return self.digest(FORMAT, kind, head, encode(given))


def revision_of(info: ModelInfo) -> str:
    """What of a worker's model shapes its answers: weights, tokenizer, template, and how it computes."""
    return " ".join((info.revision, info.dtype, str(info.quantise), info.kernels, str(info.context)))


def revisions(infos: Sequence[str]) -> tuple[str, ...]:
    """The different revisions, in order. Any of them may answer a request."""
    return tuple(sorted(set(infos)))


def _number(value: Any) -> Any:
    """1.0 and 1 mean the same option."""
    whole = isinstance(value, float) and value.is_integer() and abs(value) < LARGEST
    return int(value) if whole else value
