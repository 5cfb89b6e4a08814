"""The data of a recipe: prompts with answers that can be checked, or plain text.

Reads and checks every line. It knows no tokenizer and no tensor.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from stretto.errors import StartError
from stretto.ladder.estimate import prompt_text
from stretto.optimise.recipe import DataFiles

Match = Literal["exact", "last_line", "regex", "json"]
SHOWN = 5  # bad lines that an error names
TEXT_PIECE = 2000  # characters of a plain text that are read together
HELD_OUT = 10  # one prompt in so many is held out when the recipe names no file


class ChatTurn(Struct, frozen=True, forbid_unknown_fields=True):
    """One message of a prompt."""

    role: str
    content: str


class DataSample(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One line of the data: `prompt` or `messages` with an `answer`, or `text`.

    `match` says how a reply is compared with `answer`. `reply` is what an ideal assistant writes, to train
    on; default: the answer, unless that is a regex. `weight` multiplies the example's loss.
    """

    prompt: str | None = None
    messages: tuple[ChatTurn, ...] = ()
    answer: str | None = None
    match: Match = "exact"
    reply: str | None = None
    text: str | None = None
    task: str = "all"
    level: str | int = "all"
    weight: Annotated[float, Meta(ge=0)] = 1.0

    @property
    def ideal(self) -> str | None:
        """The reply to train on; None when only a rule for it is known."""
        return self.reply if self.reply is not None or self.match == "regex" else self.answer

    @property
    def last(self) -> str:
        """The text of the last message, or of the prompt."""
        return self.messages[-1].content if self.messages else self.prompt or self.text or ""

    @property
    def question(self) -> str:
        """The text that the quality of an answer is estimated from."""
        return prompt_text(self.last, (turn.content for turn in self.messages[:-1]))

    @property
    def key(self) -> str:
        """The prompt as one string. Equal prompts have equal keys."""
        turns = [(turn.role, turn.content) for turn in self.messages]
        return json.dumps([self.prompt, turns, self.text], ensure_ascii=False)


class BadLines(Struct, frozen=True):
    """Lines that are no samples: how many there are, and the first ones with their problems."""

    count: int = 0
    first: tuple[str, ...] = ()


class Corpus(Struct, frozen=True):
    """The three splits. No prompt is in two of them."""

    train: tuple[DataSample, ...]
    validation: tuple[DataSample, ...]
    test: tuple[DataSample, ...]
    bad: BadLines = BadLines()

    @property
    def graded(self) -> bool:
        """Whether the test split has answers. If not, KL and perplexity stand for quality."""
        return any(sample.answer is not None for sample in self.test)

    @property
    def digest(self) -> str:
        """A digest of everything that is in it."""
        return blake2b(
            msgspec.json.encode((self.train, self.validation, self.test)), digest_size=16
        ).hexdigest()


def read(files: DataFiles, folder: Path, *, skip_bad_lines: bool = False) -> Corpus:
    """The data of a recipe in `folder`.

    Raises StartError for a file that cannot be read, for bad lines unless they are skipped, for a prompt that
    is in two files, and for a split that is empty or mixes texts and prompts.
    """
    bad: list[str] = []
    named = {"train": files.train, "validation": files.validation, "test": files.test}
    splits = {
        name: list(_samples(folder / file, bad)) if file is not None else None for name, file in named.items()
    }
    counted = BadLines(len(bad), tuple(bad[:SHOWN]))
    if bad and not skip_bad_lines:
        raise StartError(
            f"{len(bad)} bad lines in the data: {'; '.join(counted.first)}"
            f"{'; ...' if len(bad) > SHOWN else ''}. Mend them, or leave them out with --skip-bad-lines"
        )
    train = splits["train"] or []
    for name, share in (("validation", 1), ("test", 2)):
        if splits[name] is None:
            splits[name] = [sample for sample in train if _place(sample) == share]
            train = [sample for sample in train if _place(sample) != share]
    splits["train"] = train
    for name, split in splits.items():
        _check_split(name, named[name] or files.train, split or [])
    _check_apart(splits)
    held = {name: tuple(split or ()) for name, split in splits.items()}
    return Corpus(held["train"], held["validation"], held["test"], counted)


class CorrectedAnswers(Struct, frozen=True):
    """Answers that users corrected, to train on. `held`: how many are left out, because a prompt to measure
    with asks the same."""

    samples: tuple[DataSample, ...]
    held: int

    @property
    def digest(self) -> str:
        """A digest of everything that is in it."""
        return blake2b(msgspec.json.encode(self.samples), digest_size=16).hexdigest()


