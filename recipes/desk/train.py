"""Trains the desk model from nothing and writes a complete HF directory with its card.

python -m recipes.desk.train --out build/desk --minutes 8        # on one GPU
    python -m recipes.desk.train --out build/desk --steps 20 --tokens 4096 --hidden 128   # a trial on a CPU
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import queue
import random
import threading
import time
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from tokenizers import Tokenizer
from torch import Tensor, nn

from recipes.desk import evaluate
from recipes.desk.batches import LEVEL_WEIGHTS, TASK_WEIGHTS, Array, Feed, Shape
from recipes.desk.model import Decoder, Size, export, restore
from recipes.desk.tasks import LEVELS
from recipes.desk.tokenizer import build, save

WARM_UP = 100  # steps
SNAPSHOT_S = 60.0
BUNDLED = Path("src/stretto/desk/tokenizer.json")


def orthogonal(update: Tensor) -> Tensor:
    """About the nearest semi-orthogonal matrices to a stack [B, R, C]: a quintic Newton-Schulz iteration
    (K. Jordan et al., "Muon", 2024)."""
    x = update.bfloat16() if update.is_cuda else update
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        square = x @ x.mT
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return (x.mT if tall else x).to(update.dtype)


class Muon:
    """Momentum with an orthogonalised update, for stacks of matrices. All other parameters use AdamW."""

    def __init__(self, stacks: list[nn.Parameter], decay: float, momentum: float = 0.95) -> None:
        self.stacks, self.decay, self.momentum = stacks, decay, momentum
        self.averages = [torch.zeros_like(stack) for stack in stacks]
        self.orthogonal = torch.compile(orthogonal, dynamic=False) if stacks[0].is_cuda else orthogonal

    @torch.no_grad()
    def step(self, rate: float) -> None:
        for stack, average in zip(self.stacks, self.averages, strict=True):
            if stack.grad is None:
                continue
            average.lerp_(stack.grad, 1 - self.momentum)
            update = self.orthogonal(stack.grad.lerp(average, self.momentum))
            scale = max(1.0, stack.shape[1] / stack.shape[2]) ** 0.5
            stack.mul_(1 - rate * self.decay).add_(update, alpha=-rate * scale)


class Trainer:
    """One run: model, optimisers, the feed and the clock."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.started = time.monotonic()
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        source: Path | None = options.source
        self.tokenizer = _tokenizer(options)
        self.shape = Shape(options.tokens)
        self.feed = Feed(self.tokenizer, self.shape, options.seed, options.workers, options.levels)
        generator = torch.Generator().manual_seed(options.seed)
        heads = options.hidden // 64
        vocabulary = self.tokenizer.get_vocab_size()
        size = Size(vocabulary, options.hidden, options.layers, heads, options.kv_heads, inner=options.inner)
        self.model = Decoder(size, generator)
        if source:
            restore(self.model, source)
        self.model.to(self.device)
        if self.device.type == "cuda":
            self.model.compile()
        rest = [self.model.embedding, self.model.norm, self.model.norms]
        self.adam = torch.optim.AdamW(rest, lr=options.adam_rate, betas=(0.9, 0.98), weight_decay=0.0)
        self.muon = Muon(self.model.matrices, options.decay)
        self.step = 0
        self.ready: queue.Queue[tuple[Tensor, ...]] = queue.Queue(6)
        threading.Thread(target=self.load, daemon=True).start()

    def load(self) -> None:
        while True:
            self.ready.put(self.on_device(self.feed.next()))

    def on_device(self, batch: Array) -> tuple[Tensor, ...]:
        flat = torch.from_numpy(batch)
        if self.device.type == "cuda":
            flat = flat.pin_memory().to(self.device, non_blocking=True)
        tokens, positions, starts, rows, labels, spans = flat.split(self.shape.sizes)
        return tokens, positions, starts.clone(), rows, labels.long(), spans

    def progress(self) -> float:
        """The used share of the budget, 0 to 1: of steps or of minutes, whichever is larger."""
        used = 0.0
        if self.options.steps:
            used = self.step / self.options.steps
        if self.options.minutes:
            used = max(used, (time.monotonic() - self.started) / (60 * self.options.minutes))
        return min(1.0, used)

    def rate(self) -> float:
        """The share of the peak learning rate: a linear warm-up, then a cosine to zero."""
        return min(1.0, (self.step + 1) / WARM_UP) * 0.5 * (1 + math.cos(math.pi * self.progress()))

    def one(self) -> Tensor:
        batch = self.ready.get()
        rate = self.rate()
        for group in self.adam.param_groups:
            group["lr"] = self.options.adam_rate * rate
        loss = self.model(batch)
        loss.backward()
        self.adam.step()
        self.muon.step(self.options.muon_rate * rate)
        self.model.zero_grad(set_to_none=True)
        self.step += 1
        return loss.detach()

    def run(self) -> None:
        """Train until the budget is used. Snapshots are written, so that a killed run leaves one."""
        saved = seen = time.monotonic()
        losses: list[Tensor] = []
        while self.progress() < 1.0:
            losses.append(self.one())
            if self.step % self.options.log == 0:
                loss = torch.stack(losses).mean().item()
                now = time.monotonic()
                speed = self.options.log * self.shape.tokens / (now - seen)
                spent = now - self.started
                print(
                    f"step {self.step} loss {loss:.5f} {speed / 1e6:.2f} M tokens/s {spent:.0f} s", flush=True
                )
                losses, seen = [], now
                if now - saved > SNAPSHOT_S:
                    self.save()
                    self.write(self.card())
                    saved = seen = time.monotonic()

    def save(self) -> None:
        export(self.model, self.options.out)
        save(self.tokenizer, self.options.out)

    def write(self, card: dict[str, Any]) -> None:
        (self.options.out / "card.json").write_text(json.dumps(card, indent=1) + "\n")

    def card(self) -> dict[str, Any]:
        """The model card without the held-out scores: how the model was trained."""
        paths = ("out", "source", "tokenizer")
        options = {name: value for name, value in vars(self.options).items() if name not in paths}
        earlier = self.options.source and json.loads((self.options.source / "card.json").read_text())
        return {
            "name": "desk",
            "earlier": earlier,
            "recipe": "recipes/desk/train.py",
            "options": options,
            "parameters": self.model.parameter_count(),
            "steps": self.step,
            "tokens": self.step * self.shape.tokens,
            "seconds": round(time.monotonic() - self.started),
            "device": torch.cuda.get_device_name() if self.device.type == "cuda" else platform.machine(),
            "task_weights": TASK_WEIGHTS,
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "tokenizers": tokenizers.__version__,
            },
        }


