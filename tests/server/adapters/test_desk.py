"""The bundled model gives one answer, whichever API asks."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from msgspec import json

HI: list[dict[str, Any]] = [{"role": "user", "content": "What is 22.53 + 32.62?"}]


@pytest.mark.slow
def test_the_apis_give_one_answer(desk_url: str) -> None:
    with httpx.Client(base_url=desk_url, timeout=60) as client:
        chat = client.post("/v1/chat/completions", json={"messages": HI, "temperature": 0}).json()
        content = chat["choices"][0]["message"]["content"]
        assert content
        asked = {"messages": HI, "max_tokens": 100, "temperature": 0}
        message = client.post("/v1/messages", json=asked).json()
        assert [block["text"] for block in message["content"]] == [content]
        assert message["usage"]["output_tokens"] == chat["usage"]["completion_tokens"]
        count = client.post("/v1/messages/count_tokens", json={"messages": HI}).json()
        assert count["input_tokens"] == chat["usage"]["prompt_tokens"]
        options = {"temperature": 0}
        streamed = client.post("/api/chat", json={"messages": HI, "options": options}).text.splitlines()
        assert "".join(json.decode(line)["message"]["content"] for line in streamed) == content
        asked = {"prompt": HI[0]["content"], "options": options, "stream": False}
        assert client.post("/api/generate", json=asked).json()["response"] == content
        (vector,) = client.post("/api/embed", json={"input": "Hi"}).json()["embeddings"]
        assert sum(value * value for value in vector) == pytest.approx(1.0, abs=1e-3)
