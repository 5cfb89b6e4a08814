"""Writes the desk's tasks as the data of a recipe for `stretto optimise`: train, validation and test.

python -m recipes.desk.samples build/desk-samples
The test split is held out by what its questions are about, as everywhere in this folder.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from random import Random
from typing import Any

from recipes.desk.batches import LEVEL_WEIGHTS, TASK_WEIGHTS
from recipes.desk.example import Example
from recipes.desk.questions.tools import OPENER
from recipes.desk.tasks import LEVELS, TASKS, draw, held_out, prompt_text
from recipes.desk.tokenizer import flat

VALIDATION_SEED, TEST_SEED = 1, 0


def line(example: Example) -> dict[str, Any]:
    """One line of the data. Tools and calls are texts, as the chat template writes them."""
    called = example.answer.startswith(OPENER)
    return {
        "messages": flat(example.messages, example.tools),
        "answer": example.answer,
        "match": "json" if example.task == "extract" else "exact" if called else "last_line",
        "reply": example.reply,
        "task": example.task,
        "level": example.level,
    }


def train(count: int, seed: int) -> list[Example]:
    """`count` different prompts of the training split, in the mixture that the model was trained on."""
    rng = Random(f"samples {seed}")
    found: dict[str, Example] = {}
    while len(found) < count:
        (task,) = rng.choices(tuple(TASK_WEIGHTS), tuple(TASK_WEIGHTS.values()))
        (level,) = rng.choices(LEVELS, LEVEL_WEIGHTS)
        example = draw("train", task, level, rng)
        found.setdefault(prompt_text(example), example)
    return list(found.values())


def cells(count: int, seed: int, without: Iterable[str] = ()) -> list[Example]:
    """`count` held-out prompts of each task and level, in turn, so that any beginning of them is balanced."""
    taken = set(without)
    held = [held_out(task, level, count, seed) for task in TASKS for level in LEVELS]
    turns = [cell[number] for number in range(count) for cell in held]
    return [example for example in turns if prompt_text(example) not in taken]


def write(folder: Path, counts: tuple[int, int, int], seed: int = 0) -> None:
    """The three files. `counts`: prompts to train on, then per task and level to validate and to test."""
    folder.mkdir(parents=True, exist_ok=True)
    test = cells(counts[2], TEST_SEED)
    validation = cells(counts[1], VALIDATION_SEED, map(prompt_text, test))
    for name, examples in (("train", train(counts[0], seed)), ("validation", validation), ("test", test)):
        text = "".join(json.dumps(line(example), ensure_ascii=False) + "\n" for example in examples)
        (folder / f"{name}.jsonl").write_text(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--train", type=int, default=20_000, help="prompts to train on")
    parser.add_argument("--validation", type=int, default=8, help="prompts per task and level")
    parser.add_argument("--test", type=int, default=25, help="prompts per task and level")
    options = parser.parse_args()
    write(options.folder, (options.train, options.validation, options.test))


if __name__ == "__main__":
    main()
