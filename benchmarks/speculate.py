"""Measures speculative decoding: the acceptance rate of draft tokens, and the speed-up of answers.

`python -m benchmarks.speculate replay PROMPTS.jsonl.gz [--times FILE] [--json]`: without a model. Reference
answers go through the real loop in virtual time, with a measured step-time model.
`python -m benchmarks.speculate answer MODEL_DIR --prompts PROMPTS.jsonl.gz [--quantise int8] [--json]`: a
chat model answers the prompts, each in turn without speculation and with n-gram lookup.
`python -m benchmarks.speculate desk [--small DIR] [--json]`: the bundled ladder's top, with and without, in
turns; by default the draft model is the one that the ladder names.
`python -m benchmarks.speculate verify MODEL_DIR [--quantise int8] [--json]`: the cost of verification.
"""

# The types of tokenizers and lambdas are not known here.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportUnknownLambdaType=false
from __future__ import annotations

import argparse
import gzip
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import msgspec
from msgspec import Struct
from rich.console import Console
from rich.table import Table as Grid
from tokenizers import Tokenizer

import stretto
from recipes.desk.tasks import TASKS, held_out
from stretto import terminal
from stretto.config import EngineConfig, ModelConfig, Quantise
from stretto.engine.core import EngineCore, LoadedModel
from stretto.engine.runners.draft_model import DraftModel
from stretto.engine.runners.factory import ModelLoader
from stretto.engine.runners.null import NullRunner, VirtualClock, null_info
from stretto.engine.runners.torch import TorchRunner
from stretto.engine.scheduler import SCHEDULES
from stretto.engine.scheduler.types import Limits, Plan, Row
from stretto.engine.sequence import Drawn, Sequence
from stretto.engine.speculative.policy import Speculation
from stretto.engine.step_time import StepCost, StepTime
from stretto.ladder import serving
from stretto.text.tokenizer import TextModel
from stretto.types import Request, Sampling, StepStats, TokenEvent

TIMES = Path(__file__).parent / "times" / "qwen3-0.6b-int8-zen3.json"
DESK = Path(stretto.__file__).parent / "desk"
LIMITS = Limits(64, 512)
WORDS = re.compile(r"\s?\w+|\s?[^\w\s]+|\s+")
ROWS = (1, 2, 3, 4, 5, 8)
LONGEST = 64
CONTEXT, MAX_ANSWER = 2048, 128  # tokens of prompt and answer, and of the answer


class Gain(Struct, frozen=True):
    """One setting.

    accepted: the share of the draft tokens that were accepted
    tokens_a_step: output tokens of a sequence in a step
    gain: tokens per second divided by those without speculation, in the same run
    """

    what: str
    answers: int
    tokens: int
    proposed: int
    accepted: float
    tokens_a_step: float
    gain: float


class Verified(Struct, frozen=True):
    """A step of one sequence that verifies `rows` - 1 draft tokens.

    `ms` is the median, `ratio` the median divided by that of a step with one row.
    """

    context: int
    rows: int
    ms: float
    ratio: float


class TokenCounts:
    """Counts the output tokens, draft tokens and decode rows of an engine."""

    def __init__(self) -> None:
        self.tokens = self.proposed = self.accepted = self.decodes = self.emitted = 0

    def __call__(self, events: list[TokenEvent], stats: StepStats | None) -> None:
        self.tokens += sum(event.token is not None for event in events)
        if stats is not None:
            self.proposed += stats.proposed
            self.accepted += stats.accepted
            self.emitted += stats.decode_tokens
            self.decodes += stats.decode_tokens - stats.accepted

    def gain(self, what: str, answers: int, gain: float) -> Gain:
        accepted = self.accepted / self.proposed if self.proposed else 0.0
        return Gain(what, answers, self.tokens, self.proposed, accepted, self.emitted / self.decodes, gain)


class Reciter(NullRunner):
    """A null model that draws the given `answers`, by request id."""

    def __init__(self, answers: dict[int, list[int]], cost: StepCost, clock: VirtualClock) -> None:
        super().__init__(null_info(context=65536, vocab=1 << 20), cost=cost, sleep=clock.sleep)
        self.answers = answers

    def draw(self, seq: Sequence, ahead: int) -> Drawn:
        answer, index = self.answers[seq.request.id], seq.output_len + ahead
        return Drawn(answer[index] if index < len(answer) else 0)


