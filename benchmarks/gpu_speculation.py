"""Measures speculative decoding on this GPU: draft tokens from a text's own words, on and off in turns.

`python benchmarks/gpu_speculation.py`

Random weights repeat nothing. Here every matrix has its shape and random values, but what the layers add is
small, and the head's row of a token is the embedding of the token before it in a cycle of 512. So a greedy
answer walks a cycle, with all the work of the shape. Three kinds of prompt, of 512 tokens each:
`repeats`: a whole cycle, which the answer repeats; `pieces`: that cycle in shuffled pieces of 8 tokens, so
that draft tokens copied from it are wrong after each; `never`: another cycle's tokens, so nothing repeats.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Any

import torch
from gpu_engine import DEVICE, MODELS, Driver, Made, build, new_runner
from torch import Tensor

from stretto.engine.runners.calibrate import known_times
from stretto.engine.runners.cuda import CudaRunner
from stretto.engine.runners.graphs import rows_for
from stretto.engine.runners.sampler import verified_on_device
from stretto.engine.scheduler.types import Limits
from stretto.engine.speculative.policy import Speculation, Verification
from stretto.engine.step_time import StepTime
from stretto.kernels.cuda.table import table

CYCLE, PIECE = 512, 8
BLOCKS, CONTEXT, LIMITS = 3072, 4096, Limits(32, 2048)
QUIET = 1e-4  # of a layer's output, beside an embedding whose values are 1 / 64
KINDS = ("repeats", "pieces", "never")


class Copying(Made):
    """A fake checkpoint whose greedy answers walk cycles of CYCLE tokens."""

    def __init__(
        self, shape: tuple[int, ...] = (), name: str = "", embedding: list[Tensor] | None = None
    ) -> None:
        super().__init__(shape)
        self.name = name
        self.embedding: list[Tensor] = [] if embedding is None else embedding

    def find(self, name: str, shape: tuple[int, ...]) -> Copying:
        return Copying(shape, name, self.embedding)

    def read(self, entry: Made, into: Tensor) -> None:
        assert isinstance(entry, Copying)
        super().read(entry, into)
        if entry.name.endswith("embed_tokens.weight"):
            self.embedding.append(into)
        elif entry.name == "lm_head.weight":
            (embedding,) = self.embedding
            tokens = torch.arange(into.shape[0], device=into.device)
            into[following(tokens, into.shape[0])] = embedding
        elif entry.name.endswith(("o_proj.weight", "down_proj.weight")):
            into.mul_(QUIET)


def following(tokens: Tensor, vocab: int) -> Tensor:
    """The tokens after these in their cycles. The last cycle is shorter."""
    first = tokens // CYCLE * CYCLE
    return first + (tokens + 1 - first) % (vocab - first).clamp(max=CYCLE)


def prompt(kind: str, seed: int) -> list[int]:
    """A prompt of CYCLE tokens for each sequence, from a cycle of its own."""
    cycle = list(range(seed * CYCLE, (seed + 1) * CYCLE))
    if kind == "pieces":
        pieces = [cycle[at : at + PIECE] for at in range(0, CYCLE, PIECE)]
        random.Random(seed).shuffle(pieces)
        return [token for piece in pieces for token in piece]
    # The last token is of a cycle that the prompt does not hold.
    return cycle if kind == "repeats" else [*cycle[:-1], (seed + 1) * CYCLE]


@dataclass
class Result:
    """One run. `ms`: from the last first token to the last token, of each step of one token."""

    ms: float
    tokens: int
    steps: int
    proposed: int
    accepted: int


class Answers(Driver):
    """An engine over the runner, with or without speculation."""

    def __init__(self, runner: CudaRunner, times: StepTime, speculation: Speculation | None) -> None:
        super().__init__(runner, LIMITS, StepTime(times.cost, list(times.errors)), speculation)

    @property
    def turnaround_ms(self) -> float:
        return self.engine.models["m"].history.turnarounds.quantile(0.5, inf)

    def run(self, kind: str, batch: int, count: int) -> tuple[Result, list[list[int]]]:
        """Decode `count` tokens of each sequence -> the figures since all have their first token, and the
        tokens."""
        idents = [self.submit(prompt(kind, 2 * seed), count) for seed in range(batch)]
        self.step_until(idents, 1)
        before = sum(len(self.tokens[ident]) for ident in idents)
        self.steps.clear()
        started = time.perf_counter()
        self.finish()
        ms = (time.perf_counter() - started) * 1e3
        decoded = sum(len(self.tokens[ident]) for ident in idents) - before
        result = Result(
            ms=ms * batch / decoded,
            tokens=decoded,
            steps=len(self.steps),
            proposed=sum(step.proposed for step in self.steps),
            accepted=sum(step.accepted for step in self.steps),
        )
        return result, [self.tokens.pop(ident) for ident in idents]


def compare(ways: dict[str, Answers], kind: str, batch: int, count: int, rounds: int) -> dict[str, Any]:
    """Run each way in turns -> medians."""
    found: dict[str, list[Result]] = {name: [] for name in ways}
    equal: list[bool] = []
    for _ in range(rounds):
        answers: list[list[list[int]]] = []
        for name, driver in ways.items():
            result, tokens = driver.run(kind, batch, count)
            found[name].append(result)
            answers.append(tokens)
        first, *others = answers
        equal += [one == other for tokens in others for one, other in zip(first, tokens, strict=True)]
    plain, quick = (statistics.median(each.ms for each in results) for results in found.values())
    drafted = found["ngram"]
    proposed, accepted = (sum(getattr(each, name) for each in drafted) for name in ("proposed", "accepted"))
    return {
        "kind": kind,
        "batch": batch,
        "off_ms": plain,
        "ngram_ms": quick,
        "gain": plain / quick,
        "proposed": proposed,
        "accepted": accepted,
        "steps_off": statistics.median(each.steps for each in found["off"]),
        "steps_ngram": statistics.median(each.steps for each in drafted),
        "tokens": found["off"][0].tokens,
        "equal": sum(equal) / len(equal),
    }


def show(row: dict[str, Any]) -> None:
    accepted = f"{row['accepted'] / row['proposed']:4.0%}" if row["proposed"] else "none"
    print(
        f"{row['kind']:>8} batch {row['batch']:>2}: {row['off_ms']:6.3f} ms/token off, {row['ngram_ms']:6.3f}"
        f" with n-gram drafts, {row['gain']:.2f}x; {row['proposed']} proposed, accepted {accepted};"
        f" {row['steps_off']:.0f} -> {row['steps_ngram']:.0f} steps for {row['tokens']} tokens;"
        f" answers equal {row['equal']:.2f}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=MODELS, default="qwen3-8b")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--tokens", type=int, default=192, help="of each answer")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args()
    began = time.monotonic()
    config, quantise = MODELS[options.model]
    decoder = build(config | {"tie_word_embeddings": False}, table(DEVICE, quantise), Copying())
    runner = new_runner(decoder, LIMITS, BLOCKS, CONTEXT)
    runner.start()
    while runner.prepare():
        pass
    times = known_times(runner, LIMITS, machine="", folder=None)
    rules = Verification(verified_on_device, rows_for(LIMITS.max_running), pipelined=True)
    ways = {"off": Answers(runner, times, None), "ngram": Answers(runner, times, Speculation(device=rules))}
    cost = times.cost
    print(
        f"{torch.cuda.get_device_name()}, {options.model}: ready after {time.monotonic() - began:.1f} s; a"
        f" step takes {cost.base:.2f} ms, a row {cost.per_decode:.4f} ms, a key {cost.per_key * 1e6:.2f} ns",
        flush=True,
    )
    for driver in ways.values():
        driver.run("never", 1, 32)
    rows: list[dict[str, Any]] = []
    for batch in options.batches:
        for kind in options.kinds:
            rows.append(compare(ways, kind, batch, options.tokens, options.rounds))
            show(rows[-1])
    learnt = ways["ngram"].engine.models["m"].history.times.cost
    print(
        f"the host takes {ways['ngram'].turnaround_ms:.3f} ms from a result to the next launch; learnt: a"
        f" step takes {learnt.base:.2f} ms, a row {learnt.per_decode:.4f} ms, a key"
        f" {learnt.per_key * 1e6:.2f} ns; all in {time.monotonic() - began:.1f} s"
    )
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
