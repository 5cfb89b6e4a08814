"""Draws the next token of every row of a step, as each sequence's `Sampling` asks.

A row pays for what it asks and for nothing that its neighbours ask, and what it draws depends on its own
logits, seed and position alone: not on its batch, on preemption or on how its prompt was cut. It reads
sequences and changes none; of plans, caches and time it knows nothing.
"""

from __future__ import annotations

from array import array
from collections import Counter
from itertools import accumulate
from math import e, log, log2
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stretto.engine.sequence import Drawn, Sequence, follow
from stretto.engine.structured.grammar import Matcher
from stretto.types import Logprobs, Sampling

Row = NDArray[np.float32]
GREEDY_BELOW = 1e-5
LADDER = (64, 1024, 16384)  # how many of the likeliest tokens to look at, until they settle a draw
BLOCK = 512
LOW_64 = 2**64 - 1
BELOW_ONE = 1 - 2**-48  # times any positive float64: still below it


class Sampler:
    """The sampler of one model. `vocab` is the width of its logits, `eos` the tokens that end an answer."""

    def __init__(self, vocab: int, eos: frozenset[int], device: torch.device) -> None:
        self._vocab = vocab
        self._eos = eos
        self._pick = _best_here if device.type == "cpu" else _best_there
        self._histories: dict[int, _History] = {}

    @torch.inference_mode()
    def __call__(
        self, logits: Tensor, sequences: list[Sequence], drafts: list[tuple[int, ...]] | None = None
    ) -> list[Drawn]:
        """What each sequence draws from its rows of `logits` (float32 [R, vocab], left as they were), which
        stand in order: one row, or with `drafts` one more for each of its guesses, were the guess accepted.

        In this order, as vLLM documents its own: logit_bias, min_tokens (EOS and stop_token_ids cannot be
        drawn yet), grammar, repetition penalty (prompt and output), frequency and presence penalty
        (output), then greedy at temperature 0, or temperature, min_p, top_k, top_p and the draw. Logprobs
        are those of the model's own logits, before any of it (vLLM's `raw_logprobs`).

        A row whose logits hold NaN or +inf, or that may draw nothing (its grammar failed), gives token -1.

        All rows share one argmax and one copy to the host. It settles the greedy ones; each other row is
        drawn by itself on the host, in arrays of its own: that took less time than all rows in step (small
        operations cost numpy a fraction of torch's), and makes neighbours unable to matter.
        """
        tokens, peaks = self._pick(logits)
        best: list[int] = np.where(np.isfinite(peaks), tokens, -1).tolist()
        drafts = drafts or [()] * len(sequences)
        firsts = list(accumulate((1 + len(draft) for draft in drafts), initial=0))
        special = [place for place, seq in enumerate(sequences) if _is_special(seq)]
        self._remember([sequences[place] for place in special])
        result = [
            follow(draft, lambda n, first=first: Drawn(best[first + n])) if draft else Drawn(best[first])
            for draft, first in zip(drafts, firsts, strict=False)
        ]
        if special:
            rows = logits.cpu().numpy()
            with np.errstate(over="ignore", divide="ignore"):  # what grows infinite is caught in its row
                for place in special:
                    own = slice(firsts[place], firsts[place + 1])
                    result[place] = self._follow(rows[own], best[own], sequences[place], drafts[place])
        return result

    @torch.inference_mode()
    def draft(self, logits: Tensor, places: list[tuple[Sequence, tuple[int, ...]]]) -> list[int]:
        """One draft token for each row of `logits`: what the sequence would draw after its draft tokens,
        without its grammar; 0 where nothing can be drawn."""
        tokens, peaks = self._pick(logits)
        best: list[int] = np.where(np.isfinite(peaks), tokens, 0).tolist()
        special = [row for row, (seq, _) in enumerate(places) if _is_special(seq)]
        self._remember([places[row][0] for row in special])
        if special:
            rows = logits.cpu().numpy()
            with np.errstate(over="ignore", divide="ignore"):
                for row in special:
                    best[row] = max(self._row(rows[row], best[row], _Place(*places[row])).token, 0)
        return best

    def _follow(self, logits: Row, best: list[int], seq: Sequence, draft: tuple[int, ...]) -> Drawn:
        """What follows `seq` and its guesses: `logits` [1 + guesses, vocab], the greatest of each at `best`,
        -1 where they are not sound."""
        grammar = seq.grammar.fork() if seq.grammar is not None and draft else seq.grammar

        def draw(accepted: int) -> Drawn:
            if grammar is not None and accepted:
                grammar.accept(draft[accepted - 1])
            if best[accepted] < 0:
                return Drawn(-1)
            return self._row(logits[accepted], best[accepted], _Place(seq, draft[:accepted], grammar))

        return follow(draft, draw)

    def _row(self, logits: Row, best: int, place: _Place) -> Drawn:
        """What comes at a place, drawn from sound `logits` [vocab] whose greatest is at `best`."""
        sampling, token, final = place.seq.request.sampling, best, logits
        if place.reshapes:
            final = self._reshaped(logits, place)
            token = int(final.argmax())
        peak = float(final[token])
        if not np.isfinite(peak):
            return Drawn(-1)
        if sampling.temperature >= GREEDY_BELOW:
            token = _draw(final, peak, sampling, uniform(place.seq.seed, place.number))
        if sampling.logprobs is None:
            return Drawn(token)
        return Drawn(token, _report(logits, float(logits[best]), token, sampling.logprobs))

    def _remember(self, sequences: list[Sequence]) -> None:
        """Bring the histories of those with penalties up to date, and forget all others."""
        known, self._histories = self._histories, {}
        for seq in sequences:
            if _penalised(seq.request.sampling):
                ident = seq.request.id
                history = self._histories[ident] = known.get(ident) or _History(seq)
                history.read(seq.tokens)

    def _reshaped(self, logits: Row, place: _Place) -> Row:
        """A copy of the logits with bias, minimum, grammar and penalties applied."""
        final, sampling = logits.copy(), place.seq.request.sampling
        for token, bias in sampling.logit_bias.items():
            if 0 <= token < self._vocab:
                final[token] += bias
        early = self._too_early(place)
        if place.grammar is not None:
            final[~self._allowed(place.grammar, early)] = -np.inf
        elif early:
            final[early] = -np.inf
        history = self._histories.get(place.seq.request.id)
        if history is not None:
            ids, counts = history.with_guesses(place.ahead)
            seen = final[ids]
            seen = np.where(seen > 0, seen / sampling.repetition_penalty, seen * sampling.repetition_penalty)
            seen -= sampling.frequency_penalty * counts
            final[ids] = seen - sampling.presence_penalty * (counts > 0)
        return final

    def _too_early(self, place: _Place) -> list[int]:
        """The tokens that would end the sequence before its `min_tokens`."""
        sampling = place.seq.request.sampling
        if place.output_len >= sampling.min_tokens:
            return []
        ends = sampling.stop_token_ids if sampling.ignore_eos else (*self._eos, *sampling.stop_token_ids)
        return [token for token in ends if 0 <= token < self._vocab]

    def _allowed(self, grammar: Matcher, early: list[int]) -> NDArray[np.bool_]:
        """What the grammar allows, bool [vocab]: without what is too `early`, unless nothing else is left.
        Nothing at all is allowed when the grammar failed.
        """
        bits = np.zeros(grammar.words, dtype=np.int32)
        grammar.mask_into(bits)
        allowed = np.unpackbits(bits.view(np.uint8), count=self._vocab, bitorder="little").view(np.bool_)
        later = allowed.copy()
        later[early] = False
        return later if later.any() else allowed