class Question(NamedTuple):
    """A question of MT-bench, Spec-Bench, HumanEval or GSM8K. `reference`: its answer, None if unknown."""

    category: str
    question: str
    reference: str | None


def questions(path: Path) -> Iterator[Question]:
    """The first question of each line of a file."""
    with gzip.open(path, "rt") as lines:
        for line in lines:
            row: dict[str, Any] = msgspec.json.decode(line)
            question = row["turns"][0] if "turns" in row else row.get("prompt") or row["question"]
            answer = row.get("reference") or row.get("canonical_solution") or row.get("answer")
            answer = answer[0] if isinstance(answer, list) else answer
            reference = answer if isinstance(answer, str) and answer else None
            yield Question(row.get("category", path.name.split(".")[0]), question, reference)


def words(known: dict[str, int], text: str) -> list[int]:
    """One token id for each word, number or run of signs, as a vocabulary of 150,000 splits English."""
    return [known.setdefault(word, len(known) + 1) for word in WORDS.findall(text)]


def recite(
    exchanges: list[tuple[list[int], list[int]]], cost: StepCost, speculate: bool
) -> tuple[TokenCounts, float]:
    """Run each prompt and its answer alone, in order. Returns the counts and the seconds of virtual time."""
    clock, counts = VirtualClock(), TokenCounts()
    runner = Reciter({ident: answer for ident, (_, answer) in enumerate(exchanges)}, cost, clock)
    model = LoadedModel(runner, StepTime(cost), Speculation() if speculate else None)
    engine = EngineCore(
        [model], limits=LIMITS, schedule=SCHEDULES["fcfs"], clock=clock, emit=counts, share=False
    )
    seconds = 0.0
    for ident, (prompt, answer) in enumerate(exchanges):
        sampling = Sampling(temperature=0.0, max_tokens=len(answer), ignore_eos=True)
        request = Request(id=ident, model="null", prompt=tuple(prompt), arrival=clock(), sampling=sampling)
        seconds += decode(engine, request, counts, clock)
    return counts, seconds


def decode(engine: EngineCore, request: Request, counts: TokenCounts, clock: Callable[[], float]) -> float:
    """The seconds from the first token of an answer to its last."""
    engine.submit(Sequence.of(request, engine.models[request.model].runner.info.context))
    before = counts.tokens
    while counts.tokens == before:
        engine.step()
    started = clock()
    while engine.step() or not engine.idle:
        pass
    return clock() - started


def replay(path: Path, cost: StepCost) -> dict[str, list[Gain]]:
    """The gains by tokenizer and category. They count only the time of decoding."""
    tokenizer = Tokenizer.from_file(str(DESK / "tokenizer.json"))
    known: dict[str, int] = {}
    ways = {
        "words": lambda text: words(known, text),
        "desk's tokens": lambda text: tokenizer.encode(text, add_special_tokens=False).ids,
    }
    result: dict[str, list[Gain]] = {}
    for name, encode in ways.items():
        by_category: dict[str, list[tuple[list[int], list[int]]]] = {}
        for category, question, reference in questions(path):
            prompt, answer = encode(question), encode(reference or "")
            if prompt and len(answer) > 1:
                by_category.setdefault(category, []).append((prompt, answer))
        for category, exchanges in sorted(by_category.items()):
            _, plain = recite(exchanges, cost, False)
            counts, quick = recite(exchanges, cost, True)
            result.setdefault(name, []).append(counts.gain(category, len(exchanges), plain / quick))
    return result


