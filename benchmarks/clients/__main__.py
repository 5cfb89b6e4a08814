"""Runs real clients, unmodified, against `stretto serve`, and prints which of their features work.

python -m benchmarks.clients --install    # once: a virtual environment for each client, in build/clients
python -m benchmarks.clients              # prints the table of docs/clients.md
python -m benchmarks.clients --only litellm
python -m benchmarks.clients --record     # also keeps what they send, in tests/server/recorded
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from benchmarks.clients.recording import Recorder, write
from stretto.models.source import resolve

HERE = Path(__file__).parent
BUILD = HERE.parents[1] / "build" / "clients"
RECORDED = HERE.parents[1] / "tests" / "server" / "recorded" / "bodies"
FEATURES = ("answer", "stream", "structured", "tools", "turns", "errors", "embeddings", "logprobs")
TIMEOUT_S = 1800
# What vLLM requires and only a GPU, or its own server, needs.
GPU = (
    "torch", "torchaudio", "torchvision", "torchcodec", "pynvvideocodec", "flashinfer-python", "tilelang",
    "nvidia-cudnn-frontend", "nvtx", "fastsafetensors", "instanttensor", "nvidia-cutlass-dsl",
    "quack-kernels", "tokenspeed-mla", "humming-kernels",
)  # fmt: skip
WEBUI = ("open-webui", "torch==2.13.0")


@dataclass(frozen=True)
class Client:
    """A client: its name in the table, its packages, and its script with arguments.

    `without`: what its first package requires, but no client needs. `folder`: that of its packages in
    build/clients, if several rows share it.
    """

    name: str
    packages: tuple[str, ...]
    script: tuple[str, ...]
    without: tuple[str, ...] = ()
    folder: str = ""

    @property
    def node(self) -> bool:
        return self.script[0].endswith(".mjs")

    @property
    def home(self) -> Path:
        return BUILD / (self.folder or self.name).replace(" ", "-").replace(",", "").replace("/", "-")

    @property
    def installed(self) -> bool:
        return (self.home / "installed").exists()

    @property
    def package(self) -> str:
        return re.split(r"[\[=]", self.packages[0])[0]

    @property
    def version(self) -> str:
        """The version of its first package that is installed."""
        if self.node:
            found = self.home / "node_modules" / self.package / "package.json"
            return json.loads(found.read_text())["version"]
        code = f"from importlib.metadata import version; print(version({self.package!r}))"
        return subprocess.check_output([self.home / "bin" / "python", "-c", code], text=True).strip()

    def install(self) -> None:
        self.home.mkdir(parents=True, exist_ok=True)
        if self.node:
            words = ["npm", "install", "--silent", "--no-fund", "--no-audit", "--prefix", str(self.home)]
            subprocess.run([*words, *self.packages], check=True)
        else:
            subprocess.run([sys.executable, "-m", "venv", self.home], check=True)
            pip = [self.home / "bin" / "python", "-m", "pip", "install", "--quiet"]
            if self.without:
                subprocess.run([*pip, "--no-deps", self.packages[0]], check=True)
            subprocess.run([*pip, *(self._required() if self.without else self.packages)], check=True)
        (self.home / "installed").touch()

    def _required(self) -> list[str]:
        """The packages after the first, and what the first requires, less `without`."""
        code = f"import importlib.metadata as m; print(*m.requires({self.package!r}), sep='\\n')"
        said = subprocess.check_output([self.home / "bin" / "python", "-c", code], text=True)
        lines = [line for line in said.splitlines() if "extra ==" not in line]
        names = {line: re.split(r"[^\w.-]", line)[0].lower() for line in lines}
        return [line for line in lines if names[line] not in self.without] + [*self.packages[1:]]

    def run(self, url: str, model: str, tokenizer: str) -> dict[str, str]:
        """The outcome of each feature. A client that ends early has those that it had printed."""
        if self.node:
            for each in HERE.glob("*.mjs"):
                shutil.copy(each, self.home)
        script = (self.home if self.node else HERE) / self.script[0]
        program = "node" if self.node else str(self.home / "bin" / "python")
        environment = os.environ | {
            "STRETTO_URL": url, "STRETTO_MODEL": model, "STRETTO_TOKENIZER": tokenizer,
        }  # fmt: skip
        environment.pop("PYTHONPATH", None)
        log = self.home / f"{self.script[-1]}.log"
        ended = "its time was up"
        with log.open("w") as errors:
            command = [program, str(script), *self.script[1:]]
            process = subprocess.Popen(
                command, env=environment, cwd=self.home, stdout=subprocess.PIPE, stderr=errors, text=True
            )
            try:
                said, _ = process.communicate(timeout=TIMEOUT_S)
                ended = f"the script ended with {process.returncode}"
            except subprocess.TimeoutExpired:
                process.kill()
                said, _ = process.communicate()
        found: dict[str, str] = {}
        for line in said.splitlines():
            if line.startswith('{"feature"'):
                each = json.loads(line)
                found[each["feature"]] = each["outcome"]
        return found or {"answer": f"no: {ended}, see {log}"}


CLIENTS = (
    Client("openai, chat", ("openai",), ("openai_python.py",), folder="openai"),
    Client("openai, responses", ("openai",), ("openai_responses.py",), folder="openai"),
    Client("openai (npm)", ("openai", "zod"), ("openai_node.mjs",)),
    Client("openai-agents", ("openai-agents",), ("openai_agents.py",)),
    Client("pydantic-ai", ("pydantic-ai-slim[openai]",), ("pydantic_ai_client.py",)),
    Client("langchain-openai", ("langchain-openai",), ("langchain_client.py",)),
    Client("@langchain/openai (npm)", ("@langchain/openai", "@langchain/core", "zod"), ("langchain_js.mjs",)),
    Client("ai (npm)", ("ai", "@ai-sdk/openai-compatible"), ("ai_sdk.mjs",)),
    Client("llama-index", ("llama-index-llms-openai-like",), ("llama_index_client.py",)),
    Client("instructor", ("instructor",), ("instructor_client.py",)),
    Client("litellm", ("litellm",), ("litellm_sdk.py",)),
    Client("litellm proxy", ("litellm[proxy]",), ("litellm_proxy.py",)),
    Client("anthropic", ("anthropic",), ("anthropic_client.py",)),
    Client("ollama", ("ollama",), ("ollama_client.py",)),
    Client("llm", ("llm",), ("command_lines.py", "llm")),
    Client("aider", ("aider-chat",), ("command_lines.py", "aider")),
    Client("promptfoo (npm)", ("promptfoo",), ("promptfoo.mjs",)),
    Client(
        "lm-eval",
        ("lm-eval[api]", "transformers", "torch==2.13.0"),
        ("command_lines.py", "lm-eval"),
    ),
    Client("guidellm", ("guidellm", "torch==2.13.0"), ("command_lines.py", "guidellm")),
    Client("vllm bench serve", ("vllm", "torch==2.13.0", "datasets"), ("command_lines.py", "vllm"), GPU),
    Client("open-webui, OpenAI", WEBUI, ("open_webui_client.py", "openai"), folder="open-webui"),
    Client("open-webui, Ollama", WEBUI, ("open_webui_client.py", "ollama"), folder="open-webui"),
)


def serve() -> tuple[subprocess.Popen[bytes], str]:
    """A server of the bundled model that is ready."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen([sys.executable, "-m", "stretto", "serve", "--port", str(port)])
    url = f"http://127.0.0.1:{port}"
    for _ in range(240):
        try:
            urllib.request.urlopen(url + "/ready")
            return server, url
        except OSError:
            time.sleep(0.5)
    raise SystemExit("the server did not become ready")


