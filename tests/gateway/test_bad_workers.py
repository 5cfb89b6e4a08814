"""Workers that lie, flap, speak another version, are not ours or present an expired certificate; and gateways
that were set up differently. Requests go on at the worker that is well."""

from __future__ import annotations

import asyncio
import shutil
import ssl
import subprocess
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from msgspec import Raw, msgpack, structs

from stretto.engine.scheduler.admission import Snapshot
from stretto.engine.scheduler.estimate import Estimate
from stretto.engine.step_time import StepCost
from stretto.gateway import registry
from stretto.gateway.app import Gateway
from stretto.gateway.cache.policy import CachePolicy
from stretto.gateway.registry import Worker
from stretto.gateway.settings import GatewayConfig
from stretto.protocol.relay import WorkerReport
from tests.gateway.cluster import ASK, CHAT, cluster, fake, text_of, until
from tests.server.fake_engine import info

NAN, INF = float("nan"), float("inf")
COST = StepCost(base=1.0, per_decode=1.0, per_prefill=0.1)
WELL = Snapshot(now=1.0, newest=0, estimate=Estimate(COST, 1.0), context=0, prompts={}, inflow={}, lengths={})


def report(snapshot: object = WELL, **changed: Any) -> bytes:
    made = WorkerReport(
        now=1.0,
        boot="b",
        ready=True,
        draining=False,
        models=(info(vocab=600),),
        tiers={},
        snapshots={"tiny": Raw(msgpack.encode(snapshot))},
    )
    return msgpack.encode(structs.replace(made, **changed))


def costing(**changed: float) -> Snapshot:
    return structs.replace(WELL, estimate=Estimate(structs.replace(COST, **changed), 1.0))


ABSURD: dict[str, bytes] = {
    "no msgpack": b"<html>",
    "nothing": b"",
    "another object": msgpack.encode({"a": 1}),
    "another version": report(version=2),
    "no snapshot": report({"a": 1}),
    "a time that is no number": report(now=NAN),
    "quality": report(quality=NAN),
    "joules": report(joules={"tiny": -1.0}),
    "ratio": report(bytes_per_token={"tiny": NAN}),
    "negative cache": report(models=(structs.replace(info(vocab=600), blocks=-5),)),
    "endless cache": report(models=(structs.replace(info(vocab=600), blocks=1 << 60),)),
    "no context": report(models=(structs.replace(info(vocab=600), context=0),)),
    "cost": report(costing(per_prefill=NAN)),
    "gain": report(costing(per_prefill=-1.0)),
    "endless cost": report(costing(base=INF)),
    "margin": report(structs.replace(WELL, estimate=Estimate(COST, NAN))),
    "negative margin": report(structs.replace(WELL, estimate=Estimate(COST, -1.0))),
    "inflow": report(structs.replace(WELL, inflow={2.0: NAN})),
    "worth": report(structs.replace(WELL, worth={"local": NAN})),
    "patient cost": report(structs.replace(WELL, patient=costing(per_prefill=NAN).estimate)),
    "patient margin": report(structs.replace(WELL, patient=Estimate(COST, 0.0))),
    "patient pace": report(structs.replace(WELL, patient=Estimate(COST, 1.0, itl_ms=0.0))),
    "time": report(structs.replace(WELL, now=INF)),
}


@asynccontextmanager
async def speaking(answer: Callable[[], bytes], kind: str = "application/msgpack") -> AsyncGenerator[str]:
    """A server that answers each GET with `answer()`, and breaks every other connection off."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while (await reader.readuntil(b"\r\n\r\n")).startswith(b"GET"):
                body = answer()
                writer.write(
                    b"HTTP/1.1 200 OK\r\nContent-Type: %b\r\nContent-Length: %d\r\n\r\n%b"
                    % (kind.encode(), len(body), body)
                )
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        writer.transport.abort()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine may keep the worker that is well from reporting in time."""
    monkeypatch.setattr(registry, "SILENT_S", 10.0)


def joined(gateway: Gateway, url: str) -> Worker:
    return gateway.registry.join(url)


@pytest.mark.parametrize("name", ABSURD)
async def test_an_absurd_report_makes_a_worker_unusable_until_it_makes_sense(checkpoint: Path, name: str):
    said = ABSURD[name]
    engine = fake(10, 11)
    async with (
        cluster(checkpoint, engine) as (client, gateway),
        speaking(lambda: said) as url,
    ):
        worker = joined(gateway, url)
        await until(lambda: worker.error not in ("", "no report yet"))
        assert "report" in worker.error and not worker.view.usable
        for _ in range(3):
            assert len(text_of(await client.post(CHAT, json=ASK))) == 2
        assert len(engine.requests) == 3 and (await client.get("/state")).status_code == 200
        said = report()
        await until(lambda: worker.view.usable)


