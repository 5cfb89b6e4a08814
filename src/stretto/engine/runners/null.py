"""The null model: the real loop without a network. Steps take what a cost model says, and tokens are fixed.

In virtual time it makes every scheduler test exact and instant. Behind the real server it shows what all but
the model costs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import inf, nan

from msgspec.structs import replace

from stretto.engine.scheduler.types import Plan, Row
from stretto.engine.sequence import NOTHING, Drawn, Sequence, follow
from stretto.engine.step_time import StepCost, StepLoad
from stretto.errors import StartError
from stretto.types import Logprobs, ModelInfo

FREE = StepCost()


def null_cost(path: str) -> StepCost:
    """What the steps of the null model at this path take: `null[:STEP[:DECODE[:PROMPT]]]`, in milliseconds.

    `null:38:1.5:2.9`: a step takes 38 ms, 1.5 ms more for each token that it decodes, and 2.9 ms more for
    each token of a prompt that it reads. What is left out is 0. Raises StartError for anything else.
    """
    _, *numbers = path.split(":")
    try:
        cost = tuple(map(float, numbers))
    except ValueError:
        cost = (nan,)
    if len(cost) > 3 or not all(0 <= ms < inf for ms in cost):
        raise StartError(
            f"{path!r} is no null model: write null, null:20 for steps of 20 ms, or null:38:1.5:2.9 for 38 ms"
            " and 1.5 ms for each token that a step decodes and 2.9 ms for each token of a prompt"
        )
    return StepCost(*cost)


class VirtualClock:
    """A clock that moves only when told to. Calling it gives the time in seconds; `sleep` advances it."""

    def __init__(self, now: float = 0.0) -> None:
        self._now = now

    def __call__(self) -> float:
        return self._now

    def sleep(self, seconds: float) -> None:
        self._now += seconds


@dataclass(frozen=True, slots=True)
class Finished:
    """A launched step that is complete already, as on the CPU, where a launch runs the step."""

    drawn: list[Drawn]

    def wait(self) -> list[Drawn]:
        return self.drawn


class NullRunner:
    """A runner without a model. `cost` says what a step takes, and `sleep` spends that time.

    A token depends only on the sequence's seed and the token's index, so batching does not change the text.
    Tokens are between `first` and `first + span` (0: the rest of the vocabulary), which should exclude
    special tokens. EOS is never drawn.
    """

    def __init__(
        self,
        info: ModelInfo,
        *,
        cost: StepCost = FREE,
        sleep: Callable[[float], None],
        first: int = 0,
        span: int = 0,
        depth: int = 0,
    ) -> None:
        self.info = info
        self.eos: frozenset[int] = frozenset()
        self.depth = depth
        self.cost = cost
        self._sleep = sleep
        self._first = first
        self._span = span or info.vocab - first

    def erase(self, blocks: list[int]) -> None:
        """Do nothing: there is no KV memory."""

    def prepare(self) -> bool:
        """Nothing: there are no kernels."""
        return False

    def step_ms(self, load: StepLoad) -> float:
        """The milliseconds of a step."""
        return self.cost(load)

    def launch(self, plan: Plan) -> Finished:
        milliseconds = self.step_ms(plan.load)
        if milliseconds > 0:
            self._sleep(milliseconds / 1e3)
        return Finished([self._result(row) for row in plan.rows if row.draw or row.scored])

    def _result(self, row: Row) -> Drawn:
        if row.draw and not row.draft and not row.scored:
            return self.draw(row.seq, 0)
        drawn = follow(row.draft, partial(self.draw, row.seq)) if row.draw else NOTHING
        return replace(drawn, scores=(Logprobs(0.0, rank=1),) * row.scored) if row.scored else drawn

    def draw(self, seq: Sequence, ahead: int) -> Drawn:
        """What comes after the sequence's tokens and `ahead` accepted draft tokens."""
        token = self._first + (seq.seed * 31 + (seq.length + ahead) * 7) % self._span
        logprobs = None if seq.request.sampling.logprobs is None else Logprobs(0.0, ((token, 0.0),))
        return Drawn(token, logprobs, (1.0,) if seq.request.task == "embed" else None)


def null_info(
    *, name: str = "null", context: int = 8192, vocab: int = 4096, blocks: int = 65536
) -> ModelInfo:
    """The description of a null model."""
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
