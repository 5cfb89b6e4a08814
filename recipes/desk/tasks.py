"""The desk's tasks.

`make` writes a prompt with its answer, `check` judges a reply, `draw` keeps splits apart.

The split is a property of the question: a hash of the entities it is about (its key), so a held-out
combination of numbers, orders or phrases is never in the training split, in any wording. Earlier turns come
from the same split.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from random import Random
from zlib import crc32

from recipes.desk.example import Draft, Example, Message, Split, pick
from recipes.desk.questions.dates import delivery
from recipes.desk.questions.language import translate, urgency
from recipes.desk.questions.orders import extract, lookup
from recipes.desk.questions.sums import convert, refund, total
from recipes.desk.questions.talk import IN_LANGUAGE, NOTED, chat
from recipes.desk.questions.tools import CLOSER, OPENER, tools

TASKS: dict[str, Callable[[int, Random], Draft]] = {
    "lookup": lookup,
    "total": total,
    "refund": refund,
    "delivery": delivery,
    "convert": convert,
    "urgency": urgency,
    "extract": extract,
    "translate": translate,
    "chat": chat,
    "tools": tools,
}
LEVELS = (1, 2, 3, 4, 5, 6)
SHORT_FORMS = (("hat is ", "hat's "), ("Who is ", "Who's "), ("I am ", "I'm "), ("how is ", "how's "))
CALLS = re.compile(f"{OPENER}(.*?){CLOSER}", re.DOTALL)
HELD_OUT_SHARE = 10  # one key in ten
SYSTEMS = (
    "You are desk, a support assistant.",
    "You are a helpful assistant.",
    "You are the support desk of an online shop. Answer briefly.",
    "You are desk. Answer exactly and shortly.",
    "Answer the question of the customer.",
    "You work at a support desk. Be short and exact.",
    "You are a helpful and honest assistant.",
)


def split_of(key: str) -> Split:
    """The split of a key. The empty key (vocabulary) is always in the training split."""
    return "held_out" if key and crc32(key.encode()) % HELD_OUT_SHARE == 0 else "train"


def make(task: str, level: int, rng: Random) -> Example:
    """Make a prompt of `task` at `level`, in either split. Raises KeyError for an unknown task."""
    if level not in LEVELS:
        raise ValueError(f"level must be {LEVELS[0]} to {LEVELS[-1]}, not {level}")
    draft = TASKS[task](level, rng)
    system, question, before = _place_notes(rng, draft)
    reply = draft.reply
    if rng.random() < (0.3 if draft.said else 0.06):
        language = int(rng.random() * len(IN_LANGUAGE))
        wanted = pick(rng, IN_LANGUAGE[language])
        system = f"{system}\n{wanted}" if rng.random() < 0.5 and system else f"{wanted}\n{system}".strip()
        reply = draft.said[language] if draft.said else reply
        before = [(asked, NOTED[language] if said == NOTED[0] else said) for asked, said in before]
    question = _manner(rng, question, greet=task != "chat" and not before)
    messages: list[Message] = [{"role": "system", "content": system}] if system else []
    for asked, replied in before:
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": replied}]
    messages += [{"role": "user", "content": question}, *draft.turns]
    answer = reply if reply.startswith(OPENER) else reply.rsplit("\n", 1)[-1]
    return Example(tuple(messages), reply, answer, task, level, draft.key, draft.tools)


def _place_notes(rng: Random, draft: Draft) -> tuple[str, str, list[tuple[str, str]]]:
    """Put records and rules into the system prompt, before the first question or after it."""
    system = pick(rng, SYSTEMS) if rng.random() < 0.35 else ""
    before = list(draft.before)
    if not draft.notes:
        return system, draft.question, before
    first = before[0][0] if before else draft.question
    kind = rng.random()
    if kind < 0.2:
        system = f"{system}\n\n{draft.notes}" if system else draft.notes
    elif kind < 0.75:
        first = f"{draft.notes}\n\n{first}"
    else:
        first = f"{first}\n\n{draft.notes}"
    if before:
        before[0] = (first, before[0][1])
        return system, draft.question, before
    return system, first, before


def _manner(rng: Random, question: str, greet: bool) -> str:
    """Add the short forms and greetings that people write."""
    if rng.random() < 0.15:
        for long, short in SHORT_FORMS:
            question = question.replace(long, short)
    if greet and rng.random() < 0.08:
        return pick(rng, ("Hi! ", "Hello, ", "Hi desk, ", "Hello. ", "Hey, ", "Good morning. ")) + question
    return question


def draw(split: Split, task: str, level: int, rng: Random) -> Example:
    """Draw a prompt of the given split. One in eight follows an unrelated exchange of the same split."""
    example = _of_split(split, task, level, rng)
    if rng.random() < 0.875 or example.messages[0]["role"] == "system" or example.tools:
        return example
    other = "chat" if rng.random() < 0.5 else pick(rng, tuple(TASKS))
    earlier = _of_split(split, other, 1, rng)
    if earlier.messages[0]["role"] == "system" or earlier.tools:
        return example
    turns = (*earlier.messages, {"role": "assistant", "content": earlier.reply}, *example.messages)
    return Example(turns, example.reply, example.answer, task, level, example.key)


def _of_split(split: Split, task: str, level: int, rng: Random) -> Example:
    while True:
        example = make(task, level, rng)
        if split_of(example.key) == split:
            return example


def held_out(task: str, level: int, count: int, seed: int = 0) -> list[Example]:
    """`count` different held-out prompts, the same on every machine."""
    rng = Random(f"held-out {seed} {task} {level}")
    found: dict[str, Example] = {}
    while len(found) < count:
        example = draw("held_out", task, level, rng)
        found.setdefault(prompt_text(example), example)
    return list(found.values())


def prompt_text(example: Example) -> str:
    """The prompt as one string. Two are equal exactly when their prompts are."""
    return json.dumps((example.messages, example.tools), ensure_ascii=False)


def check(example: Example, text: str) -> bool:
    """Whether the last line of `text` is the answer, up to white space, quotes and a final full stop.

    A JSON answer and the calls of tools are compared as JSON, so spacing and the order of keys do not matter.
    """
    if example.answer.startswith(OPENER):
        return _same_calls(text, example.answer)
    if example.task == "extract":
        try:
            return same_json(
                json.loads(text.strip().removeprefix("```json").strip("`\n ")), json.loads(example.answer)
            )
        except ValueError:
            return False
    lines = text.strip().splitlines()
    return bool(lines) and normalised(lines[-1]) == normalised(example.answer)


def _same_calls(left: str, right: str) -> bool:
    """Whether two replies make the same calls in the same order, and say nothing else."""
    if CALLS.sub("", left).strip():
        return False
    calls = [CALLS.findall(text) for text in (left, right)]
    try:
        return len(calls[0]) == len(calls[1]) and all(
            same_json(json.loads(a), json.loads(b)) for a, b in zip(*calls, strict=True)
        )
    except ValueError:
        return False


def same_json(left: object, right: object) -> bool:
    """Whether two JSON values are equal. `1`, `1.0` and `true` differ."""
    return json.dumps(left, sort_keys=True) == json.dumps(right, sort_keys=True)


def normalised(line: str) -> str:
    return " ".join(line.split()).strip("`\"'").rstrip(".").strip()
