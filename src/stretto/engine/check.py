"""Judges grammars of strangers before the engine sees them, in a process that may die of one.

`Checker` is the front's side, asyncio, without torch; run as a program, this module is the worker: messages
are msgpack behind their length on its standard input and output. It ends when its input does.
"""

from __future__ import annotations

import asyncio
import resource
import struct
import sys
import time
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import Iterator
from typing import BinaryIO

import msgspec
import numpy as np
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

from stretto.engine.grammar import Matcher, compiled, parsed, spoken
from stretto.errors import InvalidGrammar, Unavailable
from stretto.types import Grammar

START_S = 30.0
DOUBT_S = 30.0
REMEMBERED = 512
PROBE_S, PROBED_BYTES = 0.2, 200
LOCATE_S = 0.3
LONGEST_PATH = 200
LENGTH = struct.Struct("<I")
END, QUOTE, BLANK = 256, ord('"'), frozenset(b" \n\r\t")
DEFINITIONS = ("$defs", "definitions")
GROUPS = (*DEFINITIONS, "properties", "patternProperties", "dependentSchemas")
LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
SINGLES = ("items", "additionalItems", "additionalProperties", "contains", "propertyNames", "not")


class Checker:
    """One warm worker and the verdicts it gave. `seconds` and `memory` (bytes of address space) are what one
    grammar may take; whatever takes more is refused, and the worker replaced.
    """

    def __init__(self, *, seconds: float = 1.0, memory: int = 2**29) -> None:
        self._seconds = seconds
        self._memory = memory
        self._worker: Process | None = None
        self._turn = asyncio.Lock()
        self._verdicts: dict[Grammar, tuple[str | None, float]] = {}

    @property
    def pid(self) -> int | None:
        """The worker's process, None before the first grammar."""
        return None if self._worker is None else self._worker.pid

    async def check(self, grammar: Grammar) -> None:
        """Return when the grammar compiles within the caps. Raises InvalidGrammar saying what is wrong and
        where, and Unavailable when no worker can be started.
        """
        async with self._turn:
            message, until = self._verdicts.pop(grammar, (None, 0.0))
            if time.monotonic() >= until:
                message, until = await self._judge(grammar)
            self._verdicts[grammar] = message, until
            if len(self._verdicts) > REMEMBERED:
                del self._verdicts[next(iter(self._verdicts))]
        if message is not None:
            raise InvalidGrammar(message)

    async def close(self) -> None:
        """End the worker; the next check would start another."""
        worker, self._worker = self._worker, None
        if worker is not None:
            if worker.returncode is None:
                worker.kill()
            await worker.communicate()

    async def _judge(self, grammar: Grammar) -> tuple[str | None, float]:
        """The worker's verdict, and until when it holds: a refusal for time or memory says as much of the
        machine's load as of the grammar, so it is soon in doubt again.
        """
        kind, doubt = spoken(grammar), time.monotonic() + DOUBT_S
        try:
            body = msgspec.msgpack.encode(grammar)
        except UnicodeEncodeError:
            return f"the {kind} is not Unicode text: it holds half a surrogate pair", float("inf")
        for _ in range(2):  # it may have died of something else before it saw this grammar
            try:
                return await self._ask(await self._running(), body), float("inf")
            except TimeoutError:
                return f"the {kind} takes more than {self._seconds:g} s to compile; make it simpler", doubt
            except (asyncio.IncompleteReadError, ConnectionError):
                continue
        limit = f"{self._memory >> 20} MiB"
        return f"the {kind} breaks the compiler, or takes more than {limit}; make it simpler", doubt

    async def _ask(self, worker: Process, body: bytes) -> str | None:
        assert worker.stdin is not None and worker.stdout is not None
        done = False
        try:
            async with asyncio.timeout(self._seconds):
                worker.stdin.write(LENGTH.pack(len(body)) + body)
                await worker.stdin.drain()
                verdict = await _receive(worker.stdout)
            done = True
            return verdict
        finally:
            if not done:  # cancelled as well: half an exchange is no state to go on from
                await self.close()

    async def _running(self) -> Process:
        """The worker, started when there is none."""
        if self._worker is None or self._worker.returncode is not None:
            await self.close()
            command = (sys.executable, "-m", "stretto.engine.check", str(self._memory))
            self._worker = await asyncio.create_subprocess_exec(
                *command, stdin=PIPE, stdout=PIPE, stderr=DEVNULL
            )
            assert self._worker.stdout is not None
            ready = False
            try:
                async with asyncio.timeout(START_S):
                    await _receive(self._worker.stdout)
                ready = True
            except (TimeoutError, asyncio.IncompleteReadError) as error:
                raise Unavailable("no process to check grammars could be started; try again later") from error
            finally:
                if not ready:
                    await self.close()
        return self._worker


