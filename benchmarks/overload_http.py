"""An overload over HTTP: the load that `overload.py --http` sends to a server of the null model.

A request names only its tier, so the server's default objectives are in force.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import inf
from random import Random

from serving import serving

from stretto.bench.client import Client
from stretto.bench.metrics import Sample
from stretto.engine.runners.null import null_cost
from stretto.engine.scheduler.lateness import longest_wait_s
from stretto.simulator.replay import capacity
from stretto.simulator.report import RequestOutcome
from stretto.simulator.setting import MIX, Arrival, Setting
from stretto.statistics import spread
from stretto.types import Objective, Reason, Request

CALM = 0.5  # of the capacity, before and after the overload
RECOVERY_S = 5.0
PROBE_S = 0.2
SHORTEST_S = 1.0  # `Retry-After` is whole seconds
REFUSED = "HTTP 503"


@dataclass(frozen=True, slots=True)
class SentRequest:
    """One request and what its client saw, in seconds of the client's clock."""

    tier: str
    sample: Sample
    outcome: RequestOutcome

    @property
    def at(self) -> float:
        return self.sample.started

    @property
    def refused(self) -> bool:
        return (self.sample.error or "").startswith(REFUSED)


def run(options: argparse.Namespace) -> None:
    """Start the server, measure the peak, send the overload, and print the figures."""
    path = f"null:{options.null}"
    full = capacity([Arrival(0.0, options.prompt, options.output)] * 200, Setting(cost=null_cost(path)))
    with serving(f"null={path}", *(["--config", str(options.config)] if options.config else [])) as url:
        asyncio.run(_run(url, full, options))


async def _run(url: str, full: float, options: argparse.Namespace) -> None:
    client = Client(url)
    objectives = (await client.served_model()).objectives
    load = LoadSender(client, objectives, options)
    print(f"objectives {objectives}\nfcfs saturates at {full:.2f} requests/s, by the step times", flush=True)
    peak = 0.0
    for share in (0.7, 0.8, 0.9):
        sent = await load.send([(options.probe, share * full)])
        goodput = _goodput(sent, sent[0].at, sent[0].at + options.probe)
        peak = max(peak, goodput)
        print(f"load {share:g}: goodput {goodput:.2f} requests/s", flush=True)
        await asyncio.sleep(RECOVERY_S)
    calm, window = options.probe, options.window
    probing = asyncio.create_task(_probe(client))
    sent = await load.send([(calm, CALM * full), (window, options.load * peak), (calm, CALM * full)])
    probing.cancel()
    begin = sent[0].at + calm
    _report(sent, peak, (begin, begin + window), objectives)
    probes = [ms for at, ms in await probing if begin <= at < begin + window]
    print(f"for comparison, GET /health in the overload took {_seconds(probes, 'ms')}")
    client.close()


async def _probe(client: Client) -> list[tuple[float, float]]:
    """When and for how many milliseconds the server was asked for its health, until this is cancelled."""
    probes: list[tuple[float, float]] = []
    with suppress(asyncio.CancelledError):
        while True:
            at = time.perf_counter()
            await client.get("/health")
            probes.append((at, (time.perf_counter() - at) * 1e3))
            await asyncio.sleep(PROBE_S)
    return probes


class LoadSender:
    """Sends requests at random times (Poisson), of tiers drawn from the mix."""

    def __init__(self, client: Client, objectives: dict[str, Objective], options: argparse.Namespace) -> None:
        self._client = client
        self._objectives = objectives
        self._options = options
        self._rng = Random(options.seed)

    async def send(self, phases: Sequence[tuple[float, float]]) -> list[SentRequest]:
        """Send the phases (seconds, requests per second) and wait for every answer."""
        plan = list(self._plan(phases))
        timed = [(at, self._body(tier)) for at, tier in plan]
        samples = await self._client.samples("completions", timed, lambda _: None)
        return [self._seen(tier, one) for (_, tier), one in zip(plan, samples, strict=True)]

    def _plan(self, phases: Sequence[tuple[float, float]]) -> Iterator[tuple[float, str]]:
        begin = 0.0
        for seconds, rate in phases:
            at = begin if begin else 1e-3
            while at < begin + seconds:
                yield at, self._rng.choices(list(MIX), list(MIX.values()))[0]
                at += self._rng.expovariate(rate)
            begin += seconds

    def _body(self, tier: str) -> bytes:
        ids = self._rng.choices(range(1000, 3000), k=self._options.prompt)
        fields = {"prompt": ids, "max_tokens": self._options.output, "ignore_eos": True, "stream": True}
        return json.dumps(fields | {"service_tier": tier}).encode()

    def _seen(self, tier: str, sample: Sample) -> SentRequest:
        """The sample, judged by the tier's objective. Each event with text counts as one token."""
        objective = self._objectives.get(tier, Objective())
        request = Request(
            id=1, model="null", prompt=(1,), arrival=sample.started, tier=tier, objective=objective
        )
        outcome = RequestOutcome.of(request)
        for stamp in sample.stamps:
            outcome.on_token(stamp)
        outcome.reason = Reason.LENGTH if sample.error is None else Reason.REFUSED
        return SentRequest(tier, sample, outcome)


