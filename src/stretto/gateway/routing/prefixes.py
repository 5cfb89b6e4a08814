"""Which worker has which beginning of a prompt in its KV cache, as far as the gateway can know.

The gateway has no tokenizer. It splits a prompt's bytes into pieces of a fixed size; the key of a piece
covers everything before it, as with the blocks of a KV cache. What it sent to a worker is taken to be in
that worker's cache, least recently used last, up to the size of that cache. A wrong belief costs time only.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence

from xxhash import xxh3_64_intdigest

PIECE = 512  # bytes
MOST_PIECES = 1024  # of one prompt; what follows them is taken to be new


def keys_of(prompt: bytes, *owner: str) -> list[int]:
    """The keys of a prompt's whole pieces. Prompts of different owners (tenant, model, salt) share none."""
    key = xxh3_64_intdigest("\0".join(owner).encode("utf-8", "surrogatepass"))
    keys: list[int] = []
    for start in range(0, min(len(prompt), MOST_PIECES * PIECE) - PIECE + 1, PIECE):
        key = xxh3_64_intdigest(prompt[start : start + PIECE], key)
        keys.append(key)
    return keys


class PrefixIndex:
    """The keys that each worker is believed to hold."""

    def __init__(self) -> None:
        self._held: dict[Hashable, OrderedDict[int, None]] = {}
        self._holders: dict[int, set[Hashable]] = {}

    def match(self, keys: Sequence[int]) -> dict[Hashable, int]:
        """For each worker that holds the first key, how many of the keys it holds from the first one on."""
        found: dict[Hashable, int] = {}
        alive = set(self._holders.get(keys[0], ())) if keys else set[Hashable]()
        for count, key in enumerate(keys):
            still = alive & self._holders.get(key, set())
            for worker in alive - still:
                found[worker] = count
            alive = still
            if not alive:
                return found
        return found | dict.fromkeys(alive, len(keys))

    def add(self, worker: Hashable, keys: Sequence[int], capacity: int) -> None:
        """The worker gets a prompt with these keys, and holds `capacity` keys at most."""
        held = self._held.setdefault(worker, OrderedDict())
        for key in reversed(keys):  # so that a prompt's end is forgotten before its beginning
            held[key] = None
            held.move_to_end(key)
            self._holders.setdefault(key, set()).add(worker)
        while len(held) > capacity:
            self._drop(worker, held.popitem(last=False)[0])

    def remove(self, worker: Hashable, keys: Sequence[int]) -> None:
        """The worker does not get these keys after all."""
        held = self._held.get(worker, OrderedDict[int, None]())
        for key in keys:
            if key in held:
                del held[key]
                self._drop(worker, key)

    def forget(self, worker: Hashable) -> None:
        """The worker has lost its cache: it died or restarted."""
        for key in self._held.pop(worker, ()):
            self._drop(worker, key)

    def _drop(self, worker: Hashable, key: int) -> None:
        holders = self._holders[key]
        holders.discard(worker)
        if not holders:
            del self._holders[key]
