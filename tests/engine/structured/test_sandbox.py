"""The grammar sandbox: error messages, time and memory limits, and the replacement of its worker."""

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

from stretto.engine.structured.sandbox import GrammarSandbox
from stretto.errors import InvalidGrammar, Overloaded
from stretto.types import Grammar

SLOW = json.dumps({"type": "object", "properties": {f"p{i}": {"type": "integer"} for i in range(3000)}})
LARGE = json.dumps([f"choice number {i} of a great many" for i in range(3000)])


@pytest.fixture
async def sandbox() -> AsyncIterator[GrammarSandbox]:
    sandbox = GrammarSandbox(seconds=5.0)  # The machine that runs the tests may be busy.
    yield sandbox
    await sandbox.close()


def schema(value: object) -> Grammar:
    return Grammar("json_schema", json.dumps(value))


async def refusal(sandbox: GrammarSandbox, grammar: Grammar) -> str:
    with pytest.raises(InvalidGrammar) as caught:
        await sandbox.validate(grammar)
    assert caught.value.status == 400
    return caught.value.message


async def test_valid_grammars_pass_in_one_reused_worker(sandbox: GrammarSandbox):
    assert sandbox.pid is None
    await sandbox.validate(Grammar("json_schema", "{}"))
    pid = sandbox.pid
    for grammar in (
        Grammar("regex", r"\d+(,\d+)*"),
        Grammar("choice", '["yes", "no"]'),
        schema({"$defs": {"n": {"properties": {"next": {"$ref": "#/$defs/n"}}}}, "$ref": "#/$defs/n"}),
        schema({"enum": [f"value {i}" for i in range(2000)]}),
    ):
        await sandbox.validate(grammar)
    assert sandbox.pid == pid


async def test_an_error_names_the_path_in_the_schema(sandbox: GrammarSandbox):
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
        message = await refusal(sandbox, schema(whole))
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


async def test_invalid_grammars_are_refused_with_a_reason(sandbox: GrammarSandbox):
    for grammar, words in BAD:
        assert words in await refusal(sandbox, grammar)


async def test_exponential_patterns_end_within_the_limits(sandbox: GrammarSandbox):
    await sandbox.validate(Grammar("json_schema", "{}"))
    first = sandbox.pid
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
                await sandbox.validate(grammar)
    assert sandbox.pid == first, "one of them took all its time or memory"


async def test_a_grammar_that_exceeds_the_time_limit_is_refused():
    sandbox = GrammarSandbox(seconds=0.02)
    try:
        message = await refusal(sandbox, Grammar("json_schema", SLOW))
        assert "more than 0.02 s" in message and sandbox.pid is None
        assert await refusal(sandbox, Grammar("json_schema", SLOW)) == message
        assert sandbox.compilations == 1, "the refusal was not remembered"
    finally:
        await sandbox.close()


async def test_a_worker_that_does_not_answer_is_replaced():
    sandbox = GrammarSandbox(seconds=2.0)
    try:
        first = await stopped(sandbox)
        message = await refusal(sandbox, Grammar("regex", "a+"))
        assert "more than 2 s" in message and sandbox.pid is None
        await sandbox.validate(Grammar("regex", "b+"))
        assert sandbox.pid not in (None, first)
    finally:
        await sandbox.close()


async def test_a_timeout_is_retried_after_retry_s():
    sandbox = GrammarSandbox(seconds=2.0, retry_s=0.0)
    try:
        await stopped(sandbox)
        await refusal(sandbox, Grammar("regex", "a+"))
        await sandbox.validate(Grammar("regex", "a+"))
    finally:
        await sandbox.close()


async def stopped(sandbox: GrammarSandbox) -> int:
    """Start the sandbox's worker, suspend it with SIGSTOP and return its process id."""
    await sandbox.validate(Grammar("json_schema", "{}"))
    assert sandbox.pid is not None
    os.kill(sandbox.pid, signal.SIGSTOP)
    return sandbox.pid


async def test_a_grammar_that_exceeds_the_memory_limit_is_refused(sandbox: GrammarSandbox):
    await sandbox.validate(Grammar("choice", LARGE))
    needed = peak(sandbox)
    await sandbox.close()
    small = GrammarSandbox(seconds=20.0, memory=needed - 2 * 2**20)
    try:
        await small.validate(Grammar("regex", "a+"))
        assert "MiB" in await refusal(small, Grammar("choice", LARGE))
        await small.validate(Grammar("regex", "b+"))
    finally:
        await small.close()


