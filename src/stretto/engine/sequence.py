"""A sequence: one request while the engine holds it, and what a step draws for it.

Owned and written by the engine's loop alone; the schedule, the sampler and the runners only read it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from math import inf
from secrets import randbits
from typing import TYPE_CHECKING

from stretto.types import Logprobs, Request

if TYPE_CHECKING:
    from stretto.engine.speculative.ngram import NgramIndex
    from stretto.engine.structured.grammar import Matcher


@dataclass(frozen=True, slots=True)
class Drawn:
    """What a step drew for one sequence: a token, or for an embedding request the vector in its place.
    `token < 0` without one: the logits were not numbers. `then`: what followed it, each guess before being
    right."""

    token: int
    logprobs: Logprobs | None = None
    embedding: tuple[float, ...] | None = None
    then: tuple[Drawn, ...] = ()


def follow(draft: tuple[int, ...], draw: Callable[[int], Drawn]) -> Drawn:
    """Draw a token, and one more after each guess of `draft` that was right: `draw(n)` with n guesses
    accepted. Every token is the model's own draw at its own place, so guesses change none of them."""
    drawn = [draw(0)]
    while len(drawn) <= len(draft) and drawn[-1].token == draft[len(drawn) - 1]:
        drawn.append(draw(len(drawn)))
    return replace(drawn[0], then=tuple(drawn[1:])) if len(drawn) > 1 else drawn[0]


Rank = tuple[int, float, float, int]
UNPLACED, TIMED, SPARE = 0, 1, 2


@dataclass(slots=True, eq=False)
class Sequence:
    """The tokens of a request, how far the model has read them, and when the next one is due.

    `computed` counts the tokens whose keys and values are in the pool or in a launched step; `in_flight`
    counts tokens being drawn by launched steps, so not in `tokens` yet. It never grows beyond `limit`
    tokens. `slot` is its row in the runner's tables; `drafted` counts the tokens that a draft model has read.
    `trail` is what guesses at its next tokens go by.

    Times are seconds of the clock; inf is never. `due`: when its next token must be out; `last_due`: when
    the whole must; `gap`: the longest pause between two tokens; `spoke`: when the last one was out;
    `latest`: when the next must be out for due and gap; `late`: one was not out when it was due. `rank`
    orders the queues: by arrival (UNPLACED) until a schedule places it among those with a due (TIMED, by
    weight and due) or those that take what time is left (SPARE).
    """

    request: Request
    seed: int
    tokens: list[int]
    prompt_len: int
    limit: int
    computed: int = 0
    in_flight: int = 0
    cached: int = 0
    blocks: list[int] = field(default_factory=list[int])
    keys: list[bytes] = field(default_factory=list[bytes])
    published: int = 0
    slot: int = -1
    tabled: int = 0
    drafted: int = 0
    started: float | None = None
    preemptions: int = 0
    ended: bool = False
    grammar: Matcher | None = None
    trail: NgramIndex | None = None
    rank: Rank = (UNPLACED, 0.0, 0.0, 0)
    due: float = inf
    last_due: float = inf
    gap: float = inf
    spoke: float = inf
    latest: float = inf
    late: bool = False

    @classmethod
    def of(cls, request: Request, context: int) -> Sequence:
        """A sequence that has not run yet. Its limit is `max_tokens` within a context of `context` tokens."""
        seed, wanted = request.sampling.seed, request.sampling.max_tokens
        prompt_len = len(request.prompt)
        arrival, objective = request.arrival, request.objective
        return cls(
            request=request,
            seed=randbits(63) if seed is None else seed,
            tokens=list(request.prompt),
            prompt_len=prompt_len,
            limit=context if wanted is None else min(context, prompt_len + wanted),
            rank=(UNPLACED, 0.0, arrival, request.id),
            due=arrival + _seconds(objective.ttft_ms),
            last_due=arrival + _seconds(objective.total_ms),
            latest=arrival + _seconds(objective.ttft_ms),
            gap=_seconds(objective.itl_ms),
        )

    @property
    def output_len(self) -> int:
        return len(self.tokens) - self.prompt_len

    @property
    def length(self) -> int:
        """Tokens it has, those being drawn included."""
        return len(self.tokens) + self.in_flight

    @property
    def remaining(self) -> int:
        """Tokens the model must still read before it can say the next one; none while that is being drawn and
        nothing can follow it before it is known."""
        if self.in_flight and (self.length >= self.limit or self.grammar is not None):
            return 0
        return len(self.tokens) + self.in_flight - self.computed

    def speak(self, now: float) -> None:
        """A token is out. Token k is due k gaps after the first one was, however early that came; where no
        first was due, k gaps after it came. A due time never moves."""
        self.late = self.late or now > self.due or now > self.last_due
        itl = _seconds(self.request.objective.itl_ms)
        self.due = (now if self.due == inf else self.due) + itl
        self.spoke = now
        self.latest = min(self.due, now + self.gap)


def _seconds(milliseconds: float | None) -> float:
    return inf if milliseconds is None else milliseconds / 1e3
