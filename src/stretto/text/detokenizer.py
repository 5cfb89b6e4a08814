"""Token ids -> text, one token at a time, with stop strings. One Decoder per sequence; it knows no HTTP.

A token is a run of bytes, and text comes out in whole characters only; where bytes are no UTF-8 stands the
replacement character, as in the tokenizer's own decoding.
"""

from __future__ import annotations

import json
from codecs import getincrementaldecoder
from collections.abc import Callable, Iterable
from typing import Any

from tokenizers import Tokenizer

from stretto.errors import CheckpointError

_Utf8 = getincrementaldecoder("utf-8")
_BLANK = "\u2581"


class Pieces(dict[int, bytes]):
    """The bytes each token id stands for, worked out when first asked for. Ids without a token are empty."""

    def __init__(self, tokenizer: Tokenizer, hidden: Iterable[int] = ()) -> None:
        """`hidden` ids show nothing: the special tokens."""
        super().__init__((id, b"") for id in hidden)
        self._name = tokenizer.id_to_token
        self._bytes = _spelling(tokenizer)

    def __missing__(self, id: int) -> bytes:
        token = self._name(id)
        piece = b"" if token is None else self._bytes(token)
        self[id] = piece
        return piece


def _spelling(tokenizer: Tokenizer) -> Callable[[str], bytes]:
    """How the tokenizer's vocabulary spells bytes. Raises CheckpointError for a decoder it does not know."""
    if tokenizer.decoder is None:
        return lambda token: b" " + token.encode()
    kinds, unknown = _decoders(json.loads(tokenizer.decoder.__getstate__()))
    if unknown:
        raise CheckpointError(
            f"tokenizer.json decodes with {unknown}, which Stretto does not know; "
            "byte-level and SentencePiece-like tokenizers work"
        )
    return _byte_level if "ByteLevel" in kinds else _sentencepiece


def _decoders(state: dict[str, Any]) -> tuple[set[str], str | None]:
    kinds: set[str] = set()
    for step in state["decoders"] if state["type"] == "Sequence" else [state]:
        kind = step["type"]
        if kind not in {"ByteLevel", "ByteFallback", "Fuse", "Strip", "Metaspace", "Replace"}:
            return kinds, kind
        if kind == "Replace" and (step["pattern"], step["content"]) != ({"String": _BLANK}, " "):
            return kinds, "a Replace of its own"
        kinds.add(kind)
    return kinds, None


def _byte_alphabet() -> dict[str, int]:
    # GPT-2's: printable bytes stand for themselves, the others for the code points from 256 on.
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


BYTE_ALPHABET = _byte_alphabet()


def _byte_level(token: str) -> bytes:
    try:
        return bytes([BYTE_ALPHABET[character] for character in token])
    except KeyError:
        return token.encode()


def _sentencepiece(token: str) -> bytes:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes.fromhex(token[3:5])
    return token.replace(_BLANK, " ").encode()


class Detokenizer:
    """Text of one sequence. `stopped` is the stop string that ended it, once one did.

    Text that may be the beginning of a stop string is held back until it is or is not. The result depends on
    the characters alone, never on where tokens meet: the stop string that is complete first wins.
    """

    __slots__ = ("_free", "_held", "_pieces", "_stop", "_utf8", "stopped")

    def __init__(self, pieces: Pieces, stop: tuple[str, ...] = (), min_tokens: int = 0) -> None:
        """The text of the first `min_tokens` tokens is not searched for stop strings."""
        self._pieces = pieces
        self._stop = stop
        self._free = min_tokens if stop else 0
        self._held = ""
        self._utf8 = _Utf8("replace").decode
        self.stopped: str | None = None

    def push(self, token: int) -> str:
        """The text that is certain now that `token` came; often that token's own, sometimes empty."""
        text = self._utf8(self._pieces[token])
        if not self._stop:
            return text
        if self._free:
            self._free -= 1
            return text
        return self._watch(text) if text else ""

    def flush(self) -> str:
        """The rest, when the sequence ended."""
        text = self._utf8(b"", True)
        if not self._stop:
            return text
        out = self._watch(text) if text and not self.stopped else ""
        held, self._held = self._held, ""
        return out + held

    def _watch(self, text: str) -> str:
        text = self._held + text
        ends = [(at + len(stop), at, stop) for stop in self._stop if (at := text.find(stop)) >= 0]
        if ends:
            _, at, self.stopped = min(ends)
            self._held = ""
            return text[:at]
        keep = max(_overlap(text, stop) for stop in self._stop)
        cut = len(text) - keep
        self._held = text[cut:]
        return text[:cut]


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of `text` that begin `stop`."""
    for length in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
