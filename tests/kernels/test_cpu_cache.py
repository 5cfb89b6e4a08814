"""The cache of packed weights on disk: reuse, damaged files, forged metadata and the size limit."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from stretto.kernels.cpu import cache as module
from stretto.kernels.cpu.cache import Folder, PackedCache, checksum
from stretto.kernels.cpu.native import Native
from stretto.kernels.cpu.table import CpuQuantise, table
from stretto.models.checkpoint import identity
from stretto.models.load import load
from tests.kernels.levels import LIBRARY
from tests.models.checkpoints import FAMILIES, make
from tests.models.stepping import Driver

PROMPT = [(7 * i * i + 3 * i) % 150 + 4 for i in range(30)]
LIMIT = 2**30


@pytest.fixture
def native() -> Native:
    if LIBRARY is None:
        pytest.skip("the C kernels are not built: no compiler at install time")
    LIBRARY.threads(2)
    return LIBRARY


@pytest.fixture(autouse=True)
def _small_matrices_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stretto.kernels.cpu.table.SMALLEST_QUANTISED", 32)


class Start:
    """One start of a model, with its logits and its cache."""

    def __init__(
        self, native: Native, path: Path, folder: Path, quantise: CpuQuantise = "int8", limit: int = LIMIT
    ) -> None:
        kernels = table(native, quantise)
        self.cache = PackedCache.open(native, Folder(folder, limit), f"{kernels.name} {identity(path)}")
        decoder = load(
            path, dtype=torch.float32, device=torch.device("cpu"), kernels=kernels, store=self.cache
        )
        self.packed_anew = self.cache.fresh
        self.bytes, self.parameters = decoder.weight_bytes, decoder.parameters
        self.logits = Driver(decoder).read(PROMPT, 16)
        self.cache.save()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    make("llama", tmp_path / "model", num_hidden_layers=2)
    return tmp_path / "model"


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_loads_from_its_packed_weights(native: Native, tmp_path: Path, family: str) -> None:
    make(family, tmp_path / "model", dtype=torch.bfloat16)
    first = Start(native, tmp_path / "model", tmp_path / "kept", "int4")
    second = Start(native, tmp_path / "model", tmp_path / "kept", "int4")
    assert first.packed_anew and not second.packed_anew
    assert torch.equal(first.logits, second.logits)
    assert (first.bytes, first.parameters) == (second.bytes, second.parameters)


def test_each_format_and_checkpoint_has_its_own_cache_file(
    native: Native, model: Path, tmp_path: Path
) -> None:
    Start(native, model, tmp_path / "kept", "int8")
    assert Start(native, model, tmp_path / "kept", "int4").packed_anew
    file = model / "model.safetensors"
    times, tensors = os.stat(file), load_file(file)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    tensors["model.layers.0.mlp.down_proj.weight"][0, 0] += 1
    save_file(tensors, file, metadata={"format": "pt"})
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert os.stat(file).st_size == times.st_size
    assert Start(native, model, tmp_path / "kept", "int8").packed_anew
    assert len(list((tmp_path / "kept").iterdir())) == 3


def data_start(content: bytes | bytearray) -> int:
    return 8 + int.from_bytes(content[:8], "little")


def test_the_file_is_safetensors_with_aligned_data(native: Native, model: Path, tmp_path: Path) -> None:
    file = Start(native, model, tmp_path / "kept").cache.file
    assert data_start(file.read_bytes()) % 64 == 0
    tensors = load_file(file)
    assert len(tensors) > 5 and all(tensor.data_ptr() % 64 == 0 for tensor in tensors.values())


@pytest.mark.parametrize("place", [0.3, 0.6, 0.999])
def test_a_flipped_bit_repacks_only_its_tensor(
    native: Native, model: Path, tmp_path: Path, place: float, caplog: pytest.LogCaptureFixture
) -> None:
    first = Start(native, model, tmp_path / "kept")
    file = first.cache.file
    content = bytearray(file.read_bytes())
    start = data_start(content)
    content[start + int(place * (len(content) - start))] ^= 0x10
    file.write_bytes(content)
    second = Start(native, model, tmp_path / "kept")
    assert "damaged" in caplog.text and "packed again" in caplog.text
    assert second.packed_anew and torch.equal(first.logits, second.logits)
    third = Start(native, model, tmp_path / "kept")
    assert not third.packed_anew and torch.equal(first.logits, third.logits)


def _cut(content: bytes) -> bytes:
    return content[: len(content) * 2 // 3]


def _header(content: bytes) -> bytes:
    changed = content.replace(rb"[\"int8\",", rb"[\"int4\",")
    assert changed != content
    return changed


@pytest.mark.parametrize(
    "change",
    [
        _cut,
        _header,
        lambda content: b"",
        lambda content: content[:10],
        lambda content: b"PK\x03\x04" + content[4:],
        lambda content: content[:8] + b"\xff" * 8 + content[16:],
    ],
)
def test_a_broken_file_is_written_again(
    native: Native,
    model: Path,
    tmp_path: Path,
    change: Callable[[bytes], bytes],
    caplog: pytest.LogCaptureFixture,
) -> None:
    first = Start(native, model, tmp_path / "kept")
    first.cache.file.write_bytes(change(first.cache.file.read_bytes()))
    second = Start(native, model, tmp_path / "kept")
    assert "damaged" in caplog.text
    assert second.packed_anew and torch.equal(first.logits, second.logits)
    assert not Start(native, model, tmp_path / "kept").packed_anew


@pytest.mark.parametrize("form", [["int8", 64, 64, 0], ["int8", 2**40, 64, 64], ["int4", 64, 64, 32]])
def test_forged_shapes_in_the_metadata_read_no_other_memory(
    native: Native, model: Path, tmp_path: Path, form: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An attacker who can write to the folder can also write matching checksums."""
    first = Start(native, model, tmp_path / "kept")
    lied = module.Form(*form)
    monkeypatch.setattr(module, "Form", lambda *_: lied)
    first.cache.write()
    monkeypatch.undo()
    monkeypatch.setattr("stretto.kernels.cpu.table.SMALLEST_QUANTISED", 32)
    second = Start(native, model, tmp_path / "kept")
    assert second.packed_anew and torch.equal(first.logits, second.logits)


