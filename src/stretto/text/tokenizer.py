"""One model's text: its tokenizer and chat template. Text and messages in, token ids out, and back.

In a chat, special tokens that a user types are plain text. A raw prompt is the model's whole input, so its
special tokens count as such. Sampling defaults in generation_config.json are ignored: OpenAI's apply.
"""

from __future__ import annotations

import json
import mmap
import resource
from collections.abc import Sequence
from functools import cache, cached_property
from itertools import product
from pathlib import Path
from string import ascii_lowercase
from typing import Any, cast

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from stretto.disk.files import loading, read_file
from stretto.errors import CheckpointError, InvalidRequest, UnsupportedField
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
        with loading(f"the tokenizer in {path}"):
            self._load(path)

    def _load(self, path: Path) -> None:
        is_null = str(path).partition(":")[0] == NULL
        self.tokenizer = _null_tokenizer() if is_null else _load(path)
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        config = _config(path)
        _add_listed(self.tokenizer, config)
        self.template = chat_template.load(path, config) if not is_null else _null_template()
        self._added = self.tokenizer.get_added_tokens_decoder()
        self.largest_id = max(self.tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
        self._special = {id for id, token in self._added.items() if token.special}
        self._guard = SpecialTokenGuard(token.content for token in self._added.values())
        self._continuation: Tokenizer | None = None
        self._pieces: dict[frozenset[str], Pieces] = {}
        self.pieces = self._pieces_showing(frozenset())

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """The ids of a raw prompt, with its special tokens. `special`: also with the tokenizer's own BOS or
        EOS around it."""
        return _encoded(self.tokenizer, [text], special=special)

    def encode_chat(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None, **variables: Any
    ) -> list[int]:
        """The ids of a chat up to its answer. Raises UnsupportedField when the model has no chat template."""
        return self.encode_rendered(self.render(messages, tools, variables))

    def render(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None,
        variables: dict[str, Any],
        *,
        unfinished: bool = False,
    ) -> str:
        """The text of a chat's prompt. Special tokens in the arguments are broken by a secret mark.

        `unfinished`: the prompt ends with the content of the last message, which the answer goes on with.
        Raises InvalidRequest if the template changes that content.
        """
        if self.template is None:
            raise UnsupportedField(
                f"the model in {self.path.name} has no chat template; use /v1/completions instead",
                param="$.messages",
            )
        guard = self._guard.guard
        guarded = guard(messages)
        rendered = self.template.render(guarded, guard(tools) if tools else None, guard(variables))
        return _up_to(rendered, guarded[-1]["content"]) if unfinished else rendered

    def encode_rendered(self, rendered: str) -> list[int]:
        """The ids of what `render` returned."""
        first, *rest = self._guard.split(rendered)
        ids = _encoded(self.tokenizer, [first])
        return ids + _encoded(self._continuing_tokenizer(), rest) if rest else ids

    def least_tokens(self, text: str) -> int:
        """How many tokens a raw prompt, or what `render` returned, has at least. 0: this tokenizer allows no
        such statement. It takes microseconds, and encoding may take seconds."""
        longest = self._longest_token
        if longest is None:
            return 0
        pieces = self._guard.split(text)
        size = sum(len(piece) if piece.isascii() else len(_whole(piece).encode()) for piece in pieces)
        return max(len(pieces), -(-size // longest))

    @cached_property
    def _longest_token(self) -> int | None:
        return longest_token(json.loads(self.tokenizer.to_str()))

    def decode(self, ids: list[int], *, special: bool = False) -> str:
        """The text of token ids. `special`: with the special tokens among them."""
        return self.tokenizer.decode(ids, skip_special_tokens=not special)

    def detokenizer(
        self,
        stop: tuple[str, ...] = (),
        min_tokens: int = 0,
        show: frozenset[str] = frozenset(),
        *,
        stop_shown: bool = False,
    ) -> Detokenizer:
        """A detokenizer for one answer. `show` are special tokens to keep in the text, as tool calls need."""
        return Detokenizer(self._pieces_showing(show), stop, min_tokens, stop_shown=stop_shown)

    def holds(self, token: str) -> bool:
        """Whether the vocabulary has `token`."""
        return self.tokenizer.token_to_id(token) is not None

    def special_id(self, token: str) -> int | None:
        """The id of the special token with that text; None if there is none."""
        id = self.tokenizer.token_to_id(token)
        return id if id in self._special else None

    def marks(self, *, without: Sequence[str] = ()) -> dict[str, int]:
        """The ids of the tokens that llguidance takes for special ones, not for text, without those named."""
        return {
            token.content: id
            for id, token in sorted(self._added.items())
            if (token.special or (token.content[:1] == "<" and token.content[-1:] == ">"))
            and token.content not in without
        }

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


# The memory that encoding takes. For each byte of text it was up to 167 bytes with the bundled tokenizer.
ENCODING_BYTES_A_BYTE, ENCODING_BYTES = 192, 2**22
SMALL_TEXT = 2**16  # bytes; the system refuses what this needs only where a limit says so


def _memory_is_limited() -> bool:
    """Whether the system may refuse memory although it has some: this process has a limit, or the system
    promises no more than it has. It takes 1 us."""
    return (
        resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY
        or resource.getrlimit(resource.RLIMIT_DATA)[0] != resource.RLIM_INFINITY
        or _promises_no_more()
    )


@cache
def _promises_no_more() -> bool:
    """Whether Linux counts each page that it has promised (`vm.overcommit_memory` is 2)."""
    try:
        return Path("/proc/sys/vm/overcommit_memory").read_text(encoding="utf-8").strip() == "2"
    except OSError:
        return True


def _encoded(tokenizer: Tokenizer, texts: list[str], *, special: bool = False) -> list[int]:
    """The ids of all texts, one after the other. Half a surrogate pair counts as U+FFFD.

    Raises MemoryError if there is too little memory. The tokenizer itself would end the process then.
    """
    size = sum(len(text if text.isascii() else text.encode(errors="surrogatepass")) for text in texts)
    if size > SMALL_TEXT or _memory_is_limited():
        try:
            # Nothing touches these pages, so the system only checks that it could give them. It takes 8 us.
            mmap.mmap(-1, ENCODING_BYTES + ENCODING_BYTES_A_BYTE * size, flags=mmap.MAP_PRIVATE).close()
        except OSError:
            raise MemoryError(f"no memory to encode a text of {size} bytes") from None
    # The batch call, even for one text: it releases the interpreter lock and computes no offsets.
    try:
        encoded = tokenizer.encode_batch_fast(texts, add_special_tokens=special)
    except TypeError:  # what the bindings raise for text that is not Unicode
        encoded = tokenizer.encode_batch_fast([_whole(text) for text in texts], add_special_tokens=special)
    return encoded[0].ids if len(encoded) == 1 else [id for each in encoded for id in each.ids]


def _up_to(rendered: str, content: Any) -> str:
    """The rendered chat up to the end of its last message's content. Raises InvalidRequest without one."""
    found = content.strip() if isinstance(content, str) else ""
    at = rendered.rfind(found) if found else -1
    if at < 0:
        raise InvalidRequest(
            "$.continue_final_message: the prompt does not contain the last message as it is; leave it out",
            param="$.continue_final_message",
        )
    return rendered[: at + len(found)]


def _whole(text: str) -> str:
    """The text, with U+FFFD for half a surrogate pair."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


# How many bytes of text may become one byte when a normalizer composes it: U+212A becomes K, and three Hangul
# letters become one syllable; for NFKC, a mathematical letter becomes a Latin one.
SHRINK = {"NFC": 3, "NFD": 3, "NFKC": 4, "NFKD": 4, "Prepend": 1, "ByteLevel": 1}
KEEPS_ALL = {"ByteLevel", "Metaspace", "Digits", "Split", "Punctuation"}


def longest_token(tokenizer: dict[str, Any]) -> int | None:
    """The most bytes of text that one token stands for, by a tokenizer.json. None if there is no such number,
    because a token may stand for a text of any length, or text may be dropped."""
    model, added = tokenizer["model"], tokenizer["added_tokens"]
    normal = _steps(tokenizer["normalizer"], "normalizers")
    splits = _steps(tokenizer["pre_tokenizer"], "pretokenizers")
    vocabulary: dict[str, int] = model["vocab"] if model["type"] == "BPE" else {}
    byte_level = any(step["type"] == "ByteLevel" for step in normal + splits)
    if byte_level:
        alphabet = set(BYTE_ALPHABET)
    else:
        alphabet = {f"<0x{byte:02X}>" for byte in range(256)} if model.get("byte_fallback") else {""}
    blank = any(token["lstrip"] or token["rstrip"] for token in added)
    if not alphabet <= vocabulary.keys() or blank:
        return None
    if any(step["type"] not in KEEPS_ALL or step.get("behavior") == "Removed" for step in splits):
        return None
    shrink = 1
    for step in normal:
        by = SHRINK.get(step["type"], 0)
        if step["type"] == "Replace":
            by = int(
                len(step["content"].encode())
                >= len(step["pattern"].get("String", step["content"] + " ").encode())
            )
        shrink *= by
    longest = max(map(len, vocabulary)) if byte_level else max(len(each.encode()) for each in vocabulary)
    longest = max(longest, *(len(token["content"].encode()) for token in added), 0)
    return longest * shrink or None


def _steps(step: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    """The steps of a normalizer or pre-tokenizer, without the sequences around them."""
    if step is None:
        return []
    return (
        [inner for each in step[key] for inner in _steps(each, key)] if step["type"] == "Sequence" else [step]
    )


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
        return Tokenizer.from_buffer(read_file(file))
    except CheckpointError:
        raise
    except Exception as error:  # the bindings raise bare Exception
        raise CheckpointError(f"{file} does not load: {error}") from error


def _config(path: Path) -> dict[str, Any]:
    """tokenizer_config.json. What it lacks is in special_tokens_map.json of older checkpoints, and named
    tokens may stand in a dict of extra ones: both as `AutoTokenizer` reads them."""
    config = _json(path / "tokenizer_config.json")
    if "added_tokens_decoder" not in config:
        config |= _json(path / "special_tokens_map.json")
    extra = config.get("extra_special_tokens")
    return config | cast("dict[str, Any]", extra) if isinstance(extra, dict) else config


def _add_listed(tokenizer: Tokenizer, config: dict[str, Any]) -> None:
    """Add the tokens that only tokenizer_config.json lists. Raises CheckpointError where an id is taken."""
    listed = config.get("added_tokens_decoder")
    tokens = cast("dict[str, Any]", listed) if isinstance(listed, dict) else {}
    for id, values in sorted(tokens.items(), key=lambda item: int(item[0])):
        content = values["content"]
        if tokenizer.token_to_id(content) is not None:
            continue
        flags = {name: bool(values.get(name)) for name in ("single_word", "lstrip", "rstrip", "special")}
        normalized = bool(values.get("normalized", not flags["special"]))
        token = AddedToken(content, normalized=normalized, **flags)
        tokenizer.add_tokens([token])  # pyright: ignore[reportUnknownMemberType]
        if tokenizer.token_to_id(content) != int(id):
            raise CheckpointError(
                f"tokenizer_config.json gives {content!r} the id {id}, which tokenizer.json cannot: save both"
                " anew with save_pretrained of transformers"
            )


def _json(file: Path) -> dict[str, Any]:
    if not file.exists():
        return {}
    try:
        found: object = json.loads(read_file(file))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is not JSON: {error}; fetch it again") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{file} must hold a JSON object, not {type(found).__name__}")
    return cast("dict[str, Any]", found)


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
