"""What a loaded model says: its answers to many prompts, and its distribution over the next token.

It drives the decoder that serves, so quality is measured on the very kernels that answer requests. It owns
its batches and caches, and knows no schedule and no text.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from stretto.kernels import Batch, Cache
from stretto.models.decoder import Decoder
from stretto.models.fields import Fields
from stretto.optimise.data import DataSample
from stretto.text.tokenizer import TextModel

BLOCK = 16
AT_ONCE = {"cpu": 32, "cuda": 512}  # prompts that are answered together, by device

Ids = list[int]
CountCallback = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class AnswerOptions:
    """How answers are generated. `temperature = 0` takes the likeliest token; otherwise `seed` decides."""

    max_tokens: int
    context: int
    eos: frozenset[int]
    temperature: float = 0.0
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Encoded:
    """A prompt and the ideal reply as token ids. `start`: the first token of the reply."""

    ids: Ids
    start: int


class TextCodec:
    """The tokenizer of a checkpoint, for samples. `eos`: the token that ends a reply, one of the model's."""

    def __init__(self, path: Path, eos: Sequence[int]) -> None:
        self.text = TextModel(path)
        named = (
            Fields.load(path / "tokenizer_config.json") if (path / "tokenizer_config.json").exists() else None
        )
        written = None if named is None else named.get("eos_token")
        usual = self.text.tokenizer.token_to_id(written) if isinstance(written, str) else None
        self.eos = usual if usual in eos else next(iter(eos), None)

    def prompt(self, sample: DataSample) -> Ids:
        """The ids of a prompt. A bare prompt becomes a user's message if the model has a chat template."""
        if sample.messages:
            return self.text.encode_chat(
                [{"role": turn.role, "content": turn.content} for turn in sample.messages]
            )
        if self.text.template is None:
            return self.text.encode(sample.prompt or "")
        return self.text.encode_chat([{"role": "user", "content": sample.prompt or ""}])

    def reply(self, text: str) -> Ids:
        """The ids of a reply, with the token that ends it."""
        ids = self.text.tokenizer.encode(text, add_special_tokens=False).ids
        return ids if self.eos is None else [*ids, self.eos]

    def whole(self, sample: DataSample, reply: str | None = None) -> Encoded | None:
        """Prompt and reply (default: the ideal one), or a text; None: there is no reply to read."""
        if sample.text is not None:
            return Encoded(self.text.encode(sample.text), 1)
        said = sample.ideal if reply is None else reply
        if said is None:
            return None
        prompt = self.prompt(sample)
        return Encoded(prompt + self.reply(said), len(prompt))


def generate(
    decoder: Decoder, prompts: Sequence[Ids], how: AnswerOptions, on_done: CountCallback | None = None
) -> list[Ids]:
    """The answer to each prompt, without the token that ended it. `on_done(done, total)` counts prompts.

    A prompt that leaves no room in the context gets an empty answer.
    """
    return [each.ids for each in generate_traced(decoder, prompts, how, on_done)]


@dataclass(frozen=True, slots=True)
class TracedAnswer:
    """An answer, and the log-probability of the likeliest token at each place: one more than there are tokens
    if a token ended it."""

    ids: Ids
    sureness: list[float]

    @property
    def least(self) -> float:
        """That of the least sure token; 0 for a prompt that got no answer."""
        return min(self.sureness, default=0.0)

    @property
    def drawn(self) -> int:
        """How many tokens were drawn, with the one that ended it."""
        return len(self.sureness)

    def sure_of(self, below: float) -> int:
        """How many tokens come before the first one that is less sure than `below`; all if none is."""
        return next((place for place, value in enumerate(self.sureness) if value < below), self.drawn)


def generate_traced(
    decoder: Decoder, prompts: Sequence[Ids], how: AnswerOptions, on_done: CountCallback | None = None
) -> list[TracedAnswer]:
    """The same as `generate`, with how sure the model was of each token."""
    answers: list[TracedAnswer] = [TracedAnswer([], []) for _ in prompts]
    # Prompts of about the same length run together, so that their answers end at about the same time.
    order = sorted(range(len(prompts)), key=lambda place: len(prompts[place]))
    order = [place for place in order if len(prompts[place]) < how.context]
    together = AT_ONCE.get(decoder.device.type, AT_ONCE["cpu"])
    for first in range(0, len(order), together):
        places = order[first : first + together]
        generator = torch.Generator().manual_seed(how.seed * 1_000_003 + first)
        group = _Group(decoder, [prompts[place] for place in places], how)
        for place, answer in zip(places, group.run(generator), strict=True):
            answers[place] = answer
        if on_done is not None:
            on_done(min(first + together, len(order)), len(prompts))
    return answers