def _goodput(sent: Sequence[SentRequest], begin: float, end: float) -> float:
    """Requests on time that ended in this time, per second."""
    return sum(one.outcome.good and begin <= one.sample.ended < end for one in sent) / (end - begin)


def _report(
    sent: Sequence[SentRequest], peak: float, window: tuple[float, float], objectives: dict[str, Objective]
) -> None:
    begin, end = window
    goodput = _goodput(sent, begin, end)
    print(
        f"peak {peak:.2f}; goodput in the overload {goodput:.2f} requests/s, {goodput / peak:.0%} of the peak"
    )
    errors = [one.sample.error for one in sent if one.sample.error and not one.refused]
    refused = [one for one in sent if one.refused]
    print(f"{len(sent)} sent, {len(refused)} refused, {len(errors)} other errors {errors[:3]}")
    for tier in MIX:
        mine = [one for one in sent if one.tier == tier]
        begun = [one for one in mine if one.outcome.count]
        bound_s = longest_wait_s((objectives[tier].ttft_ms or inf) / 1e3, 0.0)
        print(
            f"{tier}: {len(mine)} sent, {sum(one.outcome.good for one in mine)} on time,"
            f" {sum(one.refused for one in mine)} refused;"
            f" TTFT of the admitted {_seconds([one.sample.ttft for one in begun])}, bound {bound_s:g} s"
        )
    took = [(one.sample.ended - one.at) * 1e3 for one in refused]
    quick = sum(ms < 20 for ms in took)
    print(f"refused after {_seconds(took, 'ms')}; {quick} of {len(refused)} within 20 ms")
    _print_retries(sent, refused)
    before = [one.sample.ttft for one in sent if one.at < begin and one.outcome.count and one.tier != "flex"]
    later = [one for one in sent if one.at >= end + RECOVERY_S and one.tier != "flex"]
    after = [one.sample.ttft for one in later if one.outcome.count]
    print(f"TTFT before the overload {_seconds(before)}; from 5 s after it {_seconds(after)}, without flex")
    bad = [one.at - end for one in sent if one.at > end and not one.outcome.good]
    print(f"the last request that was refused or late came {max(bad, default=0.0):.1f} s after the overload")


def _print_retries(sent: Sequence[SentRequest], refused: Sequence[SentRequest]) -> None:
    """The time until the next request of the tier was admitted, divided by what `Retry-After` said.

    Both are at least `SHORTEST_S`.
    """
    ratios: list[float] = []
    for one in refused:
        alike = (
            other for other in sent if other.tier == one.tier and other.at > one.at and not other.refused
        )
        actual = next((other.at - one.at for other in alike), inf)
        ratios.append(max(actual, SHORTEST_S) / max(one.sample.retry_after or 0.0, SHORTEST_S))
    if told := spread([one.sample.retry_after or 0.0 for one in refused]):
        right = sum(0.5 <= ratio <= 2 for ratio in ratios)
        ordered = sorted(ratios)
        shown = ", ".join(f"{ordered[int(q * (len(ordered) - 1))]:.2f}" for q in (0, 0.1, 0.5, 0.9, 1))
        print(
            f"Retry-After {told.p50:g} s (p50), {told.max:g} s (max); right within a factor of 2: {right} of"
            f" {len(refused)}; actual / said: {shown} (min, p10, p50, p90, max)"
        )


def _seconds(values: Sequence[float], unit: str = "s") -> str:
    seen = spread(values)
    return "-" if seen is None else f"p50 {seen.p50:.2f}, p99 {seen.p99:.2f}, max {seen.max:.2f} {unit}"
