"""Load generation: arrivals, prompts, concurrency and the requests that are sent."""

from __future__ import annotations

import asyncio
import gzip
from itertools import pairwise
from pathlib import Path
from statistics import mean, pstdev

import msgspec
import pytest
import uvloop

from stretto.bench.load import Load, arrivals, random_prompts, read_prompts, run, split_endpoint
from stretto.bench.metrics import GoodputLimits, Sample
from stretto.errors import StartError
from tests.bench.serving import DONE, OK, Piece, chat, chunked, plain, serving, usage

MODELS = plain("200 OK", b'{"data": [{"id": "desk"}]}')
STATE = plain("200 OK", b'{"models": [{"name": "desk", "vocab": 400}]}')
ANSWER: list[Piece] = [OK, *chunked(chat("a"), chat("b"), usage(3, 2), DONE)]
BUSY = b'{"error": {"message": "the queue is full", "type": "t", "code": "overloaded"}}'


def answer(path: str, body: bytes) -> list[Piece]:
    return list({"/v1/models": MODELS, "/state": STATE}.get(path, ANSWER))


def quiet(sample: Sample) -> None:
    """Ignore progress."""


def test_arrivals_are_poisson_at_the_rate_and_repeatable() -> None:
    times = arrivals(2000, 50.0, seed=3)
    gaps = [late - early for early, late in pairwise([0.0, *times])]
    assert times[-1] == pytest.approx(40.0)
    assert pstdev(gaps) / mean(gaps) == pytest.approx(1.0, abs=0.08), "exponential gaps: deviation = mean"
    assert times == arrivals(2000, 50.0, seed=3) != arrivals(2000, 50.0, seed=4)


def test_burstiness_spreads_the_gaps() -> None:
    def variation(burstiness: float) -> float:
        gaps = [b - a for a, b in pairwise([0.0, *arrivals(2000, 1.0, burstiness=burstiness)])]
        return pstdev(gaps) / mean(gaps)

    assert variation(0.25) == pytest.approx(2.0, rel=0.15)
    assert variation(100.0) == pytest.approx(0.1, rel=0.15)


def test_prompts_are_read_from_every_supported_file_format(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl.gz"
    rows = [
        '{"turns": ["first", "second"]}',
        '{"prompt": "say\\nso"}',
        '{"question": "why?", "answer": "so"}',
        '{"messages": [{"role": "user", "content": "hi"}]}',
        "",
        "a plain line",
    ]
    file.write_bytes(gzip.compress("\n".join(rows).encode()))
    assert read_prompts(file) == [
        "first",
        "say\nso",
        "why?",
        [{"role": "user", "content": "hi"}],
        "a plain line",
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"ok\n{broken\n", r":2 is not JSON"),
        (b'{"text": "x"}', "has none of the fields"),
        (b"\n\n", "has no prompt"),
        (b"\xff\xfe", "cannot read prompts"),
    ],
)
def test_a_file_without_valid_prompts_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes(content)
    with pytest.raises(StartError, match=message):
        read_prompts(file)
    with pytest.raises(StartError, match="cannot read"):
        read_prompts(tmp_path / "absent")


def test_random_prompts_contain_no_special_tokens() -> None:
    prompts = random_prompts(20, 50, vocab=400, seed=1)
    ids = [token for prompt in prompts for token in prompt]
    assert len(ids) == 1000
    assert all(isinstance(token, int) and 100 <= token < 300 for token in ids)
    assert prompts == random_prompts(20, 50, vocab=400, seed=1) != random_prompts(20, 50, vocab=400, seed=2)


async def test_random_tokens_are_within_the_servers_vocabulary() -> None:
    seen: list[Sample] = []
    async with serving(answer) as server:
        load = Load(
            requests=8, concurrency=3, random_input=16, output_tokens=2, limits=GoodputLimits(e2e_ms=60_000)
        )
        outcome = await run(server.url, load, api_key=None, on_done=seen.append)
    sent = [msgspec.json.decode(body) for path, body in server.requests if path == "/v1/completions"]
    assert (len(sent), len(seen)) == (8 + load.warm_up, 8)
    assert all(len(body["prompt"]) == 16 and max(body["prompt"]) < 400 for body in sent)
    assert all(body["ignore_eos"] and body["max_tokens"] == 2 and body["stream"] for body in sent)
    report = outcome.report
    assert (outcome.model, outcome.endpoint) == ("desk", "completions")
    assert (report.sent, report.completed, report.input_tokens, report.output_tokens) == (8, 8, 24, 16)
    assert report.good_share == 1.0
    assert report.peak_concurrency <= 3
    assert server.connections <= 4