def read_feedback(path: Path, corpus: Corpus) -> CorrectedAnswers:
    """The corrected answers in a file. Raises StartError for one that cannot be read, has bad lines, or holds
    nothing to train on."""
    bad: list[str] = []
    found = list(_samples(path, bad))
    bad += [f"{path.name}: a text is no corrected answer" for sample in found if sample.text is not None]
    if bad:
        raise StartError(
            f"{len(bad)} bad lines in the feedback: {'; '.join(bad[:SHOWN])}. Mend or remove them"
        )
    asked = {sample.last for sample in (*corpus.validation, *corpus.test)}
    samples = tuple(sample for sample in found if sample.last not in asked)
    if not samples:
        raise StartError(
            f"{path}: none of its {len(found)} lines can be trained on, as the data to measure with has the"
            " same prompts: wait for more feedback"
        )
    return CorrectedAnswers(samples, len(found) - len(samples))


def right(sample: DataSample, reply: str) -> bool:
    """Whether a reply is right.

    `exact`: equal up to white space at the ends and runs of it. `last_line`: the last lines of the reply,
    as many as the answer has, are equal to it in the same way. `regex`: the answer matches the whole reply.
    `json`: both are the same JSON value. Raises ValueError for a sample without an answer.
    """
    if sample.answer is None:
        raise ValueError("a text has no right answer")
    match sample.match:
        case "exact":
            return reply.split() == sample.answer.split()
        case "last_line":
            wanted = [line.split() for line in sample.answer.strip().splitlines()]
            lines = [line.split() for line in reply.strip().splitlines()]
            return lines[-len(wanted) :] == wanted
        case "regex":
            return re.fullmatch(sample.answer, reply.strip(), re.DOTALL) is not None
        case "json":
            return _same_json(reply, sample.answer)


def _same_json(reply: str, answer: str) -> bool:
    text = reply.strip().removeprefix("```json").strip("`\n ")
    try:
        found, wanted = json.loads(text), json.loads(answer)
    except (ValueError, RecursionError):
        return False
    # As text, `1`, `1.0` and `true` differ.
    return json.dumps(found, sort_keys=True) == json.dumps(wanted, sort_keys=True)


def _samples(path: Path, bad: list[str]) -> Iterator[DataSample]:
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise StartError(f"the data {path} cannot be read: {error.strerror or error}") from error
    if path.suffix == ".txt":
        yield from _pieces(raw.decode(errors="replace"))
        return
    for number, line in enumerate(raw.splitlines(), 1):
        if line.strip():
            found = _sample(line)
            if isinstance(found, DataSample):
                yield found
            else:
                bad.append(f"{path.name}:{number}: {found}")


def _pieces(text: str) -> Iterator[DataSample]:
    for start in range(0, len(text), TEXT_PIECE):
        piece = text[start : start + TEXT_PIECE]
        if piece.strip():
            yield DataSample(text=piece)


def _sample(line: bytes) -> DataSample | str:
    """The sample of a line, or what is wrong with it."""
    try:
        sample = msgspec.json.decode(line, type=DataSample)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        return str(error)
    if [sample.prompt is not None, bool(sample.messages), sample.text is not None].count(True) != 1:
        return "give exactly one of prompt, messages and text"
    if sample.text is not None:
        if sample.answer is not None or sample.reply is not None:
            return "a text has no answer and no reply"
        return sample if sample.text.strip() else "the text is empty"
    if sample.answer is None:
        return "a prompt needs an answer"
    return _answer_problem(sample) or sample


def _answer_problem(sample: DataSample) -> str | None:
    assert sample.answer is not None
    if sample.match == "regex":
        try:
            re.compile(sample.answer)
        except re.error as error:
            return f"the answer is no regex: {error}"
    if sample.match == "json":
        try:
            json.loads(sample.answer)
        except ValueError as error:
            return f"the answer is no JSON: {error}"
    if sample.reply is not None and not right(sample, sample.reply):
        return "its own reply does not match its answer"
    return None


def _place(sample: DataSample) -> int:
    """A number from 0 to 9 that depends on the prompt alone."""
    return blake2b(sample.key.encode(), digest_size=4).digest()[0] % HELD_OUT


def _check_split(name: str, file: str, split: Sequence[DataSample]) -> None:
    if not split:
        raise StartError(f"data.{name}: {file} gives no samples for it: add lines, or name another file")
    texts = sum(sample.text is not None for sample in split)
    if 0 < texts < len(split):
        raise StartError(f"data.{name}: {file} mixes texts and prompts: give one kind")


def _check_apart(splits: dict[str, list[DataSample] | None]) -> None:
    """Raises StartError when a prompt to measure with is also trained on."""
    trained = {sample.key for sample in splits["train"] or ()}
    for name in ("validation", "test"):
        both = sum(sample.key in trained for sample in splits[name] or ())
        if both:
            raise StartError(
                f"data.{name}: {both} of its prompts are in data.train too: take them out of one"
            )


def groups(samples: Iterable[DataSample], key: Callable[[DataSample], Any]) -> dict[str, list[int]]:
    """The places of the samples, by a property."""
    found: dict[str, list[int]] = {}
    for place, sample in enumerate(samples):
        found.setdefault(str(key(sample)), []).append(place)
    return found
