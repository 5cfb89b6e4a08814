"""Turns an engine's config into runners: what is loaded, in which dtype, with how much KV memory.

The decisions are `stretto.hardware`'s, so that `stretto doctor` tells the same story.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import msgspec
import torch

from stretto.config import EngineConfig, ModelConfig
from stretto.engine.core import Runner
from stretto.engine.runners.draft_model import Draft
from stretto.engine.runners.null import NullRunner, null_info
from stretto.engine.runners.torch import TorchRunner
from stretto.engine.speculative.policy import Speculation
from stretto.engine.step_time import StepCost
from stretto.engine.structured.grammar import Grammars
from stretto.errors import InvalidGrammar, StartError
from stretto.hardware import (
    KvShape,
    check_fit,
    choose_device,
    choose_dtype,
    choose_kv,
    choose_kv_dtype,
    choose_threads,
    packed_folder,
    snapshot,
)
from stretto.kernels.choice import choose_kernels, use_threads
from stretto.kernels.cpu import native
from stretto.kernels.cpu.cache import Folder, PackedCache
from stretto.models import families
from stretto.models.checkpoint import identity
from stretto.models.decoder import Decoder
from stretto.models.load import load
from stretto.types import ModelInfo

Progress = Callable[[str, int, int], None]
# It needs Triton, which comes with torch for CUDA alone.
CUDA = "stretto.engine.runners.cuda"


class Runners:
    """Every model of one engine process, loaded, and `machine`: what computes them, in words.
    `progress(stage, done, total)` hears of long work.

    Raises StartError, and CheckpointError below it, when a model cannot be held.
    """

    def __init__(self, config: EngineConfig, progress: Progress) -> None:
        self._config = config
        self._progress = progress
        self._grammars: dict[str, Grammars] = {}
        machine, threads = snapshot(), choose_threads(snapshot(), config.threads).value
        self.machine = f"{machine.cpu}, {machine.cores} cores, {threads} threads, {machine.gpus}"
        use_threads(threads)
        self._device = torch.device(choose_device(config.device, torch.cuda.is_available()).value)
        self.all = [self._runner(model, len(config.models) - i) for i, model in enumerate(config.models)]
        self._speculate()

    def grammars(self, model: str) -> Grammars:
        """The grammar compiler of a model. Raises InvalidGrammar for one without a tokenizer."""
        if model not in self._grammars:
            raise InvalidGrammar(f"model {model} has no tokenizer, so it cannot follow a grammar")
        return self._grammars[model]

    def _runner(self, model: ModelConfig, left: int) -> Runner:
        """Load one of the `left` models that still share the free memory."""
        if model.null_ms is not None:
            return NullRunner(null_info(name=model.name), cost=StepCost(base=model.null_ms), sleep=time.sleep)
        started, path = time.monotonic(), Path(model.path)
        spec = families.read(path)
        dtype = choose_dtype(snapshot(), spec.dtype, device=self._device.type, asked=model.dtype).value
        check_fit(model.name, _weight_bytes(path, spec.dtype, dtype), self._available())
        kernels, why = choose_kernels(self._device, getattr(torch, dtype), model.quantise)
        packs = model.quantise is not None and self._device.type == "cpu"
        store = self._store(path, kernels.name) if packs else None
        decoder = load(
            path,
            dtype=getattr(torch, dtype),
            device=self._device,
            kernels=kernels,
            progress=lambda _, done, total: self._progress(model.name, done, total),
            store=store,
        )
        if store is not None:
            store.save()
        decoder.kv_dtype = self._kv_dtype(decoder, model.quantise is not None)
        info = self._info(model, decoder, left, time.monotonic() - started)
        info = msgspec.structs.replace(info, kernels=why)
        eos = frozenset(spec.eos)
        if (path / "tokenizer.json").exists():
            self._grammars[model.name] = Grammars(path, eos, spec.vocab)
        kind = import_module(CUDA).CudaRunner if self._device.type == "cuda" else TorchRunner
        return kind(decoder, info, eos=eos, max_running=self._config.max_running)

    def _kv_dtype(self, decoder: Decoder, quantised: bool) -> torch.dtype:
        cached = frozenset(_named(dtype) for dtype in decoder.kernels.caches)
        asked = self._config.kv_dtype
        choice = choose_kv_dtype(_named(decoder.dtype), quantised=quantised, asked=asked, cached=cached)
        return getattr(torch, choice.value)

    def _store(self, path: Path, kernels: str) -> PackedCache | None:
        """What an earlier start kept of this checkpoint's weights for these kernels."""
        library = native.load()
        if library is None or not self._config.cache_bytes:
            return None
        folder = Folder(packed_folder(self._config.cache_dir), self._config.cache_bytes)
        return PackedCache.open(library, folder, f"{kernels} {identity(path)}")

    def _speculate(self) -> None:
        """Let the runners that can be guessed for have guesses, from the model that is to make them too."""
        asked = self._config.speculate
        if asked == "off":
            return
        runners = [runner for runner in self.all if isinstance(runner, TorchRunner)]
        for runner in runners:
            runner.speculation = Speculation()
        if asked == "ngram":
            return
        small = next((runner for runner in runners if runner.info.name == asked), None)
        if small is None:
            held = ", ".join(runner.info.name for runner in runners) or "none that can guess"
            raise StartError(f"speculate: {asked!r} is neither off, ngram nor a model held here ({held})")
        for runner in runners:
            if runner is not small:
                _let_guess(small, runner)

    def _info(self, model: ModelConfig, decoder: Decoder, left: int, load_s: float) -> ModelInfo:
        """What the loaded model is, with the share of KV memory that is its own."""
        config, spec = self._config, decoder.spec
        shape = KvShape(
            block_bytes=decoder.cache_bytes_per_block(config.block_size),
            block_size=config.block_size,
            context=spec.context,
            max_running=config.max_running,
        )
        kv = choose_kv(
            shape,
            self._available() // left,
            asked_bytes=config.kv_bytes // len(config.models),
            asked_context=config.context,
        ).value
        return ModelInfo(
            name=model.name,
            path=model.path,
            family=spec.family,
            dtype=_named(decoder.dtype),
            quantise=model.quantise,
            device=str(self._device),
            context=kv.context,
            vocab=spec.vocab,
            parameters=decoder.parameters,
            weight_bytes=decoder.weight_bytes,
            kv_bytes=kv.bytes,
            block_size=config.block_size,
            blocks=kv.blocks,
            load_s=load_s,
        )

    def _available(self) -> int:
        """Bytes the device can still give."""
        if self._device.type == "cuda":
            return torch.cuda.mem_get_info(self._device)[0]
        return snapshot().available


def _let_guess(small: TorchRunner, runner: TorchRunner) -> None:
    """Give a runner a smaller model to guess for it. Raises StartError when their tokens are not the same."""
    if small.info.vocab != runner.info.vocab:
        raise StartError(
            f"speculate: {small.info.name} has {small.info.vocab} tokens and {runner.info.name}"
            f" {runner.info.vocab}; a model can guess only for one with the same tokenizer"
        )
    draft = Draft(small, runner)
    runner.speculation = Speculation(draft)
    runner.info = msgspec.structs.replace(runner.info, kv_bytes=runner.info.kv_bytes + draft.nbytes)


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _weight_bytes(path: Path, stored: str, held: str) -> int:
    """What a checkpoint's weights will take, from the size of its files."""
    size = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    return size * getattr(torch, held).itemsize // getattr(torch, stored).itemsize
