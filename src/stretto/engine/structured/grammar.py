"""Structured output: compiles a grammar and says which tokens may come next, with llguidance.

Owns the translation of each kind of grammar, the limits of compiling and of one step, and the state of a
matcher. Knows no tensor and no request. `structured.sandbox` compiles untrusted grammars first.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING

import msgspec
import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, regex_to_lark
from numpy.typing import NDArray

from stretto.errors import InvalidGrammar
from stretto.types import LONGEST_GRAMMAR, CallGrammar, Grammar, GrammarKind

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

# With llguidance's own limits one mask may take tens of milliseconds while every stream waits. With these it
# takes about ten.
LIMITS = LLParserLimits(
    max_items_in_row=5_000, step_lexer_fuel=100_000, max_lexer_states=50_000, verbose_errors=False
)
# At most one blank where JSON allows blanks: each is a token, and a confused model emits them until its
# limit. A schema's own `x-guidance` may say otherwise.
COMPACT: JsonCompileOptions = {"whitespace_pattern": " "}
COMPILED_GRAMMARS = 32  # kept for each model


class Matcher:
    """The state of one output text under a grammar.

    A mask is int32 [words]: bit t % 32 of word t // 32 says whether token t may come next. The tokenizer has
    `known` tokens and the model `vocab`; tokens beyond `known` are never allowed. A preempted sequence keeps
    its matcher. Accepting its output tokens in order in a new one gives the same state.
    """

    def __init__(self, state: LLMatcher, known: int, vocab: int, panics: list[str] | None = None) -> None:
        self._state = state
        self._broken = ""
        self.panics: list[str] = [] if panics is None else panics  # of this matcher and its copies
        self._known = _words(known)
        self.words = max(self._known, _words(vocab))

    def mask_into(self, bits: NDArray[np.int32]) -> None:
        """Write the mask of the next token into `bits` (int32 [words], contiguous).

        EOS is allowed where the text may end. No token is allowed when this step exceeds the limits; then
        `error` says so.
        """
        assert bits.shape == (self.words,) and bits.dtype == np.int32 and bits.flags.c_contiguous
        bits[self._known :] = 0
        try:
            self._state.unsafe_compute_mask_ptr(bits.ctypes.data, self._known * bits.itemsize)
        except BaseException as error:  # a panic of the library is no Exception, and ends one sequence only
            self._panic(error)
        if self.error is not None:
            self._note_panic()
            bits[:] = 0

    def fork(self) -> Matcher:
        """An independent copy."""
        return Matcher(self._state.deep_copy(), self._known * 32, self.words * 32, self.panics)

    def accept(self, token: int) -> bool:
        """Advance by one token. False when the grammar does not allow it or a limit is exceeded."""
        try:
            accepted = self._state.consume_token(token)
        except BaseException as error:
            self._panic(error)
            return False
        if not accepted:
            self._note_panic()
        return accepted

    def _panic(self, error: BaseException) -> None:
        self._broken = f"{type(error).__name__} in its library"
        self.panics.append(self._broken)

    def _note_panic(self) -> None:
        """The library catches most panics itself, and then says so in its error."""
        if self._state.is_error() and (error := self._state.get_error()).startswith("panic"):
            self.panics.append(error)

    @property
    def finished(self) -> bool:
        """Whether the text is complete, so that nothing may follow."""
        return self._state.is_stopped() and not self._state.is_error()

    @property
    def error(self) -> str | None:
        """Why the matcher failed, None while it has not."""
        if self._broken:
            return f"the grammar cannot be followed: {self._broken}"
        if not self._state.is_error():
            return None
        return f"the grammar cannot be followed: {reason(self._state.get_error())}"


class Grammars:
    """Compiles grammars for one model and keeps the most recent ones. One thread may compile.

    `eos`: the tokens that end an answer. `vocab`: the width of the model's logits. The tokenizer is read with
    the first grammar, because that takes a second for a large one.
    """

    def __init__(self, tokenizer_dir: Path, eos: frozenset[int], vocab: int) -> None:
        self._path = tokenizer_dir / "tokenizer.json"
        self._eos = eos
        self._vocab = vocab
        self._starts: dict[Grammar, Matcher] = {}  # those used last at the end
        self._lock = Lock()

    def compile(self, grammar: Grammar) -> Matcher:
        """A matcher at the start of a text. Raises InvalidGrammar."""
        known = self.known(grammar)
        if known is not None:
            return known
        start = self._matcher(compiled(self._tokenizer, grammar))
        with self._lock:
            self._starts[grammar] = start
            if len(self._starts) > COMPILED_GRAMMARS:
                del self._starts[next(iter(self._starts))]
        return start.fork()

    def known(self, grammar: Grammar) -> Matcher | None:
        """The same for a grammar that is kept, else None. It takes microseconds, and any thread may ask."""
        with self._lock:
            start = self._starts.pop(grammar, None)
            if start is None or start.panics:  # a panic leaves all copies unusable
                return None
            self._starts[grammar] = start
        return start.fork()

    def _matcher(self, state: LLMatcher) -> Matcher:
        return Matcher(state, self._tokenizer.vocab_size, self._vocab)

    @property
    def kept(self) -> int:
        """How many compiled grammars are kept."""
        return len(self._starts)

    @cached_property
    def _tokenizer(self) -> LLTokenizer:
        try:
            text, ends = self._path.read_text(encoding="utf-8"), sorted(self._eos)
            try:
                return LLTokenizer(text, eos_token=ends or None)
            except ValueError:  # the model has an EOS token that its tokenizer lacks
                size = LLTokenizer(text).vocab_size
                return LLTokenizer(text, eos_token=[token for token in ends if token < size] or None)
        except (OSError, ValueError) as error:
            raise InvalidGrammar(f"this model's tokenizer cannot follow a grammar: {error}") from error


def _words(tokens: int) -> int:
    return -(-tokens // 32)


def compiled(tokenizer: LLTokenizer, grammar: Grammar) -> LLMatcher:
    """llguidance's matcher at the start of a text. Raises InvalidGrammar."""
    try:
        text = TRANSLATIONS[grammar.kind](_bounded(grammar))
        state = LLMatcher(tokenizer, text, log_level=0, limits=LIMITS)
    except ValueError as error:
        raise InvalidGrammar(f"the {grammar.label} does not compile: {reason(str(error))}") from error
    if state.is_error():
        raise InvalidGrammar(f"the {grammar.label} does not compile: {reason(state.get_error())}")
    return state