class _Place(NamedTuple):
    """Where a token is drawn: what follows `seq` and the guesses `ahead`, once `grammar` has taken those."""

    seq: Sequence
    ahead: tuple[int, ...] = ()
    grammar: Matcher | None = None

    @property
    def number(self) -> int:
        return self.seq.length + len(self.ahead)

    @property
    def output_len(self) -> int:
        return self.seq.output_len + len(self.ahead)

    @property
    def reshapes(self) -> bool:
        """Whether the logits are changed before anything is drawn."""
        sampling = self.seq.request.sampling
        return (
            self.grammar is not None
            or bool(sampling.logit_bias)
            or self.output_len < sampling.min_tokens
            or _penalised(sampling)
        )


class _History:
    """The distinct tokens of a sequence, and how often its output holds each. The prompt's are counted as
    0, and kept only when a repetition penalty asks for them.
    """

    __slots__ = ("_places", "_until", "counts", "ids")

    def __init__(self, seq: Sequence) -> None:
        repeats = seq.request.sampling.repetition_penalty != 1.0
        prompt = seq.tokens[: seq.prompt_len] if repeats else []
        self._places = {token: place for place, token in enumerate(dict.fromkeys(prompt))}
        self._until = seq.prompt_len
        self.ids = array("q", self._places)
        self.counts = array("q", [0] * len(self._places))

    def read(self, tokens: list[int]) -> None:
        """Count the output tokens that were not there the last time."""
        for token in tokens[self._until :]:
            place = self._places.setdefault(token, len(self.ids))
            if place == len(self.ids):
                self.ids.append(token)
                self.counts.append(0)
            self.counts[place] += 1
        self._until = len(tokens)

    def with_guesses(self, ahead: tuple[int, ...]) -> tuple[NDArray[np.int64], Row]:
        """The tokens and how often the output would hold each with the guesses accepted."""
        ids, counts = np.array(self.ids), np.array(self.counts, dtype=np.float32)
        for token, times in Counter(ahead).items():
            if token in self._places:
                counts[self._places[token]] += times
            else:
                ids, counts = np.append(ids, token), np.append(counts, np.float32(times))
        return ids, counts


