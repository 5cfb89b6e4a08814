"""The checker of strangers' grammars: what it says, what it survives, and that it stays within its caps."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import suppress

import pytest

from stretto.engine.structured import sandbox as module
from stretto.engine.structured.sandbox import Checker
from stretto.errors import InvalidGrammar
from stretto.types import Grammar

SLOW = json.dumps({"type": "object", "properties": {f"p{i}": {"type": "integer"} for i in range(3000)}})
LARGE = json.dumps([f"choice number {i} of a great many" for i in range(3000)])


@pytest.fixture
async def checker() -> AsyncIterator[Checker]:
    checker = Checker(seconds=5.0)  # the machine that runs the tests may be busy
    yield checker
    await checker.close()


def schema(value: object) -> Grammar:
    return Grammar("json_schema", json.dumps(value))


async def said(checker: Checker, grammar: Grammar) -> str:
    with pytest.raises(InvalidGrammar) as caught:
        await checker.check(grammar)
    assert caught.value.status == 400
    return caught.value.message


async def test_good_grammars_pass_in_one_warm_worker(checker: Checker):
    assert checker.pid is None
    await checker.check(Grammar("json_object"))
    pid = checker.pid
    for grammar in (
        Grammar("regex", r"\d+(,\d+)*"),
        Grammar("choice", '["yes", "no"]'),
        schema({"$defs": {"n": {"properties": {"next": {"$ref": "#/$defs/n"}}}}, "$ref": "#/$defs/n"}),
        schema({"enum": [f"value {i}" for i in range(2000)]}),
    ):
        await checker.check(grammar)
    assert checker.pid == pid


async def test_an_error_says_where_in_the_schema(checker: Checker):
    loop = {"$defs": {"fine": {}, "loop": {"$ref": "#/$defs/loop"}}}
    for part, path, words in (
        ({"type": "array", "uniqueItems": True}, ".properties.part", '"uniqueItems" is not supported'),
        ({"anyOf": [{}, {"items": {"type": "objekt"}}]}, ".properties.part.anyOf[1].items", "Invalid type"),
        ({"type": "string", "pattern": "a("}, ".properties.part", "unclosed group"),
        ({"additionalProperties": {"not": {}}}, ".properties.part.additionalProperties", '"not"'),
        ({"$ref": "#/$defs/loop"}, ".$defs.loop", "no text satisfies it"),
    ):
        properties = {"fine": {"type": "string"}, "part": part}
        whole = {"type": "object", "required": ["part"], "properties": properties, **loop}
        message = await said(checker, schema(whole))
        assert words in message and message.endswith(f"(at ${path} of the schema)"), message


BAD = [
    (Grammar("regex", "a(b"), "unclosed group"),
    (Grammar("regex", r"(a)\1"), "backreferences are not supported"),
    (Grammar("regex", "(" * 300 + ")" * 300), "nested parentheses"),
    (Grammar("regex", r"[^\x00-\U0010FFFF]"), "no text satisfies it"),
    (Grammar("json_schema", '{"items":' * 10_000), "not JSON"),
    (Grammar("json_schema", '{"x":"\ud800"}'), "not Unicode"),
    (Grammar("json_schema", "false"), "or true"),
    (Grammar("json_schema", json.dumps({"enum": ["x" * 200_000]})), "at most 131072"),
    (schema({"$ref": "#"}), "no text satisfies it"),
    (schema({"$ref": "http://127.0.0.1:1/schema.json"}), "not present"),
    (schema({"allOf": [{"anyOf": [{"minimum": i + j} for i in range(9)]} for j in range(9)]}), "schema"),
    (schema({"type": "object", "properties": {f"k{i}": {} for i in range(2000)}}), "too much work"),
    (Grammar("choice", "{}"), "one or more strings"),
]


async def test_bad_grammars_are_refused_in_words(checker: Checker):
    for grammar, words in BAD:
        assert words in await said(checker, grammar)


async def test_explosive_patterns_are_answered_within_the_caps(checker: Checker):
    await checker.check(Grammar("json_object"))
    first = checker.pid
    for pattern in (
        r"(a{1,1000}){1,1000}",
        r"((((a*)*)*)*)*b",
        r"(.*a.{20}){20}",
        r"(\w+\s?){1,200}!",
        r"(x+x+)+y",
        ".{1,100000}",
    ):
        for grammar in (Grammar("regex", pattern), schema({"type": "string", "pattern": pattern})):
            with suppress(InvalidGrammar):
                await checker.check(grammar)
    assert checker.pid == first, "one of them took all its time or memory"


async def test_a_grammar_that_takes_too_long_is_refused_and_the_worker_replaced(checker: Checker):
    await checker.check(Grammar("json_object"))
    first = checker.pid
    checker._seconds = 0.02
    message = await said(checker, Grammar("json_schema", SLOW))
    assert "more than 0.02 s" in message and checker.pid is None
    checker._seconds = 5.0
    assert await said(checker, Grammar("json_schema", SLOW)) == message
    assert checker.pid is None, "the refusal was not remembered"
    await checker.check(Grammar("regex", "a+"))
    assert checker.pid not in (None, first)


async def test_a_refusal_for_time_is_in_doubt_again(checker: Checker, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "DOUBT_S", 0.0)
    slow = schema({"type": "object", "properties": {f"p{i}": {} for i in range(400)}})
    checker._seconds = 0.001
    await said(checker, slow)
    checker._seconds = 20.0
    await checker.check(slow)


async def test_a_grammar_that_takes_too_much_memory_is_refused(checker: Checker):
    await checker.check(Grammar("choice", LARGE))
    needed = peak(checker)
    await checker.close()
    small = Checker(seconds=20.0, memory=needed - 2 * 2**20)
    try:
        await small.check(Grammar("regex", "a+"))
        assert "MiB" in await said(small, Grammar("choice", LARGE))
        await small.check(Grammar("regex", "b+"))
    finally:
        await small.close()


def peak(checker: Checker) -> int:
    """The most address space the worker ever had, in bytes."""
    with open(f"/proc/{checker.pid}/status") as status:
        found = re.search(r"VmPeak:\s+(\d+) kB", status.read())
    assert found
    return int(found[1]) * 1024


async def test_a_killed_worker_is_replaced(checker: Checker):
    await checker.check(Grammar("json_object"))
    first = checker.pid
    assert first is not None
    os.kill(first, signal.SIGKILL)
    await checker.check(Grammar("regex", "a+"))
    assert checker.pid not in (None, first)


async def test_a_worker_killed_while_it_works_costs_one_more_try(checker: Checker):
    await checker.check(Grammar("json_object"))
    first = checker.pid
    assert first is not None
    os.kill(first, signal.SIGSTOP)
    waiting = asyncio.create_task(checker.check(Grammar("regex", "a+")))
    await asyncio.sleep(0.05)
    os.kill(first, signal.SIGKILL)
    await waiting
    assert checker.pid not in (None, first)


async def test_leaving_in_the_middle_leaves_no_half_exchange(checker: Checker):
    await checker.check(Grammar("json_object"))
    first = checker.pid
    leaving = asyncio.create_task(checker.check(Grammar("json_schema", SLOW)))
    await asyncio.sleep(0.01)
    leaving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leaving
    assert "unclosed" in await said(checker, Grammar("regex", "("))
    assert checker.pid != first


async def test_many_ask_at_once(checker: Checker):
    grammars = [
        Grammar("regex", f"a{{{number}}}" if number % 2 else f"(a{{{number}}}") for number in range(40)
    ]
    results = await asyncio.gather(*(checker.check(grammar) for grammar in grammars), return_exceptions=True)
    assert [result is None for result in results] == [number % 2 == 1 for number in range(40)]


async def test_verdicts_are_remembered_up_to_a_bound(checker: Checker, monkeypatch: pytest.MonkeyPatch):
    asked: list[bytes] = []
    ask = Checker._ask

    async def counted(self: Checker, worker: asyncio.subprocess.Process, body: bytes) -> str | None:
        asked.append(body)
        return await ask(self, worker, body)

    monkeypatch.setattr(Checker, "_ask", counted)
    monkeypatch.setattr(module, "REMEMBERED", 3)
    for pattern in ("a", "b", "(", "a", "(", "c", "a", "b"):
        with suppress(InvalidGrammar):
            await checker.check(Grammar("regex", pattern))
    assert len(asked) == 5 and len(checker._verdicts) == 3


def test_it_imports_no_torch():
    code = (
        "import sys, stretto.engine.structured.sandbox;"
        " assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


async def test_the_worker_ends_with_its_input(checker: Checker):
    await checker.check(Grammar("json_object"))
    worker = checker._worker
    assert worker is not None and worker.stdin is not None
    worker.stdin.close()
    assert await asyncio.wait_for(worker.wait(), 10) == 0
