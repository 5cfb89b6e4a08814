"""Loads the models of an engine: which dtype, kernels, device and how much KV memory each one gets.

The choices themselves are made in `stretto.hardware`, so that `stretto doctor` reports the same ones.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping, Sequence
from functools import partial
from importlib import import_module
from math import inf
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import torch

from stretto.config import EngineConfig, ModelConfig, tiers_of
from stretto.engine.core import LoadedModel
from stretto.engine.runners.calibrate import known_times
from stretto.engine.runners.draft_model import CHUNK, UNREAD, DeviceDraftModel, DraftModel
from stretto.engine.runners.graphs import MOST_TOKENS, rows_for
from stretto.engine.runners.interface import Runner
from stretto.engine.runners.null import NullRunner, null_cost, null_info
from stretto.engine.runners.sampler import verified_on_device
from stretto.engine.runners.torch import TorchRunner
from stretto.engine.scheduler.default_tiers import default_tiers
from stretto.engine.scheduler.types import Limits
from stretto.engine.speculative.policy import Speculation, Verification
from stretto.engine.step_time import StepTime
from stretto.engine.structured.grammar import Grammars
from stretto.errors import InvalidGrammar, StartError
from stretto.hardware import (
    MOST_STEP_TOKENS,
    KvShape,
    cache_folder,
    check_fit,
    choose_device,
    choose_dtype,
    choose_kv,
    choose_kv_dtype,
    choose_running,
    choose_step_tokens,
    choose_threads,
    gib,
    packed_folder,
    snapshot,
)
from stretto.kernels.choice import choose_kernels, choose_wider, use_threads
from stretto.kernels.cpu import native
from stretto.kernels.cpu.cache import Folder, PackedCache
from stretto.models import families
from stretto.models.checkpoint import Checkpoint, identity
from stretto.models.decoder import Decoder
from stretto.models.load import MixedKernels, load
from stretto.models.source import ProgressCallback
from stretto.telemetry.start_times import StartTimes
from stretto.types import ModelInfo

log = logging.getLogger(__name__)
CUDA = "stretto.engine.runners.cuda"  # imported on demand: it needs Triton, which only comes with CUDA


class LoadedWeights(NamedTuple):
    """A model whose weights are loaded. `why`: a phrase on the choice of its kernels."""

    model: ModelConfig
    decoder: Decoder
    eos: frozenset[int]
    why: str
    load_s: float


def no_progress(stage: str, done: int, total: int) -> None:
    """Ignore the progress of loading."""


def machine_name(config: EngineConfig) -> str:
    """The processors that compute, and the threads: step times are those of one machine."""
    machine, threads = snapshot(), choose_threads(snapshot(), config.threads).value
    return f"{machine.cpu}, {machine.cores} cores, {threads} threads, {machine.gpus}"


class ModelLoader:
    """Loads all models of one engine process. `machine` describes the processors that run them.

    `on_progress(stage, done, total)` is called while weights are read. `times` gets the parts of the start.
    Raises StartError, or CheckpointError for a checkpoint that cannot be read.
    """

    def __init__(
        self,
        config: EngineConfig,
        on_progress: ProgressCallback = no_progress,
        times: StartTimes | None = None,
    ) -> None:
        self._progress = on_progress
        self._times = times or StartTimes()
        self._grammars: dict[str, Grammars] = {}
        self._decoders: dict[str, Decoder] = {}
        self.machine = machine_name(config)
        use_threads(choose_threads(snapshot(), config.threads).value)
        with self._times.part("device"):
            device = choose_device(config.device, torch.cuda.is_available()).value
            self._device = torch.device(device)
            self._available()  # the first question creates the context of a GPU
        running = choose_running(config.max_running, device).value
        self.config = msgspec.structs.replace(config, max_running=running)
        cache = cache_folder(config.cache_dir)
        if self._device.type == "cuda" and cache is not None:
            # Triton names a compiled kernel by its source, its own version and the device.
            os.environ.setdefault("TRITON_CACHE_DIR", str(cache / "kernels"))
        with self._times.part("weights"):
            loaded = [self._load(model) for model in config.models]
        self._free = self._available()
        shares = _kv_shares([each for each in loaded if isinstance(each, LoadedWeights)], config.block_size)
        self.runners = [
            each if isinstance(each, NullRunner) else self._runner(each, shares[each.model.name])
            for each in loaded
        ]

    def models(self) -> list[LoadedModel]:
        """The models with their step times, measured now if need be, and their speculative decoding.

        Raises StartError when `speculate` names a model that cannot draft.
        """
        cache = cache_folder(self.config.cache_dir)
        drafts = self._draft_runners()
        folder = cache and cache / "step-times"
        limits = Limits(self.config.max_running, self.config.max_step_tokens or MOST_STEP_TOKENS)
        with self._times.part("calibration"):
            times = {
                runner.info.name: known_times(runner, limits, machine=self.machine, folder=folder)
                for runner in self.runners
            }
        return [
            LoadedModel(
                runner,
                times[runner.info.name],
                self._speculation(runner, drafts.get(runner.info.name), times),
            )
            for runner in self.runners
        ]

    def grammars(self, model: str) -> Grammars:
        """The grammar compiler of a model. Raises InvalidGrammar if the model has no tokenizer."""
        if model not in self._grammars:
            raise InvalidGrammar(f"model {model} has no tokenizer, so it cannot follow a grammar")
        return self._grammars[model]

    def _load(self, model: ModelConfig) -> LoadedWeights | NullRunner:
        """Load the weights of a model."""
        if model.is_null:
            return NullRunner(null_info(name=model.name), cost=null_cost(model.path), sleep=time.sleep)
        started, path = time.monotonic(), Path(model.path)
        spec = families.read(path)
        with Checkpoint(path) as checkpoint:
            stored, parameters = spec.dtype or checkpoint.dtype, checkpoint.parameters
        dtype = choose_dtype(snapshot(), stored, device=self._device.type, requested=model.dtype).value
        check_fit(model.name, parameters * getattr(torch, dtype).itemsize, self._available())
        with self._times.part("imports"):  # of Triton, on a GPU
            kernels, why = choose_kernels(self._device, getattr(torch, dtype), model.quantise)
        packs = model.quantise is not None and self._device.type == "cpu"
        store = self._store(path, " ".join((kernels.name, *model.exclude))) if packs else None
        mixed = None
        if model.quantise is not None and model.exclude:
            wider = choose_wider(self._device, getattr(torch, dtype), model.quantise)
            mixed = MixedKernels(kernels, wider, frozenset(model.exclude))
        decoder = load(
            path,
            dtype=getattr(torch, dtype),
            device=self._device,
            kernels=mixed or kernels,
            progress=lambda _, done, total: self._progress(model.name, done, total),
            store=store,
        )
        if store is not None:
            store.save()
        decoder = decoder.with_kv_dtype(self._kv_dtype(decoder, model.quantise is not None))
        eos = frozenset(spec.eos)
        if (path / "tokenizer.json").exists():
            self._grammars[model.name] = Grammars(path, eos, spec.vocab)
        return LoadedWeights(model, decoder, eos, why, time.monotonic() - started)

    def _runner(self, loaded: LoadedWeights, share: float) -> Runner:
        """The runner of a model. `share`: of the memory for KV caches. Raises StartError."""
        info = self._info(loaded.model, loaded.decoder, share)
        info = msgspec.structs.replace(info, kernels=loaded.why, load_s=loaded.load_s)
        self._decoders[info.name] = loaded.decoder
        if self._device.type == "cuda":
            return self._cuda_runner(
                loaded.decoder, info, loaded.eos, self.config.max_step_tokens or MOST_STEP_TOKENS
            )
        return TorchRunner(loaded.decoder, info, eos=loaded.eos, max_running=self.config.max_running)

    def _cuda_runner(self, decoder: Decoder, info: ModelInfo, eos: frozenset[int], most: int) -> Any:
        """A `CudaRunner` for steps of at most `most` tokens, with its graphs. Raises StartError when they
        leave no memory."""
        try:
            with self._times.part("imports"):
                runners = import_module(CUDA)
            with self._times.part("memory"):
                runner = runners.CudaRunner(
                    decoder, info, eos=eos, max_running=self.config.max_running, most_tokens=most
                )
            runner.start(partial(self._progress, f"{info.name}: graphs"), self._times)
        except torch.OutOfMemoryError as error:
            raise StartError(
                f"{info.name}: beside {gib(info.kv_bytes)} of KV cache, {self._device} has too little memory "
                "for its steps; set a smaller --kv-memory or --max-running"
            ) from error
        return runner

    def _kv_dtype(self, decoder: Decoder, quantised: bool) -> torch.dtype:
        cached = frozenset(_named(dtype) for dtype in decoder.kernels.kv_dtypes)
        choice = choose_kv_dtype(
            _named(decoder.dtype), quantised=quantised, requested=self.config.kv_dtype, cached=cached
        )
        return getattr(torch, choice.value)

    def _store(self, path: Path, kernels: str) -> PackedCache | None:
        """The weights of this checkpoint that an earlier start packed for these kernels."""
        library, kept = native.load(), packed_folder(self.config.cache_dir)
        if library is None or kept is None or not self.config.cache_bytes:
            return None
        folder = Folder(kept, self.config.cache_bytes)
        return PackedCache.open(library, folder, f"{kernels} {identity(path)}")

    def _draft_runners(self) -> dict[str, Runner]:
        """By model, the runner of its draft model, where it has one. Raises StartError for a wrong name."""
        name = self.config.speculate
        if name in ("off", "ngram"):
            return {}
        able = {each.info.name: each for each in self.runners if not isinstance(each, NullRunner)}
        if name == "auto":
            return {each.name: able[each.draft] for each in self.config.models if each.draft in able}
        if name not in able:
            names = ", ".join(able) or "none"
            raise StartError(
                f"speculate: {name!r} is neither auto, off, ngram nor a loaded model that can draft ({names})"
            )
        return dict.fromkeys((each.name for each in self.config.models), able[name])

    def _speculation(
        self, runner: Runner, small: Runner | None, times: Mapping[str, StepTime]
    ) -> Speculation | None:
        """Speculative decoding for a model, with `small` as its draft model. Raises StartError."""
        if self.config.speculate == "off" or isinstance(runner, NullRunner):
            return None
        rules = Verification()
        if self._device.type == "cuda":
            rules = Verification(verified_on_device, rows_for(self.config.max_running), pipelined=True)
        if small is None or small is runner:
            return Speculation(device=rules)
        if small.info.vocab != runner.info.vocab:
            raise StartError(
                f"speculate: {small.info.name} has {small.info.vocab} tokens and {runner.info.name}"
                f" {runner.info.vocab}; a draft model must have the same tokenizer"
            )
        own = times[small.info.name]
        if isinstance(small, TorchRunner) and isinstance(runner, TorchRunner):
            return Speculation(DraftModel(small, runner, own), rules)
        info = msgspec.structs.replace(runner.info, name=small.info.name)
        most = max(CHUNK, UNREAD * self.config.max_running)
        drafting = self._cuda_runner(self._decoders[small.info.name], info, runner.eos, most)
        return Speculation(DeviceDraftModel(drafting, StepTime(own.cost, list(own.errors))), rules)

    def _info(self, model: ModelConfig, decoder: Decoder, share: float) -> ModelInfo:
        """The description of a loaded model, with its share of the memory that is free or set for caches."""
        config, spec = self.config, decoder.spec
        shape = KvShape(
            block_bytes=decoder.cache_bytes_per_block(config.block_size),
            block_size=config.block_size,
            context=spec.context,
            max_running=config.max_running,
        )
        kv = choose_kv(
            shape,
            int(self._free * share),
            requested_bytes=int(config.kv_bytes * share),
            requested_context=config.context,
        )
        return ModelInfo(
            name=model.name,
            path=model.path,
            family=spec.family,
            dtype=_named(decoder.dtype),
            quantise=model.quantise,
            device=str(self._device),
            context=kv.value.context,
            vocab=spec.vocab,
            parameters=decoder.parameters,
            weight_bytes=decoder.weight_bytes,
            kv_bytes=kv.value.bytes,
            block_size=config.block_size,
            blocks=kv.value.blocks,
            load_s=0.0,
            kv_why=kv.why,
            usual_tokens=model.usual_tokens,
            revision=identity(Path(model.path)),
        )

    def _available(self) -> int:
        """The free memory of the device in bytes."""
        if self._device.type == "cuda":
            return torch.cuda.mem_get_info(self._device)[0]
        return snapshot().available


def _kv_shares(loaded: Sequence[LoadedWeights], block_size: int) -> dict[str, float]:
    """Each model's share of the memory for KV caches. All caches have room for equally many tokens."""
    sizes = {each.model.name: each.decoder.cache_bytes_per_block(block_size) for each in loaded}
    return {name: size / sum(sizes.values()) for name, size in sizes.items()}


def step_limits(config: EngineConfig, models: list[LoadedModel]) -> Limits:
    """What the engine may do at once, and what its tiers ask for.

    The step of each model keeps the tightest objective of the tiers. On a GPU it is a graph, unless the user
    wants longer ones.
    """
    costs = [model.times.cost for model in models]
    on_gpu = any(model.runner.info.device.startswith("cuda") for model in models)
    tiers = tiers_of(config.tiers, default_tiers(costs))
    itl_ms = min((tier.objective.itl_ms for tier in tiers.values() if tier.objective.itl_ms), default=inf)
    chosen = [
        choose_step_tokens(
            config.max_step_tokens,
            base_ms=cost.base,
            per_token_ms=cost.per_prefill,
            itl_ms=itl_ms,
            most=MOST_TOKENS if on_gpu else MOST_STEP_TOKENS,
        )
        for cost in costs
    ]
    fewest = min(chosen, key=lambda each: each.value)
    log.debug("a step has at most %d tokens: %s", fewest.value, fewest.why)
    return Limits(config.max_running, fewest.value, tiers)


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