def uniform(seed: int, index: int) -> float:
    """The number in [0, BELOW_ONE] that decides token `index` of a sequence: SplitMix64 (Steele, Lea and
    Flood, 2014) as a counter-based generator of 48 bits.
    """
    return (_mix(_mix(seed) + (index + 1) * 0x9E3779B97F4A7C15) >> 16) * 2.0**-48


def _mix(state: int) -> int:
    state &= LOW_64
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & LOW_64
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & LOW_64
    return state ^ (state >> 31)


def _penalised(sampling: Sampling) -> bool:
    return (
        sampling.repetition_penalty != 1.0
        or sampling.frequency_penalty != 0.0
        or sampling.presence_penalty != 0.0
    )


def _is_special(seq: Sequence) -> bool:
    """Whether the greatest logit alone does not answer it."""
    sampling = seq.request.sampling
    drawn = sampling.temperature >= GREEDY_BELOW or sampling.logprobs is not None
    return drawn or _Place(seq, grammar=seq.grammar).reshapes


def _best_here(logits: Tensor) -> tuple[NDArray[np.int64], Row]:
    """The likeliest token of each row (the first of equals) and its logit. NaN counts as the greatest.
    On a CPU numpy finds it in a tenth of torch's time.
    """
    rows = logits.numpy()
    tokens = rows.argmax(-1)
    return tokens, rows[np.arange(len(rows)), tokens]


def _best_there(logits: Tensor) -> tuple[NDArray[np.int64], Row]:
    """The same on a device, with one copy to the host."""
    tokens = logits.argmax(-1, keepdim=True)
    both = torch.cat([tokens.double(), logits.gather(-1, tokens).double()], dim=-1).cpu().numpy()
    return both[:, 0].astype(np.int64), both[:, 1].astype(np.float32)


