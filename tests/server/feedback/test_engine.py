"""Feedback on a real server with a tiny ladder: votes move which variant the engine runs."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.ladder import tiny_ladder
from tests.server_process import serving

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
BODY: dict[str, Any] = {"prompt": "max 3 9 4:", "max_tokens": 2, "temperature": 0}


def ask(client: httpx.Client) -> dict[str, Any]:
    response = client.post("/v1/completions", json=BODY)
    assert response.status_code == 200, response.text
    return response.json()


def test_votes_move_the_variant_that_answers(tmp_path: Path) -> None:
    ladder = tiny_ladder.make(tmp_path / "tiny")
    with serving(tmp_path, str(ladder)) as server, httpx.Client(base_url=server.url, timeout=60) as client:
        server.wait_ready()
        first = [ask(client) for _ in range(5)]
        # A busy machine may choose by deadline or load.
        best = [each["stretto"] for each in first if each["stretto"]["variant_reason"] == "best"]
        assert {report["variant"] for report in best} <= {"tiny:full"}
        for _ in range(40):
            answer = ask(client)
            thumbs = "down" if answer["stretto"]["variant"] == "tiny:full" else "up"
            vote = client.post("/v1/feedback", json={"request_id": answer["id"], "thumbs": thumbs})
            assert vote.json()["learnt"] is True
        found = Counter(ask(client)["stretto"]["variant"] for _ in range(30))
        assert found["tiny:full"] <= 3, found
        summary = client.get("/v1/feedback").json()["models"]["tiny"]
        assert summary["tiny:full"]["mean_reward"] == 0.0
        assert client.delete("/v1/feedback").json()["erased"] == 75
        assert client.get("/v1/feedback").json()["models"] == {}
