"""Draws the next token of every row of a step, as each sequence's `Sampling` says.

A draw depends only on the row's own logits, seed and position: not on its batch, on preemption or on how its
prompt was chunked. A row pays only for the options that it uses itself. The sampler reads sequences and
changes none. It knows no plan, no cache and no time.
"""

from __future__ import annotations

from array import array
from collections import Counter
from itertools import accumulate
from math import e, log, log2
from typing import NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stretto.engine.sequence import Drawn, Sequence, follow
from stretto.engine.structured.grammar import Matcher
from stretto.types import Logprobs, Sampling

Logits = NDArray[np.float32]
GREEDY_BELOW = 1e-5
CANDIDATES = (64, 1024, 16384)  # how many of the likeliest tokens are tried in turn to settle a draw
BLOCK = 512  # tokens whose weights are summed together
LOW_64 = 2**64 - 1
BELOW_ONE = 1 - 2**-48  # the product with any positive float64 is less than that number


class Sampler:
    """The sampler of one model. `vocab` is the width of its logits, `eos` the tokens that end an answer."""

    def __init__(self, vocab: int, eos: frozenset[int], device: torch.device) -> None:
        self._vocab = vocab
        self._eos = eos
        self._argmax = argmax_on_host if device.type == "cpu" else argmax_on_device
        self._counts: dict[int, _TokenCounts] = {}
        self._biases: dict[int, tuple[NDArray[np.int64], Logits]] = {}

    @property
    def tracked(self) -> list[int]:
        """The ids of the requests whose tokens are counted for their penalties."""
        return list(self._counts)

    @torch.inference_mode()
    def __call__(
        self, logits: Tensor, sequences: list[Sequence], drafts: list[tuple[int, ...]] | None = None
    ) -> list[Drawn]:
        """Draw for each sequence from its rows of `logits` (float32 [R, vocab], not changed).

        A sequence has one row, and with `drafts` one more for each draft token: row n holds the logits after
        n accepted draft tokens. The rows of a sequence are next to each other, in the order of `sequences`.

        Order of operations, as vLLM documents its own: logit_bias, min_tokens (EOS and stop_token_ids cannot
        be drawn yet), grammar, repetition penalty (prompt and output), frequency and presence penalty
        (output), then greedy at temperature 0, or temperature, min_p, top_k, top_p and the draw. Logprobs are
        those of the model's own logits, before all of these (vLLM's `raw_logprobs`).

        A row whose logits hold NaN or +inf, or for which no token is allowed, gives token -1.

        All rows share one argmax and one copy to the host, which is enough for the greedy rows. Every other
        row is drawn by itself on the host in numpy. That took less time than drawing all rows together in
        torch, because small operations cost numpy a fraction, and no row can affect another.
        """
        tokens, peaks = self._argmax(logits)
        best: list[int] = np.where(np.isfinite(peaks), tokens, -1).tolist()
        drafts = drafts or [()] * len(sequences)
        firsts = list(accumulate((1 + len(draft) for draft in drafts), initial=0))
        single = [row for row, seq in enumerate(sequences) if _needs_own_draw(seq)]
        self._update_counts([sequences[row] for row in single])
        result = [
            follow(draft, lambda n, first=first: Drawn(best[first + n])) if draft else Drawn(best[first])
            for draft, first in zip(drafts, firsts, strict=False)
        ]
        if single:
            rows = logits.cpu().numpy()
            with np.errstate(over="ignore", divide="ignore"):  # an infinite result is handled by its row
                for row in single:
                    own = slice(firsts[row], firsts[row + 1])
                    result[row] = self._verify(rows[own], best[own], sequences[row], drafts[row])
        return result

    @torch.inference_mode()
    def draft(self, logits: Tensor, drafts: list[tuple[Sequence, tuple[int, ...]]]) -> list[int]:
        """One draft token for each row of `logits`: what the sequence would draw after its draft tokens,
        without its grammar; 0 where nothing can be drawn."""
        tokens, peaks = self._argmax(logits)
        best: list[int] = np.where(np.isfinite(peaks), tokens, 0).tolist()
        single = [row for row, (seq, _) in enumerate(drafts) if _needs_own_draw(seq)]
        self._update_counts([drafts[row][0] for row in single])
        if single:
            rows = logits.cpu().numpy()
            with np.errstate(over="ignore", divide="ignore"):
                for row in single:
                    best[row] = max(self.draw_row(rows[row], best[row], Position(*drafts[row])).token, 0)
        return best

    def _verify(self, logits: Logits, best: list[int], seq: Sequence, draft: tuple[int, ...]) -> Drawn:
        """Draw after a sequence and after each accepted draft token.

        `logits` is [1 + draft tokens, vocab]. `best` holds the argmax of each row, which is -1 for a row that
        holds NaN or +inf.
        """
        grammar = seq.grammar.fork() if seq.grammar is not None and draft else seq.grammar

        def draw(accepted: int) -> Drawn:
            if grammar is not None and accepted:
                grammar.accept(draft[accepted - 1])
            if best[accepted] < 0:
                return Drawn(-1)
            return self.draw_row(logits[accepted], best[accepted], Position(seq, draft[:accepted], grammar))

        return follow(draft, draw)

    def draw_row(self, logits: Logits, best: int, position: Position) -> Drawn:
        """Draw one token from `logits` [vocab], which hold no NaN and no +inf. `best` is their argmax."""
        sampling, token, final = position.seq.request.sampling, best, logits
        if position.changes_logits:
            final = self._changed(logits, position)
            token = int(final.argmax())
        peak = float(final[token])
        if not np.isfinite(peak):
            return Drawn(-1)
        if sampling.temperature >= GREEDY_BELOW:
            token = sample(final, peak, sampling, uniform(position.seq.seed, position.token_index))
        sureness = 0.0 if position.seq.request.cascade is None else -_log_total(logits, float(logits[best]))
        if sampling.logprobs is None:
            return Drawn(token, sureness=sureness)
        logprobs = _logprobs(logits, float(logits[best]), token, sampling.logprobs)
        return Drawn(token, logprobs, sureness=sureness)

    def _update_counts(self, sequences: list[Sequence]) -> None:
        """Update the token counts of the sequences with penalties and the arrays of those with a logit bias,
        and drop those of all others."""
        known, self._counts = self._counts, {}
        biased, self._biases = self._biases, {}
        for seq in sequences:
            if bias := seq.request.sampling.logit_bias:
                self._biases[seq.request.id] = biased.get(seq.request.id) or self._bias_arrays(bias)
            if _penalised(seq.request.sampling):
                ident = seq.request.id
                counts = self._counts[ident] = known.get(ident) or _TokenCounts(seq)
                counts.update(seq.tokens)

    def _bias_arrays(self, bias: dict[int, float]) -> tuple[NDArray[np.int64], Logits]:
        """The token ids of a logit bias and what to add to the logits of each."""
        ids = np.fromiter(bias, np.int64, len(bias))
        inside = (ids >= 0) & (ids < self._vocab)
        return ids[inside], np.fromiter(bias.values(), np.float32, len(bias))[inside]

    def _changed(self, logits: Logits, position: Position) -> Logits:
        """A copy of the logits with bias, minimum, grammar and penalties applied."""
        final, sampling = logits.copy(), position.seq.request.sampling
        if (biases := self._biases.get(position.seq.request.id)) is not None:
            final[biases[0]] += biases[1]
        early = self._too_early(position)
        if position.grammar is not None:
            final[~self._allowed(position.grammar, early)] = -np.inf
        elif early:
            final[early] = -np.inf
        tracked = self._counts.get(position.seq.request.id)
        if tracked is not None:
            ids, counts = tracked.with_draft(position.draft)
            seen = final[ids]
            seen = np.where(seen > 0, seen / sampling.repetition_penalty, seen * sampling.repetition_penalty)
            seen -= sampling.frequency_penalty * counts
            final[ids] = seen - sampling.presence_penalty * (counts > 0)
        return final

    def _too_early(self, position: Position) -> list[int]:
        """The tokens that would end the sequence before its `min_tokens`."""
        sampling = position.seq.request.sampling
        if position.output_len >= sampling.min_tokens:
            return []
        ends = sampling.stop_token_ids if sampling.ignore_eos else (*self._eos, *sampling.stop_token_ids)
        return [token for token in ends if 0 <= token < self._vocab]

    def _allowed(self, grammar: Matcher, early: list[int]) -> NDArray[np.bool_]:
        """The tokens that the grammar allows: bool [vocab].

        Tokens in `early` are left out unless no other is allowed. A grammar that failed allows no token.
        """
        bits = np.zeros(grammar.words, dtype=np.int32)
        grammar.mask_into(bits)
        allowed = np.unpackbits(bits.view(np.uint8), count=self._vocab, bitorder="little").view(np.bool_)
        later = allowed.copy()
        later[early] = False
        return later if later.any() else allowed


