"""Embeddings: texts in, one vector each out. A long list goes to the engine a few at a time."""

from __future__ import annotations

import base64
import math
from array import array
from sys import byteorder

from msgspec import json
from starlette.types import Send

from stretto.errors import EngineError, InvalidRequest, Unavailable
from stretto.protocol.openai import Embedding, EmbeddingList, EmbeddingRequest, EmbeddingUsage
from stretto.server import asgi
from stretto.server.objectives import of_embedding
from stretto.server.state import Front, Run
from stretto.server.validation import salt_of, split
from stretto.text.output import Output
from stretto.text.prompts import encode_prompts
from stretto.types import Request, Sampling

WINDOW = 16


async def embed(
    front: Front, run: Run, request: EmbeddingRequest, size: int, caller: tuple[str, float], send: Send
) -> None:
    """Answers the request. `caller` is (tenant, arrival)."""
    name, text = front.model(request.model)
    front.ensure_open()
    info = front.engine.models.get(name)
    if info is None:
        raise Unavailable(f"model {name} is not loaded yet", retry_after=2.0)
    inputs = split(request.input, "$.input")
    prompts = await front.off_loop(size, encode_prompts, text, inputs, info, "$.input")
    tenant, arrival = caller
    salt = salt_of(request.user, request.cache_salt)
    vectors: list[tuple[float, ...]] = []
    for start in range(0, len(prompts), WINDOW):
        part = prompts[start : start + WINDOW]
        front.ensure_open(len(part))
        choices = run.open(
            _choice(
                front,
                Request(
                    id=front.engine.next_id(),
                    model=name,
                    prompt=prompt,
                    arrival=arrival,
                    sampling=Sampling(max_tokens=1),
                    task="embed",
                    tenant=tenant,
                    salt=salt,
                    objective=of_embedding(request.objective),
                ),
            )
            for prompt in part
        )
        vectors += [await _vector(run, choice) for choice in choices]
    await _answer(send, request, name, vectors, sum(map(len, prompts)))


def _choice(front: Front, request: Request) -> Output:
    return Output(request, front.engine.submit(request), front.texts[request.model].detokenizer())


async def _vector(run: Run, choice: Output) -> tuple[float, ...]:
    vector: tuple[float, ...] | None = None
    async for events in choice.stream:
        if choice.times.first is None:
            run.heard(choice)
        for event in events:
            vector = event.embedding or vector
        choice.push([event for event in events if event.finish is not None])
        if choice.finish_reason is not None:
            break
    if vector is None:
        raise EngineError("the engine ended the sequence without an embedding")
    return vector


async def _answer(
    send: Send, request: EmbeddingRequest, model: str, vectors: list[tuple[float, ...]], tokens: int
) -> None:
    size = len(vectors[0])
    if request.dimensions is not None and request.dimensions > size:
        where = "$.dimensions"
        raise InvalidRequest(f"{where}: this model's embeddings have {size}", param=where)
    data: list[Embedding] = []
    for index, vector in enumerate(vectors):
        if request.dimensions is not None:
            vector = _shortened(vector, request.dimensions)
        packed = _base64(vector) if request.encoding_format == "base64" else list(vector)
        data.append(Embedding(index=index, embedding=packed))
    body = EmbeddingList(data=data, model=model, usage=EmbeddingUsage(tokens, tokens))
    await asgi.answer(send, json.encode(body))


def _shortened(vector: tuple[float, ...], dimensions: int) -> tuple[float, ...]:
    """The first dimensions, scaled to length one again, as OpenAI does."""
    head = vector[:dimensions]
    norm = math.sqrt(sum(value * value for value in head))
    return tuple(value / norm for value in head) if norm else head


def _base64(vector: tuple[float, ...]) -> str:
    floats = array("f", vector)
    if byteorder == "big":
        floats.byteswap()
    return base64.b64encode(floats.tobytes()).decode()
