"""What the engine's loop asks of a runner: it launches plans, and says later what they drew."""

from __future__ import annotations

from typing import Protocol

from stretto.engine.scheduler.types import Plan
from stretto.engine.sequence import Drawn
from stretto.types import ModelInfo


class Pending(Protocol):
    """A launched step."""

    def wait(self) -> list[Drawn]:
        """Wait for the step; one result for each row of the plan that draws or scores, in order."""
        ...


class Runner(Protocol):
    """Runs plans for one model. `depth` launched steps may be unfinished when the next is launched."""

    info: ModelInfo
    eos: frozenset[int]
    depth: int

    def launch(self, plan: Plan) -> Pending:
        """Start the plan's step. A step that fails raises here or in `wait`."""
        ...

    def erase(self, blocks: list[int]) -> None:
        """Zero the KV memory of these blocks, after all launched steps."""

    def prepare(self) -> bool: ...  # use a little spare time for later steps; whether there is more to do
