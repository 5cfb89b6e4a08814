"""A recorded load against a real server in real time: each request at its instant, come what may.

Dues are judged here, by what the client heard and when, and count from the instant a request was to be sent.
Prompts are random tokens of the recorded lengths, with equal beginnings where the trace says so.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import chain, islice
from random import Random
from typing import Any

import msgspec
from msgspec import Struct

from stretto.bench.client import OVERDUE, Client, RequestFailed
from stretto.bench.load import UNKNOWN_VOCAB
from stretto.bench.metrics import Sample
from stretto.errors import StartError
from stretto.simulator.replay import ReplayReport, Setting, Told, by_tier, planned, wasted, weighted, within
from stretto.types import PREFIX_BLOCK, Arrival, Objective, Reason, Request

PATH = "completions"
BACKLOG = 64
BUSY = ("HTTP 429", "HTTP 503")
OnDone = Callable[[Sample], None]


class Model(Struct, frozen=True):
    """What a Stretto server says of a model it holds; any other is taken to have the smallest vocabulary."""

    name: str
    vocab: int = UNKNOWN_VOCAB
    context: int = 16384


class _State(Struct):
    models: list[Model]
    schedule: str = ""


class Server:
    """One server and the model on it that is asked. `schedule`: what it says it runs, if it does."""

    def __init__(self, client: Client, model: Model, schedule: str) -> None:
        self._client = client
        self.model = model
        self.schedule = schedule

    @classmethod
    async def of(cls, url: str, *, api_key: str | None) -> Server:
        """Ask it what it holds. Raises StartError when it does not answer."""
        client = Client(url, api_key=api_key)
        try:
            names = await client.models()
        except RequestFailed as failure:
            raise StartError(
                f"{client.target.host} does not answer as a model server: {failure}"
            ) from failure
        if not names:
            raise StartError(f"{client.target.host} serves no model")
        try:
            state = msgspec.json.decode(await client.get("/state"), type=_State)
        except (RequestFailed, msgspec.DecodeError):
            state = _State([])
        held = next((model for model in state.models if model.name == names[0]), Model(names[0]))
        return cls(client, held, state.schedule)

    async def replay(
        self, arrivals: Sequence[Arrival], setting: Setting, rate: float, on_done: OnDone
    ) -> tuple[ReplayReport, list[Told]]:
        """Send the trace at the setting's load, where load 1.0 is `rate`, and wait for all answers."""
        usable = [within(arrival, setting) for arrival in arrivals]
        requests = planned(usable, setting, rate)
        samples, drained = await self._send(requests, usable, setting.seed, on_done)
        told = [_told(request, sample) for request, sample in zip(requests, samples, strict=True)]
        end = requests[-1].arrival
        tiers = by_tier(told, setting.tiers, end)
        report = ReplayReport(
            schedule=setting.schedule,
            load=setting.load,
            rate=len(told) / end if end else 0.0,
            capacity=rate,
            duration_s=end,
            drained_s=drained,
            tokens=sum(one.computed for one in told),
            wasted=wasted(told),
            tiers=tiers,
            weighted_goodput=weighted(tiers, setting.tiers),
            server=self._client.target.host,
            errors=dict(Counter(sample.error for sample in samples if sample.error is not None)),
        )
        return report, told

    async def capacity(self, arrivals: Sequence[Arrival], setting: Setting, on_done: OnDone) -> float:
        """Requests per second that it completes when the first `BACKLOG` of them wait from the start, none
        with an objective. Raises StartError when it does not complete them all: then it is not known."""
        waiting = [
            msgspec.structs.replace(within(arrival, setting), at=0.0) for arrival in arrivals[:BACKLOG]
        ]
        flex = msgspec.structs.replace(setting, mix={"flex": 1.0}, load=1.0)
        requests = [
            msgspec.structs.replace(request, arrival=0.0, objective=Objective())
            for request in planned(waiting, flex, 1.0)
        ]
        samples, drained = await self._send(requests, waiting, setting.seed + 1, on_done)
        failed = next((sample for sample in samples if sample.error is not None), None)
        if failed is not None:
            raise StartError(
                f"a backlog of {len(samples)} requests did not get through ({failed.error}: {failed.detail}):"
                " say with --rate what load 1.0 is"
            )
        return len(samples) / drained

    def close(self) -> None:
        self._client.close()

    async def _send(
        self, requests: Sequence[Request], arrivals: Sequence[Arrival], seed: int, on_done: OnDone
    ) -> tuple[list[Sample], float]:
        """Each request at its instant: samples by a clock that starts with the first, and the last end."""
        bodies = [
            self._body(request, arrival, seed) for request, arrival in zip(requests, arrivals, strict=True)
        ]
        started = time.perf_counter()

        async def one(request: Request, body: bytes) -> Sample:
            await asyncio.sleep(started + request.arrival - time.perf_counter())
            sample = await self._client.sample(PATH, body)
            on_done(sample)
            stamps = tuple(stamp - started for stamp in sample.stamps)
            return msgspec.structs.replace(sample, stamps=stamps, ended=sample.ended - started)

        samples = await asyncio.gather(
            *(one(request, body) for request, body in zip(requests, bodies, strict=True))
        )
        return samples, time.perf_counter() - started

    def _body(self, request: Request, arrival: Arrival, seed: int) -> bytes:
        body: dict[str, Any] = {
            "model": self.model.name,
            "prompt": prompt(request.id, arrival, vocab=self.model.vocab, seed=seed),
            "max_tokens": arrival.output_tokens,
            "ignore_eos": True,
            "temperature": 0.0,
            "stream": True,
            "stream_options": {"include_usage": True},
            "service_tier": request.tier,
        }
        objective = request.objective
        limits = {name: getattr(objective, name) for name in ("ttft_ms", "itl_ms", "total_ms")}
        if any(limit is not None for limit in limits.values()):
            named = {name: limit for name, limit in limits.items() if limit is not None}
            body["objective"] = named | {"on_miss": objective.on_miss}
        return msgspec.json.encode(body)


def prompt(ident: int, arrival: Arrival, *, vocab: int, seed: int) -> list[int]:
    """Token ids from the middle half of the vocabulary, where no special token lies. Equal blocks of the
    trace's prefix are equal tokens, all else is drawn for this request."""
    low, high = vocab // 4, max(vocab * 3 // 4, vocab // 4 + 1)
    blocks = chain.from_iterable(
        Random(f"{seed} block {block}").choices(range(low, high), k=PREFIX_BLOCK) for block in arrival.prefix
    )
    known = list(islice(blocks, arrival.prompt_tokens))
    rest = Random(f"{seed} request {ident}").choices(range(low, high), k=arrival.prompt_tokens - len(known))
    return known + rest


def _told(request: Request, sample: Sample) -> Told:
    """The sample as the replay's judge has it: each piece of text is a token, heard when it came."""
    told = Told(request)
    for stamp in sample.stamps:
        told.hear(stamp)
    if sample.error is None:
        told.reason = Reason.DEADLINE if sample.reason == OVERDUE else Reason.LENGTH
        told.computed = sample.prompt_tokens + sample.output_tokens
    elif sample.error == OVERDUE:
        told.reason = Reason.DEADLINE
    else:
        told.reason = Reason.REFUSED if sample.error.startswith(BUSY) else Reason.ERROR
    return told
