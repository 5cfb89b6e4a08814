"""Measures weight formats: their bytes, and the difference of their next-token distributions from float32.

`python -m benchmarks.quality MODEL_DIR [--text NAME=FILE ...] [--json]` reads held-out text of the bundled
model's tasks, and each file: plain text, or JSON lines whose strings are joined (both may be gzipped).
KL is KL(float32 || format) in nats at every token of the text. `top1` is the share of tokens at which
both have the same likeliest token.
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer
from torch import Tensor

from recipes.desk.tasks import LEVELS, TASKS, held_out
from stretto.kernels import AnyKernels, Batch, Packed
from stretto.kernels.cpu import native
from stretto.kernels.cpu.table import PackedExperts, table
from stretto.kernels.cpu.weights import PackedLinear
from stretto.kernels.reference import REFERENCE
from stretto.models.decoder import Decoder
from stretto.models.load import load

CPU = torch.device("cpu")
BLOCK = 16
LONGEST = 512  # tokens of a text read together


@dataclass
class Count:
    """A `Store` that keeps nothing and counts what was packed."""

    nbytes: int = 0
    weights: int = 0
    kinds: dict[str, int] = field(default_factory=dict[str, int])

    def take(self, name: str) -> None:
        return None

    def keep(self, name: str, packed: Packed) -> None:
        if isinstance(packed, PackedExperts):
            for each in (*packed.gate_up, *packed.down):
                self.keep(name, each)
        elif isinstance(packed, PackedLinear):
            self.nbytes += packed.nbytes
            self.weights += packed.n * packed.k
            self.kinds[packed.format] = self.kinds.get(packed.format, 0) + packed.n * packed.k

    def report(self) -> dict[str, Any]:
        shares = {kind: round(count / self.weights, 4) for kind, count in sorted(self.kinds.items())}
        return {
            "bytes": self.nbytes,
            "bits_per_weight": round(8 * self.nbytes / self.weights, 3),
            "share_of_weights": shares,
        }


@torch.inference_mode()
def logits(decoder: Decoder, tokens: list[int]) -> Tensor:
    """Float32 [len(tokens), vocab], all read in one step."""
    count = len(tokens)
    blocks = -(-count // BLOCK)
    span = torch.arange(count)
    batch = Batch(
        tokens=torch.tensor(tokens),
        positions=span,
        slots=span,
        query_starts=torch.tensor([0, count], dtype=torch.int32),
        contexts=torch.tensor([count], dtype=torch.int32),
        tables=torch.arange(blocks, dtype=torch.int32)[None],
        outputs=None,
        query_lens=[count],
        context_lens=[count],
    )
    return decoder.logits(decoder.forward(batch, decoder.new_cache(blocks, BLOCK)))


def compare(wanted: Tensor, found: Tensor) -> tuple[Tensor, Tensor]:
    """KL(wanted || found) of each row in nats, and whether both have the same likeliest token."""
    sure, seen = wanted.log_softmax(-1).double(), found.log_softmax(-1).double()
    return (sure.exp() * (sure - seen)).sum(-1), wanted.argmax(-1) == found.argmax(-1)


def desk_texts(model: Path) -> Iterator[str]:
    """Held-out prompts of every task and level with their ideal replies, in the model's chat template."""
    source = json.loads((model / "tokenizer_config.json").read_text()).get("chat_template")
    template = None if source is None else ImmutableSandboxedEnvironment().from_string(source)
    for index in range(1000):
        for task in TASKS:
            example = held_out(task, LEVELS[index % len(LEVELS)], index + 1)[index]
            turns = [*example.messages, {"role": "assistant", "content": example.reply}]
            if template is None:
                yield "\n".join(turn["content"] for turn in turns)
            else:
                tools = list(example.tools) or None
                yield template.render(messages=turns, tools=tools, add_generation_prompt=False)


