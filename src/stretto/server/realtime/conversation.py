"""The items of one conversation: their order, their limits, and how they look on the wire."""

from __future__ import annotations

from collections.abc import Sequence
from secrets import token_hex
from typing import Any

from msgspec import json, structs

from stretto.errors import InvalidRequest
from stretto.protocol.limits import LIMITS
from stretto.protocol.realtime.options import ConversationItem
from stretto.protocol.responses import InputPart
from stretto.server.adapters.response_items import ItemConversation

ROOT = "root"
TYPED = ("message", "function_call", "function_call_output")


class RealtimeConversation:
    """The items, oldest first. `most_bytes`: of all items together, as JSON."""

    def __init__(self, most_bytes: int) -> None:
        self.id = f"conv_{token_hex(12)}"
        self.size = 0
        self._most_bytes = most_bytes
        self._items: list[ConversationItem] = []

    @property
    def items(self) -> Sequence[ConversationItem]:
        return self._items

    @property
    def last_id(self) -> str | None:
        """The id of the newest item; None without items."""
        return self._items[-1].id if self._items else None

    def add(self, item: ConversationItem, previous: str | None = None) -> tuple[ConversationItem, str | None]:
        """Adds an item after the one with the id `previous`; returns it with an id, and the id of the one
        before it. Raises InvalidRequest for an item that is incomplete or does not fit."""
        item = checked(item, "$.item")
        if any(other.id == item.id for other in self._items):
            raise InvalidRequest(f"$.item.id: there is an item {item.id!r} already", param="$.item.id")
        if len(self._items) >= LIMITS["messages"].most:
            raise LIMITS["messages"].error("the conversation", len(self._items) + 1)
        size = len(json.encode(item))
        if self.size + size > self._most_bytes:
            raise InvalidRequest(
                f"$.item: the conversation may have {self._most_bytes} bytes; delete items, or open another",
                param="$.item",
            )
        at = len(self._items)
        if previous is not None:
            at = 0 if previous == ROOT else self._index(previous, "$.previous_item_id") + 1
        self._items.insert(at, item)
        self.size += size
        return item, self._items[at - 1].id if at else None

    def get(self, id: str) -> ConversationItem:
        """The item with that id. Raises InvalidRequest."""
        return self._items[self._index(id, "$.item_id")]

    def delete(self, id: str) -> None:
        """Drops an item. Raises InvalidRequest for an unknown one."""
        item = self._items.pop(self._index(id, "$.item_id"))
        self.size -= len(json.encode(item))

    def truncate(self, id: str, characters: int) -> None:
        """Keeps the first characters of an answer. Raises InvalidRequest for any other item."""
        at = self._index(id, "$.item_id")
        item = self._items[at]
        if item.role != "assistant":
            raise InvalidRequest("$.item_id: only an answer can be truncated", param="$.item_id")
        content = item.content if isinstance(item.content, list) else [_text_part(item.content or "")]
        parts: list[InputPart] = []
        for part in content:
            text = (part.text or "")[:characters]
            characters -= len(text)
            parts.append(structs.replace(part, text=text))
        self._items[at] = shorter = structs.replace(item, content=parts)
        self.size += len(json.encode(shorter)) - len(json.encode(item))

    def resolved(self, items: Sequence[ConversationItem]) -> list[ConversationItem]:
        """The items of a response's own input, with those that it refers to. Raises InvalidRequest."""
        found: list[ConversationItem] = []
        for at, item in enumerate(items):
            path = f"$.response.input[{at}]"
            if item.type == "item_reference":
                found.append(self._items[self._index(item.id or "", f"{path}.id")])
            else:
                found.append(checked(item, path))
        return found

    def _index(self, id: str, path: str) -> int:
        for at, item in enumerate(self._items):
            if item.id == id:
                return at
        raise InvalidRequest(f"{path}: the conversation has no item {id[:100]!r}", param=path)


def checked(item: ConversationItem, path: str) -> ConversationItem:
    """The item with an id and a status. Raises InvalidRequest for one that lacks what its type needs."""
    if item.type not in TYPED:
        raise InvalidRequest(f"{path}.type must be one of {', '.join(TYPED)}", param=f"{path}.type")
    ItemConversation().add(item, path)
    return structs.replace(
        item, id=item.id or f"item_{token_hex(12)}", status=item.status if item.status else "completed"
    )


def user_message(text: str) -> ConversationItem:
    """A message of the user."""
    content = [InputPart(type="input_text", text=text)]
    return ConversationItem(type="message", role="user", content=content)


def shown(item: ConversationItem, *, older: bool = False) -> dict[str, Any]:
    """The item as clients see it. `older`: an answer's parts have the type `text`."""
    found: dict[str, Any] = {
        "id": item.id,
        "object": "realtime.item",
        "type": item.type,
        "status": item.status or "completed",
    }
    for name in ("role", "call_id", "name", "arguments"):
        if (value := getattr(item, name)) is not None:
            found[name] = value
    if item.output is not None:
        found["output"] = item.output if isinstance(item.output, str) else "".join(map(_text_of, item.output))
    if item.content is not None:
        answered = "text" if older else "output_text"
        kind = answered if item.role == "assistant" else "input_text"
        parts = [item.content] if isinstance(item.content, str) else map(_text_of, item.content)
        found["content"] = [{"type": kind, "text": text} for text in parts]
    return found


def _text_part(text: str) -> InputPart:
    return InputPart(type="output_text", text=text)


def _text_of(part: InputPart) -> str:
    return (part.refusal if part.type == "refusal" else part.text) or ""
