"""A minimal driver of a decoder. It builds batches by hand, so that a test controls what each step holds."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor

from stretto.kernels import Batch
from stretto.models.decoder import Decoder


@dataclass
class Text:
    """A sequence: its tokens, the number of them in the cache, and its blocks."""

    tokens: list[int]
    blocks: list[int] = field(default_factory=list[int])
    done: int = 0


class Driver:
    """A decoder with a cache whose blocks are allocated in a scattered order."""

    def __init__(self, decoder: Decoder, *, blocks: int = 64, block_size: int = 4) -> None:
        self.decoder = decoder
        self.size = block_size
        self.cache = decoder.new_cache(blocks, block_size)
        self.free = torch.randperm(blocks, generator=torch.Generator().manual_seed(7)).tolist()

    def text(self, tokens: list[int], *, shared: Text | None = None, reuse: int = 0) -> Text:
        """A new sequence. Its first `reuse` tokens, in whole blocks, share the blocks of `shared`."""
        blocks = shared.blocks[: reuse // self.size] if shared else []
        return Text(list(tokens), list(blocks), reuse)

    def batch(self, work: list[tuple[Text, int]], outputs: list[int] | None = None) -> Batch:
        """The batch that processes the next `count` tokens of each text.

        `outputs` are the rows to compute logits for. The default is the last row of each text."""
        tokens: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        counts = [count for _, count in work]
        contexts: list[int] = []
        for text, count in work:
            end = text.done + count
            while len(text.blocks) * self.size < end:
                text.blocks.append(self.free.pop())
            tokens += text.tokens[text.done : end]
            for position in range(text.done, end):
                positions.append(position)
                slots.append(text.blocks[position // self.size] * self.size + position % self.size)
            text.done = end
            contexts.append(end)
        width = max(len(text.blocks) for text, _ in work)
        tables = [text.blocks + [0] * (width - len(text.blocks)) for text, _ in work]
        starts = [0, *accumulate(counts)]
        return Batch(
            tokens=torch.tensor(tokens),
            positions=torch.tensor(positions),
            slots=torch.tensor(slots),
            query_starts=torch.tensor(starts, dtype=torch.int32),
            contexts=torch.tensor(contexts, dtype=torch.int32),
            tables=torch.tensor(tables, dtype=torch.int32),
            outputs=torch.tensor(
                [end - 1 for end in starts[1:]] if outputs is None else outputs, dtype=torch.int64
            ),
            query_lens=counts,
            context_lens=contexts,
        )

    def step(self, work: list[tuple[Text, int]], outputs: list[int] | None = None) -> Tensor:
        """Run one step and return its logits: [R, vocab]."""
        hidden = self.decoder.forward(self.batch(work, outputs), self.cache)
        return self.decoder.logits(hidden)

    def read(self, tokens: list[int], chunk: int) -> Tensor:
        """The logits after every token, prefilled `chunk` tokens at a time: [len(tokens), vocab]."""
        text, rows = self.text(tokens), []
        while text.done < len(tokens):
            count = min(chunk, len(tokens) - text.done)
            rows.append(self.step([(text, count)], list(range(count))))
        return torch.cat(rows)

    def greedy(self, texts: list[Text], count: int, chunk: int = 1000) -> list[list[int]]:
        """Continue all texts together by `count` greedy tokens.

        Prompts are prefilled `chunk` tokens at a time while other texts decode."""
        goals = [len(text.tokens) + count for text in texts]
        while any(len(t.tokens) < goal for t, goal in zip(texts, goals, strict=True)):
            live = [text for text, goal in zip(texts, goals, strict=True) if len(text.tokens) < goal]
            logits = self.step([(text, min(chunk, len(text.tokens) - text.done)) for text in live])
            for text, row in zip(live, logits, strict=True):
                if text.done == len(text.tokens):
                    text.tokens.append(int(row.argmax()))
        return [text.tokens[-count:] for text in texts]
