"""Measures what it brings to read a prompt while it is typed, and whom it costs anything.

`python benchmarks/checkpoint.py qwen3-0.6b DIR`, then `python benchmarks/realtime.py DIR`. It starts a server
and types prompts into `/v1/realtime`, in turn with posting such prompts whole. Then it closes sockets while
their prompts are read, and counts the steps afterwards. Last, in virtual time, it reads prompts beside
streams, and compares the gaps between their tokens.
"""

# pyright: reportUnknownMemberType=false
from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import NamedTuple

import httpx
from websockets.asyncio.client import ClientConnection, connect

from stretto.engine.core import LoadedModel
from stretto.engine.runners.null import NullRunner, VirtualClock, null_info
from stretto.engine.scheduler import SCHEDULES
from stretto.engine.scheduler.types import Limits
from stretto.engine.step_time import StepCost, StepTime
from stretto.simulator.harness import World
from stretto.simulator.setting import SMALL_CPU
from stretto.statistics import quantile
from stretto.types import Objective, Request, Sampling

WORDS = (
    "please order number help refund late box blue small when where thanks deliver street paid twice".split()
)
FAST = StepCost(base=5.0, per_decode=0.05, per_prefill=0.01, per_key=1e-6)  # about a GPU
KEYS_PER_WORD = 2  # a word comes in so many events


class Sample(NamedTuple):
    """One prompt: seconds to the first token, its tokens, and those that were read before it was sent."""

    ttft: float
    tokens: int
    cached: int


@contextmanager
def served(model: str, options: list[str]) -> Generator[str]:
    """The URL of a server process."""
    with tempfile.NamedTemporaryFile("w+") as log:
        command = [sys.executable, "-m", "stretto", "serve", model, "--port", "0", *options]
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            while not (
                found := re.search(r"^ready .* (http://\S+)$", Path(log.name).read_text(), re.MULTILINE)
            ):
                if process.poll() is not None:
                    raise SystemExit(Path(log.name).read_text())
                time.sleep(0.2)
            yield found[1]
        finally:
            process.terminate()
            process.wait()


def socket_of(url: str) -> connect:
    return connect(url.replace("http", "ws", 1) + "/v1/realtime", compression=None, max_queue=4096)


