"""Where a sequence may be repeating its own text, and how often that has been right.

An index of one text, grown token by token, and a count of what came true (prompt lookup; LLMA, arXiv
2304.04487). It knows tokens alone: neither what a guess costs nor who checks it.
"""

from __future__ import annotations

GRAM = 2  # tokens of the shortest passage that is looked up
LOOKS = 16  # passages compared, the latest first
LOOKED_BACK = 32  # tokens of each
HORIZON = 8192  # tokens of a prompt that are indexed, the last ones: the first step must not wait for more
LONGEST_CLASS = 5
FIRST_CHANCE = 0.5
PRIOR_TRIALS = 4.0  # what others have seen counts as so many trials of one's own
MEMORY = 32.0  # trials that are remembered, about
UNTRIED = 1.0 - 1.0 / 512.0


class Odds:
    """How often a guess is right, by class: a beta estimate that forgets (`MEMORY` trials). Without trials of
    its own it says what `prior` says."""

    __slots__ = ("_hits", "_prior", "_trials")

    def __init__(self, prior: Odds | None = None) -> None:
        self._hits = [0.0] * (LONGEST_CLASS + 1)
        self._trials = [0.0] * (LONGEST_CLASS + 1)
        self._prior = prior

    def chance(self, kind: int) -> float:
        prior = FIRST_CHANCE if self._prior is None else self._prior.chance(kind)
        return (self._hits[kind] + PRIOR_TRIALS * prior) / (self._trials[kind] + PRIOR_TRIALS)

    def fade(self) -> None:
        """Nothing was tried: what is known grows a little older."""
        self._hits = [hits * UNTRIED for hits in self._hits]
        self._trials = [trials * UNTRIED for trials in self._trials]

    def saw(self, kind: int, hit: bool) -> None:
        fade = 1.0 - 1.0 / MEMORY
        self._hits[kind] = self._hits[kind] * fade + hit
        self._trials[kind] = self._trials[kind] * fade + 1.0
        if self._prior is not None:
            self._prior.saw(kind, hit)


class NgramIndex:
    """One sequence's text, and where in it the present passage stood before.

    An index of chains, as in Deflate (RFC 1951): the latest place of each `GRAM` tokens, and for every place
    the one before it with the same tokens. `at` is the token that would come next if the passage repeated,
    -1: there is none; `length`: tokens that are known to agree before it. `odds` are those of such guesses,
    `drafter` those of a smaller model's; both begin as others' were.
    """

    __slots__ = ("_before", "_head", "_read", "_start", "at", "drafter", "length", "odds")

    def __init__(self, odds: Odds, drafter: Odds, prompt_len: int) -> None:
        self.odds, self.drafter = Odds(odds), Odds(drafter)
        self.at = -1
        self.length = 0
        self._head: dict[tuple[int, ...], int] = {}
        self._before: list[int] = []
        self._start = self._read = max(0, prompt_len - HORIZON)

    def chance(self, ahead: int) -> float:
        """That the next guess is right, once `ahead` were; 0 without any."""
        return self.odds.chance(_class_of(self.length + ahead)) if self.at >= 0 else 0.0

    def read(self, tokens: list[int], prompt_len: int) -> None:
        """Take in the tokens that are new: index them, and see for each of an answer whether the guess would
        have been right, checked or not."""
        for index in range(self._read, len(tokens)):
            if self.at >= 0 and index >= prompt_len:
                hit = tokens[self.at] == tokens[index]
                self.odds.saw(_class_of(self.length), hit)
                self.at, self.length = (self.at + 1, self.length + 1) if hit else (-1, 0)
            self._index(tokens, index)
            if self.at < 0 and index >= prompt_len - 1:
                self._look(tokens, index)
        self._read = len(tokens)

    def guesses(self, tokens: list[int], count: int) -> tuple[int, ...]:
        """The next `count` tokens, if the passage repeats; at the end of the text it goes round."""
        period = len(tokens) - self.at
        return tuple(tokens[self.at + place % period] for place in range(count))

    def _index(self, tokens: list[int], index: int) -> None:
        gram = tuple(tokens[max(index + 1 - GRAM, 0) : index + 1])
        self._before.append(self._head.get(gram, -1))
        self._head[gram] = index

    def _look(self, tokens: list[int], last: int) -> None:
        """Find the longest passage that ended before as the text ends now; of equal ones the latest."""
        place, looks = self._before[last - self._start], LOOKS
        while place >= 0 and looks:
            length = _agreement(tokens, place, last)
            if length > self.length:
                self.at, self.length = place + 1, length
            place, looks = self._before[place - self._start], looks - 1


def _class_of(length: int) -> int:
    return min(length.bit_length(), LONGEST_CLASS)


def _agreement(tokens: list[int], place: int, last: int) -> int:
    """How many tokens that end at `place` are those that end at `last`; `LOOKED_BACK` at most."""
    length = 0
    while length < min(LOOKED_BACK, place + 1) and tokens[place - length] == tokens[last - length]:
        length += 1
    return length
