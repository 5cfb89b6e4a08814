"""A tiny real checkpoint, damaged in many ways: each ends in one sentence, within seconds."""

# pyright: reportUnknownMemberType=false
from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from stretto.errors import CheckpointError, InvalidRequest, StartError, StrettoError
from stretto.kernels.reference import REFERENCE
from stretto.models.load import load
from stretto.models.source import check
from stretto.text.tokenizer import TextModel
from tests.models.checkpoints import make, rewrite
from tests.server.checkpoint import byte_level, write

Damage = Callable[[Path], object]
CONFIG, WEIGHTS, TOKENIZER = "config.json", "model.safetensors", "tokenizer.json"
SETTINGS, INDEX = "tokenizer_config.json", "model.safetensors.index.json"
NESTED = b"[" * 100_000 + b"]" * 100_000


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("whole")
    make("llama", path, num_hidden_layers=1)
    return write(path, byte_level(), "{{ messages[0].content }}", eos="<|stop|>")


def content(name: str, data: bytes | str) -> Damage:
    raw = data if isinstance(data, bytes) else data.encode()
    return lambda path: (path / name).write_bytes(raw)


def cut(name: str, keep: int) -> Damage:
    return lambda path: os.truncate(path / name, keep)


def half(name: str) -> Damage:
    return lambda path: os.truncate(path / name, (path / name).stat().st_size // 2)


def replaced(name: str, make_it: Callable[[Path], object]) -> Damage:
    def damage(path: Path) -> None:
        (path / name).unlink(missing_ok=True)
        make_it(path / name)

    return damage


def fields(**changes: Any) -> Damage:
    return lambda path: rewrite(path, **changes)


def setting(**changes: Any) -> Damage:
    def damage(path: Path) -> None:
        file = path / SETTINGS
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return damage


def header(change: Callable[[dict[str, Any]], object]) -> Damage:
    """Change the header of the weights, and leave their data."""

    def damage(path: Path) -> None:
        raw = (path / WEIGHTS).read_bytes()
        length = struct.unpack("<Q", raw[:8])[0]
        entries = json.loads(raw[8 : 8 + length])
        change(entries)
        changed = json.dumps(entries).encode()
        (path / WEIGHTS).write_bytes(struct.pack("<Q", len(changed)) + changed + raw[8 + length :])

    return damage


def tensor(**changes: Any) -> Damage:
    return header(lambda entries: entries["model.norm.weight"].update(changes))


def loop(path: Path) -> None:
    path.symlink_to(path.name)


def zeros(path: Path) -> None:
    path.symlink_to("/dev/zero")


def tokenizer(**changes: Any) -> Damage:
    def damage(path: Path) -> None:
        file = path / TOKENIZER
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return damage


def yarn(**changes: Any) -> Damage:
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64} | changes
    return fields(rope_parameters=None, rope_scaling=scaling)