def table(rows: list[tuple[Client, dict[str, str]]]) -> str:
    """A Markdown table, and below it the reason of each `no`."""
    lines = ["| client | " + " | ".join(FEATURES) + " |", "| --- " * (len(FEATURES) + 1) + "|"]
    reasons: list[str] = []
    for client, found in rows:
        cells = [found.get(name, "-").partition(":")[0] for name in FEATURES]
        lines.append(f"| `{client.name}` {client.version} | " + " | ".join(cells) + " |")
        reasons += [f"- {client.name}, {name}: {why}" for name, why in found.items() if why != "yes"]
    return "\n".join(lines + (["", *reasons] if reasons else []))


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.clients",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--install", action="store_true", help="install the clients first")
    parser.add_argument(
        "--only", metavar="NAME", nargs="+", default=[""], help="clients whose name has one of these"
    )
    parser.add_argument("--record", action="store_true", help="keep their requests, for the tests")
    options = parser.parse_args()
    chosen = [client for client in CLIENTS if any(each in client.name for each in options.only)]
    if options.install:
        for client in [each for each in chosen if not each.installed]:
            print(f"installing {client.name}", file=sys.stderr)
            try:
                client.install()
            except subprocess.CalledProcessError as error:
                print(f"{client.name} cannot be installed: {error}", file=sys.stderr)
    missing = [client.name for client in chosen if not client.installed]
    if missing:
        print(f"not installed, so not run: {', '.join(missing)}. --install does it", file=sys.stderr)
    tokenizer = str(next(resolve("desk").rglob("tokenizer.json")).parent)
    server, url = serve()
    recorder = Recorder(url) if options.record else None
    rows: list[tuple[Client, dict[str, str]]] = []
    try:
        for client in [each for each in chosen if each.installed]:
            rows.append((client, client.run(recorder.url if recorder else url, "desk", tokenizer)))
            if recorder:
                write(RECORDED, client.name, client.version, recorder.take())
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(30)
    print(table(rows))


if __name__ == "__main__":
    main()
