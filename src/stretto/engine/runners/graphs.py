"""Which sizes of step a GPU has a graph for, and which of them serves a step.

Pure numbers: it knows no tensor and no sequence.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

MOST_TOKENS = 2560
"""Longer steps are launched kernel by kernel: their work takes several times as long as the launches."""
# Few sizes are captured at start, the others when nobody waits. A step is padded to the next size.
FIRST_DECODES = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384)
DECODES = (*range(1, 33), *range(40, 129, 8), *range(144, 257, 16), *range(288, 1025, 32))
FIRST_TOKENS = (32, 64, 128, 192, 256, 320, 384, 512, 576, 640, 768, 1024, 1280, 1536, 1792, 2048, 2304, 2560)
TOKENS = (16, 96, 160, 224, 448, 704, 832, 896, 960, 1152, 1408, 1664, 1920)
# Of a step with prompts, or as many as there may be.
FIRST_ROWS = (16, 64, 256)
ROWS = (128,)
LONE_ROWS = 16  # of a step of one sequence, whose draft tokens are rows of their own


class StepSize(NamedTuple):
    """A step of `tokens` tokens in `rows` rows: one for each sequence, and one for each draft token.
    `decodes`: each row has one token."""

    tokens: int
    rows: int
    decodes: bool

    def holds(self, other: StepSize) -> bool:
        """Whether a step of the other size can be padded to this one."""
        return self.decodes == other.decodes and self.tokens >= other.tokens and self.rows >= other.rows


def decode_size(rows: int) -> StepSize:
    """A step in which each of `rows` rows has one token."""
    return StepSize(rows, rows, True)


def rows_for(max_running: int) -> int:
    """The most rows of a step. Draft tokens are as many as fit beside the sequences."""
    return max(max_running, LONE_ROWS)


def first_sizes(most_rows: int, most_tokens: int) -> list[StepSize]:
    """The sizes that are ready before the first request: any step has one that holds it."""
    return _sizes(FIRST_DECODES, FIRST_TOKENS, FIRST_ROWS, most_rows, min(most_tokens, MOST_TOKENS))


def later_sizes(most_rows: int, most_tokens: int) -> list[StepSize]:
    """The sizes between those, which waste less on padding."""
    most = min(most_tokens, MOST_TOKENS)
    known = {*first_sizes(most_rows, most_tokens)}
    tokens, rows = FIRST_TOKENS + TOKENS, FIRST_ROWS + ROWS
    return [size for size in _sizes(DECODES, tokens, rows, most_rows, most) if size not in known]


def nearest(sizes: Iterable[StepSize], step: StepSize) -> StepSize | None:
    """The smallest of these sizes that holds a step; None: none does."""
    return min((size for size in sizes if size.holds(step)), default=None)


def _sizes(
    decodes: tuple[int, ...],
    tokens: tuple[int, ...],
    rows: tuple[int, ...],
    most_rows: int,
    most_tokens: int,
) -> list[StepSize]:
    """The largest come first, because the graphs after them then share their memory."""
    batches = {*(batch for batch in decodes if batch < most_rows), most_rows}
    lengths = {*(count for count in tokens if count < most_tokens), most_tokens}
    mixed = {
        StepSize(count, min(most, most_rows, count), False)
        for count in lengths
        for most in (*rows, most_rows)
    }
    return sorted(mixed | {decode_size(batch) for batch in batches}, reverse=True)
