"""`stretto keys`: what it prints, and what it never prints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from stretto.gateway.accounts.keys import KeyFile, hash_of
from tests.test_cli import run_main


@pytest.fixture
def keys(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs `stretto keys ...` on one file; returns its JSON, or its plain output."""

    def run(*arguments: str, plain: bool = False) -> Any:
        with pytest.raises(SystemExit) as exit:
            run_main(
                ["keys", *arguments, "--file", str(tmp_path / "keys.json"), *([] if plain else ["--json"])]
            )
        out, err = capsys.readouterr()
        assert exit.value.code in (0, None), err
        return (out, err) if plain else json.loads(out)

    return run


def test_a_key_lives_from_create_to_revoke(keys: Any, tmp_path: Path):
    limits = ["--limit", "requests=60/minute", "--limit", "cost=10/month"]
    made = keys("create", "acme", *limits, "--tier", "flex", "--model", "m", "--expires", "90d")
    name = made["record"]["id"]
    assert made["record"]["limits"] == ["requests=60/minute", "cost=10/month"]
    assert (made["status"], made["record"]["scopes"]) == ("active", ["infer", "usage"])
    fresh = keys("rotate", name, "--grace", "1h")
    assert fresh["key"] != made["key"]
    shown = keys("show", name)
    assert "key" not in shown or shown["key"] is None
    assert not {"hash", "previous"} & shown["record"].keys()
    assert keys("revoke", name)["status"] == "revoked"
    (listed,) = keys("list", "--tenant", "acme")
    assert listed["status"] == "revoked" and keys("list", "--tenant", "bob") == []
    record = KeyFile(tmp_path / "keys.json").read().keys[0]
    assert (record.hash, record.previous) == (hash_of(fresh["key"]), hash_of(made["key"]))
    assert keys("tenant", "acme", "--limit", "tokens=5/day") == {"tenant": "acme", "limits": ["tokens=5/day"]}


def test_the_key_alone_is_on_standard_output(keys: Any):
    out, err = keys("create", "acme", plain=True)
    assert out.startswith("sk-stretto-") and len(out.splitlines()) == 1
    assert "only time that the key is shown" in err and out.strip() not in err
    out, _ = keys("list", plain=True)
    assert "acme" in out and "sk-stretto-" not in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["create", "a b"], "1 to 64 letters"),
        (["create", "a", "--limit", "tokens=5"], "'tokens=5' is no limit"),
        (["create", "a", "--expires", "soon"], "'soon' is no time"),
        (["create", "a", "--scope", "root"], "'root'"),
        (["list"], "there is no key file"),
        (["revoke", "key-1"], "there is no key file"),
    ],
)
def test_errors_are_one_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit) as exit:
        run_main(["keys", *arguments, "--file", str(tmp_path / "keys.json")])
    err = capsys.readouterr().err
    assert exit.value.code == 1 and message in err and err.count("\n") == 1
    assert not (tmp_path / "keys.json").exists()
