"""The bound of a text's tokens that needs no encoding: never above the number of tokens."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers

from stretto.errors import ContextExceeded
from stretto.text.prompts import check_size
from stretto.text.tokenizer import SHRINK, TextModel, longest_token
from tests.server.checkpoint import CHATML, CORPUS, byte_level, sentencepiece, write
from tests.server.fake_engine import info


def bound(tokenizer: Tokenizer) -> int | None:
    return longest_token(json.loads(tokenizer.to_str()))


def composing(form: Any) -> Tokenizer:
    tokenizer = byte_level()
    tokenizer.normalizer = form
    return tokenizer


SOUND = {
    "byte level": byte_level,
    "sentencepiece": sentencepiece,
    "NFC": lambda: composing(normalizers.NFC()),
    "NFKC": lambda: composing(normalizers.NFKC()),
}


@pytest.mark.parametrize("name", SOUND)
def test_a_text_never_has_fewer_tokens_than_stated(name: str, tmp_path: Path) -> None:
    text = TextModel(
        write(tmp_path, SOUND[name](), CHATML, eos="<|stop|>" if name != "sentencepiece" else "</s>")
    )
    draw = random.Random(5)
    pool = [
        *CORPUS[:4],
        "<|stop|>",
        "</tool_call>",
        " ",
        "\u212a",
        "\u1112\u1161\u11ab",
        "\U0001d400",
        "e\u0301",
        "\ud83d",
    ]
    for _ in range(300):
        typed = "".join(draw.choices(pool, k=draw.randrange(1, 40)))
        chat = text.render([{"role": "user", "content": typed}], None, {})
        assert 0 < text.least_tokens(chat) <= len(text.encode_rendered(chat))
        assert 0 < text.least_tokens(typed) <= len(text.encode(typed))


@pytest.mark.parametrize("form", ["NFC", "NFD", "NFKC", "NFKD"])
def test_no_character_shrinks_by_more_than_the_table_says(form: Any) -> None:
    """Every character, and the longest way to write every character that is composed."""
    for code in range(sys.maxunicode + 1):
        if not 0xD800 <= code < 0xE000:
            character = chr(code)
            shortest = len(unicodedata.normalize(form, character).encode())
            longest = max(len(character.encode()), len(unicodedata.normalize("NFD", character).encode()))
            assert longest <= SHRINK[form] * shortest


def swallowing() -> Tokenizer:
    tokenizer = byte_level()
    tokenizer.add_tokens([AddedToken("<pad>", rstrip=True)])  # pyright: ignore[reportUnknownMemberType]
    return tokenizer


def dropping() -> Tokenizer:
    tokenizer = byte_level()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), tokenizer.pre_tokenizer]
    )
    return tokenizer


@pytest.mark.parametrize(
    "tokenizer",
    [
        swallowing(),
        dropping(),
        composing(normalizers.Strip()),
        composing(normalizers.Replace("a", "")),
        Tokenizer(models.WordLevel({"a": 0}, unk_token="a")),
        Tokenizer(models.BPE({"a": 0}, [], unk_token="a", fuse_unk=True)),
    ],
)
def test_a_tokenizer_that_may_drop_text_has_no_bound(tokenizer: Tokenizer) -> None:
    assert bound(tokenizer) is None


def test_a_text_that_is_too_long_is_refused_without_encoding(tmp_path: Path) -> None:
    text = TextModel(write(tmp_path, byte_level(), CHATML, eos="<|stop|>"))
    del text.tokenizer  # so that encoding fails
    text.__dict__["_longest_token"] = 16
    model = info(vocab=600, context=512)
    for prompt in ("a " * 2_000_000, text.render([{"role": "user", "content": "<|stop|>" * 513}], None, {})):
        with pytest.raises(ContextExceeded, match=r"\$\.prompt has .* so at least"):
            check_size(prompt, text, model, "$.prompt")
    check_size("a" * 16 * 512, text, model, "$.prompt")


ENCODE = """
import resource, sys
from pathlib import Path
from stretto.text.tokenizer import TextModel
text = TextModel(Path(sys.argv[1]))
text.encode_rendered("a few words")
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**26, -1))
try:
    text.encode_rendered("word " * 400_000)
except MemoryError as error:
    print(error)
print(len(text.encode_rendered("a few words")))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_text_too_large_for_the_memory_that_is_left_ends_no_process(tmp_path: Path) -> None:
    """The tokenizer aborts when it gets no memory, so it must not begin."""
    path = write(tmp_path, byte_level(), CHATML, eos="<|stop|>")
    run = subprocess.run([sys.executable, "-c", ENCODE, path], capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[0] == "no memory to encode a text of 2000000 bytes"
    assert int(run.stdout.splitlines()[1]) > 0


SHORT = """
import resource, sys
from pathlib import Path
from stretto.text.tokenizer import TextModel
text = TextModel(Path(sys.argv[1]))
text.encode_rendered("a few words")
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**20, -1))
try:
    text.encode_rendered("a few words")
except MemoryError as error:
    print(error)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_short_text_asks_for_memory_too_once_the_process_has_a_limit(tmp_path: Path) -> None:
    path = write(tmp_path, byte_level(), CHATML, eos="<|stop|>")
    run = subprocess.run([sys.executable, "-c", SHORT, path], capture_output=True, text=True, timeout=60)
    assert run.stdout == "no memory to encode a text of 11 bytes\n", run.stderr