def reason(error: str) -> str:
    """An error of llguidance in one line for the author of the grammar."""
    line = re.sub(r"^at \d+\(\d+\): (failed to compile JSON schema: )?", "", error.splitlines()[0])
    found = re.search(r"Unimplemented keys: \[(.*)\]", error)
    if found:
        return f"{found[1]} is not supported here"
    if line.startswith("oneOf constraints"):
        return "oneOf is supported where its schemas exclude each other; use anyOf"
    if "recursion limit" in error:
        return "it is nested too deeply"
    if "NoExtension" in error:
        return "no text satisfies it"
    if re.search(r"Current row has|too many (items|states|expr)|too large|too big|fuel", error):
        return f"it takes too much work ({line.split('; consider')[0]}); make it simpler"
    found = re.search(r"lookarounds not supported yet; (\w+)", error)
    if found:
        return rf"look-around such as \b, ^ or $ inside it is not supported ({found[1]})"
    found = re.search(r"regex parse error:\n    (.*)\n    ( *)\^+\nerror: (.*)", error)
    if found:
        return f"{found[3]}, at {found[1][len(found[2]) :][:30]!r}"
    return line


def _bounded(grammar: Grammar) -> str:
    longest = LONGEST_GRAMMAR.get(grammar.kind, 0)
    if len(grammar.source) > longest:
        raise InvalidGrammar(
            f"the {grammar.label} has {len(grammar.source)} characters; at most {longest} are allowed"
        )
    return grammar.source


def _json_object(_: str) -> str:
    return _json_schema('{"type": "object"}')


def _json_schema(source: str) -> str:
    # llguidance inserts the text unparsed into its own document, so it must be exactly one JSON value.
    schema = parsed(source)
    if schema is True:
        source = "{}"
    elif not isinstance(schema, dict):
        raise InvalidGrammar("a JSON schema is an object, or true")
    return LLMatcher.grammar_from_json_schema(source, defaults=COMPACT)


def _tool_calls(source: str) -> str:
    """Free text with calls in it, each held to its schema."""
    grammar = msgspec.json.decode(source, type=CallGrammar)
    marks = [f"mark_{at}: <[{','.join(map(str, ids))}]>" for at, ids in enumerate(grammar.marks)]
    return LLMatcher.grammar_from_lark("\n".join((grammar.rules, *marks)))


def _regex(source: str) -> str:
    # \d means 0-9, as in JSON Schema, and not every digit of Unicode.
    return LLMatcher.grammar_from_lark(f"start: /{regex_to_lark(source, 'd')}/")


def _choice(source: str) -> str:
    try:
        choices = msgspec.convert(parsed(source), list[str])
    except msgspec.ValidationError:
        choices = []
    if not choices:
        raise InvalidGrammar("a choice is a JSON list of one or more strings")
    return _regex("|".join(re.escape(each) for each in choices))


def parsed(source: str) -> object:
    """The JSON value that `source` holds. Raises InvalidGrammar."""
    try:
        return msgspec.json.decode(source)
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise InvalidGrammar(f"it is not JSON: {error}") from error


TRANSLATIONS: dict[GrammarKind, Callable[[str], str]] = {
    "json_object": _json_object,
    "json_schema": _json_schema,
    "regex": _regex,
    "choice": _choice,
    "tool_calls": _tool_calls,
}
