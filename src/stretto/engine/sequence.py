"""A sequence: one request while the engine holds it, and what a step draws for it.

`stretto.engine.core` alone assigns the fields of a sequence. Its KV state belongs to the block pool, its
deadline to `stretto.deadlines`; the scheduler, the sampler and the runners only read all three.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import isfinite
from secrets import randbits
from typing import TYPE_CHECKING, NamedTuple

from msgspec import Struct, structs

from stretto.deadlines import Deadline
from stretto.engine.kv_cache import KvState
from stretto.types import Began, Finish, Logprobs, Moved, MoveReason, Reason, Request

if TYPE_CHECKING:
    from stretto.engine.structured.grammar import Matcher


class Drawn(Struct, frozen=True, gc=False):
    """What a step drew for one sequence.

    `token` is negative for an embedding request, which has a vector (`embedding`) instead, and when the
    logits were not numbers. `then` holds the tokens drawn after accepted draft tokens. `scores`: one for each
    token of the prompt that its row scored; none if the logits were not numbers. `sureness`: the
    log-probability of the likeliest token, for a sequence with a cascade.
    """

    token: int
    logprobs: Logprobs | None = None
    embedding: tuple[float, ...] | None = None
    then: tuple[Drawn, ...] = ()
    scores: tuple[Logprobs, ...] = ()
    sureness: float = 0.0

    @property
    def finite(self) -> bool:
        """Whether it was drawn from numbers, and not from NaN or infinite ones."""
        return self.token >= 0 or (self.embedding is not None and isfinite(sum(self.embedding)))


NOTHING = Drawn(-1)  # of a row that draws nothing


def follow(draft: tuple[int, ...], draw: Callable[[int], Drawn]) -> Drawn:
    """Draw a token, and one more after each accepted token of `draft`.

    `draw(n)` draws the token after `n` accepted draft tokens. A draft token is accepted when it equals the
    token that was drawn at its position, so drafts never change an answer.
    """
    drawn = [draw(0)]
    while len(drawn) <= len(draft) and drawn[-1].token == draft[len(drawn) - 1]:
        drawn.append(draw(len(drawn)))
    return structs.replace(drawn[0], then=tuple(drawn[1:])) if len(drawn) > 1 else drawn[0]


@dataclass(frozen=True, slots=True)
class Ending:
    """How a sequence ends, and what goes with that."""

    reason: Reason
    stop_token: int | None = None
    error: str | None = None
    embedding: tuple[float, ...] | None = None
    retry_after: float | None = None


UNPLACED, TIMED, BEST_EFFORT, SPARE_TIME = 0, 1, 2, 3


class Rank(NamedTuple):
    """Orders the queues: newcomers by arrival (UNPLACED), then sequences with a deadline (TIMED) by weight
    and deadline, then those that take what time is left (BEST_EFFORT) by fair share, then those that no other
    request may wait for (SPARE_TIME) by arrival."""

    group: int
    negated_weight: float
    order: float  # the arrival, the deadline, or the virtual start time
    ident: int


@dataclass(slots=True, eq=False)
class Sequence:
    """A request's tokens, its place in the engine, and the states that others own: `kv` and `deadline`."""

    request: Request
    seed: int
    tokens: list[int]  # the prompt, then the output
    prompt_len: int
    limit: int  # it ends when it has so many tokens
    kv: KvState
    deadline: Deadline
    rank: Rank
    stops: frozenset[int]  # its `stop_token_ids`
    grammar: Matcher | None = None
    draws: bool = True  # whether it draws tokens, rather than only computing its prompt
    scores: list[Logprobs] | None = None  # of its prompt's tokens after the first; None: not wanted, or sent
    slot: int = -1  # its row in the runner's tables; -1 while it waits
    in_flight: int = 0  # tokens that launched steps are drawing, so not in `tokens` yet
    expected: int = 0  # tokens of the prompt that were expected in the prefix cache when it came
    cached: int = 0  # tokens of the prompt that the prefix cache held when it started
    started: float | None = None  # when its first step was planned
    preemptions: int = 0
    moves: int = 0  # from one model to another
    moved: Moved | None = None  # the last move, until its client is told
    ended: bool = False

    @classmethod
    def of(cls, request: Request, context: int, grammar: Matcher | None = None) -> Sequence:
        """A sequence that has not run yet, in a context of at most `context` tokens."""
        sampling, tokens = request.sampling, [*request.prompt, *request.emitted]
        prompt_len = len(request.prompt)
        wanted = context if sampling.max_tokens is None else prompt_len + sampling.max_tokens
        return cls(
            request=request,
            seed=randbits(63) if sampling.seed is None else sampling.seed,
            tokens=tokens,
            prompt_len=prompt_len,
            limit=min(context, wanted),
            kv=KvState(tokens, (request.tenant, request.salt)),
            deadline=Deadline.of(request.arrival, request.objective, len(request.emitted)),
            rank=Rank(SPARE_TIME if request.spare_time else UNPLACED, 0.0, request.arrival, request.id),
            stops=frozenset(sampling.stop_token_ids),
            grammar=grammar,
            draws=sampling.max_tokens != 0,
            scores=None if sampling.prompt_logprobs is None else [],
        )

    def moved_to(self, request: Request, context: int, why: MoveReason) -> Sequence:
        """The sequence for another model of this context, with the tokens that it has."""
        made = Sequence.of(request, context, self.grammar)
        tokens = list(self.tokens)
        return replace(
            made,
            tokens=tokens,
            kv=KvState(tokens, (request.tenant, request.salt)),
            seed=self.seed,
            limit=min(self.limit, context),
            deadline=self.deadline,
            scores=made.scores if self.scores is not None else None,
            started=self.started,
            cached=self.cached,
            preemptions=self.preemptions,
            moves=self.moves + 1,
            moved=Moved(request.model, self.output_len, why),
        )

    def unsure_of(self, drawn: Drawn) -> bool:
        """Whether its model is less sure of a token than its cascade asks for."""
        cascade = self.request.cascade
        return cascade is not None and drawn.token >= 0 and drawn.sureness < cascade.below

    @property
    def output_len(self) -> int:
        return len(self.tokens) - self.prompt_len

    @property
    def began(self) -> Began | None:
        """How it started, and its last move. The first token carries it, because a client that cancels gets
        no end; so does the first one after a move."""
        if self.started is None:
            return None
        scores = None if self.scores is None else tuple(self.scores)
        queued_ms = (self.started - self.request.arrival) * 1e3
        cached = min(self.cached, self.prompt_len)
        return Began(queued_ms, cached, prompt_logprobs=scores, moved=self.moved)

    def finish(self, ending: Ending, now: float) -> Finish:
        """What is reported of its end."""
        return Finish(
            reason=ending.reason,
            prompt_tokens=self.prompt_len,
            output_tokens=self.output_len,
            cached_tokens=min(self.cached, self.prompt_len),
            queue_ms=((now if self.started is None else self.started) - self.request.arrival) * 1e3,
            stop_token=ending.stop_token,
            error=ending.error,
            preemptions=self.preemptions,
            late=self.deadline.late or ending.reason in (Reason.DEADLINE, Reason.REFUSED),
            retry_after=ending.retry_after,
        )

    @property
    def grammar_ending(self) -> Ending | None:
        """The end of a sequence whose grammar needs more work than a step may take, else None."""
        error = None if self.grammar is None else self.grammar.error
        return None if error is None else Ending(Reason.INVALID, error=error)

    def draws_at(self, end: int) -> bool:
        """Whether a step that computes its tokens up to `end` draws the next one."""
        return end == self.length and self.draws

    def scored_at(self, start: int, end: int) -> int:
        """How many tokens of the prompt a step scores that computes the tokens from `start` to `end`: each
        position tells how likely the next token is."""
        if self.scores is None:
            return 0
        return max(min(end, self.prompt_len - 1) - max(start, len(self.scores)), 0)

    @property
    def done(self) -> int:
        """Tokens that are computed; of one that waits, those that it expects in the prefix cache."""
        return self.kv.computed if self.slot >= 0 else min(self.expected, self.prompt_len - 1)

    @property
    def length(self) -> int:
        """Tokens it has, with those that launched steps are drawing."""
        return len(self.tokens) + self.in_flight

    @property
    def remaining(self) -> int:
        """Tokens to compute before the next one can be drawn.

        0 while a token is being drawn after which none can be planned: the last one that the limit allows, or
        one that a grammar must see first.
        """
        if self.in_flight and (self.length >= self.limit or self.grammar is not None):
            return 0
        return len(self.tokens) + self.in_flight - self.kv.computed
