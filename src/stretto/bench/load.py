"""Drives a server: prompts from a file or random tokens, at a rate or with a fixed number under way at once.

Everything random is seeded, so that a run can be repeated. Knows no terminal: progress is a callback.
"""

from __future__ import annotations

import asyncio
import gzip
import time
from collections.abc import Callable, Sequence
from itertools import accumulate, cycle, islice
from pathlib import Path
from random import Random
from typing import Any, Literal

import msgspec
from msgspec import Struct

from stretto.bench.client import Client, RequestFailed
from stretto.bench.metrics import NO_LIMITS, GoodputLimits, LoadReport, Sample, report
from stretto.errors import StartError

Message = dict[str, Any]
Prompt = str | list[int] | list[Message]
Endpoint = Literal["chat", "completions"]
PATHS: dict[Endpoint, str] = {"chat": "chat/completions", "completions": "completions"}
UNKNOWN_VOCAB = 1000


class Load(Struct, frozen=True, kw_only=True):
    """One load test. One of `rate` (requests per second) and `concurrency` (under way at once) is set.

    `prompts`: a file; without one, prompts are `random_input` random token ids each. `burstiness`: 1 is a
    Poisson process, below it is burstier, above it more even.
    """

    requests: int
    rate: float | None = None
    concurrency: int | None = None
    prompts: Path | None = None
    random_input: int = 128
    output_tokens: int = 128
    endpoint: Endpoint | None = None
    model: str | None = None
    limits: GoodputLimits = NO_LIMITS
    seed: int = 0
    burstiness: float = 1.0
    warm_up: int = 1

    def __post_init__(self) -> None:
        if (self.rate is None) == (self.concurrency is None):
            raise StartError("give either --rate or --concurrency")
        if self.prompts is None and self.endpoint == "chat":
            raise StartError("random token ids go to the completions endpoint: give --prompts FILE for chat")
        counts = (
            self.requests,
            self.random_input,
            self.output_tokens,
            1 if self.concurrency is None else self.concurrency,
        )
        if min(counts) < 1 or (self.rate is not None and not self.rate > 0):
            raise StartError(
                "--requests, --rate, --concurrency, --random-input, --output-tokens must be above 0"
            )


class Outcome(Struct, frozen=True, kw_only=True):
    """A finished load test: what was asked, what was measured, and one message for each kind of failure."""

    url: str
    model: str
    endpoint: Endpoint
    load: Load
    report: LoadReport
    examples: dict[str, str]


def addressed(url: str) -> tuple[str, Endpoint | None]:
    """A server's address without the endpoint that may stand behind it, and that endpoint."""
    for endpoint, path in PATHS.items():
        base = url.removesuffix("/").removesuffix(f"/{path}")
        if base != url.removesuffix("/"):
            return base, endpoint
    return url, None


async def run(url: str, load: Load, *, api_key: str | None, on_done: Callable[[Sample], None]) -> Outcome:
    """Warm up, send everything, wait for all answers. `on_done` hears of each.

    Raises StartError when the server cannot be reached or the very first request fails: a load test of a
    server that refuses everything measures nothing.
    """
    client = Client(url, api_key=api_key)
    try:
        model = load.model or await _first_model(client)
        endpoint = load.endpoint or ("chat" if load.prompts else "completions")
        bodies = await _bodies(client, load, model, endpoint)
        for body in islice(cycle(bodies), load.warm_up):
            sample = await client.sample(PATHS[endpoint], body)
            if sample.error is not None:
                raise StartError(f"the warm-up request failed: {sample.error}: {sample.detail}")
        started = time.perf_counter()
        samples = await _drive(client, load, PATHS[endpoint], bodies, on_done)
        duration = max(sample.ended for sample in samples) - started
    finally:
        client.close()
    failed = {sample.error: sample.detail for sample in reversed(samples) if sample.error is not None}
    return Outcome(
        url=url,
        model=model,
        endpoint=endpoint,
        load=load,
        report=report(samples, duration, load.limits),
        examples=failed,
    )


def arrivals(count: int, rate: float, *, seed: int = 0, burstiness: float = 1.0) -> list[float]:
    """When each of `count` requests is sent, seconds from the start: gamma-distributed gaps, scaled so that
    all are sent within count / rate seconds whatever the seed, as `vllm bench serve` does."""
    random = Random(seed)
    times = list(accumulate(random.gammavariate(burstiness, 1.0) for _ in range(count)))
    scale = count / rate / times[-1]
    return [instant * scale for instant in times]


