"""A sequence: one request while the engine holds it, and what a step draws for it.

Owned and written by the engine's loop alone; the schedule, the sampler and the runners only read it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from secrets import randbits
from typing import TYPE_CHECKING

from stretto.types import Logprobs, Request

if TYPE_CHECKING:
    from stretto.engine.grammar import Matcher


@dataclass(frozen=True, slots=True)
class Drawn:
    """What a step drew for one sequence: a token, or for an embedding request the vector in its place.
    `token < 0` without one: the logits were not numbers."""

    token: int
    logprobs: Logprobs | None = None
    embedding: tuple[float, ...] | None = None


@dataclass(slots=True, eq=False)
class Sequence:
    """The tokens of a request, and how far the model has read them.

    `computed` counts the tokens whose keys and values are in the pool or in a launched step; `in_flight`
    counts tokens being drawn by launched steps, so not in `tokens` yet. It never grows beyond `limit`
    tokens. `slot` is its row in the runner's tables.
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
    started: float | None = None
    preemptions: int = 0
    ended: bool = False
    grammar: Matcher | None = None

    @classmethod
    def of(cls, request: Request, context: int) -> Sequence:
        """A sequence that has not run yet. Its limit is `max_tokens` within a context of `context` tokens."""
        seed, wanted = request.sampling.seed, request.sampling.max_tokens
        prompt_len = len(request.prompt)
        return cls(
            request=request,
            seed=randbits(63) if seed is None else seed,
            tokens=list(request.prompt),
            prompt_len=prompt_len,
            limit=context if wanted is None else min(context, prompt_len + wanted),
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
        return self.length - self.computed
