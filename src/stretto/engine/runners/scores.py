"""Scores the tokens of a prompt: how likely the model thinks each of them after the tokens before it."""

# torch's stubs do not type `tolist`.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate, pairwise

import torch
from msgspec.structs import replace
from torch import Tensor

from stretto.engine.scheduler.types import Row
from stretto.engine.sequence import NOTHING, Drawn
from stretto.types import Logprobs

SLICE = 64  # positions whose logits are in memory at once: 39 MB with 152,000 tokens


def scored_rows(
    hidden: Tensor,
    rows: list[Row],
    logits: Callable[[Tensor], Tensor],
    draw: Callable[[Tensor, list[Row]], list[Drawn]],
) -> list[Drawn]:
    """One result for each row that draws or scores, in order.

    hidden: [outputs, hidden], for each such row first the positions that it scores, then those after which it
    draws. logits: hidden states [R, hidden] -> float32 [R, vocab]. draw: the results of the rows that draw,
    from their hidden states.
    """
    rows = [row for row in rows if row.has_result]
    sizes = [row.scored + (1 + len(row.draft) if row.draw else 0) for row in rows]
    drawn_from = [
        at
        for row, end in zip(rows, accumulate(sizes), strict=True)
        if row.draw
        for at in range(end - 1 - len(row.draft), end)
    ]
    drawing = [row for row in rows if row.draw]
    drawn = iter(draw(hidden[torch.tensor(drawn_from, device=hidden.device)], drawing) if drawing else [])
    results: list[Drawn] = []
    for row, (first, _) in zip(rows, pairwise(accumulate(sizes, initial=0)), strict=True):
        result = next(drawn) if row.draw else NOTHING
        if row.scored:
            result = replace(result, scores=score(row, hidden[first : first + row.scored], logits))
        results.append(result)
    return results


def score(row: Row, hidden: Tensor, logits: Callable[[Tensor], Tensor]) -> tuple[Logprobs, ...]:
    """The log-probability of the token after each position that the row scores, its rank, and the likeliest
    tokens there. hidden: [scored, hidden]. Empty if a logit is NaN or +inf."""
    following = [row.seq.tokens[position + 1] for position in row.positions_scored]
    count = row.seq.request.sampling.prompt_logprobs or 0
    found: list[Logprobs] = []
    for first in range(0, len(following), SLICE):
        chunk = logits(hidden[first : first + SLICE])
        wanted = torch.tensor(following[first : first + SLICE], device=chunk.device).unsqueeze(1)
        own = chunk.gather(1, wanted)
        total = chunk.logsumexp(1, keepdim=True)
        likely = chunk.topk(count, dim=1)
        ranks: list[int] = (chunk >= own).sum(1).tolist()
        chosen: list[float] = (own - total).squeeze(1).tolist()
        if not bool(torch.isfinite(total).all()):
            return ()
        tops: list[list[float]] = (likely.values - total).tolist()
        ids: list[list[int]] = likely.indices.tolist()
        for each, rank, top, tokens in zip(chosen, ranks, tops, ids, strict=True):
            pairs = tuple(pair for pair in zip(tokens, top, strict=True) if pair[1] > -torch.inf)
            found.append(Logprobs(each, pairs, rank))
    return tuple(found)