async def _receive(stream: asyncio.StreamReader) -> str | None:
    (length,) = LENGTH.unpack(await stream.readexactly(LENGTH.size))
    return msgspec.msgpack.decode(await stream.readexactly(length), type=str | None)


class Bytes:
    """A vocabulary of the 256 bytes and an end, in the shape llguidance reads: enough to judge a grammar."""

    eos_token_id = END
    bos_token_id = None
    tokens = (*(bytes([byte]) for byte in range(256)), b"<end>")
    special_token_ids = (END,)

    def __call__(self, text: bytes | str) -> list[int]:
        return list(text.encode() if isinstance(text, str) else text)


def verdict(tokenizer: LLTokenizer, grammar: Grammar) -> str | None:
    """What is wrong with the grammar, None when nothing is."""
    try:
        probe(compiled(tokenizer, grammar))
    except InvalidGrammar as error:
        where = locate(tokenizer, grammar.source, error.message) if grammar.kind == "json_schema" else "$"
        return error.message if where == "$" else f"{error.message} (at {where[:LONGEST_PATH]} of the schema)"
    return None


def probe(state: LLMatcher) -> None:
    """Write a short text under the grammar. Raises InvalidGrammar when that fails: some grammars compile and
    allow no text, or are too wide only where the text begins.
    """
    matcher, until = Matcher(state.deep_copy(), END + 1, END + 1), time.monotonic() + PROBE_S
    bits = np.zeros(matcher.words, dtype=np.int32)
    for turn in range(PROBED_BYTES):
        matcher.mask_into(bits)
        allowed = np.flatnonzero(np.unpackbits(bits.view(np.uint8), count=END, bitorder="little")).tolist()
        if matcher.error is not None:
            raise InvalidGrammar(matcher.error)
        if not allowed or time.monotonic() > until:
            return
        # Strings closed at once and no blanks: so few bytes reach more of a schema.
        choices = [QUOTE] if QUOTE in allowed else [each for each in allowed if each not in BLANK] or allowed
        matcher.accept(choices[turn * 7919 % len(choices)])


def locate(tokenizer: LLTokenizer, source: str, message: str) -> str:
    """The path to the smallest part of a schema that fails with the same message."""
    until, path = time.monotonic() + LOCATE_S, "$"
    try:
        part = parsed(source)
    except InvalidGrammar:
        return path
    shared = {name: part[name] for name in DEFINITIONS if name in part} if isinstance(part, dict) else {}
    step: str | None = ""
    while step is not None:
        path, step = path + step, None
        for further, child in parts(part):
            alone = Grammar("json_schema", msgspec.json.encode({**shared, **child}).decode())
            if time.monotonic() > until:
                return path
            if fails_alike(tokenizer, alone, message):
                step, part = further, child
                break
    return path


def fails_alike(tokenizer: LLTokenizer, grammar: Grammar, message: str) -> bool:
    try:
        probe(compiled(tokenizer, grammar))
    except InvalidGrammar as error:
        return error.message == message
    return False


def parts(schema: object) -> Iterator[tuple[str, dict[str, object]]]:
    """The schemas directly inside a schema, with the step of the path that leads to each."""
    if not isinstance(schema, dict):
        return
    for name in GROUPS:
        group = schema.get(name)
        if isinstance(group, dict):
            yield from ((f".{name}.{key}", each) for key, each in group.items() if isinstance(each, dict))
    for name in LISTS:
        several = schema.get(name)
        if isinstance(several, list):
            yield from ((f".{name}[{at}]", each) for at, each in enumerate(several) if isinstance(each, dict))
    for name in SINGLES:
        single = schema.get(name)
        if isinstance(single, dict):
            yield f".{name}", single


def serve(requests: BinaryIO, replies: BinaryIO) -> None:
    """Judge what comes until nothing does. The first reply only says that the worker is there."""
    tokenizer = LLTokenizer(TokenizerWrapper(Bytes()))
    decoder = msgspec.msgpack.Decoder(Grammar)
    answer: str | None = None
    while True:
        body = msgspec.msgpack.encode(answer)
        replies.write(LENGTH.pack(len(body)) + body)
        replies.flush()
        header = requests.read(LENGTH.size)
        if len(header) < LENGTH.size:
            return
        answer = verdict(tokenizer, decoder.decode(requests.read(LENGTH.unpack(header)[0])))


if __name__ == "__main__":
    memory = int(sys.argv[1])
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    serve(sys.stdin.buffer, sys.stdout.buffer)
