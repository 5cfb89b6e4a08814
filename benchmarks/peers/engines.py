"""The compared engines: how each is installed, which weights it gets, and how it is started.

Each engine is a process that reads and writes lines of JSON (`stretto.profiler.protocol`), so all are
measured in the same way. Each peer has a Python environment of its own in the home folder.
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
# A newer torch would install gigabytes of CUDA. The torchvision that comes along does not fit it.
TORCH = "torch==2.13.0"
THREADS = 2


@dataclass(frozen=True)
class Format:
    """An engine with a weight format. `peer`: the environment it runs in, empty for Stretto's own.

    `kind`: the format's name in that engine. `bits`: bits per weight.
    """

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
    """A folder with everything that takes long to make: environments, checkpoints, exports."""

    def __init__(self, path: Path) -> None:
        self._path = path.resolve()

    def prepare(self, shape: str, formats: Sequence[Format]) -> None:
        """Make what is missing for these formats."""
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
        """The checkpoint of a shape: random weights, except for desk, which the package contains."""
        return DESK if shape == "desk" else self._path / shape / "checkpoint"

    def context(self, shape: str) -> int:
        """The largest number of tokens, prompt and answer together, that the checkpoint allows."""
        config = msgspec.json.decode((self.checkpoint(shape) / "config.json").read_bytes())
        return config["max_position_embeddings"]

    def python(self, peer: str) -> Path:
        """The interpreter of a peer's environment."""
        return self._path / peer / "bin" / "python"

    def model(self, shape: str, format: Format) -> Path:
        """The file or folder that the engine loads."""
        if not format.peer:
            return self.checkpoint(shape)
        name = f"openvino-{format.kind}" if format.peer == "openvino" else f"{format.kind}.gguf"
        return self._path / shape / name

    def command(self, shape: str, format: Format) -> tuple[list[str], bytes]:
        """The command that starts the engine, and the first line to send it (perhaps none)."""
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
            build_flags = {"CMAKE_ARGS": "-DGGML_NATIVE=ON"}
            self._run(pip, "install", "-q", "llama-cpp-python", "gguf", "numpy", **build_flags)

    def _export(self, shape: str, format: Format) -> None:
        checkpoint, model = self.checkpoint(shape), self.model(shape, format)
        if format.peer == "llamacpp":
            script = HERE / "gguf_export.py"
            self._run(self.python("llamacpp"), script, checkpoint, model, format.kind)
            return
        task = ("--task", "text-generation-with-past", "--weight-format", format.kind)
        groups = ("--group-size", "64") if format.kind == "int4" else ()
        command = self.python("openvino").with_name("optimum-cli")
        unfinished = model.with_suffix(".part")
        self._run(command, "export", "openvino", "--model", checkpoint, *task, *groups, unfinished)
        unfinished.rename(model)

    def _run(self, *command: str | Path, **environ: str) -> None:
        """Run a command with its output on standard error. Raises CalledProcessError."""
        subprocess.run(
            [str(part) for part in command], check=True, stdout=sys.stderr, env=os.environ | environ
        )
