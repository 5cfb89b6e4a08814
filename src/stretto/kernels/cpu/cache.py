"""Packed weights on disk: written when a model is packed, verified and memory-mapped at later starts.

Owns the files and the size of their folder. A file is plain safetensors: tensors of bytes, and metadata that
say how they are packed and what their XXH3 checksums are. Knows no checkpoint: whoever opens a file names the
key it must have been written under. The folder may be shared, read-only, full or missing.
"""

from __future__ import annotations

import logging
import os
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any, cast

import msgspec
import torch
import xxhash
from msgspec import Struct
from safetensors import SafetensorError, safe_open
from torch import Tensor

from stretto.hardware import gib
from stretto.kernels import Activation, Packed
from stretto.kernels.cpu import native as library
from stretto.kernels.cpu.native import Native
from stretto.kernels.cpu.table import GROUP, SMALLEST_QUANTISED, VOCABULARY, PackedExperts
from stretto.kernels.cpu.weights import Form, PackedLinear, adopt

log = logging.getLogger(__name__)
SUFFIX = ".packed.safetensors"
ALIGNMENT = 64  # bytes; the kernels read whole cache lines
CHECK_THREADS = 4  # enough to read memory at its full bandwidth
ABANDONED_S = 3600  # a draft this old belongs to no running process


class DamagedFile(Exception):
    """A file does not hold what was written to it."""


class StoredLinear(Struct, frozen=True):
    """One packed matrix. `data` and `bias` are checksums of the tensors that hold them."""

    form: Form
    data: int
    bias: int | None


class StoredWeights(Struct, frozen=True):
    """One linear layer, or all experts of a layer: first each expert's `gate_up`, then each one's `down`."""

    linears: list[StoredLinear]
    activation: Activation | None  # of experts


@dataclass(frozen=True, slots=True)
class Folder:
    """The folder of the files. `limit` is how many bytes they may take together."""

    path: Path
    limit: int

    def files(self) -> list[Path]:
        """The files, least recently used first."""
        found: list[tuple[float, Path]] = []
        for file in self.path.glob(f"*{SUFFIX}"):
            try:
                found.append((file.stat().st_mtime, file))
            except OSError:
                continue
        return [file for _, file in sorted(found)]

    def evict(self, nbytes: int) -> None:
        """Delete the least recently used files until `nbytes` more fit, and drafts that a crash left."""
        for draft in self.path.glob(f".*{SUFFIX}.*"):
            if draft.stat().st_mtime < time.time() - ABANDONED_S:
                draft.unlink(missing_ok=True)
        files = self.files()
        total = nbytes + sum(file.stat().st_size for file in files)
        for file in files:
            if total > self.limit:
                total -= file.stat().st_size
                file.unlink(missing_ok=True)


def layout(native: Native) -> str:
    """What decides how weights are packed beside the weights and their format: the library's code, the
    instruction set in use, and the rules that choose a format."""
    found = library.path()
    code = b"" if found is None else found.read_bytes()
    rules = f"{GROUP} {SMALLEST_QUANTISED} {VOCABULARY}"
    return f"{native.level} {blake2b(code, digest_size=16).hexdigest()} {rules}"


@dataclass(slots=True)
class PackedCache:
    """The packed weights of one model. `take` returns what an earlier start stored. What had to be packed now
    is passed to `keep`, and `save` writes it."""

    native: Native
    folder: Folder
    key: str
    stored: dict[str, StoredWeights]
    tensors: dict[str, Tensor]  # of the file: those that match their checksums
    held: dict[str, Packed] = field(default_factory=dict[str, Packed])
    fresh: bool = False  # something had to be packed now

    @classmethod
    def open(cls, native: Native, folder: Folder, key: str) -> PackedCache:
        """Map the file of `key`, if there is one, and verify its checksums."""
        cache = cls(native, folder, f"{key} {layout(native)}", {}, {})
        try:
            cache.stored, tensors = _read(cache.file, cache.key)
            cache.tensors = _verified(cache.stored, tensors)
            os.utime(cache.file)
        except FileNotFoundError:
            pass
        except DamagedFile as damage:
            log.warning("%s is damaged (%s): the weights are packed again", cache.file, damage)
        except OSError as error:
            log.info("%s: %s", cache.file, error)  # a file that can be read, but whose time cannot be set
        return cache

    @property
    def file(self) -> Path:
        return self.folder.path / (blake2b(self.key.encode(), digest_size=16).hexdigest() + SUFFIX)

    def take(self, name: str) -> Packed | None:
        """The weights stored under `name`. None when there are none, or when they are damaged."""
        stored = self.stored.get(name)
        if stored is None:
            return None
        try:
            linears = [self._linear(_tensor_name(name, i), each) for i, each in enumerate(stored.linears)]
        except (KeyError, ValueError) as damage:
            log.warning("%s is damaged (%s: %s): these weights are packed again", self.file, name, damage)
            return None
        packed: Packed = linears[0]
        if stored.activation is not None:
            count = len(linears) // 2
            packed = PackedExperts(linears[:count], linears[count:], stored.activation)
        self.held[name] = packed
        return packed

    def keep(self, name: str, packed: Packed) -> None:
        self.held[name] = packed
        self.fresh = True

    def save(self) -> None:
        """Write the file if something was packed now. Logs a failure: without the file, starts are slower."""
        if self.fresh:
            self.write()

    def write(self) -> None:
        """Write the file. Logs a failure."""
        tensors: dict[str, Tensor] = {}
        stored = {name: _store(name, packed, tensors) for name, packed in self.held.items()}
        header = _header(self.key, stored, tensors)
        size = len(header) + sum(tensor.nbytes for tensor in tensors.values())
        if size > self.folder.limit:
            taken, limit = gib(size), gib(self.folder.limit)
            log.warning("packed weights are not kept: they take %s, and cache_size is %s", taken, limit)
            return
        try:
            self.folder.path.mkdir(parents=True, exist_ok=True, mode=0o700)
            self.folder.evict(size)
            self._replace([header, *(tensor.numpy().data for tensor in tensors.values())], size)
        except OSError as error:
            log.warning("packed weights are not kept in %s: %s", self.folder.path, error.strerror or error)

    def _replace(self, parts: list[bytes | memoryview], size: int) -> None:
        """Write a draft beside the file and rename it, so that a reader sees either all of it or nothing."""
        descriptor, draft = tempfile.mkstemp(prefix=f".{self.file.name}.", dir=self.folder.path)
        try:
            with os.fdopen(descriptor, "wb") as file:
                os.posix_fallocate(descriptor, 0, size)  # fails on a full disk before anything is written
                file.writelines(parts)
            os.replace(draft, self.file)
        except BaseException:
            os.unlink(draft)
            raise

    def _linear(self, name: str, stored: StoredLinear) -> PackedLinear:
        bias = None
        if stored.bias is not None:
            bias = self.tensors[f"{name}.bias"].view(torch.float32)[: stored.form.n]
        return adopt(self.native, stored.form, self.tensors[f"{name}.data"], bias)


