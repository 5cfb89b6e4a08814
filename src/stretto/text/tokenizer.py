"""One model's text: its tokenizer and chat template. Text and messages in, token ids out, and back.

What a chat user types is text, special tokens included; a raw prompt is the caller's whole model input, so
special tokens are special in it. Sampling defaults in generation_config.json are not applied: OpenAI's hold.
"""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from string import ascii_lowercase
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from stretto.errors import CheckpointError, UnsupportedField
from stretto.text import chat_template
from stretto.text.detokenizer import BYTE_ALPHABET, Detokenizer, Pieces
from stretto.text.special_tokens import Literals

NULL = "null"


class TextModel:
    """The text side of the checkpoint in `path`; `null` is the null model's: one token per byte.

    `eos` are the ids that end an answer. Raises CheckpointError for a tokenizer that is missing or unknown.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        is_null = str(path).partition(":")[0] == NULL
        self.tokenizer = _null_tokenizer() if is_null else _load(path)
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        config = _json(path / "tokenizer_config.json")
        self.template = chat_template.load(path, config) if not is_null else _null_template()
        self._added = self.tokenizer.get_added_tokens_decoder()
        self._special = {id for id, token in self._added.items() if token.special}
        self._literals = Literals(token.content for token in self._added.values())
        self._continuation: Tokenizer | None = None
        self._pieces: dict[frozenset[str], Pieces] = {}
        self.pieces = self._pieces_showing(frozenset())
        self.vocab = self.tokenizer.get_vocab_size()
        self.eos = _eos(path, self.tokenizer, config)

    def encode(self, text: str) -> list[int]:
        """A raw prompt's ids: special tokens parse, and the tokenizer's own BOS or EOS is added."""
        # The batch call, even for one: it gives the interpreter lock back, and counts no offsets.
        return self.tokenizer.encode_batch_fast([text])[0].ids

    def encode_chat(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None, **variables: Any
    ) -> list[int]:
        """The ids of a chat, ready for the answer. Raises UnsupportedField when the model has no template."""
        return self.encode_rendered(self.render(messages, tools, variables))

    def render(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, variables: dict[str, Any]
    ) -> str:
        """The prompt's text. Special tokens that came with the arguments are marked as broken in it."""
        if self.template is None:
            raise UnsupportedField(
                f"the model in {self.path.name} has no chat template: use /v1/completions", param="$.messages"
            )
        guard = self._literals.guard
        return self.template.render(guard(messages), guard(tools) if tools else None, guard(variables))

    def encode_rendered(self, rendered: str) -> list[int]:
        """The ids of what `render` returned."""
        first, *rest = self._literals.split(rendered)
        ids = self.tokenizer.encode_batch_fast([first], add_special_tokens=False)[0].ids
        for piece in rest:
            ids += self._within_text().encode_batch_fast([piece], add_special_tokens=False)[0].ids
        return ids

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def detokenizer(
        self, stop: tuple[str, ...] = (), min_tokens: int = 0, show: frozenset[str] = frozenset()
    ) -> Detokenizer:
        """For one answer. `show` are special tokens to keep in the text, those that mark tool calls."""
        return Detokenizer(self._pieces_showing(show), stop, min_tokens)

    def holds(self, token: str) -> bool:
        """Whether `token` is one token of its own."""
        return self.tokenizer.token_to_id(token) is not None

    def _pieces_showing(self, show: frozenset[str]) -> Pieces:
        if show not in self._pieces:
            hidden = (id for id in self._special if self._added[id].content not in show)
            self._pieces[show] = Pieces(self.tokenizer, hidden)
        return self._pieces[show]

    def _within_text(self) -> Tokenizer:
        """The tokenizer for text that continues other text: SentencePiece's adds no blank in front."""
        if self._continuation is None:
            whole: dict[str, Any] = json.loads(self.tokenizer.to_str())
            for part in ("normalizer", "pre_tokenizer"):
                whole[part] = _without_prefix(whole[part])
            self._continuation = Tokenizer.from_str(json.dumps(whole))
        return self._continuation


def _without_prefix(step: dict[str, Any] | None) -> dict[str, Any] | None:
    if step is None or step["type"] == "Prepend":
        return None
    if step["type"] == "Sequence":
        key = "normalizers" if "normalizers" in step else "pretokenizers"
        return {**step, key: [kept for inner in step[key] if (kept := _without_prefix(inner))]}
    if step["type"] == "Metaspace":
        return {**step, "prepend_scheme": "never"}
    return {**step, "add_prefix_space": False} if "add_prefix_space" in step else step


def _load(path: Path) -> Tokenizer:
    file = path / "tokenizer.json"
    if not file.is_file():
        raise CheckpointError(
            f"{path} has no tokenizer.json; save the tokenizer again with a fast tokenizer of transformers"
        )
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # the bindings raise bare Exception
        raise CheckpointError(f"{file} does not load: {error}") from error


def _json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        return json.loads(file.read_bytes())
    except ValueError as error:
        raise CheckpointError(f"{file} is not JSON: {error}") from error


def _eos(path: Path, tokenizer: Tokenizer, config: dict[str, Any]) -> frozenset[int]:
    for name in ("generation_config.json", "config.json"):
        ids = _json(path / name).get("eos_token_id")
        if ids is not None:
            return frozenset([ids] if isinstance(ids, int) else ids)
    token = config.get("eos_token")
    token = token.get("content") if isinstance(token, dict) else token
    id = tokenizer.token_to_id(token) if isinstance(token, str) else None
    return frozenset() if id is None else frozenset([id])


def _null_tokenizer() -> Tokenizer:
    """Reads any text as bytes; each of the null model's other tokens says three letters and a blank."""
    vocabulary = dict(BYTE_ALPHABET)
    blank = next(character for character, byte in BYTE_ALPHABET.items() if byte == 0x20)
    for letters in product(ascii_lowercase[:16], repeat=3):
        vocabulary["".join(letters) + blank] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _null_template() -> chat_template.ChatTemplate:
    return chat_template.ChatTemplate({"default": "{% for m in messages %}{{ m.content }}\n{% endfor %}"}, {})