def answer(
    path: Path, prompts: Path, quantise: Quantise | None, count: int, rounds: int
) -> dict[str, list[Gain]]:
    """Answer the first `count` prompts of each category greedily, one at a time.

    The gains count only the time of decoding, and of each answer the shortest of `rounds` runs.
    """
    model = ModelConfig(name="m", path=str(path), quantise=quantise)
    config = EngineConfig(models=(model,), kv_bytes=2**28, context=CONTEXT, speculate="off")
    text, counts = TextModel(path), TokenCounts()
    (model,) = ModelLoader(config).models()
    engines = {
        speculate: EngineCore(
            [LoadedModel(model.runner, model.times, Speculation() if speculate else None)],
            limits=LIMITS,
            schedule=SCHEDULES["fcfs"],
            clock=time.monotonic,
            emit=lambda events, stats: counts(events, stats),
            share=False,
        )
        for speculate in (False, True)
    }
    by_category: dict[str, list[list[int]]] = {}
    for category, question, _ in questions(prompts):
        encoded = text.encode_chat([{"role": "user", "content": question}])
        if len(encoded) < CONTEXT - MAX_ANSWER:
            by_category.setdefault(category, []).append(encoded)
    ident, result = 0, list[Gain]()
    for category, prompt_ids in sorted(by_category.items()):
        took: dict[bool, dict[int, float]] = {False: {}, True: {}}
        speculated = TokenCounts()
        for number, prompt in list(enumerate(prompt_ids[:count])) * rounds:
            for speculate in (False, True):
                counts, ident = speculated if speculate else TokenCounts(), ident + 1
                request = Request(
                    id=ident,
                    model="m",
                    prompt=tuple(prompt),
                    arrival=time.monotonic(),
                    sampling=Sampling(temperature=0.0, max_tokens=MAX_ANSWER),
                )
                seconds = decode(engines[speculate], request, counts, time.monotonic)
                took[speculate][number] = min(seconds, took[speculate].get(number, seconds))
        gain = sum(took[False].values()) / sum(took[True].values())
        result.append(speculated.gain(category, len(took[True]), gain))
        print(result[-1], file=sys.stderr)
    return {f"{path.name}, {quantise or 'as it is'}": result}


class Desk:
    """The bundled model with each way of speculative decoding, each in an engine of its own."""

    def __init__(self, small: Path | None, threads: int) -> None:
        ladder = serving.read(ModelConfig(name="desk", path=str(DESK)), "cpu")
        models = [ladder.top, *(each for each in ladder.models.values() if each.name == ladder.top.draft)]
        if small is not None:
            models[1:] = [ModelConfig(name="small", path=str(small))]
        config = EngineConfig(
            models=tuple(models), kv_bytes=2**28, context=2048, speculate="off", threads=threads
        )
        self.desk, *self._small = ModelLoader(config).models()
        self.counts, self.next = TokenCounts(), 0
        self.engine = self.engine_with(None)

    def engine_with(self, speculation: Speculation | None) -> EngineCore:
        return EngineCore(
            [LoadedModel(self.desk.runner, self.desk.times, speculation)],
            limits=LIMITS,
            schedule=SCHEDULES["fcfs"],
            clock=time.monotonic,
            emit=self._emit,
            share=False,
        )

    def _emit(self, events: list[TokenEvent], stats: StepStats | None) -> None:
        self.counts(events, stats)

    def ways(self) -> dict[str, EngineCore]:
        """An engine for each way of speculative decoding."""
        ways: dict[str, Speculation | None] = {"without": None, "own text": Speculation()}
        runner = self.desk.runner
        for small in self._small:
            if isinstance(runner, TorchRunner) and isinstance(small.runner, TorchRunner):
                ways["smaller model"] = Speculation(DraftModel(small.runner, runner, small.times))
        return {way: self.engine_with(speculation) for way, speculation in ways.items()}

    def run(self, prompts: list[list[int]], sampling: Sampling, batch: int) -> float:
        """Answer all prompts, `batch` at a time. Returns the seconds."""
        started = time.monotonic()
        for first in range(0, len(prompts), batch):
            for prompt in prompts[first : first + batch]:
                self.next += 1
                own = msgspec.structs.replace(sampling, seed=len(prompt))
                request = Request(
                    id=self.next,
                    model=self.desk.info.name,
                    prompt=tuple(prompt),
                    arrival=started,
                    sampling=own,
                )
                self.engine.submit(Sequence.of(request, 2048))
            while self.engine.step() or not self.engine.idle:
                pass
        return time.monotonic() - started