def read_prompts(path: Path) -> list[Prompt]:
    """Prompts from a file, one per line, `.gz` too: JSON with `messages`, `turns` (the first is taken),
    `prompt` or `question`; any other line is a prompt itself. Raises StartError naming the line."""
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rt", encoding="utf-8") as file:
            lines = file.read().splitlines()
    except (OSError, UnicodeDecodeError, EOFError) as error:
        raise StartError(f"cannot read prompts from {path}: {error}") from error
    prompts = [_prompt(line, f"{path}:{number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not prompts:
        raise StartError(f"{path} holds no prompt")
    return prompts


def random_prompts(count: int, length: int, *, vocab: int, seed: int) -> list[Prompt]:
    """Prompts of `length` token ids from the middle half of the vocabulary, where no special token lies."""
    random = Random(seed)
    return [[random.randrange(vocab // 4, vocab * 3 // 4) for _ in range(length)] for _ in range(count)]


def _prompt(line: str, where: str) -> Prompt:
    if not line.lstrip().startswith("{"):
        return line
    try:
        row = msgspec.json.decode(line, type=dict[str, Any])
    except msgspec.DecodeError as error:
        raise StartError(f"{where} is not JSON: {error}") from error
    match row:
        case {"messages": [{"role": str()}, *_]}:
            return row["messages"]
        case {"turns": [str() as text, *_]} | {"prompt": str() as text} | {"question": str() as text}:
            return text
    raise StartError(f"{where} has none of the fields messages, turns, prompt, question")


async def _first_model(client: Client) -> str:
    try:
        names = await client.models()
    except RequestFailed as failure:
        raise StartError(f"{client.target.host} does not answer as a model server: {failure}") from failure
    if not names:
        raise StartError(f"{client.target.host} serves no model")
    return names[0]


async def _bodies(client: Client, load: Load, model: str, endpoint: Endpoint) -> list[bytes]:
    if load.prompts is not None:
        prompts = list(islice(cycle(read_prompts(load.prompts)), load.requests))
    else:
        vocab = await _vocab(client, model)
        prompts = random_prompts(load.requests, load.random_input, vocab=vocab, seed=load.seed)
    return [_body(prompt, load, model, endpoint) for prompt in prompts]


def _body(prompt: Prompt, load: Load, model: str, endpoint: Endpoint) -> bytes:
    body: dict[str, Any] = {
        "model": model,
        "max_tokens": load.output_tokens,
        "temperature": 0.0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if endpoint == "chat":
        body["messages"] = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    elif isinstance(prompt, list) and isinstance(prompt[0], dict):
        raise StartError("prompts with messages go to the chat endpoint: give URL/v1/chat/completions")
    else:
        body["prompt"] = prompt
    if load.prompts is None:
        # Random tokens have no natural end: without this an early EOS would make the lengths a lottery.
        body["ignore_eos"] = True
    return msgspec.json.encode(body)


class _Held(Struct):
    name: str
    vocab: int


class _State(Struct):
    models: list[_Held]


async def _vocab(client: Client, model: str) -> int:
    """A Stretto server tells its vocabulary; any other is taken to have at least the smallest common one."""
    try:
        state = msgspec.json.decode(await client.get("/state"), type=_State)
    except (RequestFailed, msgspec.DecodeError):
        return UNKNOWN_VOCAB
    return next((held.vocab for held in state.models if held.name == model), UNKNOWN_VOCAB)


async def _drive(
    client: Client, load: Load, path: str, bodies: Sequence[bytes], on_done: Callable[[Sample], None]
) -> list[Sample]:
    """Each worker takes the next body; at a rate every request has its own, which waits for its time."""
    start = time.perf_counter()
    times = [0.0] * len(bodies)
    if load.rate is not None:
        times = arrivals(len(bodies), load.rate, seed=load.seed, burstiness=load.burstiness)
    queue = iter(zip(times, bodies, strict=True))
    samples: list[Sample] = []

    async def work() -> None:
        for instant, body in queue:
            await asyncio.sleep(start + instant - time.perf_counter())
            samples.append(await client.sample(path, body))
            on_done(samples[-1])

    await asyncio.gather(*(work() for _ in range(min(load.concurrency or len(bodies), len(bodies)))))
    return samples