def peak(sandbox: GrammarSandbox) -> int:
    """The peak address space of the worker, in bytes."""
    with open(f"/proc/{sandbox.pid}/status") as status:
        found = re.search(r"VmPeak:\s+(\d+) kB", status.read())
    assert found
    return int(found[1]) * 1024


async def test_a_killed_worker_is_replaced(sandbox: GrammarSandbox):
    await sandbox.validate(Grammar("json_schema", "{}"))
    first = sandbox.pid
    assert first is not None
    os.kill(first, signal.SIGKILL)
    await sandbox.validate(Grammar("regex", "a+"))
    assert sandbox.pid not in (None, first)


async def test_a_grammar_is_retried_when_its_worker_is_killed(sandbox: GrammarSandbox):
    first = await stopped(sandbox)
    waiting = asyncio.create_task(sandbox.validate(Grammar("regex", "a+")))
    await asyncio.sleep(0.05)
    os.kill(first, signal.SIGKILL)
    await waiting
    assert sandbox.pid not in (None, first)


async def test_a_cancelled_validation_does_not_mix_up_later_answers(sandbox: GrammarSandbox):
    await sandbox.validate(Grammar("json_schema", "{}"))
    first = sandbox.pid
    leaving = asyncio.create_task(sandbox.validate(Grammar("json_schema", SLOW)))
    await asyncio.sleep(0.01)
    leaving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leaving
    assert "unclosed" in await refusal(sandbox, Grammar("regex", "("))
    assert sandbox.pid != first


async def test_concurrent_validations_get_their_own_results(sandbox: GrammarSandbox):
    grammars = [
        Grammar("regex", f"a{{{number}}}" if number % 2 else f"(a{{{number}}}") for number in range(40)
    ]
    results = await asyncio.gather(
        *(sandbox.validate(grammar) for grammar in grammars), return_exceptions=True
    )
    assert [result is None for result in results] == [number % 2 == 1 for number in range(40)]


async def test_the_number_of_cached_results_is_bounded():
    sandbox = GrammarSandbox(seconds=5.0, remembered=3)
    try:
        for pattern in ("a", "b", "(", "a", "(", "c", "a", "b"):
            with suppress(InvalidGrammar):
                await sandbox.validate(Grammar("regex", pattern))
        assert sandbox.compilations == 5
    finally:
        await sandbox.close()


def test_the_sandbox_imports_no_torch():
    code = (
        "import sys, stretto.engine.structured.sandbox;"
        " assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_worker_exits_when_its_input_closes():
    command = [sys.executable, "-m", "stretto.engine.structured.sandbox_worker", str(2**29)]
    ended = subprocess.run(command, input=b"", stdout=subprocess.PIPE, timeout=30, check=True)
    assert ended.stdout == b"null\n"


async def test_known_grammars_and_other_tenants_do_not_wait_behind_slow_ones() -> None:
    """Forty slow regexes of one tenant: each takes the child for as long as it may."""
    sandbox = GrammarSandbox(seconds=0.3, waiting=64, patience_s=60)
    known, unknown = schema({"type": "integer"}), schema({"type": "string"})
    try:
        await sandbox.validate(known)
        slow = [
            asyncio.create_task(sandbox.validate(Grammar("json_schema", SLOW + " " * at), "greedy"))
            for at in range(40)
        ]
        await asyncio.sleep(0.05)
        compilations = sandbox.compilations
        for grammar in (Grammar("json_object"), known):
            await asyncio.wait_for(sandbox.validate(grammar, "greedy"), 0.1)
        assert sandbox.compilations == compilations
        await sandbox.validate(unknown, "other")
        assert sandbox.compilations <= compilations + 3
        ended = [task.exception() for task in slow if task.done()]
        assert sum(isinstance(error, Overloaded) for error in ended) >= 7, "of one tenant 32 may wait"
    finally:
        for task in slow:
            task.cancel()
        await asyncio.gather(*slow, return_exceptions=True)
        await sandbox.close()


async def test_equal_grammars_that_wait_are_compiled_once(sandbox: GrammarSandbox) -> None:
    grammar = schema({"type": "array", "items": {"type": "integer"}})
    await asyncio.gather(*(sandbox.validate(grammar) for _ in range(8)))
    assert sandbox.compilations == 1


async def test_no_grammar_waits_longer_than_the_patience() -> None:
    sandbox = GrammarSandbox(seconds=5.0, patience_s=0.05)
    try:
        running = asyncio.create_task(sandbox.validate(Grammar("json_schema", SLOW)))
        await asyncio.sleep(0)
        with pytest.raises(Overloaded) as caught:
            await sandbox.validate(schema({"type": "string"}))
        assert caught.value.retry_after
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
    finally:
        await sandbox.close()