def desk(small: Path | None, threads: int, rounds: int, count: int) -> dict[str, list[Gain]]:
    """The gains on held-out questions of level 1 of every task: medians over the rounds."""
    text = TextModel(DESK)
    examples = [example for task in TASKS for example in held_out(task, 1, count)]
    prompts = [
        text.encode_chat([dict(message) for message in example.messages], list(example.tools) or None)
        for example in examples
    ]
    model = Desk(small, threads)
    settings = {
        "greedy, one at a time": (Sampling(temperature=0.0, max_tokens=LONGEST), 1),
        "temperature 1, one at a time": (Sampling(max_tokens=LONGEST), 1),
        "greedy, four at a time": (Sampling(temperature=0.0, max_tokens=LONGEST), 4),
    }
    result: dict[str, list[Gain]] = {}
    for name, (sampling, batch) in settings.items():
        ways = model.ways()
        rates: dict[str, list[float]] = {way: [] for way in ways}
        counts: dict[str, TokenCounts] = {}
        for _ in range(rounds + 1):
            for way, engine in ways.items():
                model.engine = engine
                model.counts = counts[way] = TokenCounts()
                seconds = model.run(prompts, sampling, batch)
                rates[way].append(model.counts.tokens / seconds)
                print(f"{name}, {way}: {rates[way][-1]:.0f} tokens/s", file=sys.stderr)
        rate = {way: median(each[1:]) for way, each in rates.items()}
        result[f"{name}, {rate['without']:.0f} tokens/s without"] = [
            counts[way].gain(way, len(prompts), rate[way] / rate["without"]) for way in ways
        ]
    return result


def verify(path: Path, quantise: Quantise | None, rounds: int) -> list[Verified]:
    """Steps of one sequence with 1 to 8 rows, in turns."""
    model = ModelConfig(name="m", path=str(path), quantise=quantise)
    config = EngineConfig(models=(model,), kv_bytes=2**29, context=2048, speculate="off")
    (runner,) = ModelLoader(config).runners
    found: list[Verified] = []
    for context in (64, 1024):
        sampling = Sampling(temperature=0.0, max_tokens=64)
        request = Request(id=1, model="m", prompt=(5,) * context, arrival=0.0, sampling=sampling)
        seq = Sequence.of(request, 2048)
        seq = replace(seq, slot=0, kv=replace(seq.kv, blocks=list(range(2048 // 16))))
        runner.launch(Plan("m", rows=[Row(seq, 0, context, True)])).wait()
        took: dict[int, list[float]] = {rows: [] for rows in ROWS}
        for _ in range(rounds):
            for rows in ROWS:
                plan = Plan("m", rows=[Row(seq, context - 1, rows, True, (7,) * (rows - 1))])
                started = time.perf_counter()
                runner.launch(plan).wait()
                took[rows].append((time.perf_counter() - started) * 1e3)
        one = median(took[1])
        found += [Verified(context, rows, median(ms), median(ms) / one) for rows, ms in took.items()]
    return found


def show(result: dict[str, list[Gain]] | list[Verified]) -> Iterator[Grid]:
    """The result as tables."""
    parts: dict[str, Any] = result if isinstance(result, dict) else {"": result}
    for title, rows in parts.items():
        grid = Grid(*rows[0].__struct_fields__, title=title)
        for row in rows:
            cells = msgspec.structs.astuple(row)
            grid.add_row(*(f"{cell:.2f}" if isinstance(cell, float) else str(cell) for cell in cells))
        yield grid


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("what", choices=("replay", "answer", "desk", "verify"))
    parser.add_argument("path", type=Path, nargs="?")
    parser.add_argument("--prompts", type=Path, help="JSON lines of questions for `answer`")
    parser.add_argument("--times", type=Path, default=TIMES, help="a step-time model, as JSON")
    parser.add_argument("--small", type=Path, help="a smaller model with desk's tokenizer")
    parser.add_argument("--threads", type=int, default=0, help="of `desk`; 0: as a server would take")
    parser.add_argument("--quantise", choices=("int8", "int4"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--count", type=int, default=2, help="prompts of each category or task")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    result: dict[str, list[Gain]] | list[Verified]
    if options.what == "desk":
        result = desk(options.small, options.threads, options.rounds, options.count)
    elif options.path is None:
        parser.error(f"{options.what} needs a path")
    elif options.what == "answer":
        if options.prompts is None:
            parser.error("answer needs --prompts")
        result = answer(options.path, options.prompts, options.quantise, options.count, options.rounds)
    elif options.what == "replay":
        result = replay(options.path, msgspec.json.decode(options.times.read_bytes(), type=StepCost))
    else:
        result = verify(options.path, options.quantise, options.rounds)
    if options.json:
        terminal.print_json(result)
    else:
        for grid in show(result):
            Console().print(grid)


if __name__ == "__main__":
    main()
