"""Readers of server-sent events."""

from __future__ import annotations

import json
from typing import Any


def events(body: str) -> list[Any]:
    """The decoded JSON of each event. The last event must be [DONE], which is left out."""
    *chunks, done = [part.removeprefix("data: ") for part in body.split("\n\n") if part]
    assert done == "[DONE]"
    return [json.loads(chunk) for chunk in chunks]


def text_of(chunks: list[Any], index: int = 0) -> str:
    """The text of one choice of chat or plain completion chunks."""
    choices = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]
    return "".join(choice.get("text") or choice.get("delta", {}).get("content", "") for choice in choices)
