"""A real server of the null model, at several times what it can do: it serves a request or refuses it."""

from __future__ import annotations

import asyncio
from pathlib import Path
from random import Random

import msgspec
import pytest

from stretto.bench.client import Client
from stretto.bench.metrics import Sample
from stretto.engine.scheduler.lateness import LATEST
from tests.server_process import serving

NULL = "null=null:5:0.5:2"  # a prompt of 100 tokens takes 205 ms: 5 such requests in a second are too many
TTFT_S, SECONDS, RATE = 4.0, 12.0, 12.0
SLACK_S = 10.0  # for a machine that is busy with other tests


async def overloaded(url: str) -> list[Sample]:
    rng, client, at = Random(1), Client(url), 0.0
    timed: list[tuple[float, bytes]] = []
    while at < SECONDS:
        body = {"prompt": rng.choices(range(1000, 3000), k=100), "max_tokens": 4, "ignore_eos": True}
        timed.append((at, msgspec.json.encode(body | {"stream": True})))
        at += rng.expovariate(RATE)
    try:
        return await client.samples("completions", timed, lambda _: None)
    finally:
        client.close()


@pytest.mark.slow
def test_an_overload_over_http(tmp_path: Path) -> None:
    file = tmp_path / "stretto.toml"
    file.write_text(f"[tiers.default]\nttft_ms = {TTFT_S * 1e3}\n")
    with serving(tmp_path, NULL, "--config", str(file)) as server:
        samples = asyncio.run(overloaded(server.url))
        assert server.get("/state")[1]["objectives"]["default"]["ttft_ms"] == TTFT_S * 1e3
    refused = [one for one in samples if one.error is not None]
    served = [one for one in samples if one.error is None]
    assert {one.error for one in refused} == {"HTTP 503 cannot_be_on_time"}
    assert len(refused) > len(samples) / 4, "it can do less than half of them"
    assert len(served) > 2.0 * SECONDS, "it goes on answering"
    assert all(one.retry_after is not None and 1 <= one.retry_after <= SECONDS for one in refused)
    assert all(one.ttft <= LATEST * TTFT_S + SLACK_S for one in served), "nobody waits beyond the bound"
    waited = [one.ended - one.started for one in refused]
    assert sum(wait < TTFT_S / 2 for wait in waited) >= 0.8 * len(waited), "they are told when they come"