def checksum(tensor: Tensor) -> int:
    """XXH3 of a tensor of bytes."""
    return xxhash.xxh3_64_intdigest(tensor.numpy().data)


def _digest(key: str, packed: str) -> str:
    return xxhash.xxh3_64_hexdigest((key + packed).encode())


def _tensor_name(name: str, index: int) -> str:
    return f"{name}.{index}"


def _store(name: str, packed: Packed, tensors: dict[str, Tensor]) -> StoredWeights:
    """How weights are described in the file. Adds their bytes to `tensors`, each a whole number of lines."""
    experts = packed if isinstance(packed, PackedExperts) else None
    linears = [cast(PackedLinear, packed)] if experts is None else [*experts.gate_up, *experts.down]
    stored: list[StoredLinear] = []
    for i, linear in enumerate(linears):
        at, bias = _tensor_name(name, i), None
        tensors[f"{at}.data"] = linear.data
        if linear.bias is not None:
            raw = linear.bias.view(torch.uint8)
            tensors[f"{at}.bias"] = padded = torch.nn.functional.pad(raw, (0, -raw.nbytes % ALIGNMENT))
            bias = checksum(padded)
        form = Form(linear.format, linear.n, linear.k, linear.group)
        stored.append(StoredLinear(form, checksum(linear.data), bias))
    return StoredWeights(stored, None if experts is None else experts.activation)


def _header(key: str, stored: dict[str, StoredWeights], tensors: dict[str, Tensor]) -> bytes:
    """The beginning of a safetensors file, padded with spaces so that the data are aligned. The tensors
    follow in order."""
    packed = msgspec.json.encode(stored).decode()
    metadata = {"key": key, "packed": packed, "checksum": _digest(key, packed)}
    header: dict[str, object] = {"__metadata__": metadata}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": "U8", "shape": [tensor.nbytes], "data_offsets": [start, end]}
    raw = msgspec.json.encode(header)
    raw += b" " * (-(8 + len(raw)) % ALIGNMENT)
    return len(raw).to_bytes(8, "little") + raw


def _read(path: Path, key: str) -> tuple[dict[str, StoredWeights], dict[str, Tensor]]:
    """What a file says of its weights, and its tensors, mapped. Raises OSError and DamagedFile."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)
    try:
        with cast(Any, safe_open)(path, framework="pt") as opened:  # has no types
            metadata: dict[str, str] = opened.metadata() or {}
            tensors: dict[str, Tensor] = {name: opened.get_tensor(name) for name in opened.keys()}
    except SafetensorError as error:
        raise DamagedFile(str(error)) from None
    packed = metadata.get("packed", "")
    if metadata.get("key") != key or metadata.get("checksum") != _digest(key, packed):
        raise DamagedFile("its metadata are not those that were written")
    try:
        return msgspec.json.decode(packed, type=dict[str, StoredWeights]), tensors
    except msgspec.DecodeError as error:
        raise DamagedFile(f"its metadata: {error}") from None


def _verified(stored: dict[str, StoredWeights], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that match their checksums."""
    wanted: dict[str, int] = {}
    for name, weights in stored.items():
        for i, linear in enumerate(weights.linears):
            wanted[f"{_tensor_name(name, i)}.data"] = linear.data
            if linear.bias is not None:
                wanted[f"{_tensor_name(name, i)}.bias"] = linear.bias
    with ThreadPoolExecutor(CHECK_THREADS, thread_name_prefix="checksum") as pool:
        sums = pool.map(checksum, tensors.values())
        found = dict(zip(tensors, sums, strict=True))
    return {name: tensors[name] for name in tensors if found[name] == wanted.get(name)}
