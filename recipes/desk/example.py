"""The parts of a task. The answer is the last line of a reply; the lines before it are working."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Literal, TypeVar

Message = dict[str, str]
Split = Literal["train", "held_out"]
LETTERS = tuple("ABCDEFGHKLMNPRSTUVWXZ")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Draft:
    """One question as a task writes it.

    `key` names the entities of the question (its numbers, orders, phrases) and nothing that its text does not
    show; the split is decided by it. An empty key means vocabulary, which is always in the training split.
    `notes` (records, rules) may be moved into the system prompt. `before` are earlier turns over the
    same notes.
    """

    question: str
    reply: str
    key: str
    notes: str = ""
    before: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Example:
    """A finished prompt. `reply`: what an ideal assistant writes. `answer`: the last line of it."""

    messages: tuple[Message, ...]
    reply: str
    answer: str
    task: str
    level: int
    key: str


def pick(rng: Random, rows: Sequence[T]) -> T:
    """`rng.choice`, at a third of its cost."""
    return rows[int(rng.random() * len(rows))]


def between(rng: Random, low: int, high: int) -> int:
    """A whole number from low to high, both included."""
    return low + int(rng.random() * (high - low + 1))


def money(cents: int) -> str:
    """`1250` -> `12.50`."""
    return f"{cents // 100}.{cents % 100:02d}"


def order_id(rng: Random) -> str:
    """Usually like `A-1042`, sometimes in another shop's style. The last two characters are digits."""
    kind = rng.random()
    if kind < 0.8:
        return f"{pick(rng, LETTERS)}-{between(rng, 1000, 9999)}"
    if kind < 0.86:
        return f"#{between(rng, 10000, 99999)}"
    if kind < 0.92:
        return f"{pick(rng, LETTERS)}{pick(rng, LETTERS)}-{between(rng, 100, 999)}"
    if kind < 0.96:
        return f"{pick(rng, LETTERS)}-{between(rng, 10, 99)}"
    return str(between(rng, 100000, 999999))
