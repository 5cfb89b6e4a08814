"""Chunk templates, the fast path of streaming, give the same bytes as the plain encoder."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from stretto.protocol.openai import Delta, FunctionDelta, StreamOptions, ToolCallDelta
from stretto.server.responses import (
    CHAT,
    TEXT,
    ChunkPart,
    ChunkTemplate,
    ResponseHead,
    ResponseWriter,
    Style,
    event_of,
)
from stretto.server.validation import AnswerSpec, ModelHandle
from stretto.text.output import Output
from stretto.text.tokenizer import TextModel
from stretto.types import Request, Sampling, TokenEvent
from tests.server.fake_engine import FakeEngine, FakeStream, info

# A model name may look like the place of the delta in a chunk.
HEAD = ResponseHead("chatcmpl-1", 1_700_000_000, '"delta":{}, "text":""', "default")
DELTAS = st.builds(Delta, content=st.text()) | st.builds(Delta, role=st.just("assistant"), content=st.text())
CALL = ToolCallDelta(index=0, id="call-1", type="function", function=FunctionDelta(name="now", arguments="{"))


@pytest.mark.parametrize("style", [CHAT, TEXT], ids=["chat", "text"])
@given(delta=DELTAS, index=st.integers(0, 9))
def test_a_chunk_template_makes_the_same_bytes_as_the_encoder(style: Style, delta: Delta, index: int) -> None:
    template = ChunkTemplate(style.chunk(HEAD, ChunkPart(index)), style)
    plain = style.chunk(HEAD, ChunkPart(index, delta))
    assert template.events([(delta, None)]) == event_of(plain)
    assert template.events([(delta, None)] * 3) == event_of(plain) * 3


@pytest.mark.parametrize("delta", [Delta(), Delta(reasoning_content="hm"), Delta(tool_calls=[CALL])])
def test_a_chunk_template_encodes_reasoning_and_tool_calls(delta: Delta) -> None:
    template = ChunkTemplate(structs.replace(CHAT.chunk(HEAD, ChunkPart(0)), usage=None), CHAT)
    plain = structs.replace(CHAT.chunk(HEAD, ChunkPart(0, delta)), usage=None)
    assert template.events([(delta, None)]) == event_of(plain)


def writer(text: TextModel, style: Style, **options: bool) -> ResponseWriter:
    spec = AnswerSpec(
        model=ModelHandle("tiny", text, info(vocab=400)),
        encode=list,
        question=str,
        sampling=Sampling(),
        answers=1,
        salt="",
        metadata=None,
        stream=True,
        options=StreamOptions(**options),
        grammar_path="$.tools",
    )
    return ResponseWriter(style, spec, "default", "made-up-id")


def parsed(events: bytes) -> list[Any]:
    return [json.loads(part.removeprefix(b"data: ")) for part in events.split(b"\n\n") if part]


@pytest.mark.parametrize("style", [CHAT, TEXT], ids=["chat", "text"])
def test_a_response_writer_sends_the_same_chunks_with_and_without_a_template(
    style: Style, checkpoint: Path
) -> None:
    """With `continuous_usage_stats` each chunk has usage, so the writer cannot use its template."""
    text = TextModel(checkpoint)
    seen: list[list[Any]] = []
    for each_usage in (False, True):
        request = Request(id=1, model="tiny", prompt=(1, 2), arrival=time.monotonic())
        stream = FakeStream(FakeEngine(lambda request: [], {}), request, [])
        output = Output(request, stream, text.detokenizer())
        write = writer(text, style, continuous_usage_stats=each_usage)
        events = b"".join(write.events(output, output.push([TokenEvent(1, id)])) for id in (300, 301, 302))
        seen.append(
            [
                {k: v for k, v in chunk.items() if k not in ("usage", "id", "created")}
                for chunk in parsed(events)
            ]
        )
    assert seen[0] == seen[1]
    assert len(seen[0]) == 3
