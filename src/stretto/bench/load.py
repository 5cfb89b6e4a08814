"""Loads a server with prompts from a file or with random tokens, at a rate or at a fixed concurrency.

All random values have a seed, so a run can be repeated. A callback gets the progress.
"""

from __future__ import annotations

import gzip
import time
from collections.abc import Callable
from itertools import accumulate, cycle, islice
from pathlib import Path
from random import Random
from typing import Any, Literal

import msgspec
from msgspec import Struct

from stretto.bench.client import Client, ServedModel
from stretto.bench.metrics import NO_LIMITS, GoodputLimits, LoadReport, Sample, report
from stretto.errors import StartError, reason_of

LoadPrompt = str | list[int] | list[dict[str, Any]]  # a text, token ids, or chat messages
EndpointName = Literal["chat", "completions"]
PATHS: dict[EndpointName, str] = {"chat": "chat/completions", "completions": "completions"}


class Load(Struct, frozen=True, kw_only=True):
    """What a load test sends. Exactly one of `rate` (requests per second) and `concurrency` is set.

    `prompts`: a file; without it, each prompt is `random_input` random token ids. `burstiness`: 1 is a
    Poisson process, less is burstier and more is more even. `warm_up`: requests that are sent before the
    measurement. Raises StartError when the settings contradict each other.
    """

    requests: int
    rate: float | None = None
    concurrency: int | None = None
    prompts: Path | None = None
    random_input: int = 128
    output_tokens: int = 128
    endpoint: EndpointName | None = None
    model: str | None = None
    limits: GoodputLimits = NO_LIMITS
    seed: int = 0
    burstiness: float = 1.0
    warm_up: int = 1

    def __post_init__(self) -> None:
        if (self.rate is None) == (self.concurrency is None):
            raise StartError("give exactly one of --rate and --concurrency")
        if self.prompts is None and self.endpoint == "chat":
            raise StartError(
                "random token ids need the completions endpoint; give --prompts FILE to load chat"
            )
        counts = (
            self.requests,
            self.random_input,
            self.output_tokens,
            1 if self.concurrency is None else self.concurrency,
        )
        if min(counts) < 1 or (self.rate is not None and not self.rate > 0):
            raise StartError(
                "--requests, --rate, --concurrency, --random-input and --output-tokens must be above 0"
            )


class Outcome(Struct, frozen=True, kw_only=True):
    """A finished load test. `examples`: for each kind of failure, the message of the first."""

    url: str
    model: str
    endpoint: EndpointName
    load: Load
    report: LoadReport
    examples: dict[str, str]


def split_endpoint(url: str) -> tuple[str, EndpointName | None]:
    """Split a URL into the server's address and the endpoint that its path names, if any."""
    for endpoint, path in PATHS.items():
        base = url.removesuffix("/").removesuffix(f"/{path}")
        if base != url.removesuffix("/"):
            return base, endpoint
    return url, None


async def run(url: str, load: Load, *, api_key: str | None, on_done: Callable[[Sample], None]) -> Outcome:
    """Warm up, send every request and wait for all answers. `on_done` is called with each.

    Raises StartError when the server cannot be reached or a warm-up request fails: a load test of a server
    that refuses everything measures nothing.
    """
    client = Client(url, api_key=api_key)
    try:
        model = await client.served_model(load.model)
        endpoint = load.endpoint or ("chat" if load.prompts else "completions")
        bodies = _bodies(load, model, endpoint)
        for body in islice(cycle(bodies), load.warm_up):
            sample = await client.sample(PATHS[endpoint], body)
            if sample.error is not None:
                raise StartError(f"the warm-up request failed: {sample.error}: {sample.detail}")
        times = [0.0] * len(bodies)
        if load.rate is not None:
            times = arrivals(len(bodies), load.rate, seed=load.seed, burstiness=load.burstiness)
        timed, started = list(zip(times, bodies, strict=True)), time.perf_counter()
        samples = await client.samples(PATHS[endpoint], timed, on_done, load.concurrency)
        duration = max(sample.ended for sample in samples) - started
    finally:
        client.close()
    failed = {sample.error: sample.detail for sample in reversed(samples) if sample.error is not None}
    return Outcome(
        url=url,
        model=model.name,
        endpoint=endpoint,
        load=load,
        report=report(samples, duration, load.limits),
        examples=failed,
    )


def arrivals(count: int, rate: float, *, seed: int = 0, burstiness: float = 1.0) -> list[float]:
    """When each of `count` requests is sent, in seconds from the start.

    Gaps are gamma-distributed, and scaled so that the last request is sent after count / rate seconds
    whatever the seed. `vllm bench serve` does the same.
    """
    random = Random(seed)
    times = list(accumulate(random.gammavariate(burstiness, 1.0) for _ in range(count)))
    scale = count / rate / times[-1]
    return [instant * scale for instant in times]


def read_prompts(path: Path) -> list[LoadPrompt]:
    """Read prompts from a file, plain or gzipped, one per line. Raises StartError that names a wrong line.

    A line is JSON with `messages`, `turns` (the first one counts), `prompt` or `question`. Any other line is
    a prompt itself.
    """
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rt", encoding="utf-8") as file:
            lines = file.read().splitlines()
    except (OSError, UnicodeDecodeError, EOFError) as error:
        raise StartError(f"cannot read prompts from {path}: {reason_of(error)}") from error
    prompts = [_prompt(line, f"{path}:{number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not prompts:
        raise StartError(f"{path} has no prompt; write one per line")
    return prompts


def random_prompts(count: int, length: int, *, vocab: int, seed: int) -> list[LoadPrompt]:
    """Prompts of `length` token ids from the middle half of the vocabulary: special tokens lie outside."""
    random = Random(seed)
    return [[random.randrange(vocab // 4, vocab * 3 // 4) for _ in range(length)] for _ in range(count)]


def _prompt(line: str, where: str) -> LoadPrompt:
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
        case _:
            raise StartError(f"{where} has none of the fields messages, turns, prompt, question; add one")


def _bodies(load: Load, model: ServedModel, endpoint: EndpointName) -> list[bytes]:
    if load.prompts is not None:
        prompts = list(islice(cycle(read_prompts(load.prompts)), load.requests))
    else:
        prompts = random_prompts(load.requests, load.random_input, vocab=model.vocab, seed=load.seed)
    return [_body(prompt, load, model.name, endpoint) for prompt in prompts]


def _body(prompt: LoadPrompt, load: Load, model: str, endpoint: EndpointName) -> bytes:
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
        raise StartError("prompts with messages need the chat endpoint; give URL/v1/chat/completions")
    else:
        body["prompt"] = prompt
    if load.prompts is None:
        # An answer to random tokens may end anywhere. This gives all answers the same length.
        body["ignore_eos"] = True
    return msgspec.json.encode(body)
