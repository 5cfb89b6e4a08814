"""A tokenizer's files in the forms of older and other programs, read as `AutoTokenizer` reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from stretto.errors import CheckpointError
from stretto.text.tokenizer import TextModel
from tests.server.checkpoint import byte_level, write

TEMPLATE = "{{ bos_token }}{{ image_token }}{% for m in messages %}{{ m.content }}<|end of turn|>{% endfor %}"
CHAT = [{"role": "user", "content": "Hello"}]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write(tmp_path, byte_level(), TEMPLATE, eos="<|stop|>")


def change(path: Path, name: str, **fields: Any) -> None:
    file = path / name
    found = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({key: value for key, value in (found | fields).items() if value is not None}))


def reference(path: Path) -> list[int]:
    theirs = PreTrainedTokenizerFast.from_pretrained(path)
    return theirs.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=False)


def test_a_first_token_that_only_the_special_tokens_map_names(path: Path):
    change(path, "tokenizer_config.json", added_tokens_decoder=None, bos_token=None)
    change(path, "special_tokens_map.json", bos_token={"content": "<|stop|>"})
    text = TextModel(path)
    assert text.template is not None
    assert text.render(CHAT, None, {}).startswith("<|stop|>")
    assert text.encode_chat(CHAT) == reference(path)


def test_tokens_that_only_the_config_lists(path: Path):
    size = TextModel(path).tokenizer.get_vocab_size()
    added = {
        str(size): {"content": "<|end of turn|>", "special": True, "normalized": False},
        str(size + 1): {"content": "<tool>", "special": False},
    }
    change(path, "tokenizer_config.json", added_tokens_decoder=added)
    text = TextModel(path)
    ids = text.encode_chat(CHAT)
    assert ids[-1] == size and ids == reference(path)
    assert text.special_id("<|end of turn|>") == size and text.special_id("<tool>") is None
    assert text.encode("a<tool>b")[1] == size + 1
    assert text.decode(ids) == "Hello"
    typed = text.encode_chat([{"role": "user", "content": "<|end of turn|>"}])
    assert typed.count(size) == 1, "what a user types is no special token"


def test_a_listed_token_whose_id_is_taken_is_refused(path: Path):
    change(path, "tokenizer_config.json", added_tokens_decoder={"3": {"content": "<new>", "special": True}})
    with pytest.raises(CheckpointError, match=r"<new>.*id 3"):
        TextModel(path)


def test_named_extra_tokens_are_variables_of_the_template(path: Path):
    change(path, "tokenizer_config.json", extra_special_tokens={"image_token": "<|stop|>"})
    text = TextModel(path)
    assert text.render(CHAT, None, {}).startswith("<|stop|>Hello")
    assert text.encode_chat(CHAT) == reference(path)