async def test_a_worker_that_lies_about_being_idle_costs_a_retry_and_no_answer(checkpoint: Path):
    """Its reports promise the first token at once, and each request is broken off."""
    engine = fake(10, 11)
    async with (
        cluster(checkpoint, engine) as (client, gateway),
        speaking(lambda: report(costing(base=0.0, per_prefill=0.0))) as url,
    ):
        worker = joined(gateway, url)
        await until(lambda: worker.view.usable)
        body = ASK | {"objective": {"ttft_ms": 5000}}
        answers = await asyncio.gather(*(client.post(CHAT, json=body) for _ in range(12)))
        assert [len(text_of(answer)) for answer in answers] == [2] * 12
        assert len(engine.requests) == 12 and gateway.relay.failovers == 0


async def test_a_worker_that_flaps_loses_no_request(checkpoint: Path):
    """Every other report is garbage."""
    engine, turn = fake(10, 11), count()
    async with (
        cluster(checkpoint, engine) as (client, gateway),
        speaking(lambda: report() if next(turn) % 2 else b"x") as url,
    ):
        worker = joined(gateway, url)
        await until(lambda: next(turn) > 4)
        for _ in range(20):
            assert len(text_of(await client.post(CHAT, json=ASK))) == 2
        assert len(engine.requests) == 20 and worker.name in gateway.registry.workers


async def test_what_is_no_worker_gets_no_request(checkpoint: Path):
    """A web page at every path, and a server of another kind without models."""
    engine = fake(10)
    async with (
        cluster(checkpoint, engine) as (client, gateway),
        speaking(lambda: b"<!doctype html><title>Router</title>", "text/html") as url,
    ):
        worker = joined(gateway, url)
        await until(lambda: "cannot be read" in worker.error)
        assert len(text_of(await client.post(CHAT, json=ASK))) == 1
        (row,) = [
            each for each in (await client.get("/state")).json()["workers"] if each["name"] == worker.name
        ]
        assert not row["usable"] and "cannot be read" in row["error"]


def expired(folder: Path) -> tuple[Path, Path]:
    """A certificate for 127.0.0.1 that ended in 2020, and its key."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    (folder / "index.txt").touch()
    (folder / "serial").write_text("01")
    (folder / "ca.cnf").write_text(
        "[ca]\ndefault_ca=d\n[d]\ndatabase=index.txt\nnew_certs_dir=.\nserial=serial\ndefault_md=sha256\n"
        "policy=p\nx509_extensions=e\n[p]\ncommonName=supplied\n[e]\nsubjectAltName=IP:127.0.0.1\n"
        "basicConstraints=critical,CA:TRUE\n"
    )
    for line in (
        "ecparam -name prime256v1 -genkey -noout -out key.pem",
        "req -new -key key.pem -subj /CN=127.0.0.1 -out asked.csr",
        "ca -batch -selfsign -config ca.cnf -keyfile key.pem -in asked.csr -startdate 20200101000000Z"
        " -enddate 20200201000000Z -notext -out cert.pem",
    ):
        subprocess.run(["openssl", *line.split()], cwd=folder, check=True, capture_output=True)
    return folder / "cert.pem", folder / "key.pem"


async def test_a_worker_with_an_expired_certificate_is_named_and_gets_nothing(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Its issuer is trusted, so the date alone is wrong."""
    certificate, key = expired(tmp_path)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    heard: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heard.append(await reader.read(100))

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
    engine = fake(10)
    async with cluster(checkpoint, engine) as (client, gateway):
        worker = joined(gateway, f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}")
        await until(lambda: "certificate has expired" in worker.error)
        assert not worker.view.usable
        assert len(text_of(await client.post(CHAT, json=ASK))) == 1
    server.close()
    assert not any(heard)


async def test_gateways_that_are_set_up_differently_do_each_as_they_are_told(checkpoint: Path):
    """One keeps answers, the other one does not; a third one has another gateway_key."""
    engine = fake(10)
    fixed = ASK | {"temperature": 0}
    policies = {"*": CachePolicy()}
    async with cluster(checkpoint, engine, gateway_key="g", caches=policies) as (client, gateway):
        urls = tuple(f"http://{name}" for name in gateway.registry.workers)
        other, stranger = (
            Gateway(GatewayConfig(workers=urls, port=0, gateway_key=key)) for key in ("g", "wrong")
        )
        for each in (other, stranger):
            await each.wait_ready()
        (well,), (refused,) = ([*each.registry.workers.values()] for each in (other, stranger))
        await until(lambda: well.view.usable and "status" in refused.error)
        assert "401" in refused.error and not refused.view.usable
        answers = [await client.post(CHAT, json=fixed) for _ in range(2)]
        assert [answer.headers.get("x-stretto-cached") for answer in answers] == [None, "exact"]
        assert other.answers.stats.report().kept == 0 and well.models == {"tiny": well.models["tiny"]}
        for each in (other, stranger):
            await each.shutdown(1.0)
