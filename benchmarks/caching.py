"""How often the semantic cache answers, how often it is wrong, and whether near-duplicates deceive it.

    python -m benchmarks.caching hits [--requests 20000] [--prompts FILE]
    python -m benchmarks.caching near [--prompts FILE]

`hits` replays questions in other words against the cache's own index at bounds of 1 % and 2 %: questions
about order records, as the recipe of the bundled model writes them, and the prompts of MT-bench
(`--prompts`, gzipped JSON lines with `turns`) in several frames. A third are near-duplicates: the same
words with another number, name or field. The worker's answer is the task's own, or that of the bundled
model (`--model`). A served answer is wrong if it is not the one that the worker gives to the very question.

`near` asks pairs that differ in one thing that changes the answer, of an index that has verified 5,000
answers without an error, so that the guard alone stands in the way. Every pair that is served is a false
hit.
"""

from __future__ import annotations

import argparse
import gzip
import json
import re
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import NamedTuple

from benchmarks.near_duplicates import NEAR_DUPLICATES
from recipes.desk.questions.orders import ASK, ASK_ITEM_ORDER, ASK_WHO, records
from recipes.desk.questions.words import CITIES, FIRST, LAST, MONTHS, THINGS
from stretto import LLM, Sampling
from stretto.gateway.cache.embedding import TextEmbedder, best_embedder, n_grams
from stretto.gateway.cache.semantic import ErrorBound, SemanticIndex, SimilarEntry, TenantQuestions
from stretto.statistics import quantile

FIELDS = ("customer", "item", "price", "status", "city", "payment", "service", "quantity")
FRAMES = (
    "{}",
    "Please {}",
    "{} Thanks.",
    "Hi! {}",
    "Can you tell me {}",
    "Hello, {} Thank you.",
    "{} Please.",
    "Hey. {}",
)
TENANT = CONVERSATION = b"t"


class Asked(NamedTuple):
    """One request: its text, the meaning that it shares with paraphrases, and the worker's answer."""

    text: str
    meaning: str
    answer: str


def parser() -> argparse.ArgumentParser:
    """The options."""
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("what", choices=["hits", "near"])
    options.add_argument("--requests", type=int, default=20_000)
    options.add_argument("--prompts", type=Path, help="MT-bench's questions, gzipped JSON lines")
    options.add_argument("--model", action="store_true", help="answers of the bundled model")
    options.add_argument("--seed", type=int, default=0)
    return options


# Traffic


def mt_bench(path: Path | None) -> list[str]:
    """The first turns of MT-bench's questions; none without the file."""
    if path is None:
        return []
    with gzip.open(path, "rt") as file:
        return [json.loads(line)["turns"][0] for line in file]


class Shop:
    """Order records in a system prompt, and questions about them. With few records, paraphrases repeat."""

    def __init__(self, rng: Random, count: int) -> None:
        self.rows = records(rng, count, FIELDS)
        self.notes = "\n".join(
            f"Order {row['order']}: " + ", ".join(f"{name} {row[name]}" for name in FIELDS)
            for row in self.rows
        )

    def ask(self, rng: Random) -> Asked:
        """A question in one of its wordings; popular orders are asked about more often."""
        row = self.rows[min(int(rng.paretovariate(0.7)) - 1, len(self.rows) - 1)]
        kind = rng.random()
        if kind < 0.1:
            text = rng.choice(ASK_WHO).format(o=row["order"])
            return Asked(text, f"customer {row['order']}", row["customer"])
        if kind < 0.15:
            text = rng.choice(ASK_ITEM_ORDER).format(i=row["item"])
            return Asked(text, f"order {row['item']}", row["order"])
        name = rng.choice(FIELDS)
        text = rng.choice(FRAMES).format(rng.choice(ASK).format(f=name, o=row["order"]))
        return Asked(text, f"{name} {row['order']}", row[name])


