"""Keeps answers of `/v1/responses` in memory, with the conversations that led to them. Off by default.

A kept answer belongs to its tenant. When the memory is full, the oldest answers go. Nothing is written to a
disk, and a restart forgets everything.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple

from stretto.errors import UnknownResponse


class KeptResponse(NamedTuple):
    """An answer as its client got it, and the conversation up to and with it: a list of items. Both JSON.
    `items`: the ids of the items that the answer consists of."""

    tenant: str
    answer: bytes
    conversation: bytes
    items: tuple[str, ...] = ()


class ResponseStore:
    """Answers by id, in at most `most` bytes of text; 0 keeps none."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._size = 0
        self._kept: OrderedDict[str, KeptResponse] = OrderedDict()
        self._items: dict[str, str] = {}  # the id of an item -> that of its answer

    @property
    def on(self) -> bool:
        """Whether it keeps anything."""
        return self._most > 0

    def put(self, id: str, kept: KeptResponse) -> None:
        """Keeps an answer, and drops the oldest ones that no longer fit."""
        self._kept[id] = kept
        self._size += _size(kept)
        self._items |= dict.fromkeys(kept.items, id)
        while self._size > self._most:
            self._forget(next(iter(self._kept)))

    def get(self, id: str, tenant: str, path: str) -> KeptResponse:
        """The tenant's answer of that id, which came in the field at `path`. Raises UnknownResponse."""
        kept = self._kept.get(id)
        if kept is None or kept.tenant != tenant:
            why = "it has been dropped, or never was" if self.on else "the setting response_store is off"
            raise UnknownResponse(
                f"{path}: this server keeps no response {id!r}: {why}; send the conversation in $.input",
                param=path,
            )
        return kept

    def delete(self, id: str, tenant: str, path: str) -> None:
        """Drops an answer. Raises UnknownResponse."""
        self.get(id, tenant, path)
        self._forget(id)

    def holding(self, item: str, tenant: str, path: str) -> KeptResponse:
        """The tenant's answer with that item, named in the field at `path`. Raises UnknownResponse."""
        kept = self._kept.get(self._items.get(item, ""))
        if kept is None or kept.tenant != tenant:
            why = (
                "its answer has been dropped, or never was"
                if self.on
                else "the setting response_store is off"
            )
            raise UnknownResponse(
                f"{path}: this server keeps no item {item!r}: {why}; send the whole item, as clients do with"
                " store: false",
                param=path,
            )
        return kept

    def _forget(self, id: str) -> None:
        kept = self._kept.pop(id)
        self._size -= _size(kept)
        for item in kept.items:
            self._items.pop(item, None)


def _size(kept: KeptResponse) -> int:
    return len(kept.answer) + len(kept.conversation) + 2 * sum(map(len, kept.items))
