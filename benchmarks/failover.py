"""Kills or stops workers or a gateway while streams run, and counts what the clients see.

    python benchmarks/failover.py [--how kill|stop|gateway] [--schema] [--streams 64] [--rounds 20]

The workers serve the bundled model. In each round one of them is killed (SIGKILL to its server and its
engine) or stopped (SIGSTOP) while all streams are under way. With `--how gateway` there are two gateways, and
one of them is killed: its streams must break off in an error that the client sees, and the client sends the
request to the other one.

Every answer is seeded, and must be the one that an undisturbed worker gives. The workers compute in float32,
because with bfloat16 an answer depends a little on what else is in a step; every request names its variant,
because a ladder chooses by load. A seed whose undisturbed answers differ, because two tokens are nearly a
tie, is replaced by another. A lost stream has no end, a wrong one differs, a duplicate repeats a part,
and a silent one was cut without an error. A tied one differs too, but at a token whose random number lies at
the edge of the token's share: without a failure, the answer changes there too if the token's logit is lowered
by 0.002. (Of 40 answers that were changed on purpose none passed as a tie.) The pause is the gap between two
tokens in which the failure fell, beside the gap at a random instant of an undisturbed round. Prints one line
a round, then totals.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from bisect import bisect
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import httpx

from stretto.statistics import quantile

TOKENS = 60
UNDISTURBED = 3  # rounds without a failure
LIGHTER = 0.002  # far beyond the rounding errors of a logit, about 0.00001
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
    """What a client saw of one stream. `times`: when each event came, after the request's start."""

    text: str = ""
    ended: bool = False
    error: str = ""
    times: list[float] = field(default_factory=list[float])

    def gap_at(self, when: float) -> float | None:
        """Seconds between the two events around `when`; None if the stream did not run then."""
        place = bisect(self.times, when)
        if place < 2 or place == len(self.times):  # the first gap is the wait for the first token
            return None
        return self.times[place] - self.times[place - 1]

    def repeats(self, right: str) -> bool:
        """Whether it is the right answer with a part that comes twice."""
        text = self.text
        extra = len(text) - len(right)
        return extra > 0 and alike(text, right) + alike(text[::-1], right[::-1]) >= len(right)