class Position(NamedTuple):
    """Where a token is drawn: after `seq` and accepted draft tokens, which `grammar` has accepted too."""

    seq: Sequence
    draft: tuple[int, ...] = ()
    grammar: Matcher | None = None

    @property
    def token_index(self) -> int:
        """The index of the token in its sequence."""
        return self.seq.length + len(self.draft)

    @property
    def output_len(self) -> int:
        """Output tokens before it."""
        return self.seq.output_len + len(self.draft)

    @property
    def changes_logits(self) -> bool:
        """Whether bias, minimum, grammar or penalties change the logits before the draw."""
        sampling = self.seq.request.sampling
        return (
            self.grammar is not None
            or bool(sampling.logit_bias)
            or self.output_len < sampling.min_tokens
            or _penalised(sampling)
        )


class _TokenCounts:
    """The distinct tokens of a sequence (`ids`), and how often its output holds each (`counts`).

    Tokens of the prompt are kept, with count 0, only if the sequence has a repetition penalty.
    """

    __slots__ = ("_places", "_until", "counts", "ids")

    def __init__(self, seq: Sequence) -> None:
        repeats = seq.request.sampling.repetition_penalty != 1.0
        prompt = seq.tokens[: seq.prompt_len] if repeats else []
        self._places = {token: place for place, token in enumerate(dict.fromkeys(prompt))}
        self._until = seq.prompt_len
        self.ids = array("q", self._places)
        self.counts = array("q", [0] * len(self._places))

    def update(self, tokens: list[int]) -> None:
        """Count the output tokens that are new since the last call."""
        for token in tokens[self._until :]:
            place = self._places.setdefault(token, len(self.ids))
            if place == len(self.ids):
                self.ids.append(token)
                self.counts.append(0)
            self.counts[place] += 1
        self._until = len(tokens)

    def with_draft(self, draft: tuple[int, ...]) -> tuple[NDArray[np.int64], Logits]:
        """The ids and counts as they would be with the draft tokens accepted."""
        ids, counts = np.array(self.ids), np.array(self.counts, dtype=np.float32)
        for token, times in Counter(draft).items():
            if token in self._places:
                counts[self._places[token]] += times
            else:
                ids, counts = np.append(ids, token), np.append(counts, np.float32(times))
        return ids, counts


