"""vLLM's `/v1/score` and `/v1/rerank`: how near texts are to each other. Jina and Cohere have the latter too.

A score is the cosine of the angle between the embeddings of two texts, from -1 to 1. So it is as good as the
model's embeddings are.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from operator import mul

from msgspec import json
from starlette.responses import Response

from stretto.errors import InvalidRequest
from stretto.protocol.openai import EmbeddingRequest, EmbeddingUsage
from stretto.protocol.parsing import JSON, parse
from stretto.protocol.vllm import (
    RankedDocument,
    RankedText,
    Ranking,
    RerankDocument,
    RerankRequest,
    Score,
    ScoreRequest,
    Scores,
)
from stretto.server.embeddings import embedded
from stretto.server.state import Call

SCORE = json.Decoder(ScoreRequest)
RERANK = json.Decoder(RerankRequest)
Vector = tuple[float, ...]


async def score(call: Call) -> None:
    """Answers with the score of each pair of texts. Raises StrettoError."""
    request = parse(SCORE, call.body)
    left = [request.text_1] if isinstance(request.text_1, str) else request.text_1
    right = [request.text_2] if isinstance(request.text_2, str) else request.text_2
    if len(left) != len(right) and 1 not in (len(left), len(right)):
        path = "$.text_2"
        raise InvalidRequest(
            f"{path} has {len(right)} texts and $.text_1 has {len(left)}; send as many, or one of either",
            param=path,
        )
    model, first, used = await _embed(call, request, left, "$.text_1")
    _, second, more = await _embed(call, request, right, "$.text_2")
    pairs = max(len(left), len(right))
    scores = await asyncio.to_thread(_cosines, _repeated(first, pairs), _repeated(second, pairs))
    answer = Scores(
        id=f"score-{call.exchange.id}",
        created=int(time.time()),
        model=model,
        data=[Score(index=at, score=value) for at, value in enumerate(scores)],
        usage=EmbeddingUsage(used + more, used + more),
    )
    await call.respond(Response(json.encode(answer), media_type=JSON))


async def rerank(call: Call) -> None:
    """Answers with the documents in the order of their nearness to the query. Raises StrettoError."""
    request = parse(RERANK, call.body, history=frozenset((RerankDocument,)))
    texts = [each if isinstance(each, str) else each.text for each in request.documents]
    model, query, used = await _embed(call, request, [request.query], "$.query")
    _, documents, more = await _embed(call, request, texts, "$.documents")
    scores = await asyncio.to_thread(_cosines, _repeated(query, len(texts)), documents)
    order = sorted(range(len(texts)), key=lambda at: -scores[at])[: request.top_n]
    shown = request.return_documents is not False
    answer = Ranking(
        id=f"rerank-{call.exchange.id}",
        model=model,
        results=[
            RankedDocument(
                index=at, relevance_score=scores[at], document=RankedText(texts[at]) if shown else None
            )
            for at in order
        ],
        usage=EmbeddingUsage(used + more, used + more),
    )
    await call.respond(Response(json.encode(answer), media_type=JSON))


async def _embed(
    call: Call, request: ScoreRequest | RerankRequest, texts: list[str], path: str
) -> tuple[str, list[Vector], int]:
    """The model's name, the embedding of each text, and the number of tokens that were read."""
    return await embedded(
        call,
        EmbeddingRequest(
            input=list(texts),
            model=request.model,
            user=request.user,
            cache_salt=request.cache_salt,
            objective=request.objective,
        ),
        path=path,
    )


def _repeated(vectors: list[Vector], count: int) -> list[Vector]:
    return vectors * count if len(vectors) == 1 else vectors


def _cosines(left: Sequence[Vector], right: Sequence[Vector]) -> list[float]:
    """Of vectors of length 1."""
    return [sum(map(mul, a, b)) for a, b in zip(left, right, strict=True)]
