"""Keys, limits and usage at a running gateway, over HTTP."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from starlette.datastructures import Headers

from stretto.config import ServeConfig
from stretto.engine.step_time import StepCost
from stretto.errors import StartError, Unauthorised
from stretto.gateway import settings
from stretto.gateway.accounts import issue
from stretto.gateway.accounts.keys import KeyFile
from stretto.gateway.accounts.prices import Price
from stretto.gateway.app import Gateway
from stretto.gateway.settings import GatewayConfig
from stretto.ladder.registry import TokenEnergy
from stretto.server.app import App
from tests.gateway.cluster import ASK, CHAT, cluster, fake
from tests.ladder.tiny_ladder import variant
from tests.server.fake_engine import FakeEngine, info
from tests.server.variants.test_placement import build


@pytest.fixture
def file(tmp_path: Path) -> KeyFile:
    made = KeyFile(tmp_path / "keys.json")
    create(made, "admin", scopes=("admin",))
    return made


def create(file: KeyFile, tenant: str, **fields: Any) -> dict[str, str]:
    """The header of a new key."""
    return {"Authorization": f"Bearer {issue.create(file, now(), tenant=tenant, **fields).key}"}


def now() -> datetime:
    return datetime.now(UTC)


async def wait_for(condition: Callable[[], bool]) -> None:
    for _ in range(500):
        if condition():
            return
        await asyncio.sleep(0.02)
    raise AssertionError("it did not become true in 10 s")


async def test_the_tenant_is_that_of_the_key_and_never_of_the_body(checkpoint: Path, file: KeyFile):
    ann = create(file, "ann")
    engine = fake(10)
    async with cluster(checkpoint, engine, gateway_key="g", keys_file=str(file.path)) as (client, _):
        assert (await client.post(CHAT, json=ASK)).status_code == 401
        answer = await client.post(CHAT, json=ASK | {"user": "bob"}, headers=ann | {"x-tenant": "bob"})
        assert answer.status_code == 200 and engine.requests[-1].tenant == "ann"
        for field in ("tenant", "api_key", "organization"):
            refused = await client.post(CHAT, json=ASK | {field: "bob"}, headers=ann)
            assert refused.status_code == 400 and field in refused.text
        assert {request.tenant for request in engine.requests} == {"ann"}


async def test_scopes_say_which_paths_a_key_may_use(checkpoint: Path, file: KeyFile):
    ann, admin = create(file, "ann"), create(file, "ops", scopes=("admin",))
    async with cluster(checkpoint, fake(10), gateway_key="g", keys_file=str(file.path)) as (client, gateway):
        name = next(iter(gateway.registry.workers))
        drain = f"/v1/workers/{name}/drain"
        assert (await client.post(drain)).status_code == 401
        refused = await client.post(drain, headers=ann)
        assert refused.status_code == 403 and refused.json()["error"]["code"] == "not_allowed"
        assert (await client.post(drain, headers=admin)).status_code == 200
        assert (await client.post(drain, headers={"x-api-key": "g"})).status_code == 200
        assert (await client.post(CHAT, json=ASK, headers=admin)).status_code == 403
        assert (await client.get("/v1/usage?tenant=bob", headers=ann)).status_code == 403
        assert (await client.get("/v1/usage?tenant=bob", headers=admin)).status_code == 200


async def test_a_rate_is_answered_with_429_and_a_retry_after_that_is_right(checkpoint: Path, file: KeyFile):
    ann = create(file, "ann", limits=("requests=2/second",))
    async with cluster(checkpoint, fake(10), gateway_key="g", keys_file=str(file.path)) as (client, gateway):
        frozen = gateway.ledger.now()
        gateway.ledger.now = lambda: frozen
        answers = [await client.post(CHAT, json=ASK, headers=ann) for _ in range(3)]
        assert [each.status_code for each in answers] == [200, 200, 429]
        error = answers[-1].json()["error"]
        assert (error["code"], error["type"]) == ("rate_limit_exceeded", "rate_limit_error")
        after = float(answers[-1].headers["retry-after"])
        later = frozen._replace(steady=frozen.steady + after)
        gateway.ledger.now = lambda: later
        assert (await client.post(CHAT, json=ASK, headers=ann)).status_code == 200


@pytest.mark.parametrize("stream", [True, False])
async def test_the_tokens_of_an_answer_are_those_that_the_worker_counted(
    checkpoint: Path, file: KeyFile, stream: bool
):
    ann = create(file, "ann", limits=("tokens=1000/day",))
    bob = create(file, "bob")
    async with cluster(checkpoint, fake(10, 11, 12), gateway_key="g", keys_file=str(file.path)) as (
        client,
        _,
    ):
        body = ASK | {"stream": stream, "max_tokens": 100}
        assert (await client.post(CHAT, json=body, headers=ann)).status_code == 200
        whole = (await client.post(CHAT, json=ASK | {"stream": False}, headers=bob)).json()["usage"]
        report = (await client.get("/v1/usage", headers=ann)).json()
        (row,) = report["rows"]
        assert (row["tenant"], row["model"], row["requests"]) == ("ann", "tiny", 1)
        assert row["prompt_tokens"] == whole["prompt_tokens"]
        assert row["completion_tokens"] == whole["completion_tokens"] == 3
        (limit,) = report["limits"]
        assert limit["used"] == whole["total_tokens"] and limit["most"] == 1000
        table = await client.get("/v1/usage?format=csv&from=2000-01-01", headers=ann)
        assert table.headers["content-type"].startswith("text/csv")
        assert table.text.splitlines()[1].split(",")[1:4] == ["ann", "tiny", "1"]
        for wrong in ("?since=1", "?from=yesterday", "?format=xml"):
            assert (await client.get(f"/v1/usage{wrong}", headers=ann)).status_code == 400


async def test_a_used_up_budget_is_a_429_that_names_it(checkpoint: Path, file: KeyFile):
    ann = create(file, "ann", limits=("tokens=5/month",))
    async with cluster(checkpoint, fake(10, 11), gateway_key="g", keys_file=str(file.path)) as (client, _):
        assert (await client.post(CHAT, json=ASK, headers=ann)).status_code == 200
        refused = await client.post(CHAT, json=ASK, headers=ann)
        error = refused.json()["error"]
        assert (refused.status_code, error["code"], error["type"]) == (
            429,
            "budget_exceeded",
            "insufficient_quota",
        )
        assert "tokens=5/month" in error["message"] and "renewed at" in error["message"]
        assert 0 < int(refused.headers["retry-after"]) <= 31 * 86400 + 1


@pytest.mark.parametrize("stream", [True, False])
async def test_a_budget_of_energy_is_charged_with_what_workers_report(
    checkpoint: Path, file: KeyFile, stream: bool
):
    """A worker with a ladder knows the energy; no price is needed, and one for all models does not count."""

    def app(config: ServeConfig, made: FakeEngine) -> App:
        times = {"here": StepCost(base=3.0, per_decode=1.0, per_prefill=0.5)}
        known = variant("full", energy=TokenEnergy(0.8, "estimate: for tests"), times=times)
        return build(made, checkpoint, config, known)

    engine = FakeEngine(lambda request: [65, 66, 67], {"m:full": info("m:full", vocab=600)})
    ann = create(file, "ann", limits=("joules=8/month",))
    watcher = create(file, "watcher", scopes=("metrics",))
    settings: dict[str, Any] = {
        "keys_file": str(file.path),
        "gateway_key": "g",
        "prices": {"*": Price(joules=1000.0)},
    }
    async with cluster(checkpoint, engine, make=app, **settings) as (client, _):
        body = ASK | {"model": "m", "stream": stream, "max_tokens": 3}
        answer = await client.post(CHAT, json=body, headers=ann)
        events = answer.text.splitlines() if stream else [f"data: {answer.text}"]
        last = [json.loads(each[6:]) for each in events if each.startswith("data: {")][-1]
        took = last["stretto"]["energy_j"]
        assert 2.4 < took < 10, "three tokens, and a prompt"
        usage = (await client.get("/v1/usage", headers=ann)).json()
        assert [row["joules"] for row in usage["rows"]] == [pytest.approx(took)]
        assert usage["limits"][0]["used"] == pytest.approx(took)
        table = (await client.get("/v1/usage?format=csv", headers=ann)).text.splitlines()
        column = table[0].split(",").index("joules")
        assert float(table[1].split(",")[column]) == pytest.approx(took)
        exposed = (await client.get("/metrics", headers=watcher)).text
        name = r'^stretto_gateway_joules_total\{model="m",tenant="ann"\} (\S+)$'
        found = re.search(name, exposed, re.MULTILINE)
        assert found is not None and float(found[1]) == pytest.approx(took)
        for _ in range(int(8 / took)):
            assert (await client.post(CHAT, json=body, headers=ann)).status_code == 200
        refused = await client.post(CHAT, json=body, headers=ann)
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "budget_exceeded")


async def test_an_answer_that_the_client_leaves_is_paid_up_to_there(checkpoint: Path, file: KeyFile):
    ann = create(file, "ann")
    async with cluster(checkpoint, fake(10, 11, 30.0), gateway_key="g", keys_file=str(file.path)) as (
        client,
        gateway,
    ):
        async with client.stream("POST", CHAT, json=ASK, headers=ann) as answer:
            async for _ in answer.aiter_bytes():
                break
        await wait_for(lambda: bool(gateway.ledger.usage.rows("ann")))
        (row,) = gateway.ledger.usage.rows("ann")
        assert row.completion_tokens in (1, 2) and row.prompt_tokens > 0


async def test_a_revoked_key_loses_its_running_stream_and_others_keep_theirs(checkpoint: Path, file: KeyFile):
    made = issue.create(file, now(), tenant="ann")
    ann, bob = {"x-api-key": made.key}, create(file, "bob")
    engine = fake(10, 3.0, 11)
    async with cluster(checkpoint, engine, gateway_key="g", keys_file=str(file.path)) as (client, gateway):
        streams = [asyncio.create_task(client.post(CHAT, json=ASK, headers=key)) for key in (ann, bob)]
        await wait_for(lambda: len(engine.open) == 2)
        issue.revoke(file, made.record.id, now())
        cut, whole = await asyncio.gather(*streams)
        assert cut.text.count('"code":"key_revoked"') == 1 and "[DONE]" not in cut.text
        assert "[DONE]" in whole.text and "error" not in whole.text
        refused = await client.post(CHAT, json=ASK, headers=ann)
        assert (refused.status_code, refused.json()["error"]["code"]) == (401, "key_revoked")
        assert gateway.server.running == 0 and not engine.open


async def test_a_key_that_expires_or_rotates_finishes_its_running_stream(checkpoint: Path, file: KeyFile):
    made = issue.create(file, now(), tenant="ann", expires=now() + timedelta(hours=1))
    engine = fake(10, 1.5, 11)
    async with cluster(checkpoint, engine, gateway_key="g", keys_file=str(file.path)) as (client, gateway):
        key = {"x-api-key": made.key}
        running = asyncio.create_task(client.post(CHAT, json=ASK, headers=key))
        await wait_for(lambda: len(engine.open) == 1)
        fresh = issue.rotate(file, made.record.id, now(), timedelta(0))
        await wait_for(lambda: _valid(gateway, fresh.key))
        late = gateway.ledger.now()
        assert "[DONE]" in (await running).text
        refused = await client.post(CHAT, json=ASK, headers=key)
        assert refused.json()["error"]["code"] == "key_expired" and "rotated" in refused.text
        gateway.ledger.now = lambda: late._replace(wall=late.wall + 7200)
        refused = await client.post(CHAT, json=ASK, headers={"x-api-key": fresh.key})
        assert (refused.status_code, refused.json()["error"]["code"]) == (401, "key_expired")


def _valid(gateway: Gateway, key: str) -> bool:
    try:
        gateway.ledger.accounts.find(Headers({"x-api-key": key}), gateway.ledger.now())
    except Unauthorised:
        return False
    return True


async def test_garbage_in_the_key_file_changes_nothing_and_is_reported(checkpoint: Path, file: KeyFile):
    ann, admin = create(file, "ann"), create(file, "ops", scopes=("admin",))
    good = file.path.read_bytes()
    async with cluster(checkpoint, fake(10), gateway_key="g", keys_file=str(file.path)) as (client, gateway):
        for garbage in (b"{", b"", b'{"keys": [{}]}'):
            file.path.write_bytes(garbage)
            await wait_for(lambda: gateway.ledger.error != "")
            assert (await client.post(CHAT, json=ASK, headers=ann)).status_code == 200
            state = (await client.get("/state", headers=admin)).json()
            assert "is no key file" in state["keys_error"]
            assert (await client.get("/state", headers=ann)).json()["keys_error"] == ""
            gateway.ledger.error = ""
        file.path.unlink()
        await wait_for(lambda: gateway.ledger.error != "")
        assert (await client.post(CHAT, json=ASK, headers=ann)).status_code == 200
        file.path.write_bytes(good)
        await wait_for(lambda: gateway.ledger.error == "")


async def test_a_new_key_works_without_a_restart(checkpoint: Path, file: KeyFile):
    async with cluster(checkpoint, fake(10), gateway_key="g", keys_file=str(file.path)) as (client, _):
        ann = create(file, "ann")
        began = time.monotonic()
        while (await client.post(CHAT, json=ASK, headers=ann)).status_code != 200:
            assert time.monotonic() - began < 10
            await asyncio.sleep(0.05)


async def test_plain_keys_still_work_beside_a_key_file(checkpoint: Path, file: KeyFile):
    engine = fake(10)
    plain = {"k-ann": "ann and friends"}
    async with cluster(checkpoint, engine, gateway_key="g", keys_file=str(file.path), api_keys=plain) as (
        client,
        _,
    ):
        answer = await client.post(CHAT, json=ASK, headers={"x-api-key": "k-ann"})
        assert answer.status_code == 200 and engine.requests[-1].tenant == "ann and friends"
        models = (await client.get("/v1/models", headers={"x-api-key": "k-ann"})).json()["data"]
        assert [card["id"] for card in models] == ["tiny"]


async def test_models_that_a_key_may_not_use_are_not_listed(checkpoint: Path, file: KeyFile):
    ann = create(file, "ann", models=("other",))
    async with cluster(checkpoint, fake(10), gateway_key="g", keys_file=str(file.path)) as (client, _):
        assert (await client.get("/v1/models", headers=ann)).json()["data"] == []
        refused = await client.post(CHAT, json=ASK, headers=ann)
        assert refused.status_code == 403 and refused.json()["error"]["param"] == "$.model"


async def test_the_official_client_reads_the_errors(checkpoint: Path, file: KeyFile):
    openai = pytest.importorskip("openai")
    limited = create(file, "ann", limits=("requests=1/ever",))["Authorization"].removeprefix("Bearer ")
    async with cluster(checkpoint, fake(10), gateway_key="g", keys_file=str(file.path)) as (client, _):
        sdk = openai.AsyncOpenAI(base_url=f"{client.base_url}/v1", api_key=limited, max_retries=0)
        messages = ASK["messages"]
        await sdk.chat.completions.create(model="tiny", messages=messages)
        with pytest.raises(openai.RateLimitError, match="requests=1/ever"):
            await sdk.chat.completions.create(model="tiny", messages=messages)
        await sdk.close()


def test_a_key_file_that_is_missing_or_wrong_stops_the_start(tmp_path: Path):
    with pytest.raises(StartError, match="there is no key file"):
        Gateway(GatewayConfig(workers=("http://a:1",), keys_file=str(tmp_path / "none.json")))
    toml = tmp_path / "gateway.toml"
    toml.write_text('workers = ["u"]\n[prices.m]\ninput = -1\n')
    with pytest.raises(StartError, match="prices"):
        settings.load({}, {}, toml)


def test_the_log_and_the_state_never_hold_a_key(file: KeyFile):
    """Only the hash of a key is in memory after the start, and a hash is in no answer."""
    made = issue.create(file, now(), tenant="ann")
    gateway = Gateway(GatewayConfig(workers=("http://a:1",), keys_file=str(file.path)))
    assert made.key not in json.dumps([repr(each) for each in vars(gateway.ledger.accounts).values()])


async def test_many_tenants_at_once_each_get_their_own_limit(checkpoint: Path, file: KeyFile):
    keys = [create(file, f"t{n}", limits=("requests=3/ever",)) for n in range(5)]
    engine: FakeEngine = fake(10)
    async with cluster(checkpoint, engine, gateway_key="g", keys_file=str(file.path)) as (client, _):
        answers = await asyncio.gather(
            *(client.post(CHAT, json=ASK, headers=key) for key in keys for _ in range(8))
        )
        assert [each.status_code for each in answers].count(200) == 15
        assert {n: sum(r.tenant == f"t{n}" for r in engine.requests) for n in range(5)} == dict.fromkeys(
            range(5), 3
        )


async def test_calls_about_feedback_count_against_limits_of_requests_alone(checkpoint: Path, file: KeyFile):
    """A key with limits of cost and tokens may give feedback, although no model has a price."""
    ann = create(file, "ann", limits=("requests=3/day", "tokens=1000/day"))
    bob = create(file, "bob", limits=("cost=1/day",))
    async with cluster(checkpoint, fake(10), gateway_key="g", keys_file=str(file.path)) as (client, _):
        answer = await client.post(CHAT, json=ASK, headers=ann)
        reward = {"request_id": answer.headers["x-request-id"], "thumbs": "up"}
        assert (await client.post("/v1/feedback", json=reward, headers=ann)).status_code == 200
        assert (await client.get("/v1/feedback", headers=ann)).status_code == 200
        report = (await client.get("/v1/usage", headers=ann)).json()
        spent = {each["limit"]: each["used"] for each in report["limits"]}
        assert spent["requests=3/day"] == 3 and spent["tokens=1000/day"] < 100
        for refused in (
            await client.delete("/v1/feedback", headers=ann),
            await client.get("/v1/feedback/policies", headers=ann),
            await client.post("/v1/feedback", json=reward, headers=ann),
            await client.post(CHAT, json=ASK, headers=ann),
        ):
            assert (refused.status_code, refused.json()["error"]["code"]) == (429, "budget_exceeded")
        assert (await client.get("/v1/feedback", headers=bob)).status_code == 200