def uniform(seed: int, index: int) -> float:
    """The random number in [0, BELOW_ONE] that decides token `index` of a sequence.

    SplitMix64 (Steele, Lea and Flood, 2014), used as a counter-based generator of 48 bits.
    """
    return (_mix(_mix(seed) + (index + 1) * 0x9E3779B97F4A7C15) >> 16) * 2.0**-48


def _mix(state: int) -> int:
    state &= LOW_64
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & LOW_64
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & LOW_64
    return state ^ (state >> 31)


def drawn_on_host(seq: Sequence) -> bool:
    """Whether a GPU leaves its draw to the host: there it has no grammars, logprobs, bias or minimum."""
    sampling = seq.request.sampling
    return seq.request.task == "generate" and (
        seq.grammar is not None
        or seq.request.cascade is not None
        or sampling.logprobs is not None
        or bool(sampling.logit_bias)
        or seq.output_len < sampling.min_tokens
    )


def verified_on_device(seq: Sequence) -> bool:
    """Whether a GPU can verify its draft tokens. With penalties, each draw depends on the draft tokens before
    it, which the device has not counted."""
    return not drawn_on_host(seq) and not _penalised(seq.request.sampling)


def _penalised(sampling: Sampling) -> bool:
    return (
        sampling.repetition_penalty != 1.0
        or sampling.frequency_penalty != 0.0
        or sampling.presence_penalty != 0.0
    )


def _needs_own_draw(seq: Sequence) -> bool:
    """Whether the argmax of the logits is not the whole result for this sequence."""
    sampling = seq.request.sampling
    sampled = sampling.temperature >= GREEDY_BELOW or sampling.logprobs is not None
    return sampled or seq.request.cascade is not None or Position(seq, grammar=seq.grammar).changes_logits


def argmax_on_host(logits: Tensor) -> tuple[NDArray[np.int64], Logits]:
    """The argmax of each row (the first of equal ones) and its logit; NaN counts as the greatest.

    On a CPU numpy takes a tenth of torch's time for it.
    """
    rows = logits.numpy()
    tokens = rows.argmax(-1)
    return tokens, rows[np.arange(len(rows)), tokens]


def argmax_on_device(logits: Tensor) -> tuple[NDArray[np.int64], Logits]:
    """The same on a device, with one copy to the host."""
    tokens = logits.argmax(-1, keepdim=True)
    both = torch.cat([tokens.double(), logits.gather(-1, tokens).double()], dim=-1).cpu().numpy()
    return both[:, 0].astype(np.int64), both[:, 1].astype(np.float32)


