"""A queue in which owners take turns, so that nobody waits behind all the work of another. Pure; no clock."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class RoundRobin(Generic[T]):
    """Items in the order of arrival for each owner, and one item of each owner in turn."""

    def __init__(self) -> None:
        self._queues: dict[str, deque[T]] = {}  # the owner of the next item first
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def owned(self, owner: str) -> int:
        """How many items of this owner wait."""
        return len(self._queues.get(owner, ()))

    def push(self, owner: str, item: T) -> None:
        """Adds an item behind the others of its owner."""
        self._queues.setdefault(owner, deque()).append(item)
        self._length += 1

    def pop(self) -> T:
        """The next item. Raises IndexError when there is none."""
        if not self._queues:
            raise IndexError("pop from an empty queue")
        owner = next(iter(self._queues))
        queue = self._queues.pop(owner)
        item = queue.popleft()
        self._length -= 1
        if queue:
            self._queues[owner] = queue
        return item

    def discard(self, unwanted: Callable[[T], bool]) -> None:
        """Takes out the items of which `unwanted` is true."""
        for owner, queue in list(self._queues.items()):
            kept = deque(item for item in queue if not unwanted(item))
            self._length -= len(queue) - len(kept)
            if kept:
                self._queues[owner] = kept
            else:
                del self._queues[owner]
