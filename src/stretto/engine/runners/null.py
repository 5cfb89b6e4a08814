"""The null model: the same loop without a network. It costs what its cost model says and draws fixed tokens.

In virtual time it makes every scheduler test exact and instant; behind the real server it shows what
everything but the model costs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from stretto.engine.scheduler.types import Plan
from stretto.engine.sequence import Drawn, Sequence, follow
from stretto.engine.speculative.policy import Speculation
from stretto.engine.step_time import StepCost, StepLoad
from stretto.types import Logprobs, ModelInfo

FREE = StepCost()


class VirtualClock:
    """Time that moves only when told to. Called, it says the second; `sleep` moves it."""

    def __init__(self, now: float = 0.0) -> None:
        self._now = now

    def __call__(self) -> float:
        return self._now

    def sleep(self, seconds: float) -> None:
        self._now += seconds


@dataclass(frozen=True, slots=True)
class NullPending:
    drawn: list[Drawn]

    def wait(self) -> list[Drawn]:
        return self.drawn


class NullRunner:
    """A runner whose tokens depend on the sequence's seed and index alone, so any batching gives the same
    text.

    Tokens lie in `first` to `first + span`: keep special tokens out of that range. It never draws an EOS.
    """

    def __init__(
        self,
        info: ModelInfo,
        *,
        cost: StepCost = FREE,
        sleep: Callable[[float], None],
        first: int = 0,
        span: int = 0,
    ) -> None:
        self.info = info
        self.eos: frozenset[int] = frozenset()
        self.depth = 0
        self.speculation: Speculation | None = None
        self.cost = cost
        self._sleep = sleep
        self._first = first
        self._span = span or info.vocab - first

    def erase(self, blocks: list[int]) -> None:
        """There is no memory to erase."""

    def _takes(self, load: StepLoad) -> float:
        """Milliseconds of a step."""
        return self.cost(load)

    def launch(self, plan: Plan) -> NullPending:
        milliseconds = self._takes(plan.load)
        if milliseconds > 0:
            self._sleep(milliseconds / 1e3)
        return NullPending([follow(row.draft, partial(self._draw, row.seq)) for row in plan.rows if row.draw])

    def _draw(self, seq: Sequence, ahead: int) -> Drawn:
        token = self._first + (seq.seed * 31 + (seq.length + ahead) * 7) % self._span
        logprobs = None if seq.request.sampling.logprobs is None else Logprobs(0.0, ((token, 0.0),))
        return Drawn(token, logprobs, (1.0,) if seq.request.task == "embed" else None)


def null_info(
    *, name: str = "null", context: int = 8192, vocab: int = 4096, blocks: int = 65536
) -> ModelInfo:
    """What the null model says of itself."""
    return ModelInfo(
        name=name,
        path="null",
        family="null",
        dtype="none",
        device="none",
        context=context,
        vocab=vocab,
        parameters=0,
        weight_bytes=0,
        kv_bytes=0,
        block_size=16,
        blocks=blocks,
        load_s=0.0,
    )