def _weights(logits: Logits, peak: float, temperature: float) -> Logits:
    """exp((logits - peak) / temperature). numpy's exp2 takes half the time of its exp."""
    weights = logits - np.float32(peak)
    weights *= np.float32(log2(e) / temperature)
    return np.exp2(weights, out=weights)


def sample(logits: Logits, peak: float, sampling: Sampling, fraction: float) -> int:
    """Sample a token from `logits` [vocab], whose maximum is `peak`, by the random number `fraction`."""
    count = sampling.top_k or len(logits)
    if count >= len(logits) and sampling.min_p == 0 and sampling.top_p == 1:
        return sample_all(_weights(logits, peak, sampling.temperature), fraction)
    return sample_filtered(logits, peak, sampling, fraction)


def sample_all(weights: Logits, fraction: float) -> int:
    """Sample from all tokens in proportion to `weights` [vocab].

    Inverts the cumulative sum in the vocabulary's order: first over blocks, then within one.
    """
    sums = np.add.reduceat(weights, np.arange(0, len(weights), BLOCK)).astype(np.float64)
    cumulative = sums.cumsum()
    target = cumulative[-1] * fraction
    block = int(cast("np.intp", cumulative.searchsorted(target, side="right")))
    rest = (target - cumulative[block] + sums[block]) / sums[block]
    inside = weights[block * BLOCK : (block + 1) * BLOCK].cumsum(dtype=np.float64)
    target = inside[-1] * min(max(rest, 0.0), BELOW_ONE)
    return block * BLOCK + int(cast("np.intp", inside.searchsorted(target, side="right")))


def sample_filtered(logits: Logits, peak: float, sampling: Sampling, fraction: float) -> int:
    """Sample from the tokens that min_p, top_k and top_p leave, in order of falling probability.

    The result is exact and mostly needs no full sort. The likeliest tokens suffice if they include all that
    min_p or top_k leave, or hold `top_p` of the whole probability mass. If not, more of them are taken.
    """
    temperature, min_p, top_p = sampling.temperature, sampling.min_p, sampling.top_p
    count = min(sampling.top_k or len(logits), len(logits))
    total = None
    for size in (*CANDIDATES, len(logits)):
        ids = top_tokens(logits, size)
        weights = np.exp((logits[ids].astype(np.float64) - peak) / temperature)
        left = min(count, int(np.count_nonzero(weights >= min_p)))
        cumulative = weights[:left].cumsum()
        if left < len(ids) or left == count:
            mass = cumulative[-1]
        elif count < len(logits):
            continue
        else:
            if total is None:
                whole = _weights(logits, peak, temperature)
                total = float(whole.sum() if min_p == 0 else whole[whole >= min_p].sum())
            mass = total
        last = int(cumulative.searchsorted(top_p * mass))
        if last < left:
            return int(ids[cumulative.searchsorted(cumulative[last] * fraction, side="right")])
    raise AssertionError("the whole vocabulary settles every draw")


def top_tokens(logits: Logits, size: int) -> NDArray[np.int64]:
    """The ids of the `size` greatest logits or a few more, the greatest first, equal ones by rising id.

    The row is folded into four times `size` columns, and the maximum of each column is taken. The `size`-th
    greatest of these maxima is a threshold that at least `size` tokens reach, and few more. Only these tokens
    are sorted.
    """
    columns = 4 * max(size, CANDIDATES[0])
    folds = len(logits) // columns
    if folds < 2:
        return np.argsort(-logits, kind="stable")
    heads = logits[: folds * columns].reshape(folds, columns).max(axis=0)
    floor = np.partition(heads, -size)[-size]
    ids = np.flatnonzero(logits >= floor)
    return ids[np.argsort(-logits[ids], kind="stable")]


def _log_total(logits: Logits, peak: float) -> float:
    """The logarithm of the sum of exp(logits - peak): minus the log-probability of the token at the peak."""
    return log(float(_weights(logits, peak, 1.0).sum(dtype=np.float64)))


def _logprobs(logits: Logits, peak: float, token: int, count: int) -> Logprobs:
    """The log-probability of `token` and of the `count` likeliest tokens with more than zero probability."""
    total = peak + _log_total(logits, peak)
    likely: list[int] = top_tokens(logits, count)[:count].tolist() if count else []
    top = ((ident, float(logits[ident]) - total) for ident in likely)
    return Logprobs(float(logits[token]) - total, tuple(pair for pair in top if pair[1] > -np.inf))
