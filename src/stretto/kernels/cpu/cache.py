"""Packed weights on disk: written when a model is packed, checked and memory-mapped at every later start.

Owns the layout of a file, its checksums and the folder's size. Knows no checkpoint: whoever opens a file says
the key it must have been written under, and the folder may be shared, read-only, full or gone.
"""

from __future__ import annotations

import logging
import mmap
import os
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import cast

import msgspec
import torch
from msgspec import Struct
from torch import Tensor

from stretto.hardware import gib
from stretto.kernels import Activation, Packed
from stretto.kernels.cpu import native as library
from stretto.kernels.cpu.native import Native
from stretto.kernels.cpu.table import GROUP, SMALLEST_QUANTISED, VOCABULARY, PackedExperts
from stretto.kernels.cpu.weights import Form, PackedLinear, adopt

log = logging.getLogger(__name__)
# A file: MAGIC, the header's length and checksum (8 bytes each, little-endian), the header (JSON), the data.
MAGIC = b"stretto1"
PREFIX = 24
PAGE = 4096
SUFFIX = ".packed"
MOST_HEADER = 64 * 2**20
CHECKERS = 4  # threads that read memory as fast as it gives
ABANDONED_S = 3600  # a draft this old belongs to nobody


class Damaged(Exception):
    """What a file holds is not what was written."""


class Span(Struct, frozen=True):
    """Bytes of a file; `start` counts from the beginning of its data."""

    start: int
    nbytes: int
    checksum: int


class HeldLinear(Struct, frozen=True, tag="linear"):
    form: Form
    data: Span
    bias: Span | None


class HeldExperts(Struct, frozen=True, tag="experts"):
    gate_up: list[HeldLinear]
    down: list[HeldLinear]
    activation: Activation


class Header(Struct, frozen=True):
    key: str
    data_bytes: int
    packed: dict[str, HeldLinear | HeldExperts]


@dataclass(frozen=True, slots=True)
class Folder:
    """Where files lie, and how many bytes they may take together; the least recently used go first."""

    path: Path
    limit: int

    def files(self) -> list[Path]:
        """Those there are, least recently used first."""
        found: list[tuple[float, Path]] = []
        for file in self.path.glob(f"*{SUFFIX}"):
            try:
                found.append((file.stat().st_mtime, file))
            except OSError:
                continue
        return [file for _, file in sorted(found)]

    def make_room(self, nbytes: int) -> None:
        """Remove what must go for a new file of `nbytes`, and what broken starts left behind."""
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
    """What packed bytes depend on beside the weights and the format: the library that packed them, its level,
    and what is packed how."""
    found = library.path()
    code = b"" if found is None else found.read_bytes()
    rules = f"{GROUP} {SMALLEST_QUANTISED} {VOCABULARY}"
    return f"{native.level} {blake2b(code, digest_size=16).hexdigest()} {rules}"


@dataclass(slots=True)
class PackedCache:
    """One model's packed weights. `take` gives what an earlier start kept; what was packed now is given to
    `keep`, and written by `save`."""

    native: Native
    folder: Folder
    key: str
    header: Header | None = None
    mapping: Tensor | None = None
    sound: frozenset[Span] = frozenset()
    held: dict[str, Packed] = field(default_factory=lambda: dict[str, Packed]())
    fresh: bool = False

    @classmethod
    def open(cls, native: Native, folder: Folder, key: str) -> PackedCache:
        """Maps the file of `key`, if there is a sound one."""
        cache = cls(native, folder, f"{key} {layout(native)}")
        try:
            cache.header, cache.mapping = _read(native, cache.file, cache.key)
            cache.sound = _sound(native, cache.header, cache.mapping)
            os.utime(cache.file)
        except FileNotFoundError:
            pass
        except Damaged as damage:
            log.warning("%s is damaged (%s): the weights are packed again", cache.file, damage)
        except OSError as error:
            log.info("%s: %s", cache.file, error)  # a file that is read but whose time cannot be set
        return cache

    @property
    def file(self) -> Path:
        return self.folder.path / (blake2b(self.key.encode(), digest_size=16).hexdigest() + SUFFIX)

    def take(self, name: str) -> Packed | None:
        """What was kept under `name`, verified; None when nothing was, or it is damaged."""
        kept = None if self.header is None else self.header.packed.get(name)
        if kept is None:
            return None
        try:
            if isinstance(kept, HeldLinear):
                packed: Packed = self._linear(kept)
            else:
                packed = PackedExperts(
                    [self._linear(each) for each in kept.gate_up],
                    [self._linear(each) for each in kept.down],
                    kept.activation,
                )
        except (Damaged, ValueError) as damage:
            log.warning("%s is damaged (%s: %s): these weights are packed again", self.file, name, damage)
            return None
        self.held[name] = packed
        return packed

    def keep(self, name: str, packed: Packed) -> None:
        self.held[name] = packed
        self.fresh = True

    def save(self) -> None:
        """Write the file if anything was packed now. Never raises: a start without it is only slower."""
        if not self.fresh:
            return
        try:
            self._write()
        except OSError as error:
            log.warning("packed weights are not kept in %s: %s", self.folder.path, error.strerror or error)

    def _write(self) -> None:
        writer = _Layout(self.native)
        packed = {name: writer.place(each) for name, each in self.held.items()}
        header = msgspec.json.encode(Header(self.key, writer.end, packed))
        start = _data_start(len(header))
        if start + writer.end > self.folder.limit:
            size, limit = gib(start + writer.end), gib(self.folder.limit)
            log.warning("packed weights are not kept: they take %s, and cache_size is %s", size, limit)
            return
        self.folder.path.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.folder.make_room(start + writer.end)
        descriptor, draft = tempfile.mkstemp(prefix=f".{self.file.name}.", dir=self.folder.path)
        try:
            with os.fdopen(descriptor, "wb", buffering=0):
                # A full disk says so now, before anything is written.
                os.posix_fallocate(descriptor, 0, start + writer.end)
                _put(descriptor, _prefix(self.native, header) + header, 0)
                for tensor, offset in writer.placed:
                    _put(descriptor, tensor.view(torch.uint8).numpy().data, start + offset)
            os.replace(draft, self.file)
        except BaseException:
            os.unlink(draft)
            raise

    def _linear(self, kept: HeldLinear) -> PackedLinear:
        bias = None if kept.bias is None else self._tensor(kept.bias).view(torch.float32)
        return adopt(self.native, kept.form, self._tensor(kept.data), bias)

    def _tensor(self, span: Span) -> Tensor:
        if span not in self.sound:
            raise Damaged(
                f"bytes {span.start} to {span.start + span.nbytes} are not what their checksum says"
            )
        return cast(Tensor, self.mapping)[span.start : span.start + span.nbytes]


