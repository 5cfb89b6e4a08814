"""The message that is being typed, and the reading of its prompt meanwhile.

What is certain of the prompt is computed in the engine's spare time, without an answer. Its blocks stay in
the prefix cache, where the response finds them. Whatever goes wrong here costs time and changes no answer.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from stretto.engine.client import Stream
from stretto.errors import StrettoError
from stretto.http.errors import internal
from stretto.protocol.openai import ChatRequest
from stretto.server.feedback.choices import user_of
from stretto.server.objectives import resolve_objective
from stretto.server.realtime.conversation import RealtimeConversation
from stretto.server.state import ReadAhead, Server
from stretto.server.validation import AnswerSpec, EncodedPrompt, check_chat
from stretto.server.variants.placement import TypedRequest, foresee
from stretto.types import Finish, Reason, Request, Sampling

LONGEST_WORD = 24  # characters; a longer run without a blank is cut: some languages write none
UNCERTAIN = 2  # tokens at the end of a text that may change when more follows
BYTES_PER_TOKEN = 4  # bytes of new text for each token of a block before the prompt is encoded again
SHARE = 128  # new text below this part of a long prompt is not read: encoding takes time from others
EDIT_PAUSE_S = 0.2  # after an edit that changed what is being read
LAST_WORD = re.compile(r"\s+\S*\s*$")
READ = Sampling(max_tokens=0)


class TypedText:
    """A text that grows at its end, and is edited elsewhere now and then."""

    def __init__(self) -> None:
        self.size = 0  # bytes of UTF-8, counted as they come
        self._parts: list[str] = []

    def __str__(self) -> str:
        if len(self._parts) > 1:
            self._parts = ["".join(self._parts)]
        return self._parts[0] if self._parts else ""

    def append(self, text: str) -> None:
        """Adds to the end."""
        self.size += len(text.encode(errors="replace"))
        self._parts.append(text)

    def replace(self, start: int, end: int | None, text: str) -> None:
        """Replaces the characters from `start` to `end`; None: to the end."""
        whole = str(self)
        end = len(whole) if end is None else end
        whole = whole[:start] + text + whole[max(start, end) :]
        self.size = len(whole.encode(errors="replace"))
        self._parts = [whole]


def certain(text: str) -> str:
    """The text without its last word, which may still change. A text of one short word stays whole."""
    tail = text[-LONGEST_WORD:]
    found = LAST_WORD.search(tail)
    cut = len(text) - len(tail) + (found.start() if found else 0)
    return text[:cut] if text[:cut].strip() else text


@dataclass(slots=True)
class PromptReader:
    """Reads the prompt of one session. `chat_of(text)` makes the request that the text would become.

    `variant`: the model of a ladder that answered last; None: none did, and that reads which would be chosen
    for the text so far. Each has its own cache.
    `told(tokens, characters)` is called when so many tokens of the prompt are read, and with them so many
    characters of the text.
    """

    server: Server
    conversation: RealtimeConversation
    tenant: str
    request_id: str
    chat_of: Callable[[str], ChatRequest]
    told: Callable[[int, int], None]
    variant: str | None = None
    size: int = 0  # bytes of the text that is encoded
    _task: asyncio.Task[None] | None = None
    _source: str = ""  # what is being read, or was last
    _looked: int = -1  # the size of the text when it was last encoded; -1: never
    _read_ahead: ReadAhead = ReadAhead()  # noqa: RUF009 - it is immutable
    _restarts: int = 0  # of the engine by then
    _useless: bool = field(default=False)  # whether the cache keeps nothing

    @property
    def read(self) -> ReadAhead:
        """What is read, if the engine still has it."""
        return self._read_ahead if self._restarts == self.server.engine.restarts else ReadAhead()

    def look(self, text: TypedText, *, edited: bool = False) -> None:
        """Begins to read what has been typed, if enough of it is new. `edited`: the text has
        changed before its end."""
        changed = edited and not str(text).startswith(self._source)
        if changed:
            self.stop()
        if self._task is not None or self._useless or self.server.gate.draining:
            return
        if changed or self._is_worth_it(text):
            self._task = asyncio.create_task(self._run(text, changed=changed))

    def stop(self) -> None:
        """Ends the reading; what the engine still does for it is cancelled."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()

    def next_message(self) -> None:
        """The text was sent or dropped: another one follows."""
        self.stop()
        self._source, self._looked, self._useless = "", -1, False

    def _is_worth_it(self, text: TypedText) -> bool:
        """Whether enough text is new since the prompt was last encoded: a block, more for a long prompt."""
        block = next((info.block_size for info in self.server.engine.models.values()), 16)
        least = max(BYTES_PER_TOKEN * block, (text.size + self.conversation.size) // SHARE)
        return self._looked < 0 or abs(text.size - self._looked) >= least

    async def _run(self, text: TypedText, *, changed: bool) -> None:
        """Reads until too little new text is left."""
        try:
            if changed:
                self._looked = -1
                await asyncio.sleep(EDIT_PAUSE_S)
            while text.size and not self._useless and self._is_worth_it(text):
                self._looked = text.size
                await self._read(text)
        except StrettoError:
            pass  # the response says what is wrong with the prompt, or with the engine
        except Exception as error:
            internal(error)
        finally:
            if self._task is asyncio.current_task():
                self._task = None

    async def _read(self, text: TypedText) -> None:
        """Computes what is certain of the prompt and not computed yet. Raises StrettoError."""
        server, typed = self.server, str(text)
        self._source = certain(typed)
        server.gate.ensure_open()
        chat = self.chat_of(self._source)
        self.size = text.size + self.conversation.size
        spec = check_chat(chat, server.model(chat.model), server.limits)
        (prompt,) = await server.run_text(self, spec.encode)
        block = spec.model.info.block_size
        uncertain = UNCERTAIN + (text.size if self._source == typed else 0)
        ids = prompt.ids[: max(len(prompt.ids) - uncertain, 0) // block * block]
        model, restarts = self.variant or self._likely(chat, spec, prompt), server.engine.restarts
        known = min(self.read.common(model, prompt.ids), len(ids))
        if len(ids) <= known:
            return
        finish = await _end_of(
            server.engine.submit(
                Request(
                    id=server.engine.next_id(),
                    model=model,
                    prompt=ids,
                    arrival=time.monotonic(),
                    sampling=READ,
                    tenant=self.tenant,
                    salt=spec.salt,
                    spare_time=True,
                    request_id=self.request_id,
                )
            )
        )
        if finish is None or finish.reason is not Reason.LENGTH:
            return
        self._useless = known >= block and not finish.cached_tokens
        self._read_ahead, self._restarts = ReadAhead(model, ids), restarts
        server.metrics.read_ahead(model, len(ids) - finish.cached_tokens)
        left = len(spec.model.text.decode(list(prompt.ids[len(ids) :])))
        self.told(len(ids), max(0, len(self._source) - left))

    def _likely(self, chat: ChatRequest, spec: AnswerSpec, prompt: EncodedPrompt) -> str:
        """The model that would answer if the text were sent now. Raises InvalidRequest for an objective that
        contradicts itself."""
        slo = resolve_objective(chat, self.server.policy, self.tenant, lambda: True)
        typed = TypedRequest(self.server, self.tenant, time.monotonic(), user_of(chat))
        return foresee(typed, spec, slo, prompt)


async def _end_of(stream: Stream) -> Finish | None:
    """The end of a request; its stream is closed, whatever happens. Raises EngineDied or EngineStalled."""
    try:
        async for events in stream:
            for event in events:
                if event.finish is not None:
                    return event.finish
        return None
    finally:
        stream.close()