def framed(rng: Random, prompts: Sequence[str]) -> Asked:
    """A prompt of MT-bench in one of several frames, or a near-duplicate of it with an answer of its own."""
    prompt = prompts[min(int(rng.paretovariate(0.7)) - 1, len(prompts) - 1)]
    if rng.random() < 1 / 3 and (changed := list(near_of(prompt))):
        prompt = rng.choice(changed).text
    return Asked(rng.choice(FRAMES).format(prompt), prompt, f"the answer to: {prompt}")


def answered(asked: list[Asked], notes: str) -> list[Asked]:
    """The same requests with the greedy answers of the bundled model."""
    texts = list(dict.fromkeys(each.text for each in asked))
    chats = [[{"role": "system", "content": notes}, {"role": "user", "content": text}] for text in texts]
    with LLM("desk") as model, ThreadPoolExecutor(32) as threads:
        done = list(
            threads.map(partial(model.chat, sampling=Sampling(temperature=0.0, max_tokens=40)), chats)
        )
    answers = {text: each.text for text, each in zip(texts, done, strict=True)}
    return [each._replace(answer=answers[each.text]) for each in asked]


# Replay


@dataclass
class Tally:
    """What became of the requests. `repeated`: had been asked in other words before. `times`: milliseconds
    of a look-up."""

    exact: int = 0
    repeated: int = 0
    served: int = 0
    wrong: int = 0
    verified: int = 0
    misses: int = 0
    likeness: Counter[str] = field(default_factory=Counter[str])
    times: list[float] = field(default_factory=list[float])


def replay(requests: Sequence[Asked], embed: TextEmbedder, most: float, seed: int) -> Tally:
    """Runs requests through the index as the gateway does. Equal texts are the exact cache's."""
    index = SemanticIndex(embed, Random(seed).random, lambda: 0.0)
    tally, kept, meant = Tally(), dict[bytes, str](), set[str]()
    for asked in requests:
        key = asked.text.encode()
        if key in kept:
            tally.exact += 1
            continue
        began = time.perf_counter()
        question = index.read(asked.text)
        match = None if question is None else index.find(TENANT, CONVERSATION, question, most)
        tally.times.append((time.perf_counter() - began) * 1e3)
        tally.repeated += asked.meaning in meant
        if match is not None and match.serve:
            tally.served += 1
            tally.likeness[match.likeness] += 1
            tally.wrong += not index.same_answer(kept[match.entry.key], asked.answer)
            continue
        meant.add(asked.meaning)
        kept[key] = asked.answer
        tally.misses += 1
        if question is None:
            continue
        if match is not None:
            right = index.same_answer(kept[match.entry.key], asked.answer)
            tally.verified += 1
            index.observe(TENANT, match, right=right)
            if right:
                continue
        index.add(TENANT, SimilarEntry(key, CONVERSATION, question, (), 1.0))
    return tally


def share_of(wrong: int, count: int) -> str:
    """A share, and the upper end of Wilson's 95 % interval of it."""
    if not count:
        return "none"
    share, z = wrong / count, 1.96
    middle = share + z * z / (2 * count)
    spread = z * ((share * (1 - share) + z * z / (4 * count)) / count) ** 0.5
    return f"{share:.2%} (below {(middle + spread) / (1 + z * z / count):.2%})"


def hits(options: argparse.Namespace) -> None:
    """Prints the table of hits."""
    rng = Random(options.seed)
    shop, prompts = Shop(rng, 8 if options.model else 60), mt_bench(options.prompts)
    desk = [shop.ask(rng) for _ in range(options.requests)]
    if options.model:
        desk = answered(desk, shop.notes)
    traffic = {"desk": desk}
    if prompts:
        traffic["MT-bench"] = [framed(rng, prompts) for _ in range(options.requests)]
    embedders: dict[str, TextEmbedder] = {best_embedder()[1]: best_embedder()[0], "n-grams": n_grams}
    columns = ("prompts", "vectors", "bound", "new texts", "asked before", "served", "verified", "wrong")
    print(f"| {' | '.join(columns)} | wrong of served | look-up p50 / p99 / max ms |")
    print("| --- " * 10 + "|")
    for name, requests in traffic.items():
        for vectors, embed in embedders.items():
            for most in (0.01, 0.02, 0.05) if options.model else (0.01, 0.02):
                tally = replay(requests, embed, most, options.seed)
                new, times = len(requests) - tally.exact, sorted(tally.times)
                print(
                    f"| {name} | {vectors} | {most:.0%} | {new} | {tally.repeated} | {tally.served} "
                    f"({tally.served / max(tally.repeated, 1):.1%}) | {tally.verified} | {tally.wrong} | "
                    f"{share_of(tally.wrong, tally.served)} | "
                    f"{quantile(times, 0.5):.2f} / "
                    f"{quantile(times, 0.99):.2f} / {times[-1]:.2f} |"
                )


