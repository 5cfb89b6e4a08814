"""Reads safetensors files, straight into the memory that will hold the weights.

Owns the file descriptors, and parses and checks the headers. Knows no model family and no decoder.
"""

from __future__ import annotations

import mmap
import os
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from hashlib import blake2b
from math import prod
from pathlib import Path
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import Any, cast

import msgspec
import torch
from torch import Tensor

from stretto.disk.files import POINTER, check_content, open_file, read_file
from stretto.errors import CheckpointError, reason_of
from stretto.models.fields import Fields
from stretto.models.spec import StoredDtype

# The format: a little-endian length of 8 bytes, a JSON header of that length, then the data.
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
DTYPE_NAMES: dict[str, StoredDtype] = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
WIDTHS = {  # bytes of an element
    **dict.fromkeys(("F64", "I64", "U64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
}
MAX_HEADER = 100 * 2**20
STAGE = 8 * 2**20
# A thread copies from the page cache at a third of the speed that a GPU takes.
READERS, LEAST_READ = min(os.cpu_count() or 1, 8), 2**16
SAMPLES, SAMPLE = 16, 16384
INDEX, WHOLE = "model.safetensors.index.json", "model.safetensors"


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor in a file. `start` is the offset of its first byte in the file."""

    file: int
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Stage:
    """Memory that one thread reads into before the device copies from it. It is pinned for a GPU."""

    memory: Tensor
    stream: torch.cuda.Stream | None

    @classmethod
    def of(cls, device: torch.device) -> Stage:
        cuda = device.type == "cuda"
        memory = torch.empty(STAGE, dtype=torch.uint8, pin_memory=cuda)
        return cls(memory, torch.cuda.Stream(device) if cuda else None)


class Checkpoint:
    """The tensors of a directory of safetensors files. It is a context manager, which holds the files open.

    Raises CheckpointError for files that are missing, truncated or malformed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.files: list[tuple[Path, int]] = []
        self.entries: dict[str, Entry] = {}
        self._stages: SimpleQueue[Stage] = SimpleQueue()
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="weights")
        try:
            for file in weight_files(path):
                self._open(file)
        except BaseException:
            self.close()
            raise
        self.nbytes = sum(entry.nbytes for entry in self.entries.values())
        self.parameters = sum(prod(entry.shape) for entry in self.entries.values())

    @property
    def dtype(self) -> StoredDtype:
        """The dtype of most of its weights, for a config.json that does not say so."""
        sizes = {name: 0 for name in DTYPES}
        for entry in self.entries.values():
            if entry.dtype in sizes:
                sizes[entry.dtype] += entry.nbytes
        return DTYPE_NAMES[max(sizes, key=sizes.__getitem__)]

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._readers.shutdown()
        for _, descriptor in self.files:
            os.close(descriptor)
        self.files = []

    def _open(self, file: Path) -> None:
        descriptor = open_file(file)
        self.files.append((file, descriptor))
        for name, entry in _header(file, descriptor, len(self.files) - 1).items():
            if name in self.entries:
                raise CheckpointError(f"{file} holds {name}, which another file of {self.path} holds too")
            self.entries[name] = entry

    def name_anew(self, entries: dict[str, Entry]) -> None:
        """Take these entries instead, which lie in the same files."""
        self.entries = entries
        self.nbytes = sum(entry.nbytes for entry in entries.values())
        self.parameters = sum(prod(entry.shape) for entry in entries.values())

    def find(self, name: str, shape: tuple[int, ...]) -> Entry:
        """The entry of tensor `name`. Raises CheckpointError when it is missing, has another shape, or has a
        dtype that is not a plain float."""
        entry = self.entries.get(name)
        if entry is None:
            raise CheckpointError(f"{self.path} has no tensor {name}, which its config.json calls for")
        file, _ = self.files[entry.file]
        if entry.shape != shape:
            raise CheckpointError(
                f"{name} in {file} has shape {list(entry.shape)}; by config.json it must be {list(shape)}"
            )
        if entry.dtype not in DTYPES:
            raise CheckpointError(f"{name} in {file} is {entry.dtype}; only {', '.join(DTYPES)} are read")
        return entry

    def read(self, entry: Entry, into: Tensor) -> None:
        """Fill `into` (contiguous) with the tensor, converted to its dtype and device. Raises CheckpointError
        when the file ends early."""
        dtype, flat = DTYPES[entry.dtype], into.view(-1)
        if dtype == into.dtype and into.device.type == "cpu":
            self._fill(entry, entry.start, flat)
            return
        count = min(STAGE // dtype.itemsize, max(-(-flat.numel() // READERS), LEAST_READ))
        ready = torch.cuda.current_stream().record_event() if flat.is_cuda else None
        reads = [
            self._readers.submit(self._read_part, entry, first, flat[first : first + count], ready)
            for first in range(0, flat.numel(), count)
        ]
        wait(reads)
        for read in reads:
            read.result()

    def _read_part(self, entry: Entry, first: int, into: Tensor, ready: torch.Event | None) -> None:
        """Read elements from number `first` on through a stage that no other thread uses. The memory of
        `into` is free once `ready`."""
        dtype = DTYPES[entry.dtype]
        try:
            stage = self._stages.get_nowait()
        except Empty:
            stage = Stage.of(into.device)
        part = stage.memory.view(dtype)[: into.numel()]
        self._fill(entry, entry.start + first * dtype.itemsize, part)
        if stage.stream is None or ready is None:
            into.copy_(part)
        else:
            with torch.cuda.stream(stage.stream):
                stage.stream.wait_event(ready)
                into.copy_(part, non_blocking=True)
            stage.stream.synchronize()
        self._stages.put(stage)

    def map(self, entry: Entry) -> Tensor:
        """The tensor, mapped: it is read when it is used. The file must not be changed meanwhile."""
        file, descriptor = self.files[entry.file]
        start = entry.start // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
        offset = entry.start - start
        try:
            # Private and writable: torch warns about memory that is read-only.
            region = mmap.mmap(
                descriptor,
                offset + entry.nbytes,
                flags=mmap.MAP_PRIVATE,
                prot=mmap.PROT_READ | mmap.PROT_WRITE,
                offset=start,
            )
        except OSError as error:
            raise CheckpointError(f"{file} cannot be mapped: {reason_of(error)}") from error
        dtype = DTYPES[entry.dtype]
        if entry.start % dtype.itemsize:
            held = torch.empty(entry.shape, dtype=dtype)
            self.read(entry, held)
            return held
        flat = torch.frombuffer(region, dtype=dtype, offset=offset, count=entry.nbytes // dtype.itemsize)
        return flat.view(entry.shape)

    def _fill(self, entry: Entry, start: int, flat: Tensor) -> None:
        file, descriptor = self.files[entry.file]
        view, done = flat.view(torch.uint8).numpy().data, 0
        while done < len(view):
            try:
                got = os.preadv(descriptor, [view[done:]], start + done)
            except OSError as error:
                raise CheckpointError(f"{file} cannot be read: {reason_of(error)}") from error
            if not got:
                raise CheckpointError(f"{file} ends early: it is truncated, fetch it again")
            done += got


def identity(path: Path) -> str:
    """A digest that changes when the checkpoint does. Raises CheckpointError.

    It covers config.json and, of each safetensors file, the name, size, time of change and samples of the
    content, the header among them. Reading all of a file would take as long as loading it.
    """
    seen = blake2b(read_file(path / "config.json"), digest_size=16)
    with Checkpoint(path) as checkpoint:
        for file, descriptor in checkpoint.files:
            stat = os.fstat(descriptor)
            seen.update(f"{file.name} {stat.st_size} {stat.st_mtime_ns}".encode())
            for sample in range(SAMPLES):
                seen.update(os.pread(descriptor, SAMPLE, stat.st_size * sample // SAMPLES))
    return seen.hexdigest()


def weight_files(path: Path) -> list[Path]:
    """The files that hold the weights. Others may lie beside them: adapters, an optimiser's state, copies.

    Raises CheckpointError when there are none.
    """
    index = path / INDEX
    if index.exists():
        names = Fields.load(index).object("weight_map").data.values()
        if not names or not all(isinstance(name, str) and Path(name).name == name for name in names):
            raise CheckpointError(f"{index}: $.weight_map must map tensors to files beside it")
        return [path / name for name in sorted(set(names))]
    files = [path / WHOLE] if (path / WHOLE).exists() else sorted(path.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{path} has no *.safetensors")
    return files


def _header(file: Path, descriptor: int, number: int) -> dict[str, Entry]:
    size = os.fstat(descriptor).st_size
    check_content(file, os.pread(descriptor, len(POINTER), 0))
    length = int.from_bytes(os.pread(descriptor, 8, 0), "little")
    if size < 8 or not 2 <= length <= min(size - 8, MAX_HEADER):
        raise CheckpointError(
            f"{file} is not a safetensors file, or is truncated: its header does not fit in it"
        )
    try:
        header = msgspec.json.decode(os.pread(descriptor, length, 8))
    except (msgspec.DecodeError, RecursionError) as error:
        raise CheckpointError(f"{file} is not a safetensors file: its header is not JSON ({error})") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{file} is not a safetensors file: its header is not a JSON object")
    tensors = cast(dict[str, Any], header)
    tensors.pop("__metadata__", None)
    entries = {name: _entry(file, number, name, raw, 8 + length) for name, raw in tensors.items()}
    end = 8 + length
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].nbytes)):
        if entry.start < end:
            raise CheckpointError(f"{file}: {name} overlaps the tensor before it")
        end = entry.start + entry.nbytes
        if end > size:
            raise CheckpointError(f"{file} is truncated: {name} ends at byte {end} of {size}; fetch it again")
    return entries


def _entry(file: Path, number: int, name: str, raw: Any, base: int) -> Entry:
    try:
        dtype, shape, (start, stop) = raw["dtype"], tuple(raw["shape"]), raw["data_offsets"]
        width, numbers = WIDTHS.get(dtype), (*shape, start, stop)
    except (KeyError, TypeError, ValueError):
        raise CheckpointError(f"{file}: the header's entry for {name} is malformed: {raw!r:.200}") from None
    if width is None:
        raise CheckpointError(
            f"{name} in {file} is {dtype!r:.40}; only {', '.join(DTYPES)} are read: use the checkpoint it was"
            " made from"
        )
    if not all(type(n) is int and n >= 0 for n in numbers):
        raise CheckpointError(f"{file}: the header's entry for {name} is malformed: {raw!r:.200}")
    nbytes = width
    for n in shape:
        nbytes *= n
    if stop - start != nbytes:
        raise CheckpointError(f"{file}: {name} is {dtype} {list(shape)}, yet takes {stop - start} bytes")
    return Entry(number, dtype, shape, base + start, nbytes)
