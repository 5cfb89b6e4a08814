"""The engines that are compared: how each is installed, what it is given, and how it is started.

Every one is a process that takes `profiler.protocol.Task`s and answers `Took`s, a line of JSON each, so
that all are measured alike. What a peer needs lies in an environment of its own under the home folder.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

import stretto
from stretto import config

HERE = Path(__file__).parent
DESK = Path(stretto.__file__).parent / "desk"
CHECKPOINT = HERE.parent / "checkpoint.py"
# An open range of torch would bring gigabytes of CUDA; torchvision does not fit it and is not needed.
TORCH = "torch==2.13.0"
THREADS = 2


@dataclass(frozen=True)
class Format:
    """An engine with its weights in so many bits. `peer`: whose environment it needs; empty: our own."""

    name: str
    peer: str
    bits: int
    kind: str


FORMATS = (
    Format("stretto int8", "", 8, "int8"),
    Format("stretto int4", "", 4, "int4"),
    Format("openvino int8", "openvino", 8, "int8"),
    Format("openvino int4", "openvino", 4, "int4"),
    Format("llama.cpp Q8_0", "llamacpp", 8, "Q8_0"),
    Format("llama.cpp Q4_0", "llamacpp", 4, "Q4_0"),
)


class Home:
    """A folder that keeps what took long to make: environments, checkpoints, exports."""

    def __init__(self, path: Path) -> None:
        self._path = path.resolve()

    def prepare(self, shape: str, formats: Sequence[Format]) -> None:
        """Make what is missing."""
        (self._path / shape).mkdir(parents=True, exist_ok=True)
        checkpoint = self.checkpoint(shape)
        if not (checkpoint / "config.json").exists():
            self._run(sys.executable, CHECKPOINT, shape, checkpoint)
        for format in formats:
            if format.peer and not self.python(format.peer).exists():
                self._install(format.peer)
            if format.peer and not self.model(shape, format).exists():
                self._export(shape, format)

    def checkpoint(self, shape: str) -> Path:
        """Random weights of the shape, but for desk, which comes with the package."""
        return DESK if shape == "desk" else self._path / shape / "checkpoint"

    def context(self, shape: str) -> int:
        """The longest prompt and answer together that the checkpoint allows."""
        config = msgspec.json.decode((self.checkpoint(shape) / "config.json").read_bytes())
        return config["max_position_embeddings"]

    def python(self, peer: str) -> Path:
        return self._path / peer / "bin" / "python"

    def model(self, shape: str, format: Format) -> Path:
        """What the engine loads."""
        if not format.peer:
            return self.checkpoint(shape)
        name = f"openvino-{format.kind}" if format.peer == "openvino" else f"{format.kind}.gguf"
        return self._path / shape / name

    def command(self, shape: str, format: Format) -> tuple[list[str], bytes]:
        """The process to start, and what it is to read first."""
        model = self.model(shape, format)
        if format.peer:
            script = HERE / f"{format.peer}_alone.py"
            return [str(self.python(format.peer)), str(script), str(model), str(THREADS)], b""
        flags = {"models": [f"model={model}"], "quantise": format.kind, "threads": THREADS}
        settings = config.load(flags, os.environ, None)[1]
        return [sys.executable, "-m", "stretto.engine", "stretto.profiler.worker"], msgspec.json.encode(
            settings
        ) + b"\n"

    def _install(self, peer: str) -> None:
        home, pip = self._path / peer, self._path / peer / "bin" / "pip"
        self._run(sys.executable, "-m", "venv", home)
        if peer == "openvino":
            self._run(pip, "install", "-q", TORCH, "openvino-genai", "optimum-intel", "nncf")
            self._run(pip, "uninstall", "-qy", "torchvision")
        else:
            built_here = {"CMAKE_ARGS": "-DGGML_NATIVE=ON"}
            self._run(pip, "install", "-q", "llama-cpp-python", "gguf", "numpy", **built_here)

    def _export(self, shape: str, format: Format) -> None:
        checkpoint, model = self.checkpoint(shape), self.model(shape, format)
        if format.peer == "llamacpp":
            script = HERE / "gguf_export.py"
            self._run(self.python("llamacpp"), script, checkpoint, model, format.kind)
            return
        task = ("--task", "text-generation-with-past", "--weight-format", format.kind)
        groups = ("--group-size", "64") if format.kind == "int4" else ()
        command = self.python("openvino").with_name("optimum-cli")
        draft = model.with_suffix(".part")
        self._run(command, "export", "openvino", "--model", checkpoint, *task, *groups, draft)
        draft.rename(model)

    def _run(self, *command: str | Path, **environ: str) -> None:
        """Raises CalledProcessError; what the command says goes to standard error."""
        subprocess.run(
            [str(part) for part in command], check=True, stdout=sys.stderr, env=os.environ | environ
        )