@pytest.mark.parametrize("change", [(0, 64), (0, -64), (2**40, 0), (-64, 0)])
def test_a_tensor_with_a_changed_offset_or_length_is_packed_anew(
    native: Native, model: Path, tmp_path: Path, change: tuple[int, int]
) -> None:
    """The header gives the tensor another length or offset than the one whose checksum is stored."""
    first = Start(native, model, tmp_path / "kept")
    content = first.cache.file.read_bytes()
    start = data_start(content)
    header = json.loads(content[8:start])
    second, third = list(header)[2:4]
    moved, longer = change
    (begin, middle), (_, end) = header[second]["data_offsets"], header[third]["data_offsets"]
    header[second] |= {
        "data_offsets": [begin + moved, middle + longer],
        "shape": [middle + longer - begin - moved],
    }
    header[third] |= {"data_offsets": [middle + longer, end], "shape": [end - middle - longer]}
    raw = json.dumps(header).encode()
    raw += b" " * (-(8 + len(raw)) % 64)
    first.cache.file.write_bytes(len(raw).to_bytes(8, "little") + raw + content[start:])
    again = Start(native, model, tmp_path / "kept")
    assert again.packed_anew and torch.equal(first.logits, again.logits)


def test_concurrent_starts_share_one_cache_file(native: Native, model: Path, tmp_path: Path) -> None:
    first, second = Start(native, model, tmp_path / "a"), Start(native, model, tmp_path / "b")
    both = Folder(tmp_path / "both", LIMIT)
    for start in (first, second):
        replace(start.cache, folder=both).write()
    third = Start(native, model, both.path)
    assert not third.packed_anew and torch.equal(first.logits, third.logits)
    assert len(list(both.path.iterdir())) == 1


def test_an_unwritable_folder_is_logged_and_not_an_error(
    native: Native, model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("in the way")
    assert Start(native, model, tmp_path / "file").packed_anew
    assert "not kept" in caplog.text


def test_a_full_disk_is_logged_and_not_an_error(
    native: Native,
    model: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    assert Start(native, model, tmp_path / "kept").packed_anew
    assert "No space left" in caplog.text
    assert list((tmp_path / "kept").iterdir()) == []


def test_the_least_recently_used_files_are_deleted_first(native: Native, model: Path, tmp_path: Path) -> None:
    files: list[Path] = []
    for layers in (1, 2, 3):
        make("llama", tmp_path / f"{layers}", num_hidden_layers=layers)
        start = Start(native, tmp_path / f"{layers}", tmp_path / "kept")
        files.append(start.cache.file)
        os.utime(start.cache.file, (layers, layers))
    Start(native, tmp_path / "1", tmp_path / "kept")  # It is used again, so it is now the newest.
    sizes = [file.stat().st_size for file in files]
    make("llama", tmp_path / "4", num_hidden_layers=1, seed=4)
    (tmp_path / "kept" / f".left{module.SUFFIX}.behind").touch()
    os.utime(tmp_path / "kept" / f".left{module.SUFFIX}.behind", (1, 1))
    Start(native, tmp_path / "4", tmp_path / "kept", limit=2 * sizes[0] + sizes[2])
    assert [file.exists() for file in files] == [True, False, True]
    assert len(list((tmp_path / "kept").iterdir())) == 3


def test_a_file_larger_than_the_limit_is_not_written(
    native: Native, model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    start = Start(native, model, tmp_path / "kept", limit=100)
    assert "cache_size" in caplog.text and not start.cache.file.exists()


def test_the_checksum_changes_with_every_byte() -> None:
    for size in (1, 31, 32, 33, 1000):
        data = torch.randint(
            0, 256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(size)
        )
        seen = {checksum(data)}
        for place in range(size):
            data[place] ^= 1 << place % 8
            seen.add(checksum(data))
            data[place] ^= 1 << place % 8
        assert len(seen) == size + 1
        assert checksum(data[:-1]) not in seen
    words = torch.arange(64, dtype=torch.int32)
    swapped = words.clone()
    swapped[[3, 40]] = swapped[[40, 3]]
    assert checksum(words.view(torch.uint8)) != checksum(swapped.view(torch.uint8))