async def prompt_of(client: httpx.AsyncClient, tokens: int, seed: int) -> str:
    """Words that make about so many tokens, different for each seed."""
    words = random.Random(seed).choices(WORDS, k=tokens)
    words[0] = f"number {seed}"
    while True:
        messages = [{"role": "user", "content": " ".join(words)}]
        count = (await client.post("/tokenize", json={"messages": messages})).json()["count"]
        if count <= tokens:
            return " ".join(words)
        del words[-max(1, (count - tokens) // 4) :]


async def posted(client: httpx.AsyncClient, text: str) -> Sample:
    """Post the prompt whole, and stream the answer."""
    body = {
        "messages": [{"role": "user", "content": text}],
        "stream": True,
        "max_tokens": 8,
        "ignore_eos": True,
        "stream_options": {"include_usage": True},
    }
    sent, first, usage = time.monotonic(), None, {}
    async with client.stream("POST", "/v1/chat/completions", json=body) as answer:
        async for line in answer.aiter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line.removeprefix("data: "))
            if first is None and any(choice["delta"].get("content") for choice in event["choices"]):
                first = time.monotonic()
            usage = event.get("usage") or usage
    assert first is not None, "no token came"
    return Sample(first - sent, usage["prompt_tokens"], usage["prompt_tokens_details"]["cached_tokens"])


async def type_text(socket: ClientConnection, text: str, seconds: float) -> None:
    """Send the text in small pieces, evenly over the seconds."""
    words = text.split(" ")
    pieces = [piece for word in words for piece in _cut(word + " ")]
    began = time.monotonic()
    for at, piece in enumerate(pieces, 1):
        await socket.send(json.dumps({"type": "input_text.append", "text": piece}))
        await asyncio.sleep(max(0.0, began + seconds * at / len(pieces) - time.monotonic()))


def _cut(word: str) -> list[str]:
    size = -(-len(word) // KEYS_PER_WORD)
    return [word[at : at + size] for at in range(0, len(word), size)]


async def typed(url: str, text: str, seconds: float) -> Sample:
    """Type the prompt, send it, and stream the answer."""
    async with socket_of(url) as socket:
        await type_text(socket, text, seconds)
        sent, first = time.monotonic(), None
        commit = {"type": "input_text.commit", "response": {"max_output_tokens": 8}}
        await socket.send(json.dumps(commit))
        async for message in socket:
            event = json.loads(message)
            if event["type"] == "response.output_text.delta" and first is None:
                first = time.monotonic()
            if event["type"] == "response.done":
                usage = event["response"]["usage"]
                assert first is not None, event
                cached = usage["input_token_details"]["cached_tokens"]
                return Sample(first - sent, usage["input_tokens"], cached)
    raise SystemExit("the server closed the session")


async def closed(client: httpx.AsyncClient, url: str, text: str, after: float) -> float:
    """Close a socket while its prompt is read. Returns how long before that the last step began, ms."""
    async with socket_of(url) as socket:
        await socket.send(json.dumps({"type": "input_text.append", "text": text}))
        await asyncio.sleep(after)
        now = time.monotonic()  # the clock of the engine, too
        socket.transport.abort()
    await asyncio.sleep(3.0)
    state = (await client.get("/state")).json()
    assert not state["active"] and not state["running"], state
    _, started, *_ = state["last_step"]
    return 1e3 * (now - started)


def gaps(cost: StepCost, streams: int, reads: int) -> list[float]:
    """The gaps between the tokens of some streams, in virtual time, while so many prompts are read."""
    clock = VirtualClock()
    runner = NullRunner(null_info(context=16384), cost=cost, sleep=clock.sleep)
    model = LoadedModel(runner, StepTime(cost, [0.0] * 16))
    world = World(clock, [model], Limits(64, 2048), SCHEDULES["deadline"], record=False)
    late = Objective(on_miss="late")
    for ident in range(1, streams + reads + 1):
        reading = ident > streams
        world.submit(
            Request(
                id=ident,
                model="null",
                prompt=(ident,) * (1500 if reading else 200),
                arrival=0.0,
                sampling=Sampling(max_tokens=0 if reading else 400, seed=ident, ignore_eos=True),
                objective=late,
                spare_time=reading,
            )
        )
    world.run()
    stamps = (world.stamps[ident] for ident in range(1, streams + 1))
    return sorted(later - sooner for each in stamps for sooner, later in pairwise(each))


def print_gaps() -> None:
    print("\ngaps between tokens, ms, in virtual time, beside 4 prompts of 1,500 tokens that are read")
    for name, cost in (("small CPU", SMALL_CPU), ("about a GPU", FAST)):
        for streams in (1, 8):
            alone, beside = gaps(cost, streams, 0), gaps(cost, streams, 4)
            cells = [
                f"{label} {1e3 * one:.2f} -> {1e3 * two:.2f} ({100 * (two / one - 1):+.1f} %)"
                for label, one, two in (
                    ("mean", sum(alone) / len(alone), sum(beside) / len(beside)),
                    ("p99", quantile(alone, 0.99), quantile(beside, 0.99)),
                    ("max", alone[-1], beside[-1]),
                )
            ]
            print(f"  {name}, {streams} streams: {'; '.join(cells)}")


def print_times(name: str, samples: list[Sample]) -> float:
    times = sorted(sample.ttft for sample in samples)
    left = [sample.tokens - sample.cached for sample in samples]
    print(
        f"  {name}: first token after {1e3 * median(times):.0f} ms (p99 {1e3 * quantile(times, 0.99):.0f}, "
        f"max {1e3 * times[-1]:.0f}); prompt of {median(s.tokens for s in samples):.0f} tokens, "
        f"{median(left):.0f} left to read (max {max(left)})"
    )
    return median(times)


async def measure(url: str, options: argparse.Namespace) -> None:
    """Run the rounds and print the figures."""
    async with httpx.AsyncClient(base_url=url, timeout=300) as client:
        whole: list[Sample] = []
        early: list[Sample] = []
        print(f"{options.rounds} rounds, in turn; typed over {options.seconds:g} s", flush=True)
        for number in range(options.rounds):
            text = await prompt_of(client, options.tokens, 2 * number)
            early.append(await typed(url, text, options.seconds))
            other = await prompt_of(client, options.tokens, 2 * number + 1)
            whole.append(await posted(client, other))
        ratio = print_times("posted whole", whole) / print_times("read while typed", early)
        print(f"  {ratio:.1f} times sooner")
        text = await prompt_of(client, options.tokens, 10**6)
        for after in (1.0, 2.0):
            ms = await closed(client, url, f"{after} {text}", after)
            print(f"closed {after} s after a paste: the last step had begun {ms:.0f} ms before")
    print_gaps()


def parser() -> argparse.ArgumentParser:
    """The options."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("model", help="directory of a checkpoint, or the name of a model")
    made.add_argument("--quantise", default="int8", help="empty: not at all")
    made.add_argument("--rounds", type=int, default=3)
    made.add_argument("--tokens", type=int, default=1500)
    made.add_argument("--seconds", type=float, default=20.0)
    return made


def main() -> None:
    options = parser().parse_args()
    with served(options.model, ["--quantise", options.quantise] if options.quantise else []) as url:
        asyncio.run(measure(url, options))


if __name__ == "__main__":
    main()
