"""Replaying a trace against a server: the requests that are sent and the verdict on each answer."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from stretto.bench.live import LoadedServer, prompt
from stretto.bench.metrics import Sample
from stretto.bench.trace import TraceOptions, live
from stretto.config import TIERS as USUAL
from stretto.config import Tier
from stretto.errors import StartError
from stretto.simulator.report import ReplayReport, RequestOutcome
from stretto.simulator.setting import PREFIX_BLOCK, Arrival, Setting
from stretto.types import Objective, Reason
from tests.bench.serving import DONE, OK, Piece, chunked, event, plain, serving, usage

TIERS = {
    "priority": Tier(objective=Objective(ttft_ms=150, itl_ms=1000), weight=4.0),
    "default": Tier(objective=Objective(ttft_ms=60_000, itl_ms=60_000), weight=2.0),
    "flex": Tier(objective=Objective(), weight=1.0),
}
ARRIVALS = [Arrival(float(number), 5, 2) for number in range(6)]
STATE = {"models": [{"name": "m", "vocab": 400, "context": 64}], "schedule": "fcfs"}


def text_event(text: str, reason: str | None = None) -> bytes:
    return event({"choices": [{"index": 0, "text": text, "finish_reason": reason}]})


GOOD: list[Piece] = [OK, *chunked(text_event("a"), text_event("b", "length"), usage(5, 2), DONE)]
SLOW: list[Piece] = [OK, 0.3, *chunked(text_event("a"), text_event("b", "length"), usage(5, 2), DONE)]
NEVER: list[Piece] = [OK, *chunked(text_event("", "deadline"), usage(5, 0), DONE)]
CUT: list[Piece] = [OK, *chunked(text_event("a"), text_event("", "deadline"), usage(5, 1), DONE)]
FULL = b'{"error": {"message": "no", "type": "unavailable", "code": "cannot_be_on_time"}}'
REFUSED: list[Piece] = list(plain("503 Busy", FULL))


def fake_server(work: list[Piece], path: str) -> list[Piece]:
    if path == "/v1/models":
        return list(plain("200 OK", b'{"data": [{"id": "m"}]}'))
    if path == "/state":
        return list(plain("200 OK", msgspec.json.encode(STATE)))
    return work


async def replayed(
    work: list[Piece], tier: str
) -> tuple[ReplayReport, list[RequestOutcome], list[dict[str, Any]]]:
    setting = Setting(schedule="fcfs", tiers=TIERS, mix={tier: 1.0}, context=64)
    async with serving(lambda path, _: fake_server(work, path)) as server:
        target = await LoadedServer.of(server.url, api_key=None)
        report, outcomes = await target.replay(ARRIVALS, setting, 60.0, quiet)
        target.close()
    bodies = [msgspec.json.decode(body) for path, body in server.requests if path == "/v1/completions"]
    return report, outcomes, bodies


def quiet(sample: Sample) -> None: ...


async def test_each_request_is_sent_with_its_lengths_and_objective() -> None:
    report, outcomes, bodies = await replayed(GOOD, "priority")
    assert len(bodies) == 6
    for body in bodies:
        assert len(body["prompt"]) == 5 and all(100 <= token < 300 for token in body["prompt"])
        assert (body["max_tokens"], body["ignore_eos"], body["service_tier"]) == (2, True, "priority")
        assert body["objective"] == {"ttft_ms": 150, "itl_ms": 1000, "on_miss": "degrade"}
    assert report.duration_s == pytest.approx(0.1, abs=0.03), "six requests at 60 a second"
    assert all(one.first >= one.request.arrival for one in outcomes)
    assert (report.server, report.schedule, report.steps) == (bodies and report.server, "fcfs", None)


async def test_a_flex_request_has_no_objective() -> None:
    report, _, bodies = await replayed(GOOD, "flex")
    assert all("objective" not in body for body in bodies)
    assert report.tiers["flex"].attainment == report.tiers["all"].attainment == 1.0
    assert (report.tiers["timed"].sent, report.wasted) == (0, 0.0)


@pytest.mark.parametrize(
    ("work", "reason", "attainment", "wasted"),
    [
        (GOOD, Reason.LENGTH, 1.0, 0.0),
        (SLOW, Reason.LENGTH, 0.0, 1.0),
        (CUT, Reason.DEADLINE, 0.0, 1.0),
        (NEVER, Reason.DEADLINE, 0.0, 0.0),
        (REFUSED, Reason.REFUSED, 0.0, 0.0),
        ([OK, None], Reason.ERROR, 0.0, 0.0),
    ],
)
async def test_each_answer_counts_as_on_time_late_or_refused(
    work: list[Piece], reason: Reason, attainment: float, wasted: float
) -> None:
    report, outcomes, _ = await replayed(work, "priority")
    assert {one.reason for one in outcomes} == {reason}
    tier = report.tiers["priority"]
    assert (tier.sent, tier.attainment, report.wasted) == (6, attainment, wasted)
    assert tier.refused == 6 * (reason is Reason.REFUSED) and tier.overdue == 6 * (reason is Reason.DEADLINE)


def test_prompts_share_a_prefix_where_the_trace_shares_blocks() -> None:
    one, other = (Arrival(0.0, 2 * PREFIX_BLOCK, 1, prefix=(7, block)) for block in (8, 9))
    first, second = (prompt(number, each, vocab=4000, seed=1) for number, each in enumerate((one, other)))
    assert len(first) == len(second) == 2 * PREFIX_BLOCK
    assert first[:PREFIX_BLOCK] == second[:PREFIX_BLOCK]
    assert first[PREFIX_BLOCK:] != second[PREFIX_BLOCK:]
    assert prompt(1, Arrival(0.0, 9, 1), vocab=4000, seed=1) != prompt(
        2, Arrival(0.0, 9, 1), vocab=4000, seed=1
    )


async def test_capacity_is_measured_when_no_rate_is_given() -> None:
    options = TraceOptions(loads=[1.0], schedules=["fcfs"], mix={"flex": 1.0})
    async with serving(lambda path, _: fake_server(SLOW, path)) as server:
        ((report, _),) = await live(server.url, ARRIVALS, options, api_key=None, on_done=quiet)
    assert report.capacity < len(ARRIVALS) / 0.3, "six at once, none before 0.3 s"
    async with serving(lambda path, _: fake_server(REFUSED, path)) as server:
        with pytest.raises(StartError, match=r"waiting requests failed .HTTP 503 cannot_be_on_time.*--rate"):
            await live(server.url, ARRIVALS, options, api_key=None, on_done=quiet)


async def test_the_objectives_are_the_servers_own() -> None:
    state = STATE | {"objectives": {"priority": {"ttft_ms": 1234}, "flex": {}}}
    options = TraceOptions(
        loads=[1.0],
        schedules=["fcfs"],
        mix={"flex": 1.0},
        objectives={"flex": Objective(ttft_ms=9)},
        rate=60.0,
    )

    def answer(path: str, _: bytes) -> list[Piece]:
        return (
            list(plain("200 OK", msgspec.json.encode(state))) if path == "/state" else fake_server(GOOD, path)
        )

    async with serving(answer) as server:
        ((report, _),) = await live(server.url, ARRIVALS, options, api_key=None, on_done=quiet)
    assert report.objectives == {
        "priority": Objective(ttft_ms=1234),
        "default": USUAL["default"].objective,
        "flex": Objective(ttft_ms=9),
    }


async def test_a_schedule_other_than_the_servers_is_refused() -> None:
    options = TraceOptions(loads=[1.0], schedules=["deadline"], mix={"flex": 1.0}, rate=9.0)
    async with serving(lambda path, _: fake_server(GOOD, path)) as server:
        with pytest.raises(StartError, match="runs fcfs, which is set at its start"):
            await live(server.url, ARRIVALS, options, api_key=None, on_done=quiet)


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    log = tmp_path_factory.mktemp("serve") / "out"
    command = [sys.executable, "-m", "stretto", "serve", "null=null:1", "--port", "0"]
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out)
    try:
        while "http://" not in log.read_text():
            assert process.poll() is None
        yield next(word for word in log.read_text().split() if word.startswith("http://"))
    finally:
        process.terminate()
        process.wait()


def test_bench_trace_against_a_real_server_writes_a_report(url: str, tmp_path: Path) -> None:
    rows = [f"2023-11-16 18:00:{at:02}.0000000,{20 + at},4" for at in range(40)]
    trace, settings, page = tmp_path / "azure.csv", tmp_path / "tiers.toml", tmp_path / "page.html"
    trace.write_text("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *rows, ""]))
    settings.write_text("[tiers.priority]\nttft_ms = 60000\nitl_ms = 60000\n")
    options = ["--tiers", "priority=0.5,flex=0.5", "--config", str(settings), "--report", str(page)]
    load = ["--url", url, "--load", "1,2", "--rate", "40"]
    command = [sys.executable, "-m", "stretto", "bench", "trace", str(trace), *load, *options, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    slow, fast = json.loads(done.stdout)
    assert slow["duration_s"] == pytest.approx(2 * fast["duration_s"], rel=0.01)
    for report in (slow, fast):
        tiers = report["tiers"]
        assert (tiers["all"]["sent"], report["capacity"], report["server"]) == (40, 40.0, url[7:])
        assert tiers["priority"]["sent"] + tiers["flex"]["sent"] == 40
        assert tiers["all"]["attainment"] == 1.0 and tiers["all"]["itl_ms"]["max"] > 0
    text = page.read_text()
    assert "src=" not in text.split("<script>")[0] and 'rel="stylesheet"' not in text
    assert all(
        part in text for part in ("azure.csv", "Goodput against load", "Time to first token", "Plotly")
    )
    assert "{{" not in text.split("<script>")[0]
