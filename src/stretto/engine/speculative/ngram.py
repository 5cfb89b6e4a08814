"""Prompt lookup: proposes draft tokens by finding where a sequence's latest tokens occurred before.

It owns the index of one sequence's text and the acceptance rates measured so far (LLMA, arXiv 2304.04487).
It knows tokens alone: neither what a draft token costs nor who verifies it.
"""

from __future__ import annotations

NGRAM = 2  # tokens of the shortest passage that is looked up
MATCHES_COMPARED = 16  # earlier occurrences that are compared, the latest first
LONGEST_MATCH = 32  # tokens compared of each occurrence
INDEXED_TOKENS = 8192  # only the last ones of a prompt are indexed
INDEXED_AT_ONCE = 1024  # of all sequences, so that no step waits for their indexes
LONGEST_BUCKET = 5
FIRST_RATE = 0.5
PRIOR_TRIALS = 4.0  # the prior counts as this many trials
MEMORY_TRIALS = 32.0  # a trial loses its weight over about this many later ones
IDLE_DECAY = 1.0 - 1.0 / 512.0


class AcceptanceRate:
    """The acceptance rate of draft tokens, by bucket: a beta estimate with exponential forgetting.

    `prior` is the estimate of all sequences together. It gives the rate while there are no trials, and it
    learns from every trial of this one. Buckets are numbered from 0 to `LONGEST_BUCKET`.
    """

    __slots__ = ("_accepted", "_prior", "_trials")

    def __init__(self, prior: AcceptanceRate | None = None) -> None:
        self._accepted = [0.0] * (LONGEST_BUCKET + 1)
        self._trials = [0.0] * (LONGEST_BUCKET + 1)
        self._prior = prior

    def estimate(self, bucket: int) -> float:
        """The probability that a draft token of this bucket is accepted."""
        prior = FIRST_RATE if self._prior is None else self._prior.estimate(bucket)
        return (self._accepted[bucket] + PRIOR_TRIALS * prior) / (self._trials[bucket] + PRIOR_TRIALS)

    def decay(self) -> None:
        """Give all trials a little less weight, so that a rate that is too low to try recovers in time."""
        self._accepted = [accepted * IDLE_DECAY for accepted in self._accepted]
        self._trials = [trials * IDLE_DECAY for trials in self._trials]

    def observe(self, bucket: int, accepted: bool) -> None:
        """Record one trial."""
        decay = 1.0 - 1.0 / MEMORY_TRIALS
        self._accepted[bucket] = self._accepted[bucket] * decay + accepted
        self._trials[bucket] = self._trials[bucket] * decay + 1.0
        if self._prior is not None:
            self._prior.observe(bucket, accepted)


class NgramIndex:
    """The n-gram index of one sequence, and where its latest tokens occurred before.

    It is an index of chains as in Deflate (RFC 1951): the latest position of each n-gram, and for every
    position the previous one with the same n-gram. `match` is the position of the token that followed the
    earlier occurrence (-1: there is none), and `match_length` counts the tokens before it that agree.
    `copied` is the acceptance rate of tokens that this index proposes, `drafted` that of a draft model for
    the same sequence. Both start from the rates given to the constructor.
    """

    __slots__ = ("_latest", "_previous", "_read", "_start", "copied", "drafted", "match", "match_length")

    def __init__(self, copied: AcceptanceRate, drafted: AcceptanceRate, prompt_len: int) -> None:
        self.copied, self.drafted = AcceptanceRate(copied), AcceptanceRate(drafted)
        self.match = -1
        self.match_length = 0
        self._latest: dict[tuple[int, ...], int] = {}
        self._previous: list[int] = []
        self._start = self._read = max(0, prompt_len - INDEXED_TOKENS)

    def __len__(self) -> int:
        """How many tokens are indexed."""
        return len(self._previous)

    def holds(self, tokens: list[int]) -> bool:
        """Whether the index has been told of all these tokens of the sequence."""
        return self._read == len(tokens)

    def acceptance(self, ahead: int) -> float:
        """The probability that draft token `ahead` (from 0) is right if those before it are; 0: no match."""
        return self.copied.estimate(_bucket(self.match_length + ahead)) if self.match >= 0 else 0.0

    def update(self, tokens: list[int], prompt_len: int, most: int = INDEXED_AT_ONCE) -> int:
        """Index the new tokens of the sequence, or the first `most` of them -> how many.

        Each new output token is a trial of the acceptance rate, whether or not a draft token was verified.
        """
        begin, end = self._read, min(len(tokens), self._read + most)
        for index in range(self._read, end):
            if self.match >= 0 and index >= prompt_len:
                hit = tokens[self.match] == tokens[index]
                self.copied.observe(_bucket(self.match_length), hit)
                self.match, self.match_length = (self.match + 1, self.match_length + 1) if hit else (-1, 0)
            self._add(tokens, index)
            if self.match < 0 and index >= prompt_len - 1:
                self._search(tokens, index)
        self._read = end
        return end - begin

    def propose(self, tokens: list[int], count: int) -> tuple[int, ...]:
        """`count` draft tokens after the match. At the end of the text they repeat from the match on."""
        period = len(tokens) - self.match
        return tuple(tokens[self.match + offset % period] for offset in range(count))

    def _add(self, tokens: list[int], index: int) -> None:
        ngram = tuple(tokens[max(index + 1 - NGRAM, 0) : index + 1])
        self._previous.append(self._latest.get(ngram, -1))
        self._latest[ngram] = index

    def _search(self, tokens: list[int], last: int) -> None:
        """Find the longest earlier passage that equals the end of the text; of equal ones the latest."""
        position, left = self._previous[last - self._start], MATCHES_COMPARED
        while position >= 0 and left:
            length = _common_suffix(tokens, position, last)
            if length > self.match_length:
                self.match, self.match_length = position + 1, length
            position, left = self._previous[position - self._start], left - 1


def _bucket(match_length: int) -> int:
    return min(match_length.bit_length(), LONGEST_BUCKET)


def _common_suffix(tokens: list[int], end: int, last: int) -> int:
    """How many tokens up to `end` equal those up to `last`; at most `LONGEST_MATCH`."""
    length = 0
    while length < min(LONGEST_MATCH, end + 1) and tokens[end - length] == tokens[last - length]:
        length += 1
    return length
