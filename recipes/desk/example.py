"""The parts of a task. The answer is the last line of a reply; the lines before it are working."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, Literal, TypeVar

Message = dict[str, Any]
Split = Literal["train", "held_out"]
LETTERS = tuple("ABCDEFGHKLMNPRSTUVWXZ")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Draft:
    """One question as a task writes it.

    `key` names the entities of the question (its numbers, orders, phrases) and nothing that its text does not
    show; the split is decided by it. An empty key means vocabulary, which is always in the training split.
    `notes` (records, rules) may be moved into the system prompt. `before` are earlier turns over the
    same notes. `said`: the reply in each of the three languages, where it has words; empty where it has none.
    `tools` and `turns` are those of a question that may be answered by a call: the tools that the request
    offers, and the messages after the question (a call and its result).
    """

    question: str
    reply: str
    key: str
    notes: str = ""
    before: tuple[tuple[str, str], ...] = ()
    said: tuple[str, ...] = ()
    tools: tuple[dict[str, Any], ...] = ()
    turns: tuple[Message, ...] = ()


@dataclass(frozen=True, slots=True)
class Example:
    """A finished prompt. `reply`: what an ideal assistant writes. `answer`: the last line of it, or all of it
    when it calls tools. `tools`: those of the request."""

    messages: tuple[Message, ...]
    reply: str
    answer: str
    task: str
    level: int
    key: str
    tools: tuple[dict[str, Any], ...] = ()


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
