"""The process that judges grammars of strangers for `stretto.engine.structured.sandbox`.

It compiles one and writes a short text under it. Too much time or memory kills it, and nothing else. It ends
when its input does.
"""

from __future__ import annotations

import resource
import struct
import sys
import time
from collections.abc import Iterator
from typing import BinaryIO

import msgspec
import numpy as np
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

from stretto.engine.structured.grammar import Matcher, compiled, parsed
from stretto.errors import InvalidGrammar
from stretto.types import Grammar

PROBE_S, PROBED_BYTES = 0.2, 200
LOCATE_S = 0.3
LONGEST_PATH = 200
LENGTH = struct.Struct("<I")
END, QUOTE, BLANK = 256, ord('"'), frozenset(b" \n\r\t")
DEFINITIONS = ("$defs", "definitions")
GROUPS = (*DEFINITIONS, "properties", "patternProperties", "dependentSchemas")
LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
SINGLES = ("items", "additionalItems", "additionalProperties", "contains", "propertyNames", "not")


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
