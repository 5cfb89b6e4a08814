"""Embeddings: one vector for each text. The engine gets the texts of a long list a few at a time."""

from __future__ import annotations

import base64
import math
import struct
from functools import partial
from typing import NamedTuple

from msgspec import json, structs
from starlette.responses import Response

from stretto.errors import CannotBeOnTime, EngineError, InvalidRequest
from stretto.protocol.openai import Embedding, EmbeddingList, EmbeddingRequest, EmbeddingUsage
from stretto.protocol.parsing import JSON, parse
from stretto.server.admission_gate import Slot
from stretto.server.objectives import DEFAULT, embedding_objective
from stretto.server.state import Call
from stretto.server.validation import ModelHandle, split_inputs
from stretto.text.output import Output
from stretto.text.prompts import encode_prompts
from stretto.types import INT32_MAX, Request, Sampling, cache_salt

DECODER = json.Decoder(EmbeddingRequest)
WINDOW = 16


class Embedded(NamedTuple):
    """The vectors of some texts, and the number of their tokens."""

    model: str
    vectors: list[tuple[float, ...]]
    tokens: int


async def embed(call: Call) -> None:
    """Answers one request for embeddings. Raises StrettoError."""
    request = parse(DECODER, call.body)
    model, vectors, tokens = await embedded(call, request)
    data = [Embedding(index=at, embedding=_packed(request, each)) for at, each in enumerate(vectors)]
    answer = EmbeddingList(data=data, model=model, usage=EmbeddingUsage(tokens, tokens))
    await call.respond(Response(json.encode(answer), media_type=JSON))


async def embedded(
    call: Call, request: EmbeddingRequest, *, cut: bool = False, path: str = "$.input"
) -> Embedded:
    """Computes the embeddings of a request. Raises StrettoError. `cut`: a text that is too long loses its
    end, and is no error. `path`: the field with the texts, for errors."""
    server = call.server
    call.label(request.model, DEFAULT)
    model = server.model(request.model)
    inputs = split_inputs(request.input, path)
    with server.gate.reserve(min(len(inputs), WINDOW)) as slot:
        info = structs.replace(model.info, context=INT32_MAX) if cut else model.info
        special = request.add_special_tokens is not False
        encode = partial(encode_prompts, model.text, inputs, info, path, special=special)
        prompts = [ids[: model.info.context] for ids in await server.run_text(call, encode)]
        vectors: list[tuple[float, ...]] = []
        for start in range(0, len(prompts), WINDOW):
            outputs = [submit(call, request, model, ids) for ids in prompts[start : start + WINDOW]]
            # Each window uses the same reserved slots, so only the last one releases them.
            last = start + WINDOW >= len(prompts)
            vectors += [await _vector(output, slot if last else None) for output in outputs]
    if request.dimensions is not None:
        vectors = [_shortened(vector, request.dimensions) for vector in vectors]
    return Embedded(model.name, vectors, sum(map(len, prompts)))


def submit(call: Call, request: EmbeddingRequest, model: ModelHandle, ids: tuple[int, ...]) -> Output:
    """Sends one text to the engine; the call owns its output."""
    sequence = Request(
        id=call.server.engine.next_id(),
        model=model.info.name,  # of a ladder always the top: each variant has a vector space of its own
        prompt=ids,
        arrival=call.arrival,
        sampling=Sampling(max_tokens=1),
        task="embed",
        tenant=call.tenant,
        salt=cache_salt(request.user, request.cache_salt),
        objective=embedding_objective(request.objective),
        request_id=call.exchange.id,
    )
    output = Output(sequence, call.server.engine.submit(sequence), model.text.detokenizer())
    call.outputs.append(output)
    return output


async def _vector(output: Output, slot: Slot | None) -> tuple[float, ...]:
    vector: tuple[float, ...] | None = None
    async for events in output.stream:
        if output.times.first is None and slot is not None:
            slot.first_token()
        for event in events:
            vector = event.embedding or vector
        output.push([event for event in events if event.finish is not None])
        if output.finish_reason is not None:
            break
    if vector is None and output.finish_reason == "deadline":
        raise CannotBeOnTime(
            "the embeddings were not ready within $.objective.total_ms; allow more time, or send fewer texts",
            param="$.objective.total_ms",
            retry_after=1.0,
        )
    if vector is None:
        raise EngineError("the engine ended the sequence without an embedding")
    return vector


def _packed(request: EmbeddingRequest, vector: tuple[float, ...]) -> list[float] | str:
    if request.encoding_format == "base64":
        return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
    return list(vector)


def _shortened(vector: tuple[float, ...], dimensions: int) -> tuple[float, ...]:
    """The first dimensions, scaled to length 1 again, as OpenAI does."""
    if dimensions > len(vector):
        path = "$.dimensions"
        raise InvalidRequest(f"{path} is {dimensions}; this model's vectors have {len(vector)}", param=path)
    head = vector[:dimensions]
    norm = math.sqrt(sum(value * value for value in head))
    return tuple(value / norm for value in head) if norm else head