ALL = (CONFIG, WEIGHTS, TOKENIZER, SETTINGS)
NEEDED = (CONFIG, WEIGHTS, TOKENIZER)
DAMAGES: dict[str, Damage] = {
    **{f"{name} is empty": content(name, "") for name in ALL},
    **{f"half of {name}": half(name) for name in ALL},
    **{f"{name} is garbage": content(name, os.urandom(4096)) for name in ALL},
    **{f"{name} is a list": content(name, "[1, 2]") for name in (CONFIG, TOKENIZER, SETTINGS)},
    **{f"{name} is nested deeply": content(name, NESTED) for name in (CONFIG, TOKENIZER, SETTINGS, INDEX)},
    **{f"{name} is a pipe": replaced(name, os.mkfifo) for name in ALL},
    **{f"{name} is a directory": replaced(name, os.mkdir) for name in ALL},
    **{f"{name} links to itself": replaced(name, loop) for name in NEEDED},
    **{f"{name} is endless": replaced(name, zeros) for name in NEEDED},
    **{f"{name} is missing": replaced(name, lambda path: None) for name in NEEDED},
    "the header says it is huge": content(WEIGHTS, struct.pack("<Q", 2**62) + b"{}"),
    "the header is 90 MB of nothing": content(WEIGHTS, struct.pack("<Q", 90 * 2**20) + b"{}"),
    "the header is nested deeply": content(WEIGHTS, struct.pack("<Q", len(NESTED)) + NESTED),
    "the weights end early": cut(WEIGHTS, 1000),
    "an unknown dtype": tensor(dtype="F4"),
    "another dtype of the same size": tensor(dtype="I32"),
    "a wrong shape": tensor(shape=[32]),
    "a negative shape": tensor(shape=[-64]),
    "a huge shape": tensor(shape=[2**62, 2**62]),
    "offsets beyond the file": tensor(data_offsets=[2**40, 2**40 + 256]),
    "offsets in the wrong order": tensor(data_offsets=[256, 0]),
    "an entry that is a list": header(lambda entries: entries.update({"model.norm.weight": [1]})),
    "a tensor is missing": header(lambda entries: entries.pop("model.norm.weight")),
    "a tensor too many": header(lambda entries: entries.update(more=entries.pop("model.norm.weight"))),
    "an index without files": content(INDEX, '{"weight_map": {"a": "b.safetensors"}}'),
    "an index out of the directory": content(INDEX, '{"weight_map": {"a": "../../../etc/passwd"}}'),
    "an index that is no map": content(INDEX, '{"weight_map": [1]}'),
    "layers without end": fields(num_hidden_layers=10**18),
    "an infinite base": content(CONFIG, '{"model_type": "llama", "rope_theta": 1e999}'),
    "a base of 400 digits": fields(rope_parameters=None, rope_theta=10**400),
    "a vocabulary of text": fields(vocab_size="many"),
    "a family of text": fields(model_type=["llama"]),
    "no heads": fields(num_attention_heads=0),
    "an end token of text": content("generation_config.json", '{"eos_token_id": "</s>"}'),
    "end tokens in lists": content("generation_config.json", '{"eos_token_id": [[2]]}'),
    "yarn with a base of 1": yarn(rope_theta=1.0),
    "yarn without cycles": yarn(beta_fast=0),
    "yarn from text": yarn(original_max_position_embeddings="64"),
    "generation_config.json is a list": content("generation_config.json", "[]"),
    "a tokenizer without a model": tokenizer(model=None),
    "a tokenizer of another kind": tokenizer(model={"type": "Quantum"}),
    "a tokenizer with a broken vocabulary": tokenizer(
        model={"type": "BPE", "vocab": {"a": -1}, "merges": []}
    ),
    "a decoder that does not exist": tokenizer(decoder={"type": "Nothing"}),
    "added tokens of text": tokenizer(added_tokens="none"),
    "a template that is a number": setting(chat_template=7),
    "templates without names": setting(chat_template=[{"template": "x"}]),
    "templates of numbers": setting(chat_template=[{"name": "default", "template": 7}]),
    "a template that is not closed": setting(chat_template="{% for m in messages %}"),
    "a template of 30 nested loops": setting(chat_template="{% for a in b %}" * 30 + "{% endfor %}" * 30),
    "a template nested deeply": setting(chat_template="{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}"),
    "a template that loops": setting(
        chat_template="{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    ),
    "a template that calls itself": setting(
        chat_template="{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}"
    ),
    "a template that grows": setting(chat_template="{{ 'a' * 10 ** 12 }}"),
    "a template with a huge power": setting(chat_template="{{ 10 ** 999999999 }}"),
    "a template that divides by zero": setting(chat_template="{{ 1 // 0 }}"),
    "chat_template.json without a template": content("chat_template.json", "{}"),
    "chat_template.jinja in another encoding": content("chat_template.jinja", b"\xff\xfe\x00"),
    "chat_template.jinja is a pipe": replaced("chat_template.jinja", os.mkfifo),
}


def serve(path: Path) -> None:
    """All that a server reads of a checkpoint, and the first chat."""
    check(path)
    load(path, dtype=torch.float32, device=torch.device("cpu"), kernels=REFERENCE)
    TextModel(path).encode_chat([{"role": "user", "content": "Hi"}])


def test_the_whole_checkpoint_is_served(whole: Path) -> None:
    serve(whole)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_checkpoint_ends_in_one_sentence(whole: Path, tmp_path: Path, name: str) -> None:
    path = tmp_path / "model"
    shutil.copytree(whole, path)
    DAMAGES[name](path)
    with pytest.raises(StrettoError) as error:
        serve(path)
    assert isinstance(error.value, CheckpointError | InvalidRequest)
    message = error.value.message
    assert "\n" not in message and 20 < len(message) < 700, message
    assert str(path) in message or "template" in message, message


def test_too_little_address_space_is_one_sentence(whole: Path) -> None:
    """With less, the engine's libraries cannot be loaded; it may be that a little more is enough."""
    code = (
        "import asyncio, sys; from stretto.config import *; from stretto.engine.client import EngineClient\n"
        "async def main():\n"
        "    client = EngineClient(EngineConfig(models=(ModelConfig(name='m', path=sys.argv[1]),)))\n"
        "    await client.start()\n"
        "    try: await client.wait_ready()\n"
        "    except Exception as error: print('said:', type(error).__name__, error)\n"
        "    finally: await client.shutdown(0.0)\n"
        "asyncio.run(main())"
    )
    for limit in (400_000, 900_000):
        command = f"ulimit -v {limit}; exec {sys.executable} -c '{code.replace(chr(39), chr(34))}' {whole}"
        done = subprocess.run(
            ["bash", "-c", command], capture_output=True, text=True, timeout=60, check=False
        )
        assert "Traceback" not in done.stderr + done.stdout
        assert done.returncode == 0
        assert limit > 400_000 or f"said: {StartError.__name__}" in done.stdout, done