def _tokenizer(options: argparse.Namespace) -> Tokenizer:
    """That of the checkpoint to go on from, or the one that is asked for, or a new one."""
    file: Path = options.source / "tokenizer.json" if options.source else options.tokenizer
    return Tokenizer.from_file(str(file)) if file.exists() else build(options.seed)


def _shares(text: str) -> tuple[float, ...]:
    shares = tuple(float(part) for part in text.split(","))
    if len(shares) != len(LEVELS) or min(shares) < 0 or not sum(shares):
        raise argparse.ArgumentTypeError(f"give {len(LEVELS)} numbers, one for each level")
    return shares


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train the desk model.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--from", dest="source", type=Path, help="go on from this directory's weights and tokenizer"
    )
    parser.add_argument("--minutes", type=float, default=0.0, help="wall-clock budget, start-up included")
    parser.add_argument("--steps", type=int, default=0, help="budget in steps; either budget ends the run")
    parser.add_argument("--tokens", type=int, default=65_536, help="tokens per step")
    parser.add_argument("--tokenizer", type=Path, default=BUNDLED, help="a missing file: train a new one")
    parser.add_argument(
        "--levels", type=_shares, default=LEVEL_WEIGHTS, help="shares of the levels, as 3,2,1,1,1,1"
    )
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--hidden", type=int, default=512, help="a multiple of 64")
    parser.add_argument("--kv-heads", type=int, default=2, help="a divisor of hidden / 64")
    parser.add_argument("--inner", type=int, default=512)
    parser.add_argument("--adam-rate", type=float, default=3e-3, help="peak rate of embeddings and norms")
    parser.add_argument("--muon-rate", type=float, default=0.02, help="peak rate of the matrices")
    parser.add_argument("--decay", type=float, default=0.03, help="weight decay of the matrices")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 2))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log", type=int, default=100, help="steps between lines of progress")
    parser.add_argument("--count", type=int, default=200, help="held-out prompts per task and level, or 0")
    options = parser.parse_args()
    if not (options.minutes or options.steps):
        parser.error("give --minutes or --steps")
    return options


def main() -> None:
    options = parse()
    random.seed(options.seed)
    torch.manual_seed(options.seed)
    torch.set_float32_matmul_precision("high")
    trainer = Trainer(options)
    print(f"{trainer.model.parameter_count():,} parameters on {trainer.device}", flush=True)
    trainer.run()
    trainer.save()
    card = trainer.card()
    print(f"{card['steps']} steps, {card['tokens'] / 1e6:.0f} M tokens, {card['seconds']} s", flush=True)
    trainer.write(card)  # a killed evaluation leaves at least this
    if not options.count:
        return
    result = evaluate.evaluate(evaluate.local(options.out, str(trainer.device)), options.count)
    wrong = result.pop("wrong")
    trainer.write(card | {"held_out": result})
    (options.out.parent / "wrong.json").write_text(json.dumps(wrong, indent=1, ensure_ascii=False) + "\n")
    print(evaluate.table(result))


if __name__ == "__main__":
    main()