# Near-duplicates


class Near(NamedTuple):
    """A text that differs from another in one thing, and what that is."""

    text: str
    what: str


def near_of(text: str) -> Iterator[Near]:
    """Near-duplicates of a text whose answer differs."""
    for match in re.finditer(r"\d+", text):
        yield Near(f"{text[: match.start()]}{int(match[0]) + 1}{text[match.end() :]}", "number")
        yield Near(f"{text[: match.start()]}{match[0]}0{text[match.end() :]}", "number")
    for match in re.finditer(r"(?<=[a-z,] )[A-Z][a-z]{2,}", text):
        other = FIRST[sum(map(ord, match[0])) % len(FIRST)]
        if other != match[0] and match[0] not in MONTHS:
            yield Near(text[: match.start()] + other + text[match.end() :], "name")
    for word, opposite in (("is", "is not"), ("are", "are not"), ("can", "cannot"), ("does", "does not"),
                           ("will", "won't"), ("with", "without"), ("should", "shouldn't")):  # fmt: skip
        if re.search(rf"\b{word}\b", text):
            yield Near(re.sub(rf"\b{word}\b", opposite, text, count=1), "negation")
    for month, other in pairwise(MONTHS):
        if month in text:
            yield Near(text.replace(month, other), "date")


SHAPES: tuple[tuple[str, str, str], ...] = (
    ("Convert {n} km to miles.", "Convert {n} miles to km.", "direction"),
    ("How much is {n} kg in pounds?", "How much is {n} g in pounds?", "unit"),
    ("What is {n} % of {m}?", "What is {m} % of {n}?", "order"),
    ("What is {n} - {m}?", "What is {m} - {n}?", "order"),
    ("What is {n} + {m}?", "What is {n} - {m}?", "operator"),
    ("Is {n} greater than {m}?", "Is {m} greater than {n}?", "order"),
    ("Is {a} older than {b}?", "Is {b} older than {a}?", "order"),
    ("does {a} owe {b} money", "does {b} owe {a} money", "order"),
    ("Which trains go from {c} to {d}?", "Which trains go from {d} to {c}?", "direction"),
    ("Which trains leave before {n}:15?", "Which trains leave after {n}:15?", "comparison"),
    ("What is the cheapest {t}?", "What is the most expensive {t}?", "comparison"),
    ("List orders over {n} EUR.", "List orders under {n} EUR.", "comparison"),
    ("List orders over {n} EUR.", "List orders over {n} USD.", "unit"),
    ("Was the {t} delivered on 3 {x} 2024?", "Was the {t} delivered on 3 {y} 2024?", "date"),
    ("Was the {t} delivered on 2024-03-0{k}?", "Was the {t} delivered on 2024-04-0{k}?", "date"),
    ("Can I return the {t}?", "Can't I return the {t}?", "negation"),
    ("Did {a} not order the {t}?", "Did {a} order the {t}?", "negation"),
    ("Who ordered the {t}?", "When was the {t} ordered?", "kind"),
    ("Who sold the {t} to {a}?", "Where was the {t} sold to {a}?", "kind"),
    ("How many {t}s did {a} buy?", "How much did {a} pay for the {t}?", "kind"),
    ("Is the {t} in stock?", "Was the {t} in stock?", "time"),
    ("What did {a} order?", "What did {b} order?", "name"),
    ("what did {al} order", "what did {bl} order", "name in small letters"),
    ("weather in {cl} today", "weather in {dl} today", "name in small letters"),
    ("{c} weather?", "{d} weather?", "name at the beginning"),
    ("What is the price of the {t}?", "What is the price of the {u}?", "other thing"),
    ("Is the {t} blue?", "Is the {t} red?", "other property"),
    ("Show my orders.", "Show your orders.", "person"),
    ("All orders except {n}?", "All orders and {n}?", "negation"),
    ("Tell me about order A-{n}.", "Tell me about order B-{n}.", "number"),
    ("f({n}) = ({n} + {m}) * 2", "f({n}) = {n} + ({m} * 2)", "operator"),
)  # fmt: skip


