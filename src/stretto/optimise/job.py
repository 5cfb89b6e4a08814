"""What every step that makes a variant is given: its parent, the data, and where it works.

Also loads decoders for it: the served kernels read and write text much faster than the trainer's model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch

from stretto.config import Quantise
from stretto.hardware import choose_kv_dtype
from stretto.kernels.choice import choose_kernels, choose_wider
from stretto.models import families
from stretto.models.decoder import Decoder
from stretto.models.load import MixedKernels, load
from stretto.models.spec import ModelSpec
from stretto.optimise.answers import (
    AnswerOptions,
    CountCallback,
    Encoded,
    Ids,
    TextCodec,
    generate,
    mean_kl,
    read_scores,
)
from stretto.optimise.data import Corpus, DataSample, right
from stretto.optimise.training.trainer import StepSession, write_whole

VALIDATED = 256  # samples of the validation split that decide between two candidates


@dataclass(frozen=True, slots=True)
class StepJob:
    """One step at work. `parent`: the checkpoint it starts from. `at`: the step's path in the recipe."""

    at: str
    parent: Path
    corpus: Corpus
    codec: TextCodec
    session: StepSession
    seed: int
    max_answer: int = 256

    @property
    def spec(self) -> ModelSpec:
        return families.read(self.parent)

    @property
    def made(self) -> Path:
        """Where the step's checkpoint goes."""
        return self.session.folder / "made"

    def generation(self, *, temperature: float = 0.0, seed: int = 0) -> AnswerOptions:
        spec = self.spec
        return AnswerOptions(self.max_answer, spec.context, frozenset(spec.eos), temperature, seed)

    def counting(self, stage: str) -> CountCallback:
        return lambda done, total: self.session.progress(stage, done, total)

    def texts(self, samples: Sequence[DataSample], most: int = 512) -> list[Encoded]:
        """Samples with their ideal replies as token ids, of at most `most` tokens."""
        whole = [self.codec.whole(sample) for sample in samples]
        limit = min(most, self.spec.context)
        cut = [Encoded(each.ids[:limit], each.start) for each in whole if each is not None]
        return [each for each in cut if each.start < len(each.ids)]

    def replies(self, path: Path, samples: Sequence[DataSample], stage: str) -> list[str]:
        """The greedy replies of a checkpoint. They are kept, so an interrupted step does not ask again."""
        file = self.session.folder / f"{stage}.json"
        if file.exists():
            return msgspec.json.decode(file.read_bytes(), type=list[str])
        decoder = load_decoder(path, self.session.device)
        prompts = [self.codec.prompt(sample) for sample in samples]
        answers = generate(decoder, prompts, self.generation(), self.counting(stage))
        found = [self.codec.text.decode(ids) for ids in answers]
        write_whole(file, msgspec.json.encode(found))
        self.session.note()
        return found

    def drawn(self, path: Path, prompts: Sequence[Ids], seed: int, stage: str) -> list[Ids]:
        """Answers that a checkpoint draws at temperature 1."""
        decoder = load_decoder(path, self.session.device)
        how = self.generation(temperature=1.0, seed=seed)
        return generate(decoder, prompts, how, self.counting(stage))

    def validate(self, path: Path, stage: str) -> tuple[float, float]:
        """How good a checkpoint is on the validation split. Larger is better.

        The share of right answers (0 for plain text), and minus the KL from the parent.
        """
        held = self.corpus.validation[:VALIDATED]
        reference, decoder = (
            load_decoder(self.parent, self.session.device),
            load_decoder(path, self.session.device),
        )
        kl = mean_kl(list(read_scores(reference, decoder, self.texts(held)[:64])))
        asked = [sample for sample in held if sample.answer is not None]
        replies = self.replies(path, asked, stage)
        good = sum(right(sample, reply) for sample, reply in zip(asked, replies, strict=True))
        return good / max(1, len(asked)), -kl


def load_decoder(
    path: Path, device: torch.device, quantise: Quantise | None = None, exclude: Sequence[str] = ()
) -> Decoder:
    """A checkpoint with the kernels that serve it; float32 on a CPU. Raises StartError when the device has
    none for the format."""
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    kernels, _ = choose_kernels(device, dtype, quantise)
    mixed = None
    if quantise is not None and exclude:
        mixed = MixedKernels(kernels, choose_wider(device, dtype, quantise), frozenset(exclude))
    decoder = load(path, dtype=dtype, device=device, kernels=mixed or kernels)
    cached = frozenset(str(each).removeprefix("torch.") for each in kernels.kv_dtypes)
    name = str(dtype).removeprefix("torch.")
    kv = choose_kv_dtype(name, quantised=quantise is not None, requested="auto", cached=cached).value
    return decoder.with_kv_dtype(getattr(torch, kv))
