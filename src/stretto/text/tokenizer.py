"""One model's text: its tokenizer and chat template. Text and messages in, token ids out, and back.

In a chat, special tokens that a user types are plain text. A raw prompt is the model's whole input, so its
special tokens count as such. Sampling defaults in generation_config.json are ignored: OpenAI's apply.
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
from stretto.text.special_tokens import SpecialTokenGuard

NULL = "null"


class TextModel:
    """The tokenizer and chat template of the checkpoint in `path`.

    The path `null` gives the null model's tokenizer, which has one token per byte. Raises CheckpointError for
    a tokenizer that is missing or does not load.
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
        self._guard = SpecialTokenGuard(token.content for token in self._added.values())
        self._continuation: Tokenizer | None = None
        self._pieces: dict[frozenset[str], Pieces] = {}
        self.pieces = self._pieces_showing(frozenset())

    def encode(self, text: str) -> list[int]:
        """The ids of a raw prompt, with its special tokens and the tokenizer's own BOS or EOS."""
        # The batch call, even for one text: it releases the interpreter lock and computes no offsets.
        return self.tokenizer.encode_batch_fast([text])[0].ids

    def encode_chat(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None, **variables: Any
    ) -> list[int]:
        """The ids of a chat up to its answer. Raises UnsupportedField when the model has no chat template."""
        return self.encode_rendered(self.render(messages, tools, variables))

    def render(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, variables: dict[str, Any]
    ) -> str:
        """The text of a chat's prompt. Special tokens in the arguments are broken by a secret mark."""
        if self.template is None:
            raise UnsupportedField(
                f"the model in {self.path.name} has no chat template; use /v1/completions instead",
                param="$.messages",
            )
        guard = self._guard.guard
        return self.template.render(guard(messages), guard(tools) if tools else None, guard(variables))

    def encode_rendered(self, rendered: str) -> list[int]:
        """The ids of what `render` returned."""
        first, *rest = self._guard.split(rendered)
        ids = self.tokenizer.encode_batch_fast([first], add_special_tokens=False)[0].ids
        for piece in rest:
            ids += self._continuing_tokenizer().encode_batch_fast([piece], add_special_tokens=False)[0].ids
        return ids

    def decode(self, ids: list[int]) -> str:
        """The text of token ids, without special tokens."""
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def detokenizer(
        self, stop: tuple[str, ...] = (), min_tokens: int = 0, show: frozenset[str] = frozenset()
    ) -> Detokenizer:
        """A detokenizer for one answer. `show` are special tokens to keep in the text, as tool calls need."""
        return Detokenizer(self._pieces_showing(show), stop, min_tokens)

    def holds(self, token: str) -> bool:
        """Whether the vocabulary has `token`."""
        return self.tokenizer.token_to_id(token) is not None

    def _pieces_showing(self, show: frozenset[str]) -> Pieces:
        if show not in self._pieces:
            hidden = (id for id in self._special if self._added[id].content not in show)
            self._pieces[show] = Pieces(self.tokenizer, hidden)
        return self._pieces[show]

    def _continuing_tokenizer(self) -> Tokenizer:
        """The tokenizer for text that continues other text: it adds no blank in front, as Llama 2's does."""
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
            f"{path} has no tokenizer.json: save one there with AutoTokenizer.from_pretrained(...)"
            ".save_pretrained(...) of transformers"
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


def _null_tokenizer() -> Tokenizer:
    """Encodes text as bytes. The null model's other tokens are three letters and a blank each."""
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
