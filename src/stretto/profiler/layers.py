"""Profiles a decode step: how long each kind of layer takes, beside the bytes that it must read.

It wraps the functions of the kernels table with timers, over the same weights, so it measures the decoder's
plain path. It works on the CPU only, where a kernel has ended when its call returns.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import torch

from stretto.kernels import AnyKernels, MixtureOfExperts, Mlp
from stretto.kernels.cpu import native
from stretto.kernels.cpu.weights import pack
from stretto.models.decoder import Decoder, ModelWeights
from stretto.profiler.protocol import LayerTime

HEAD, EXPERTS, ATTENTION, NORM = "head", "experts", "attention", "norm"
# A function of the table that is not listed here is named after the weights it is called with.
NAMED = {
    "rope_and_cache": "rope_and_cache",
    "paged_attention": ATTENTION,
    "norm": NORM,
    "add_norm": NORM,
    "prepare": "prepare",
}
BEYOND_CACHE = (65536, 1024)
REPETITIONS = 7


class LayerTimer:
    """A timed copy of a decoder.

    `decoder` computes the same as the given one, and adds the time of each kind of layer to `seconds`.
    """

    def __init__(self, decoder: Decoder) -> None:
        self._clock = time.perf_counter
        self._depth = 0
        self._names: dict[int, str] = {}
        self.bytes: dict[str, int] = defaultdict(int)  # all experts count, though a step reads only some
        for name, packed in _named(decoder.weights):
            self._names[id(packed)] = name
            self.bytes[name] += packed.nbytes
        self.seconds: dict[str, float] = defaultdict(float)
        kernels = self._timed_table(decoder.kernels)
        self.decoder = Decoder(decoder.spec, kernels, decoder.weights, decoder.kv_dtype)
        self._token_bytes = decoder.cache_bytes_per_block(1)

    def parts(self, steps: int, context: int) -> list[LayerTime]:
        """The mean over `steps` steps, whose sequences read `context` keys in all."""
        read = self.bytes | {ATTENTION: context * self._token_bytes}
        return [
            LayerTime(layer=name, bytes=read.get(name, 0), ms=seconds / steps * 1e3)
            for name, seconds in self.seconds.items()
        ]

    def _timed_table(self, kernels: AnyKernels) -> AnyKernels:
        kernels = replace(kernels, layers=None)
        names = [entry.name for entry in fields(kernels) if callable(getattr(kernels, entry.name))]
        timed = {name: self._timed(name, getattr(kernels, name)) for name in names if "pack" not in name}
        return replace(kernels, **timed)

    def _timed(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """Time a function of the table. If it calls another one, the time counts for the outer one."""

        def timed(*arguments: Any) -> Any:
            self._depth += 1
            start = self._clock()
            try:
                return call(*arguments)
            finally:
                self._depth -= 1
                if not self._depth:
                    self.seconds[self._part(name, arguments)] += self._clock() - start

        return timed

    def _part(self, name: str, arguments: tuple[Any, ...]) -> str:
        if name in NAMED:
            return NAMED[name]
        known = (self._names.get(id(argument)) for argument in arguments)
        return next((part for part in known if part is not None), name)


def bandwidth() -> float:
    """The memory bandwidth in bytes per second, with the threads that run the model.

    It times one row times 256 MiB of float32 weights, which is bound by memory, or a sum without C kernels.
    """
    weights = torch.zeros(BEYOND_CACHE)
    library = native.load()
    if library is None:
        return weights.nbytes / _best(weights.sum)
    packed, row = pack(library, weights, None, "float32"), torch.ones(1, BEYOND_CACHE[1])
    out = torch.empty(1, BEYOND_CACHE[0])
    arguments = (packed.address, row.data_ptr(), out.data_ptr(), 1, native.F32)
    return packed.nbytes / _best(lambda: library.linear(*arguments))


def _best(call: Callable[[], object]) -> float:
    seconds: list[float] = []
    for _ in range(REPETITIONS):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def _named(weights: ModelWeights) -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = [(HEAD, weights.head)]
    for layer in weights.stack.layers:
        found += [("qkv", layer.qkv), ("out", layer.out)]
        match layer.feed_forward:
            case Mlp(gate_up=gate_up, down=down):
                found += [("gate_up", gate_up), ("down", down)]
            case MixtureOfExperts(router=router, experts=experts):
                found += [("router", router), (EXPERTS, experts)]
    return found