class _Layout:
    """Gives every tensor its place in a file, each at the start of a cache line."""

    def __init__(self, native: Native) -> None:
        self.native = native
        self.placed: list[tuple[Tensor, int]] = []
        self.end = 0

    def place(self, packed: Packed) -> HeldLinear | HeldExperts:
        if isinstance(packed, PackedExperts):
            gate_up = [self.linear(each) for each in packed.gate_up]
            return HeldExperts(gate_up, [self.linear(each) for each in packed.down], packed.activation)
        return self.linear(cast(PackedLinear, packed))

    def linear(self, packed: PackedLinear) -> HeldLinear:
        bias = None if packed.bias is None else self.span(packed.bias)
        return HeldLinear(Form(packed.format, packed.n, packed.k, packed.group), self.span(packed.data), bias)

    def span(self, tensor: Tensor) -> Span:
        span = Span(self.end, tensor.nbytes, self.native.checksum(tensor.data_ptr(), tensor.nbytes))
        self.placed.append((tensor, self.end))
        self.end += -(-tensor.nbytes // 64) * 64
        return span


def _read(native: Native, path: Path, key: str) -> tuple[Header, Tensor]:
    """The header of a file, and its data. Raises OSError and Damaged."""
    with path.open("rb") as file:
        prefix, size = file.read(PREFIX), os.fstat(file.fileno()).st_size
        length = int.from_bytes(prefix[8:16], "little")
        if len(prefix) < PREFIX or prefix[:8] != MAGIC or length > min(size, MOST_HEADER):
            raise Damaged("not a file of packed weights")
        raw = file.read(length)
        if _prefix(native, raw) != prefix:
            raise Damaged("a wrong checksum of its header")
        try:
            header = msgspec.json.decode(raw, type=Header)
        except msgspec.DecodeError as error:
            raise Damaged(f"its header: {error}") from None
        start = _data_start(length)
        if header.key != key or header.data_bytes < 1 or size < start + header.data_bytes:
            raise Damaged("it is cut short, or another model's")
        region = mmap.mmap(file.fileno(), size, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    region.madvise(mmap.MADV_WILLNEED)
    return header, torch.frombuffer(region, dtype=torch.uint8, offset=start, count=header.data_bytes)


def _sound(native: Native, header: Header, mapping: Tensor) -> frozenset[Span]:
    """The spans that hold what was written: each thread reads at the pace of its own core."""
    spans = [span for each in header.packed.values() for span in _spans(each)]

    def check(span: Span) -> bool:
        if span.start < 0 or span.nbytes < 1 or span.start + span.nbytes > mapping.nbytes:
            return False
        return native.checksum(mapping.data_ptr() + span.start, span.nbytes) == span.checksum

    with ThreadPoolExecutor(CHECKERS, thread_name_prefix="checksum") as pool:
        right = pool.map(check, spans)
        return frozenset(span for span, sound in zip(spans, right, strict=True) if sound)


def _spans(held: HeldLinear | HeldExperts) -> Iterator[Span]:
    if isinstance(held, HeldExperts):
        for linear in held.gate_up + held.down:
            yield from _spans(linear)
        return
    yield held.data
    if held.bias is not None:
        yield held.bias


def _prefix(native: Native, header: bytes) -> bytes:
    held = torch.frombuffer(bytearray(header), dtype=torch.uint8)
    checksum = native.checksum(held.data_ptr(), held.nbytes)
    return MAGIC + len(header).to_bytes(8, "little") + checksum.to_bytes(8, "little")


def _data_start(header_bytes: int) -> int:
    return -(-(PREFIX + header_bytes) // PAGE) * PAGE


def _put(file: int, data: bytes | memoryview, offset: int) -> None:
    view = memoryview(data).cast("B")
    while view:
        done = os.pwrite(file, view, offset)
        view, offset = view[done:], offset + done
