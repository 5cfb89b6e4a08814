"""The child process that compiles untrusted grammars for `stretto.engine.structured.sandbox`.

It compiles one grammar at a time and generates a short text under it. A grammar that takes too much time or
memory ends this process and nothing else. The process ends when its standard input does.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator
from typing import BinaryIO, cast

import msgspec
import numpy as np
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper
from msgspec import structs

from stretto.engine.structured.grammar import Matcher, compiled, parsed
from stretto.errors import InvalidGrammar
from stretto.types import CallGrammar, Grammar

SAMPLE_S, SAMPLE_BYTES = 0.2, 200
LOCATE_S = 0.3
LONGEST_PATH, LONGEST_ERROR = 200, 10_000
MARKS = 32  # special tokens that a grammar may refer to
END, QUOTE, BLANK = 256, ord('"'), frozenset(b" \n\r\t")
DEFINITIONS = ("$defs", "definitions")
GROUPS = (*DEFINITIONS, "properties", "patternProperties", "dependentSchemas")
LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
SINGLES = ("items", "additionalItems", "additionalProperties", "contains", "propertyNames", "not")


class ByteVocabulary:
    """The 256 bytes, an end token and some special tokens, in the shape that llguidance reads.

    A grammar that compiles over bytes compiles over any tokenizer, so no model's tokenizer is needed here.
    """

    eos_token_id = END
    bos_token_id = None
    tokens = (*(bytes([byte]) for byte in range(256)), b"<end>", *(b"<mark%d>" % at for at in range(MARKS)))
    special_token_ids = tuple(range(END, END + 1 + MARKS))

    def __call__(self, text: bytes | str) -> list[int]:
        return list(text.encode() if isinstance(text, str) else text)


def error_of(tokenizer: LLTokenizer, grammar: Grammar) -> str | None:
    """What is wrong with the grammar and, for a JSON schema, where; None when it is usable."""
    try:
        if grammar.kind == "tool_calls":
            compiled(tokenizer, grammar := over_bytes(grammar))
            grammar = calls_only(grammar)
        sample_text(compiled(tokenizer, grammar))
    except InvalidGrammar as error:
        where = locate(tokenizer, grammar.source, error.message) if grammar.kind == "json_schema" else "$"
        return error.message if where == "$" else f"{error.message} (at {where[:LONGEST_PATH]} of the schema)"
    return None


def over_bytes(grammar: Grammar) -> Grammar:
    """The same grammar of calls, with special tokens that the byte vocabulary has."""
    calls = msgspec.json.decode(grammar.source, type=CallGrammar)
    marks = [[END + 1 + at % MARKS] for at in range(len(calls.marks))]
    return Grammar(grammar.kind, msgspec.json.encode(structs.replace(calls, marks=marks)).decode())


def calls_only(grammar: Grammar) -> Grammar:
    """The same grammar without the free text, so that a sampled text gets into the calls."""
    calls = msgspec.json.decode(grammar.source, type=CallGrammar)
    _, _, rules = calls.rules.partition("\n")
    alone = structs.replace(calls, rules=f"start: {' '.join(calls.calls)}\n{rules}")
    return Grammar(grammar.kind, msgspec.json.encode(alone).decode())


def sample_text(state: LLMatcher) -> None:
    """Generate a short text under the grammar. Raises InvalidGrammar when that fails.

    Some grammars compile although no text satisfies them, or exceed the limits of one step only when the
    text begins.
    """
    known = END + 1 + MARKS
    matcher, until = Matcher(state.deep_copy(), known, known), time.monotonic() + SAMPLE_S
    bits = np.zeros(matcher.words, dtype=np.int32)
    for step in range(SAMPLE_BYTES):
        matcher.mask_into(bits)
        allowed = np.flatnonzero(np.unpackbits(bits.view(np.uint8), count=known, bitorder="little")).tolist()
        allowed = [token for token in allowed if token != END]
        if matcher.error is not None:
            raise InvalidGrammar(matcher.error)
        if not allowed or time.monotonic() > until:
            return
        # Strings are closed at once and blanks avoided, so that few bytes cover more of a schema.
        choices = [QUOTE] if QUOTE in allowed else [each for each in allowed if each not in BLANK] or allowed
        matcher.accept(choices[step * 7919 % len(choices)])


def locate(tokenizer: LLTokenizer, source: str, message: str) -> str:
    """The path to the smallest subschema that fails with the same message, as far as `LOCATE_S` allows."""
    until, path = time.monotonic() + LOCATE_S, "$"
    try:
        schema = parsed(source)
    except InvalidGrammar:
        return path
    fields = _fields(schema)
    shared = {name: fields[name] for name in DEFINITIONS if name in fields}
    step: str | None = ""
    while step is not None:
        path, step = path + step, None
        for further, child in subschemas(schema):
            alone = Grammar("json_schema", msgspec.json.encode({**shared, **child}).decode())
            if time.monotonic() > until:
                return path
            if fails_alike(tokenizer, alone, message):
                step, schema = further, child
                break
    return path


def fails_alike(tokenizer: LLTokenizer, grammar: Grammar, message: str) -> bool:
    """Whether a grammar is refused with this message."""
    try:
        sample_text(compiled(tokenizer, grammar))
    except InvalidGrammar as error:
        return error.message == message
    return False


def subschemas(schema: object) -> Iterator[tuple[str, dict[str, object]]]:
    """The schemas directly inside a schema, each with the step of the path that leads to it."""
    fields = _fields(schema)
    for name in GROUPS:
        yield from _schemas((f".{name}.{key}", each) for key, each in _fields(fields.get(name)).items())
    for name in LISTS:
        members = fields.get(name)
        if isinstance(members, list):
            listed = cast("list[object]", members)
            yield from _schemas((f".{name}[{at}]", each) for at, each in enumerate(listed))
    yield from _schemas((f".{name}", fields.get(name)) for name in SINGLES)


def _fields(value: object) -> dict[str, object]:
    """The fields of a JSON object; none for any other value."""
    return cast("dict[str, object]", value) if isinstance(value, dict) else {}


def _schemas(members: Iterator[tuple[str, object]]) -> Iterator[tuple[str, dict[str, object]]]:
    for step, member in members:
        if isinstance(member, dict):
            yield step, cast("dict[str, object]", member)


def serve(requests: BinaryIO, replies: BinaryIO) -> None:
    """Answer each line of `requests` until they end. The first reply only says that the process is ready."""
    tokenizer = LLTokenizer(TokenizerWrapper(ByteVocabulary()))
    decoder = msgspec.json.Decoder(Grammar)
    _reply(replies, None)
    for line in requests:
        _reply(replies, error_of(tokenizer, decoder.decode(line)))


def _reply(replies: BinaryIO, error: str | None) -> None:
    # The reader takes lines of at most 64 KiB, and JSON may need six bytes for a character.
    replies.write(msgspec.json.encode(error and error[:LONGEST_ERROR]) + b"\n")
    replies.flush()


def main() -> None:
    """Set the limits (bytes of address space: the first argument) and serve standard input."""
    memory = int(sys.argv[1])
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    serve(sys.stdin.buffer, sys.stdout.buffer)


if __name__ == "__main__":
    main()