def file_texts(file: Path) -> Iterator[str]:
    """The records of a file, or groups of its paragraphs."""
    raw = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    text = raw.decode()
    if ".jsonl" in file.name:
        for line in text.splitlines():
            yield "\n".join(_strings(json.loads(line)))
        return
    for start in range(0, len(text), 2000):
        yield text[start : start + 2000]


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | dict):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _strings(each)


def sequences(tokenizer: Tokenizer, texts: Iterator[str], budget: int) -> Iterator[list[int]]:
    """The texts as token ids, `budget` ids at most."""
    for text in texts:
        ids = tokenizer.encode(text, add_special_tokens=False).ids[: min(LONGEST, budget)]
        if len(ids) > 1:
            budget -= len(ids)
            yield ids
        if budget <= 1:
            return


def loaded(model: Path, kernels: AnyKernels, kv_dtype: torch.dtype) -> tuple[Decoder, Count]:
    count = Count()
    decoder = load(model, dtype=torch.float32, device=CPU, kernels=kernels, store=count)
    decoder = decoder.with_kv_dtype(kv_dtype)
    return decoder, count


def measure(
    model: Path,
    formats: dict[str, tuple[AnyKernels, torch.dtype]],
    texts: dict[str, Iterator[str]],
    tokens: int,
) -> dict[str, Any]:
    """The report: the bytes of each format, and its differences on each text."""
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    plain, _ = loaded(model, REFERENCE, torch.float32)
    held = {name: loaded(model, *how) for name, how in formats.items()}
    report: dict[str, Any] = {name: count.report() | {"texts": {}} for name, (_, count) in held.items()}
    for text, source in texts.items():
        seen: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in formats}
        for ids in sequences(tokenizer, source, tokens):
            wanted = logits(plain, ids)
            for name, (decoder, _) in held.items():
                seen[name].append(compare(wanted, logits(decoder, ids)))
        for name, pairs in seen.items():
            divergence, same = (torch.cat(each) for each in zip(*pairs, strict=True))
            report[name]["texts"][text] = {
                "tokens": len(divergence),
                "kl_mean": round(float(divergence.mean()), 6),
                "kl_p99": round(float(divergence.quantile(0.99)), 6),
                "top1": round(float(same.float().mean()), 4),
            }
    return report


def table_of(report: dict[str, Any]) -> str:
    rows = [
        f"{'format':<10}{'MB':>9}{'bits':>7}  {'text':<10}{'tokens':>7}{'KL':>10}{'KL p99':>10}{'top-1':>8}"
    ]
    for name, found in report.items():
        for text, figures in found["texts"].items():
            rows.append(
                f"{name:<10}{found['bytes'] / 1e6:>9.2f}{found['bits_per_weight']:>7.2f}  {text:<10}"
                f"{figures['tokens']:>7}{figures['kl_mean']:>10.5f}{figures['kl_p99']:>10.5f}"
                f"{100 * figures['top1']:>7.2f}%"
            )
    return "\n".join(rows)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path, help="a directory in the Hugging Face layout")
    parser.add_argument("--text", action="append", default=[], metavar="NAME=FILE", help="another text")
    parser.add_argument("--tokens", type=int, default=4096, help="tokens of each text")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    library = native.load()
    if library is None:
        sys.exit("the C kernels were not built: install gcc, then install Stretto again")
    library.threads(options.threads)
    texts = {"desk": desk_texts(options.model)}
    for text in options.text:
        name, _, file = text.partition("=")
        if Path(file).exists():
            texts[name] = file_texts(Path(file))
        else:
            print(f"{name} is skipped: there is no {file}", file=sys.stderr)
    # As in the server, quantised weights come with an int8 KV cache.
    formats = {
        "none": (table(library), torch.float32),
        "int8": (table(library, "int8"), torch.int8),
        "int4": (table(library, "int4"), torch.int8),
    }
    report = measure(options.model, formats, texts, options.tokens)
    print(json.dumps(report, indent=1) if options.json else table_of(report))


if __name__ == "__main__":
    main()