def _weights(logits: Row, peak: float, heat: float) -> Row:
    """exp((logits - peak) / heat). numpy's exp2 takes half the time of its exp."""
    weights = logits - np.float32(peak)
    weights *= np.float32(log2(e) / heat)
    return np.exp2(weights, out=weights)


def _draw(logits: Row, peak: float, sampling: Sampling, fraction: float) -> int:
    """One token of a row that is not greedy; `fraction` decides."""
    count = sampling.top_k or len(logits)
    if count >= len(logits) and sampling.min_p == 0 and sampling.top_p == 1:
        return _draw_anywhere(_weights(logits, peak, sampling.temperature), fraction)
    return _draw_likely(logits, peak, sampling, fraction)


def _draw_anywhere(weights: Row, fraction: float) -> int:
    """Invert the cumulative sum in the vocabulary's order: first by blocks, then within one."""
    sums = np.add.reduceat(weights, np.arange(0, len(weights), BLOCK)).astype(np.float64)
    cumulative = sums.cumsum()
    target = cumulative[-1] * fraction
    block = int(cumulative.searchsorted(target, side="right"))
    rest = (target - cumulative[block] + sums[block]) / sums[block]
    inside = weights[block * BLOCK : (block + 1) * BLOCK].cumsum(dtype=np.float64)
    return block * BLOCK + int(inside.searchsorted(inside[-1] * min(max(rest, 0.0), BELOW_ONE), side="right"))


def _draw_likely(logits: Row, peak: float, sampling: Sampling, fraction: float) -> int:
    """Draw from what min_p, top_k and top_p leave, the likeliest first.

    Exact, and mostly without sorting: the few likeliest settle it when they hold all that min_p or top_k
    leave, or `top_p` of the mass of all; until they do, more are looked at.
    """
    heat, least, top_p = sampling.temperature, sampling.min_p, sampling.top_p
    count = min(sampling.top_k or len(logits), len(logits))
    total = None
    for size in (*LADDER, len(logits)):
        ids = _likeliest(logits, size)
        weights = np.exp((logits[ids].astype(np.float64) - peak) / heat)
        left = min(count, int(np.count_nonzero(weights >= least)))
        cumulative = weights[:left].cumsum()
        if left < len(ids) or left == count:
            mass = cumulative[-1]
        elif count < len(logits):
            continue
        else:
            if total is None:
                whole = _weights(logits, peak, heat)
                total = float(whole.sum() if least == 0 else whole[whole >= least].sum())
            mass = total
        last = int(cumulative.searchsorted(top_p * mass))
        if last < left:
            return int(ids[cumulative.searchsorted(cumulative[last] * fraction, side="right")])
    raise AssertionError("the whole vocabulary settles every draw")


def _likeliest(logits: Row, size: int) -> NDArray[np.int64]:
    """The ids of the `size` greatest logits or some more, the greatest first, equal ones by rising id.

    Every column of a folded row has its greatest; as many tokens as columns are at least as great as the
    least of those. So the `size`-th greatest of four times `size` columns is a floor that `size` tokens
    reach, and few more: the rest of a large vocabulary is never compared again.
    """
    columns = 4 * max(size, LADDER[0])
    folds = len(logits) // columns
    if folds < 2:
        return np.argsort(-logits, kind="stable")
    heads = logits[: folds * columns].reshape(folds, columns).max(axis=0)
    floor = np.partition(heads, -size)[-size]
    ids = np.flatnonzero(logits >= floor)
    return ids[np.argsort(-logits[ids], kind="stable")]


def _report(logits: Row, peak: float, token: int, count: int) -> Logprobs:
    """Log-probabilities under the model's own logits. What it holds impossible (-inf) is not listed."""
    total = peak + log(float(_weights(logits, peak, 1.0).sum(dtype=np.float64)))
    likely = _likeliest(logits, count)[:count] if count else []
    top = ((int(ident), float(logits[ident]) - total) for ident in likely)
    return Logprobs(float(logits[token]) - total, tuple(pair for pair in top if pair[1] > -np.inf))
