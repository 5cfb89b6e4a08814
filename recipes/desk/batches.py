"""Training batches that worker processes make while the model trains. Documents are packed end to end.

A batch is one int32 array of fixed size, so it crosses to the device in one copy: tokens [N], positions [N],
starts [D + 1] of the documents, rows [M] whose next token is learnt, labels [M], spans [M]: how many tokens
the reply of that row has. No torch here.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.queues import Queue
from random import Random

import numpy as np
from tokenizers import Tokenizer

from recipes.desk.tasks import LEVELS, draw
from recipes.desk.tokenizer import ASSISTANT_ID, CONTEXT, PAD_ID, SYSTEM_ID, conversation, encode

Array = np.ndarray[tuple[int, ...], np.dtype[np.int32]]
TASK_WEIGHTS = {
    "lookup": 3.0,
    "total": 1.4,
    "refund": 1.0,
    "delivery": 1.3,
    "convert": 1.6,
    "urgency": 0.6,
    "extract": 1.0,
    "translate": 1.3,
    "chat": 1.0,
    "tools": 1.4,
}
LEVEL_WEIGHTS = (0.2, 0.16, 0.14, 0.14, 0.18, 0.18)
IGNORED = -100


@dataclass(frozen=True, slots=True)
class Shape:
    """The fixed array sizes of a batch of `tokens` tokens."""

    tokens: int

    @property
    def documents(self) -> int:
        return self.tokens // 80

    @property
    def rows(self) -> int:
        return self.tokens * 3 // 8

    @property
    def sizes(self) -> tuple[int, ...]:
        return self.tokens, self.tokens, self.documents + 1, self.rows, self.rows, self.rows


def answered(tokens: Array) -> np.ndarray[tuple[int, ...], np.dtype[np.bool_]]:
    """For each token, whether an assistant wrote it. The end of its turn counts too."""
    place = np.arange(len(tokens))
    roles = (tokens >= SYSTEM_ID) & (tokens <= ASSISTANT_ID)
    last = np.maximum.accumulate(np.where(roles, place, 0))
    return (tokens[last] == ASSISTANT_ID) & ~roles


class Packer:
    """Collects documents until the next one would not fit."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        self.documents: list[Array] = []
        self.used = 0
        self.learnt = 0

    def add(self, document: Array, learnt: int) -> Array | None:
        """Add a document. Returns the finished batch if the document did not fit into it."""
        full = (
            self.used + len(document) > self.shape.tokens
            or self.learnt + learnt > self.shape.rows
            or len(self.documents) + 1 >= self.shape.documents
        )
        batch = self.finish() if full else None
        self.documents.append(document)
        self.used += len(document)
        self.learnt += learnt
        return batch

    def finish(self) -> Array:
        shape = self.shape
        lengths = [len(document) for document in self.documents]
        rest = shape.tokens - self.used
        tokens = np.concatenate([*self.documents, np.full(rest, PAD_ID, np.int32)])
        # Padding is cut into documents of its own, so that none is longer than the context.
        while rest > 0:
            lengths.append(min(rest, CONTEXT))
            rest -= lengths[-1]
        starts = np.full(shape.documents + 1, shape.tokens, np.int32)
        starts[0] = 0
        np.cumsum(lengths, out=starts[1 : len(lengths) + 1])
        positions = np.arange(shape.tokens, dtype=np.int32) - np.repeat(starts[: len(lengths)], lengths)
        mask = answered(tokens[: self.used])
        chosen = np.flatnonzero(mask[1:]).astype(np.int32)
        rows = np.zeros(shape.rows, np.int32)
        labels = np.full(shape.rows, IGNORED, np.int32)
        rows[: len(chosen)] = chosen
        labels[: len(chosen)] = tokens[chosen + 1]
        reply = np.cumsum(tokens == ASSISTANT_ID)[chosen + 1]
        spans = np.ones(shape.rows, np.int32)
        spans[: len(chosen)] = np.bincount(reply)[reply]
        self.documents, self.used, self.learnt = [], 0, 0
        return np.concatenate([tokens, positions, starts, rows, labels, spans]).astype(np.int32)


def produce(
    tokenizer_json: str, shape: Shape, seed: str, shares: Sequence[float], queue: Queue[Array]
) -> None:
    """The loop of a worker: batches of the training split without end, decided by the seed."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tokenizer = Tokenizer.from_str(tokenizer_json)
    rng = Random(seed)
    names, weights = tuple(TASK_WEIGHTS), tuple(TASK_WEIGHTS.values())
    packer = Packer(shape)
    while True:
        tasks = rng.choices(names, weights, k=256)
        levels = rng.choices(LEVELS, shares, k=256)
        texts = [
            conversation(draw("train", task, level, rng)) for task, level in zip(tasks, levels, strict=True)
        ]
        for ids in encode(tokenizer, texts):
            document = np.array(ids, np.int32)
            if (
                len(document) <= CONTEXT
                and (batch := packer.add(document, int(answered(document).sum()))) is not None
            ):
                queue.put(batch)


class Feed:
    """Takes batches from the workers in turn, so that their order depends on the seed alone."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        shape: Shape,
        seed: int,
        workers: int,
        shares: Sequence[float] = LEVEL_WEIGHTS,
    ) -> None:
        context = multiprocessing.get_context("fork")
        self.queues: list[Queue[Array]] = [context.Queue(48) for _ in range(workers)]
        self.turn = 0
        source = tokenizer.to_str()
        for number, queue in enumerate(self.queues):
            name = f"train {seed} {number} of {workers}"
            context.Process(target=produce, args=(source, shape, name, shares, queue), daemon=True).start()

    def next(self) -> Array:
        queue = self.queues[self.turn]
        self.turn = (self.turn + 1) % len(self.queues)
        return queue.get()
