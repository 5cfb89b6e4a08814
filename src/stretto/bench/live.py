"""Replays a recorded load against a real server in real time. Each request is sent at its recorded time.

A token is on time if the client received it by its deadline. Deadlines count from the recorded time of the
request. Prompts are random tokens of the recorded lengths, with equal beginnings where the trace has them.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import chain, islice
from random import Random
from typing import Any

import msgspec

from stretto.bench.client import DEADLINE, Client, ServedModel
from stretto.bench.metrics import Sample
from stretto.errors import StartError
from stretto.simulator.report import ReplayReport, RequestOutcome, by_tier, wasted, weighted
from stretto.simulator.setting import PREFIX_BLOCK, Arrival, Setting, planned, within
from stretto.types import Objective, Reason, Request

PATH = "completions"
BACKLOG = 64  # requests that wait at once while the capacity is measured
REFUSALS = ("HTTP 429", "HTTP 503")
OnDone = Callable[[Sample], None]


class LoadedServer:
    """A server under load, and the model that the requests use."""

    def __init__(self, client: Client, model: ServedModel) -> None:
        self._client = client
        self.model = model

    @classmethod
    async def of(cls, url: str, *, api_key: str | None) -> LoadedServer:
        """Ask a server for its first model. Raises StartError when it does not answer."""
        client = Client(url, api_key=api_key)
        return cls(client, await client.served_model())

    async def replay(
        self, arrivals: Sequence[Arrival], setting: Setting, rate: float, on_done: OnDone
    ) -> tuple[ReplayReport, list[RequestOutcome]]:
        """Send the trace at the setting's load and wait for all answers. `rate`: requests/s at load 1.0."""
        usable = [within(arrival, setting) for arrival in arrivals]
        requests = planned(usable, setting, rate)
        samples, drained = await self._send(requests, usable, setting.seed, on_done)
        outcomes = [_outcome(request, sample) for request, sample in zip(requests, samples, strict=True)]
        end = requests[-1].arrival
        tiers = by_tier(outcomes, setting.tiers, end)
        report = ReplayReport(
            schedule=setting.schedule,
            load=setting.load,
            rate=len(outcomes) / end if end else 0.0,
            capacity=rate,
            duration_s=end,
            drained_s=drained,
            tokens=sum(one.processed for one in outcomes),
            wasted=wasted(outcomes),
            tiers=tiers,
            weighted_goodput=weighted(tiers, setting.tiers),
            objectives={name: tier.objective for name, tier in setting.tiers.items()},
            server=self._client.address.host,
            errors=dict(Counter(sample.error for sample in samples if sample.error is not None)),
        )
        return report, outcomes

    async def capacity(self, arrivals: Sequence[Arrival], setting: Setting, on_done: OnDone) -> float:
        """Requests per second that the server completes when `BACKLOG` of them, without objectives, wait.

        Raises StartError when one of them fails, because the capacity is unknown then.
        """
        waiting = [
            msgspec.structs.replace(within(arrival, setting), at=0.0) for arrival in arrivals[:BACKLOG]
        ]
        flex = msgspec.structs.replace(setting, mix={"flex": 1.0}, load=1.0)
        requests = [
            msgspec.structs.replace(request, arrival=0.0, objective=Objective(on_miss="late"))
            for request in planned(waiting, flex, 1.0)
        ]
        samples, drained = await self._send(requests, waiting, setting.seed + 1, on_done)
        failed = next((sample for sample in samples if sample.error is not None), None)
        if failed is not None:
            raise StartError(
                f"the capacity is unknown: one of {len(samples)} waiting requests failed ({failed.error}:"
                f" {failed.detail}); give the requests per second of load 1.0 with --rate"
            )
        return len(samples) / drained

    def close(self) -> None:
        self._client.close()

    async def _send(
        self, requests: Sequence[Request], arrivals: Sequence[Arrival], seed: int, on_done: OnDone
    ) -> tuple[list[Sample], float]:
        """Send each request at its time. Returns the samples, in seconds from the start, and the duration."""
        timed = [
            (request.arrival, self._body(request, arrival, seed))
            for request, arrival in zip(requests, arrivals, strict=True)
        ]
        started = time.perf_counter()
        samples = await self._client.samples(PATH, timed, on_done)
        duration = time.perf_counter() - started
        return [
            msgspec.structs.replace(
                sample,
                stamps=tuple(stamp - started for stamp in sample.stamps),
                ended=sample.ended - started,
            )
            for sample in samples
        ], duration

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
        if any(limit is not None for limit in limits.values()) or objective.on_miss == "late":
            named = {name: limit for name, limit in limits.items() if limit is not None}
            body["objective"] = named | {"on_miss": objective.on_miss}
        return msgspec.json.encode(body)


def prompt(ident: int, arrival: Arrival, *, vocab: int, seed: int) -> list[int]:
    """Token ids from the middle half of the vocabulary: special tokens lie outside.

    Equal blocks of the trace's prefix become equal tokens. All other tokens are drawn for this request.
    """
    low, high = vocab // 4, max(vocab * 3 // 4, vocab // 4 + 1)
    blocks = chain.from_iterable(
        Random(f"{seed} block {block}").choices(range(low, high), k=PREFIX_BLOCK) for block in arrival.prefix
    )
    known = list(islice(blocks, arrival.prompt_tokens))
    rest = Random(f"{seed} request {ident}").choices(range(low, high), k=arrival.prompt_tokens - len(known))
    return known + rest


def _outcome(request: Request, sample: Sample) -> RequestOutcome:
    """The sample as the simulator judges it. Each event with text counts as one token."""
    outcome = RequestOutcome.of(request)
    for stamp in sample.stamps:
        outcome.on_token(stamp)
    if sample.error is None:
        outcome.reason = Reason.DEADLINE if sample.reason == DEADLINE else Reason.LENGTH
        outcome.processed = sample.prompt_tokens + sample.output_tokens
    elif sample.error == DEADLINE:
        outcome.reason = Reason.DEADLINE
    else:
        outcome.reason = Reason.REFUSED if sample.error.startswith(REFUSALS) else Reason.ERROR
    return outcome
