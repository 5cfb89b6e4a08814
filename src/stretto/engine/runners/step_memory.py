"""The memory of a step of the CUDA runner: what the host sends, in pinned memory, and what it becomes.

It knows neither which steps there are nor what runs in them.
"""

# torch's stubs do not type `from_numpy`.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stretto.engine.runners.graphs import StepSize
from stretto.kernels import Batch
from stretto.kernels.cuda import step_inputs

UPDATES = 4096  # blocks that a step may add to the tables from pinned memory; more take a copy of their own
# One row of a step's input, as `kernels.cuda.step_inputs` reads it.
INPUT_ROW = np.dtype(
    [
        *(
            (name, np.int32)
            for name in ("slot", "position", "token", "block", "top_k", "sink", "count", "first")
        ),
        *((name, np.float32) for name in ("temperature", "top_p", "min_p", "fraction")),
        *((name, np.float32) for name in ("repetition", "frequency", "presence")),
        ("ahead", np.int32),
    ]
)
assert INPUT_ROW.itemsize == 4 * step_inputs.ORDER


@dataclass(slots=True)
class StepMemory:
    """The memory on the device of steps of one size, and their graph once it is captured.

    `words`, int32: a row of `INPUT_ROW` for each row of the step, and for steps with prompts one more that
    pads, and the tokens. `outputs`: int64, the last token of each of these rows. `replayed`: the tokens that
    a replay draws.
    """

    size: StepSize
    words: Tensor
    batch: Batch
    outputs: Tensor
    replayed: Tensor | None = None
    graph: torch.cuda.CUDAGraph | None = None

    @classmethod
    def of(cls, size: StepSize, device: torch.device, context: int, columns: int) -> StepMemory:
        """Memory without a graph. `context`: the most tokens of a sequence; `columns`: its most blocks."""

        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        rows = input_rows(size)
        outputs = zeros(rows)
        starts = torch.arange(rows + 1, dtype=torch.int32, device=device)
        starts[rows] = size.tokens
        batch = Batch(
            tokens=zeros(size.tokens),
            positions=zeros(size.tokens),
            slots=zeros(size.tokens),
            query_starts=starts,
            contexts=zeros(rows, dtype=torch.int32),
            tables=zeros(rows, columns, dtype=torch.int32),
            outputs=None if size.decodes else outputs[: size.rows],
            query_lens=[1] * size.rows if size.decodes else [],
            context_lens=[context] * size.rows if size.decodes else [],
            written=zeros(rows, dtype=torch.int32) if size.decodes else None,
        )
        words = rows * step_inputs.ORDER + (0 if size.decodes else size.tokens)
        return cls(size, zeros(words, dtype=torch.int32), batch, outputs)

    @property
    def inputs(self) -> Tensor:
        return self.words[: input_rows(self.size) * step_inputs.ORDER].view(-1, step_inputs.ORDER)

    @property
    def ids(self) -> Tensor:
        return self.words[input_rows(self.size) * step_inputs.ORDER :]


class PinnedMemory:
    """Pinned memory of one step, which the device copies from and to while the host goes on."""

    def __init__(self, rows: int, tokens: int) -> None:
        self._pin = torch.cuda.is_available()
        self.words: NDArray[np.int32] = self._zeros((rows + 1) * step_inputs.ORDER + tokens).numpy()
        self.tokens = torch.zeros(rows, dtype=torch.int64, pin_memory=self._pin)
        self.arrived = torch.cuda.Event()
        self._updates = self._zeros(UPDATES * 3).view(-1, 3)

    def parts(self, size: StepSize) -> tuple[NDArray[np.void], NDArray[np.int32]]:
        """`INPUT_ROW`s and tokens of a step, as views of `words`."""
        until = input_rows(size) * step_inputs.ORDER
        return self.words[:until].view(INPUT_ROW), self.words[until : until + size.tokens]

    def updates(self, updates: list[tuple[int, int, int]], device: torch.device) -> Tensor:
        """The updates as int32 [N, 3], where the device can read them."""
        array = np.array(updates, dtype=np.int32)
        if len(array) > UPDATES:
            return send(array, device)
        self._updates.numpy()[: len(array)] = array
        return self._updates[: len(array)]

    def _zeros(self, count: int) -> Tensor:
        return torch.zeros(count, dtype=torch.int32, pin_memory=self._pin)


def input_rows(size: StepSize) -> int:
    """The rows of a step's input: one more than its own where tokens may have to be padded."""
    return size.rows + (not size.decodes)


def send(array: NDArray[Any], device: torch.device) -> Tensor:
    """The array on the device. The host does not wait for the copy."""
    held = torch.from_numpy(array)
    return held.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else held.clone()