def pairs(rng: Random, prompts: Sequence[str]) -> list[tuple[str, Near]]:
    """Pairs of questions with different answers."""
    found: list[tuple[str, Near]] = []
    for one, other, what in SHAPES:
        for _ in range(25):
            (a, b), (c, d), (t, u) = rng.sample(FIRST, 2), rng.sample(CITIES, 2), rng.sample(THINGS, 2)
            n, m = rng.sample(range(2, 24), 2)
            at = rng.randrange(11)
            fill = {"a": f"{a} {rng.choice(LAST)}", "b": f"{b} {rng.choice(LAST)}", "c": c, "d": d, "t": t}
            fill |= {"u": u, "n": n, "m": m, "k": rng.randrange(1, 9), "x": MONTHS[at], "y": MONTHS[at + 1]}
            fill |= {"al": a.lower(), "bl": b.lower(), "cl": c.lower(), "dl": d.lower()}
            found.append((one.format(**fill), Near(other.format(**fill), what)))
    for prompt in prompts:
        found += [(prompt, near) for near in near_of(prompt)][:8]
    shop = Shop(rng, 20)
    for row in shop.rows:
        question = rng.choice(ASK).format(f="price", o=row["order"])
        found += [(question, near) for near in near_of(question)]
        found.append((question, Near(question.replace("price", "city"), "other field")))
    found += [(one, Near(other, what)) for what, written in NEAR_DUPLICATES.items() for one, other in written]
    return list(dict.fromkeys(pair for pair in found if pair[0] != pair[1].text))


def near(options: argparse.Namespace) -> None:
    """Prints the table of false hits."""
    found = pairs(Random(options.seed), mt_bench(options.prompts))
    for name, embed in {best_embedder()[1]: best_embedder()[0], "n-grams": n_grams}.items():
        tried, served, compared = Counter[str](), Counter[str](), Counter[str]()
        for one, other in found:
            index = SemanticIndex(embed, lambda: 0.5, lambda: 0.0)
            first, second = index.read(one), index.read(other.text)
            tried[other.what] += 1
            if first is None or second is None:
                continue
            index.add(TENANT, SimilarEntry(b"1", CONVERSATION, first, (), 1.0))
            trust(index)
            match = index.find(TENANT, CONVERSATION, second, 0.02)
            compared[other.what] += match is not None
            served[other.what] += match is not None and match.serve
        print(f"vectors: {name}\n| differs in | pairs | compared | false hits |\n| --- | --- | --- | --- |")
        for what, count in sorted(tried.items()):
            print(f"| {what} | {count} | {compared[what]} | {served[what]} |")
        print(f"| all | {sum(tried.values())} | {sum(compared.values())} | {sum(served.values())} |")


def trust(index: SemanticIndex) -> None:
    """Lets the index have verified 5,000 answers for the same words, all right."""
    asked: TenantQuestions = index.tenant(TENANT)
    asked.same_words = trusted()


@cache
def trusted() -> ErrorBound:
    """The bound after 5,000 right answers."""
    bound = ErrorBound()
    for _ in range(5000):
        bound.observe(right=True)
    return bound


def main() -> None:
    options = parser().parse_args()
    {"hits": hits, "near": near}[options.what](options)


if __name__ == "__main__":
    main()
