"""Kills or stops workers behind a gateway while streams run, and counts what the clients see.

    python benchmarks/failover.py [--workers 3] [--streams 64] [--rounds 20] [--how kill|stop] [--schema]

The workers serve the bundled model. In each round one of them is killed (SIGKILL to its server and its
engine) or stopped (SIGSTOP) while all streams are under way. Every answer is seeded, and must be the one that
an undisturbed worker gives. The workers compute in float32: with bfloat16 an answer depends a little on what
else is in a step. A lost stream has no end, a wrong one differs, and a duplicate repeats a part.
Prints one line a round, then totals: lost, wrong, and the p50, p99 and maximum of the longest pause.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import httpx

from stretto.statistics import quantile

TOKENS = 60
SCHEMA = {
    "type": "object",
    "properties": {"names": {"type": "array", "items": {"type": "string", "maxLength": 8}, "minItems": 8}},
    "required": ["names"],
    "additionalProperties": False,
}


def free_port() -> int:
    """A port that nothing uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@dataclass
class Process:
    """A `stretto` process with its children, in a process group of its own."""

    arguments: list[str]
    url: str
    popen: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, or start it again."""
        command = [sys.executable, "-m", "stretto", *self.arguments]
        self.popen = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL)

    def signal(self, number: int) -> None:
        """Send a signal to it and to its children."""
        assert self.popen is not None
        os.killpg(self.popen.pid, number)

    def end(self) -> None:
        """Kill it."""
        if self.popen is not None and self.popen.poll() is None:
            self.signal(signal.SIGCONT)
            self.signal(signal.SIGKILL)
            self.popen.wait()

    async def ready(self, client: httpx.AsyncClient) -> None:
        """Wait until it takes requests."""
        for _ in range(600):
            try:
                if (await client.get(f"{self.url}/ready")).status_code == 200:
                    return
            except httpx.HTTPError:
                pass
            await asyncio.sleep(0.1)
        raise SystemExit(f"{self.url} did not become ready in 60 s")


@dataclass
class Seen:
    """What a client saw of one stream."""

    text: str = ""
    ended: bool = False
    error: str = ""
    pauses: list[float] = field(default_factory=list[float])


def request(index: int, *, schema: bool) -> dict[str, Any]:
    """The body of stream `index`."""
    body: dict[str, Any] = {
        "messages": [{"role": "user", "content": f"What is {index} + {index * 7 % 50}? Explain at length."}],
        "stream": True,
        "max_tokens": TOKENS,
        "seed": index,
        "temperature": 1.0,
        "ignore_eos": not schema,
        "service_tier": "flex",
    }
    if schema:
        body["response_format"] = {"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA}}
    return body


async def stream(client: httpx.AsyncClient, url: str, body: dict[str, Any], began: asyncio.Event) -> Seen:
    """Read one stream to its end."""
    seen, last = Seen(), time.monotonic()
    try:
        async with client.stream("POST", f"{url}/v1/chat/completions", json=body) as answer:
            async for line in answer.aiter_lines():
                if not line.startswith("data: "):
                    continue
                now = time.monotonic()
                seen.pauses.append(now - last)
                last = now
                if line == "data: [DONE]":
                    seen.ended = True
                    continue
                event = json.loads(line.removeprefix("data: "))
                if "error" in event:
                    seen.error = event["error"]["message"]
                for choice in event.get("choices", []):
                    seen.text += choice["delta"].get("content") or ""
                began.set()
    except httpx.HTTPError as error:
        seen.error = f"{type(error).__name__}: {error}"
    began.set()
    return seen


class Counts(NamedTuple):
    """What happened to the streams: how many ran when a worker failed, and how many went wrong."""

    running: int
    lost: int
    wrong: int


async def measure(options: argparse.Namespace) -> Counts:
    """Start everything, run the rounds, and print the figures."""
    ports = [free_port() for _ in range(options.workers)]
    urls = [f"http://127.0.0.1:{port}" for port in ports]
    workers = [
        Process(["serve", "--port", str(port), "--threads", "1", "--dtype", "float32"], url)
        for port, url in zip(ports, urls, strict=True)
    ]
    port = free_port()
    gateway = Process(
        ["gateway", "--port", str(port), *(part for url in urls for part in ("--worker", url))],
        f"http://127.0.0.1:{port}",
    )
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=options.streams)
    lost = wrong = failed = 0
    pauses: list[float] = []
    try:
        for process in (*workers, gateway):
            process.start()
        async with httpx.AsyncClient(timeout=120, limits=limits) as client:
            for process in (*workers, gateway):
                await process.ready(client)
            bodies = [request(index, schema=options.schema) for index in range(options.streams)]
            right = await asyncio.gather(*(stream(client, urls[0], body, asyncio.Event()) for body in bodies))
            assert all(seen.ended for seen in right), right[0]
            generator = random.Random(1)
            for number in range(options.rounds):
                began = [asyncio.Event() for _ in bodies]
                tasks = [
                    asyncio.create_task(stream(client, gateway.url, body, start))
                    for body, start in zip(bodies, began, strict=True)
                ]
                await asyncio.gather(*(start.wait() for start in began))
                await asyncio.sleep(generator.random() * 0.3)
                running = sum(not task.done() for task in tasks)
                victim = generator.choice(workers)
                victim.signal(signal.SIGKILL if options.how == "kill" else signal.SIGSTOP)
                answers = await asyncio.gather(*tasks)
                round_lost = sum(not seen.ended for seen in answers)
                round_wrong = sum(
                    seen.ended and seen.text != good.text for seen, good in zip(answers, right, strict=True)
                )
                lost, wrong, failed = lost + round_lost, wrong + round_wrong, failed + running
                pauses += [max(seen.pauses) for seen in answers]
                longest = max(max(seen.pauses) for seen in answers)
                print(
                    f"round {number + 1}: {running} running, {round_lost} lost, {round_wrong} wrong, "
                    f"longest pause {longest:.2f} s"
                )
                for seen in answers:
                    if seen.error:
                        print("   ", seen.error)
                        break
                if options.how == "kill":
                    victim.end()
                    victim.start()
                else:
                    victim.signal(signal.SIGCONT)
                await victim.ready(client)
                await asyncio.sleep(0.5)
            state = (await client.get(f"{gateway.url}/state")).json()
    finally:
        for process in (gateway, *workers):
            process.end()
    pauses.sort()
    print(
        f"{options.rounds} rounds of {options.streams} streams, {failed} running at the failure: "
        f"{lost} lost, {wrong} wrong; longest pause of a stream p50 {quantile(pauses, 0.5):.2f} s, "
        f"p99 {quantile(pauses, 0.99):.2f} s, max {pauses[-1]:.2f} s; "
        f"failovers {state['failovers']}, retries {state['retries']}"
    )
    return Counts(failed, lost, wrong)


def parser() -> argparse.ArgumentParser:
    """The options."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--workers", type=int, default=3)
    made.add_argument("--streams", type=int, default=64)
    made.add_argument("--rounds", type=int, default=20)
    made.add_argument("--how", choices=["kill", "stop"], default="kill")
    made.add_argument("--schema", action="store_true", help="answers follow a JSON schema")
    return made


if __name__ == "__main__":
    counts = asyncio.run(measure(parser().parse_args()))
    sys.exit(bool(counts.lost or counts.wrong))
