"""The items of `/v1/responses` -> messages of a chat: reasoning, text and calls in a row are one answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from stretto.errors import InvalidRequest
from stretto.protocol.openai import (
    AssistantMessage,
    CalledFunction,
    DeveloperMessage,
    Message,
    RefusalPart,
    SystemMessage,
    TextPart,
    ToolCall,
    ToolMessage,
    UserMessage,
)
from stretto.protocol.responses import InputItem, InputPart

T = TypeVar("T")
ROLES = {"user": UserMessage, "system": SystemMessage, "developer": DeveloperMessage}


@dataclass(slots=True)
class ItemConversation:
    """The messages of a chat. `places`: the path of each message -> where the client sent it; `call_places`:
    the same of each call."""

    messages: list[Message] = field(default_factory=list[Message])
    places: dict[str, str] = field(default_factory=dict[str, str])
    call_places: dict[str, str] = field(default_factory=dict[str, str])
    _thought: str | None = None
    _content: list[TextPart | RefusalPart] | str | None = None
    _calls: list[ToolCall] = field(default_factory=list[ToolCall])

    def add(self, item: InputItem, path: str) -> None:
        """Adds an item that the client sent at `path`. Raises InvalidRequest for one without a field that
        its type needs."""
        if item.type == "reasoning":
            if self._content is not None or self._calls:
                self.end_answer()
            self._begin(path)
            thought = item.content or item.summary or ()
            self._thought = thought if isinstance(thought, str) else "".join(map(_text, thought)) or None
        elif item.type == "function_call":
            self._begin(path)
            place = f"$.messages[{len(self.messages)}].tool_calls[{len(self._calls)}].function"
            self.call_places[place] = path
            name = _required(item.name, f"{path}.name")
            called = CalledFunction(name=name, arguments=item.arguments or "")
            self._calls.append(ToolCall(id=_required(item.call_id, f"{path}.call_id"), function=called))
        elif item.type == "message" and item.role == "assistant":
            if self._content is not None or self._calls:
                self.end_answer()
            self._begin(path)
            self._content = _parts(item.content or "")
        else:
            self.end_answer()
            self._begin(path)
            self.messages.append(_other(item, path))

    def names(self) -> list[tuple[str, str]]:
        """The names of all places, for `fields_named`: those of calls first, as they begin like others."""
        return [*self.call_places.items(), *self.places.items()]

    def end_answer(self) -> None:
        """Adds the answer whose items came last, if any did."""
        if self._content is not None or self._calls or self._thought is not None:
            answer = AssistantMessage(
                content=self._content, reasoning_content=self._thought, tool_calls=self._calls or None
            )
            self.messages.append(answer)
            self._thought, self._content, self._calls = None, None, []

    def _begin(self, path: str) -> None:
        self.places.setdefault(f"$.messages[{len(self.messages)}]", path)


def _other(item: InputItem, path: str) -> Message:
    if item.type == "function_call_output":
        output = _parts(_required(item.output, f"{path}.output"))
        call_id = _required(item.call_id, f"{path}.call_id")
        return ToolMessage(content=_texts(output), tool_call_id=call_id)
    role = _required(item.role, f"{path}.role")
    return ROLES[role](content=_texts(_parts(_required(item.content, f"{path}.content"))))


def _parts(content: str | Sequence[InputPart]) -> str | list[TextPart | RefusalPart]:
    if isinstance(content, str):
        return content
    return [
        RefusalPart(refusal=part.refusal or "") if part.type == "refusal" else TextPart(text=_text(part))
        for part in content
    ]


def _texts(content: str | list[TextPart | RefusalPart]) -> str | list[TextPart]:
    if isinstance(content, str):
        return content
    return [part if isinstance(part, TextPart) else TextPart(text=part.refusal) for part in content]


def _text(part: InputPart) -> str:
    return part.text or ""


def _required(value: T | None, path: str) -> T:
    if value is None:
        raise InvalidRequest(f"{path} is missing", param=path)
    return value