def alike(one: str, other: str) -> int:
    """How many characters are equal from the beginning."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(one), len(other)))


def request(index: int, *, schema: bool) -> dict[str, Any]:
    """The body of stream `index`."""
    body: dict[str, Any] = {
        "model": "desk:full",
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
    seen = Seen(times=[time.monotonic()])
    try:
        async with client.stream("POST", f"{url}/v1/chat/completions", json=body) as answer:
            if answer.status_code != 200:
                await answer.aread()
                seen.error = f"{answer.status_code}: {answer.text[:200]}"
            async for line in answer.aiter_lines():
                if not line.startswith("data: "):
                    continue
                seen.times.append(time.monotonic())
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
    """What happened to the streams: how many ran when something failed, and how many went wrong.

    `cut`: ended in an error because their gateway died, and were sent again.
    """

    running: int = 0
    lost: int = 0
    wrong: int = 0
    duplicated: int = 0
    cut: int = 0
    silent: int = 0
    tied: int = 0

    def __add__(self, other: object) -> Counts:
        return Counts(*map(sum, zip(self, cast("Counts", other), strict=True)))


@dataclass
class Cluster:
    """Workers and gateways in processes of their own, and a client."""

    workers: list[Process]
    gateways: list[Process]
    client: httpx.AsyncClient

    async def ready(self) -> None:
        """Wait until all take requests, and all gateways have all workers."""
        for process in (*self.workers, *self.gateways):
            await process.ready(self.client)
        for gateway in self.gateways:
            for _ in range(600):
                if all(worker["usable"] for worker in (await self.state(gateway))["workers"]):
                    break
                await asyncio.sleep(0.1)
            else:
                raise SystemExit(f"{gateway.url} did not find all workers usable in 60 s")

    async def state(self, gateway: Process) -> dict[str, Any]:
        """What a gateway says of its workers and itself."""
        return (await self.client.get(f"{gateway.url}/state")).json()

    async def idle(self) -> None:
        """Wait until no worker has a request: whatever nobody reads must have been cancelled."""
        for worker in self.workers:
            for _ in range(300):
                if not (await self.client.get(f"{worker.url}/state")).json()["active"]:
                    break
                await asyncio.sleep(0.1)
            else:
                raise SystemExit(f"{worker.url} still works after 30 s on what nobody reads")

    def begin(self, bodies: list[dict[str, Any]], began: list[asyncio.Event]) -> list[asyncio.Task[Seen]]:
        """Send all requests, to the gateways in turns."""
        gateways = itertools.cycle(self.gateways)
        return [
            asyncio.create_task(stream(self.client, next(gateways).url, body, start))
            for body, start in zip(bodies, began, strict=True)
        ]


def cluster_of(count: int, gateways: int, client: httpx.AsyncClient) -> Cluster:
    """The processes, not started."""
    urls = [f"http://127.0.0.1:{free_port()}" for _ in range(count + gateways)]
    asked = [part for url in urls[:count] for part in ("--worker", url)]
    serve, gateway = ["serve", "--threads", "1", "--dtype", "float32"], ["gateway", *asked]
    made = [
        Process([*(serve if place < count else gateway), "--port", url.rpartition(":")[2]], url)
        for place, url in enumerate(urls)
    ]
    return Cluster(made[:count], made[count:], client)


def judge(answers: list[Seen], right: list[str], running: int) -> Counts:
    """Compare all answers with the right ones."""
    pairs = [(seen, text) for seen, text in zip(answers, right, strict=True) if seen.ended]
    wrong = [(seen, text) for seen, text in pairs if seen.text != text]
    repeated = sum(seen.repeats(text) for seen, text in wrong)
    silent = sum(not seen.ended and not seen.error for seen in answers)
    lost = len(answers) - len(pairs)
    return Counts(running, lost, len(wrong) - repeated, repeated, silent=silent)


async def tied(cluster: Cluster, body: dict[str, Any], right: str, text: str) -> bool:
    """Whether two answers part at a token that was nearly not drawn: with a little less weight for it, an
    undisturbed worker gives the other answer."""
    url, place = cluster.gateways[0].url, alike(right, text)

    async def post(path: str, body: dict[str, Any]) -> dict[str, Any]:
        return (await cluster.client.post(f"{url}{path}", json=body)).raise_for_status().json()

    whole = body | {"stream": False, "logprobs": True}
    choice = (await post("/v1/chat/completions", whole))["choices"][0]
    if choice["message"]["content"] != right:
        return True
    ends = itertools.accumulate(len(each["token"]) for each in choice["logprobs"]["content"])
    parts = zip(ends, choice["logprobs"]["content"], strict=True)
    token = next((each["token"] for end, each in parts if end > place), None)
    if token is None:
        return False
    asked = {"model": body["model"], "prompt": token, "add_special_tokens": False}
    ids = (await post("/tokenize", asked))["tokens"]
    lighter = whole | {"logit_bias": {str(each): -LIGHTER for each in ids}}
    answer = (await post("/v1/chat/completions", lighter))["choices"][0]["message"]["content"]
    return alike(answer, text) > place


async def again(
    cluster: Cluster, victim: Process, bodies: list[dict[str, Any]], answers: list[Seen]
) -> tuple[list[Seen], int]:
    """Send what the dead gateway broke off to the other one; returns all answers, and how many those are."""
    (other,) = (gateway for gateway in cluster.gateways if gateway is not victim)
    cut = [place for place, seen in enumerate(answers) if not seen.ended and seen.error]
    redone = await asyncio.gather(
        *(stream(cluster.client, other.url, bodies[place], asyncio.Event()) for place in cut)
    )
    whole = list(answers)
    for place, seen in zip(cut, redone, strict=True):
        whole[place] = seen
    return whole, len(cut)


async def one_round(
    cluster: Cluster, victim: Process, how: str, bodies: list[dict[str, Any]], right: list[str], wait_s: float
) -> tuple[Counts, list[float]]:
    """Let the victim fail `wait_s` seconds after all streams have begun, and judge them."""
    began = [asyncio.Event() for _ in bodies]
    tasks = cluster.begin(bodies, began)
    await asyncio.gather(*(start.wait() for start in began))
    await asyncio.sleep(wait_s)
    running = sum(not task.done() for task in tasks)
    victim.signal(signal.SIGSTOP if how == "stop" else signal.SIGKILL)
    failed = time.monotonic()
    answers = await asyncio.gather(*tasks)
    gaps = [gap for seen in answers if seen.ended and (gap := seen.gap_at(failed)) is not None]
    cut = 0
    if how == "gateway":
        first = {seen.error for seen in answers if seen.error}
        answers, cut = await again(cluster, victim, bodies, answers)
        print(f"    the client saw: {', '.join(sorted(first))}")
    counts = judge(answers, right, running)._replace(cut=cut)
    for seen in answers:
        if seen.error:
            print("   ", seen.error)
            break
    if how == "stop":
        victim.signal(signal.SIGCONT)
    else:
        victim.end()
        victim.start()
    await cluster.ready()
    await cluster.idle()
    if counts.wrong:
        differ = [
            place
            for place, seen in enumerate(answers)
            if seen.ended and seen.text != right[place]
            if not seen.repeats(right[place])
        ]
        ties = sum(
            [await tied(cluster, bodies[place], right[place], answers[place].text) for place in differ]
        )
        counts = counts._replace(wrong=counts.wrong - ties, tied=ties)
    return counts, gaps


async def undisturbed(
    cluster: Cluster, count: int, *, schema: bool
) -> tuple[list[dict[str, Any]], list[str], list[float], float]:
    """Requests whose answers are the same whatever else is in a step, with those answers, the gaps around an
    instant without a failure, and the shortest time from the last first token to the last end."""
    spare = count // 4
    bodies = [request(index, schema=schema) for index in range(count + spare)]
    texts: list[list[str]] = [[] for _ in bodies]
    usual: list[float] = []
    rests: list[float] = []
    for _ in range(UNDISTURBED):
        places = list(range(len(bodies)))
        random.Random(len(usual)).shuffle(places)
        tasks = cluster.begin([bodies[place] for place in places], [asyncio.Event() for _ in places])
        seen = await asyncio.gather(*tasks)
        if not all(each.ended for each in seen):
            raise SystemExit(f"an undisturbed answer has no end: {seen[0]}")
        middle = max(each.times[1] for each in seen) + 0.1
        rests.append(max(each.times[-1] for each in seen) - max(each.times[0] for each in seen))
        usual += [gap for each in seen if (gap := each.gap_at(middle)) is not None]
        for place, each in zip(places, seen, strict=True):
            texts[place].append(each.text)
    same = [place for place, found in enumerate(texts) if len(set(found)) == 1][:count]
    print(
        f"{sum(len(set(found)) > 1 for found in texts)} of {len(bodies)} seeds are nearly a tie", flush=True
    )
    if len(same) < count:
        raise SystemExit(f"only {len(same)} answers stay the same when nothing fails")
    return [bodies[place] for place in same], [texts[place][0] for place in same], usual, min(rests)


def spread(seconds: list[float]) -> str:
    """Quantiles for print."""
    if not seconds:
        return "none"
    ordered = sorted(seconds)
    parts = (quantile(ordered, 0.5), quantile(ordered, 0.99), ordered[-1])
    return "p50 {:.2f} s, p99 {:.2f}, max {:.2f}".format(*parts)


async def measure(options: argparse.Namespace) -> Counts:
    """Start everything, run the rounds, and print the figures."""
    how = options.how
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=options.streams)
    async with httpx.AsyncClient(timeout=120, limits=limits) as client:
        cluster = cluster_of(options.workers, 2 if how == "gateway" else 1, client)
        try:
            for process in (*cluster.workers, *cluster.gateways):
                process.start()
            await cluster.ready()
            bodies, right, usual, rest_s = await undisturbed(cluster, options.streams, schema=options.schema)
            generator, total, pauses = random.Random(1), Counts(), list[float]()
            for number in range(options.rounds):
                victim = generator.choice(cluster.gateways if how == "gateway" else cluster.workers)
                wait_s = generator.random() * min(0.3, rest_s / 3)
                counts, gaps = await one_round(cluster, victim, how, bodies, right, wait_s)
                total, pauses = total + counts, pauses + gaps
                print(f"round {number + 1}: {said(counts)}; pause {spread(gaps)}", flush=True)
            states = [await cluster.state(gateway) for gateway in cluster.gateways]
        finally:
            for process in (*cluster.gateways, *cluster.workers):
                process.end()
    failovers, retries = (sum(state[key] for state in states) for key in ("failovers", "retries"))
    print(
        f"{options.rounds} rounds of {options.streams} streams: {said(total)}; pause {spread(pauses)}; "
        f"undisturbed {spread(usual)}; failovers {failovers}, retries {retries}"
    )
    return total


def said(counts: Counts) -> str:
    """The counts as text."""
    return ", ".join(f"{value} {name}" for name, value in counts._asdict().items())


def parser() -> argparse.ArgumentParser:
    """The options."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--workers", type=int, default=3)
    made.add_argument("--streams", type=int, default=64)
    made.add_argument("--rounds", type=int, default=20)
    made.add_argument("--how", choices=["kill", "stop", "gateway"], default="kill")
    made.add_argument("--schema", action="store_true", help="answers follow a JSON schema")
    return made


if __name__ == "__main__":
    found = asyncio.run(measure(parser().parse_args()))
    sys.exit(bool(found.lost or found.wrong or found.duplicated or found.silent))
