"""Token ids -> text, one token at a time, with stop strings. Each sequence has its own Detokenizer.

Text comes out in whole characters. Bytes that are not UTF-8 become the replacement character, as in the
tokenizer's own decoding.
"""

from __future__ import annotations

import json
from codecs import getincrementaldecoder
from collections.abc import Callable, Iterable
from typing import Any, Protocol

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from stretto.text.stop_strings import StopStrings

_Utf8 = getincrementaldecoder("utf-8")
_BLANK = "\u2581"  # SentencePiece writes a blank like this
_ADDITIVE = {"ByteLevel", "ByteFallback", "Fuse", "Strip", "Metaspace", "Replace"}


class TokenDecoder(Protocol):
    """Turns the tokens of one sequence into text."""

    def push(self, token: int) -> str: ...
    def flush(self) -> str: ...


class Pieces(dict[int, bytes]):
    """The bytes of each token id, computed on first use. Ids without a token have none.

    `additive`: the text of a sequence is the bytes of its tokens, one after the other. This holds for
    byte-level and SentencePiece tokenizers. For any other kind they are those of the token decoded alone.
    """

    def __init__(self, tokenizer: Tokenizer, hidden: Iterable[int] = ()) -> None:
        """`hidden` ids, the special tokens, have no bytes."""
        self._hidden = frozenset(hidden)
        super().__init__((id, b"") for id in self._hidden)
        self._tokenizer = tokenizer
        self._spelling = _spelling(tokenizer)
        self.additive = self._spelling is not None

    def __missing__(self, id: int) -> bytes:
        token = self._tokenizer.id_to_token(id)
        if token is None:
            piece = b""
        elif self._spelling is not None:
            piece = self._spelling(token)
        else:
            piece = self._tokenizer.decode([id], skip_special_tokens=False).encode()
        self[id] = piece
        return piece

    def name(self, id: int) -> str:
        """The token as log probabilities spell it: its text, `bytes:\\xf0\\x9f` if it is no whole text (as
        OpenAI's API does), or the name of a special token."""
        piece = self[id]
        if not piece:
            return self._tokenizer.id_to_token(id) or ""
        try:
            return piece.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)

    def decoder(self) -> TokenDecoder:
        """A decoder for one sequence: ours where pieces add up, as it is faster, else the library's."""
        return _PieceDecoder(self) if self.additive else self.library_decoder()

    def library_decoder(self) -> TokenDecoder:
        """A decoder for one sequence, of the tokenizers library. It works for every kind of tokenizer."""
        return _LibraryDecoder(self._tokenizer, self._hidden)


class _PieceDecoder:
    __slots__ = ("_pieces", "_utf8")

    def __init__(self, pieces: Pieces) -> None:
        self._pieces = pieces
        self._utf8 = _Utf8("replace").decode

    def push(self, token: int) -> str:
        return self._utf8(self._pieces[token])

    def flush(self) -> str:
        return self._utf8(b"", True)


class _LibraryDecoder:
    """Decodes with any kind of decoder that the tokenizers library has."""

    __slots__ = ("_hidden", "_pending", "_stream", "_tokenizer")

    def __init__(self, tokenizer: Tokenizer, hidden: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._hidden = hidden
        self._stream = DecodeStream(skip_special_tokens=False)
        self._pending: list[int] = []

    def push(self, token: int) -> str:
        if token in self._hidden:
            return ""
        text = self._stream.step(self._tokenizer, token)
        if text is None:
            self._pending.append(token)
            return ""
        self._pending.clear()
        return text

    def flush(self) -> str:
        return self._tokenizer.decode(self._pending, skip_special_tokens=False)


def _spelling(tokenizer: Tokenizer) -> Callable[[str], bytes] | None:
    """How the vocabulary of a byte-level or SentencePiece tokenizer spells bytes; None for another kind."""
    if tokenizer.decoder is None:
        return None
    state: dict[str, Any] = json.loads(tokenizer.decoder.__getstate__())
    steps: list[dict[str, Any]] = state["decoders"] if state["type"] == "Sequence" else [state]
    if not all(_is_additive(step) for step in steps):
        return None
    return _byte_level if any(step["type"] == "ByteLevel" for step in steps) else _sentencepiece


def _is_additive(step: dict[str, Any]) -> bool:
    own_replace = step["type"] == "Replace" and (step["pattern"], step["content"]) != (
        {"String": _BLANK},
        " ",
    )
    return step["type"] in _ADDITIVE and not own_replace


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's: printable bytes stand for themselves, the others for the code points from 256 on."""
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
    """The text of one sequence, up to a stop string."""

    __slots__ = ("_decoder", "_push", "_stop")

    def __init__(
        self, pieces: Pieces, stop: tuple[str, ...] = (), min_tokens: int = 0, *, stop_shown: bool = False
    ) -> None:
        """The text of the first `min_tokens` tokens is not searched for stop strings. `stop_shown`: the one
        that is found is part of the text."""
        self._decoder = pieces.decoder()
        self._push = self._decoder.push
        self._stop = StopStrings(stop, min_tokens, shown=stop_shown) if stop else None

    @property
    def stopped(self) -> str | None:
        """The stop string that ended the text, once one did."""
        return None if self._stop is None else self._stop.found

    def push(self, token: int) -> str:
        """The text that is certain now: often the token's own, sometimes empty, sometimes more."""
        text = self._push(token)
        return text if self._stop is None else self._stop.token(text)

    def flush(self) -> str:
        """The remaining text, when the sequence ended."""
        text = self._decoder.flush()
        if self._stop is None:
            return text
        out = self._stop.push(text) if text and self._stop.found is None else ""
        return out + self._stop.flush()