def test_a_load_test_runs_on_uvloop() -> None:
    async def once() -> int:
        async with serving(answer) as server:
            outcome = await run(server.url, Load(requests=2, rate=99.0), api_key=None, on_done=quiet)
        return outcome.report.completed

    assert uvloop.run(once()) == 2


async def test_prompts_of_a_file_are_repeated_until_all_requests_are_sent(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("one\ntwo\n")
    async with serving(answer) as server:
        await run(server.url, Load(requests=3, rate=200.0, prompts=file), api_key=None, on_done=quiet)
    bodies = [
        msgspec.json.decode(body) for path, body in server.requests if path.endswith("chat/completions")
    ]
    assert [body["messages"][0]["content"] for body in bodies[1:]] == ["one", "two", "one"]
    assert "ignore_eos" not in bodies[0]


async def test_concurrency_is_reached_and_never_exceeded() -> None:
    slow: list[Piece] = [OK, 0.02, *chunked(chat("a"), DONE)]

    def late(path: str, body: bytes) -> list[Piece]:
        return slow if path == "/v1/completions" else answer(path, body)

    async with serving(late) as server:
        outcome = await run(server.url, Load(requests=12, concurrency=4), api_key=None, on_done=quiet)
    assert outcome.report.peak_concurrency == 4


async def test_failures_are_counted_by_kind() -> None:
    count = 0

    def sometimes(path: str, body: bytes) -> list[Piece]:
        nonlocal count
        count += path == "/v1/completions"
        busy = path == "/v1/completions" and count % 3 == 0
        return list(plain("503 Busy", BUSY)) if busy else answer(path, body)

    async with serving(sometimes) as server:
        outcome = await run(server.url, Load(requests=9, concurrency=1), api_key=None, on_done=quiet)
    assert (outcome.report.completed, outcome.report.failed) == (6, 3)
    assert outcome.report.errors == {"HTTP 503 overloaded": 3}
    assert outcome.examples == {"HTTP 503 overloaded": "the queue is full"}


async def test_a_failed_warm_up_request_stops_the_benchmark() -> None:
    def refuse(path: str, body: bytes) -> list[Piece]:
        return list(plain("503 Busy", BUSY)) if path == "/v1/completions" else answer(path, body)

    async with serving(refuse) as server:
        with pytest.raises(
            StartError, match="warm-up request failed: HTTP 503 overloaded: the queue is full"
        ):
            await run(server.url, Load(requests=1, rate=1.0), api_key=None, on_done=quiet)
    with pytest.raises(StartError, match="cannot connect"):
        await asyncio.wait_for(
            run("http://127.0.0.1:9", Load(requests=1, rate=1.0), api_key=None, on_done=quiet), 5
        )


@pytest.mark.parametrize(
    "wrong",
    [
        {},
        {"rate": 1.0, "concurrency": 1},
        {"rate": 0.0},
        {"rate": float("nan")},
        {"concurrency": 0},
        {"rate": 1.0, "endpoint": "chat"},
        {"rate": 1.0, "output_tokens": 0},
    ],
)
def test_contradicting_settings_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(StartError):
        Load(requests=1, **wrong)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("url", "means"),
    [
        ("http://x:1", ("http://x:1", None)),
        ("http://x:1/v1/", ("http://x:1/v1/", None)),
        ("http://x:1/v1/completions", ("http://x:1/v1", "completions")),
        ("http://x:1/v1/chat/completions/", ("http://x:1/v1", "chat")),
    ],
)
def test_the_address_may_include_the_endpoint(url: str, means: tuple[str, str | None]) -> None:
    assert split_endpoint(url) == means