class _Group:
    """Prompts that are answered together. Each sequence has a fixed run of blocks."""

    def __init__(self, decoder: Decoder, prompts: list[Ids], how: AnswerOptions) -> None:
        self._decoder, self._prompts, self._how = decoder, prompts, how
        longest = min(max(map(len, prompts)) + how.max_tokens, how.context)
        self._width = -(-longest // BLOCK)
        self._cache: Cache = decoder.new_cache(self._width * len(prompts), BLOCK)

    def run(self, generator: torch.Generator) -> list[TracedAnswer]:
        answers = [TracedAnswer([], []) for _ in self._prompts]
        rows = [(place, 0, prompt) for place, prompt in enumerate(self._prompts)]
        while rows:
            batch = _batch(rows, self._width, self._decoder.device)
            logits = self._decoder.logits(self._decoder.forward(batch, self._cache))
            drawn = _draw(logits, self._how.temperature, generator)
            following: list[tuple[int, int, Ids]] = []
            sureness: list[float] = logits.float().log_softmax(-1).amax(-1).tolist()
            for (place, start, tokens), token, sure in zip(rows, drawn, sureness, strict=True):
                end, answer = start + len(tokens), answers[place]
                answer.sureness.append(sure)
                if token in self._how.eos:
                    continue
                answer.ids.append(token)
                if len(answer.ids) < self._how.max_tokens and end + 1 < self._how.context:
                    following.append((place, end, [token]))
            rows = following
        return answers


def _draw(logits: Tensor, temperature: float, generator: torch.Generator) -> Ids:
    if temperature == 0.0:
        return logits.argmax(-1).tolist()
    chances = (logits / temperature).softmax(-1).cpu()
    return torch.multinomial(chances, 1, generator=generator)[:, 0].tolist()


def _batch(
    rows: Sequence[tuple[int, int, Ids]], width: int, device: torch.device, *, whole: bool = False
) -> Batch:
    """A step of rows (sequence, first position, tokens). `whole`: all hidden states, not only the last."""
    lengths = [len(tokens) for _, _, tokens in rows]
    contexts = [start + len(tokens) for _, start, tokens in rows]
    positions = [start + index for _, start, tokens in rows for index in range(len(tokens))]
    homes = [place * width * BLOCK for place, _, tokens in rows for _ in tokens]
    starts = torch.tensor([0, *lengths]).cumsum(0)
    first_blocks = torch.tensor([place * width for place, _, _ in rows], dtype=torch.int32)
    tables = first_blocks[:, None] + torch.arange(width, dtype=torch.int32)
    return Batch(
        tokens=torch.tensor([token for _, _, tokens in rows for token in tokens], device=device),
        positions=torch.tensor(positions, device=device),
        slots=torch.tensor([home + at for home, at in zip(homes, positions, strict=True)], device=device),
        query_starts=starts.to(device, torch.int32),
        contexts=torch.tensor(contexts, dtype=torch.int32, device=device),
        tables=tables.to(device),
        outputs=None if whole else (starts[1:] - 1).to(device),
        query_lens=lengths,
        context_lens=contexts,
    )


def logits_of(decoder: Decoder, ids: Ids) -> Tensor:
    """The logits at every token of a sequence, float32 [len(ids), vocab], all read in one step."""
    width = -(-len(ids) // BLOCK)
    batch = _batch([(0, 0, ids)], width, decoder.device, whole=True)
    return decoder.logits(decoder.forward(batch, decoder.new_cache(width, BLOCK)))


def divergence(wanted: Tensor, found: Tensor) -> tuple[Tensor, Tensor]:
    """KL(wanted || found) of each row of logits in nats, and whether both have the same likeliest token."""
    sure, seen = wanted.log_softmax(-1).double(), found.log_softmax(-1).double()
    return (sure.exp() * (sure - seen)).sum(-1).clamp(min=0.0), wanted.argmax(-1) == found.argmax(-1)


@dataclass(frozen=True, slots=True)
class TextScore:
    """How a model reads one sequence, over the tokens of the reply: means of KL, of agreement with the
    reference on the likeliest token, and of the negative log-likelihood, in nats."""

    tokens: int
    kl: float
    same: float
    nll: float


def read_scores(reference: Decoder, decoder: Decoder, texts: Sequence[Encoded]) -> Iterator[TextScore]:
    """The score of each text, relative to `reference`."""
    for text in texts:
        at = slice(text.start - 1, len(text.ids) - 1)
        wanted, found = logits_of(reference, text.ids)[at], logits_of(decoder, text.ids)[at]
        kl, same = divergence(wanted, found)
        targets = torch.tensor(text.ids[text.start :], device=found.device)
        nll = torch.nn.functional.cross_entropy(found.float(), targets)
        yield TextScore(len(targets), float(kl.mean()), float(same.float().mean()), float(nll))


def mean_kl(scores: Sequence[TextScore]) -> float:
    """The mean KL over the tokens of all texts."""
    return sum(score.kl * score.tokens for score in scores) / max(1, sum(score.tokens for score in scores))
