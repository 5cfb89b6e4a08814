"""The Python API: `LLM` runs the server's engine process and text code without HTTP.

Its methods block. They hand coroutines to one event loop, which runs in a daemon thread.
"""

from __future__ import annotations

import asyncio
import time
import weakref
from collections.abc import Callable, Coroutine, Generator, Iterable, Sequence
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any, TypeVar, cast

import msgspec
from msgspec import Struct

from stretto import config
from stretto.engine.client import EngineClient
from stretto.engine.structured.sandbox import GrammarSandbox
from stretto.errors import InvalidRequest, Unavailable
from stretto.ladder.locate import locate
from stretto.text.output import Output, OutputDelta
from stretto.text.prompts import check_length, check_sampling_ids, check_token_ids
from stretto.text.tokenizer import TextModel
from stretto.types import Logprobs, ModelInfo, Reason, Request, Sampling, WorkerState

T = TypeVar("T")
Messages = Sequence[dict[str, Any]]
DEFAULT = Sampling()
GRACE_S = 5.0


class Completion(Struct, frozen=True, kw_only=True):
    """One answer to one prompt.

    `token_ids` holds every generated token, also those of a stop string, which `text` leaves out.
    `finish_reason` is `stop` or `length`. `logprobs` has one entry per token when `Sampling.logprobs` is set.
    `prompt_logprobs` has one for each token of the prompt after the first, when `Sampling.prompt_logprobs` is
    set. With `Sampling(n=k)`, `alternatives` holds the k - 1 other answers.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    prompt_tokens: int
    cached_tokens: int = 0
    logprobs: tuple[Logprobs, ...] | None = None
    prompt_logprobs: tuple[Logprobs, ...] | None = None
    alternatives: tuple[Completion, ...] = ()


class LLM:
    """A model in an engine process of its own. It is loaded when the constructor returns.

    `path` is a directory in the Hugging Face layout, a ladder (its top variant is loaded), a hub id, or
    `desk`, the bundled model. `settings` are those of `stretto serve` under the same names: `device`,
    `threads`, `kv_memory="2GiB"`, `context`, ... Call `close`, or use a `with` block. If the engine process
    dies, calls in progress raise EngineDied and it restarts. Raises StartError for a wrong setting,
    CheckpointError for a model that cannot be loaded.
    """

    def __init__(
        self,
        path: str = "desk",
        quantise: str | None = None,
        dtype: str | None = None,
        *,
        on_progress: Callable[[str, int, int], None] | None = None,
        **settings: Any,
    ) -> None:
        flags = settings | {"models": [path], "dtype": dtype or "auto", "quantise": quantise}
        engine = config.load(flags, {}, None)[1]
        engine = msgspec.structs.replace(engine, models=locate(engine.models, on_progress))
        model = engine.models[0]
        self._loop = asyncio.new_event_loop()
        self._thread = Thread(target=self._loop.run_forever, name="stretto-llm", daemon=True)
        self._thread.start()
        self._client, self._sandbox = EngineClient(engine, on_progress=on_progress), GrammarSandbox()
        self._finalise = weakref.finalize(self, _end, self._loop, self._thread, self._client, self._sandbox)
        try:
            self._wait(self._client.start())
            self._text = TextModel(Path(model.path))
            self._wait(self._client.wait_ready())
        except BaseException:
            self.close()
            raise
        self.info: ModelInfo = self._client.models[model.name]

    def generate(
        self,
        prompts: str | Sequence[str] | Sequence[Sequence[int]],
        sampling: Sampling | Sequence[Sampling] | None = None,
    ) -> list[Completion]:
        """Complete all prompts (text or token ids) at once. The answers are in the order of the prompts.

        `sampling` is one for all prompts, or one for each. Raises InvalidRequest for wrong arguments, before
        any work is done, and EngineDied when the engine process ends.
        """
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        if sampling is None or isinstance(sampling, Sampling):
            sampling = [sampling or DEFAULT] * len(texts)
        if len(sampling) != len(texts):
            raise InvalidRequest(f"{len(texts)} prompts and {len(sampling)} samplings: give one for each")
        return self._wait(
            self._complete([self._requests(*pair) for pair in zip(texts, sampling, strict=True)])
        )

    def chat(self, messages: Messages, sampling: Sampling | None = None) -> Completion:
        """Answer a conversation of `{"role": ..., "content": ...}` through the model's chat template."""
        return self._wait(self._complete([self._requests(messages, sampling or DEFAULT)]))[0]

    def stream(
        self, prompt: str | Sequence[int] | Messages, sampling: Sampling | None = None
    ) -> Generator[str]:
        """Yield the text of one answer while it is generated. `prompt` may be a conversation.

        Closing the generator cancels the rest of the answer.
        """
        chosen = sampling or DEFAULT
        if chosen.n != 1:
            raise InvalidRequest("stream gives one answer: leave n at 1", param="n")
        return self._stream(self._requests(prompt, chosen)[0])

    def encode(self, text: str) -> list[int]:
        """The token ids of a raw prompt, with the tokenizer's own BOS or EOS."""
        return self._text.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, without special tokens."""
        return self._text.decode(list(ids))

    @property
    def chats(self) -> bool:
        """Whether the model has a chat template."""
        return self._text.template is not None

    @property
    def state(self) -> WorkerState:
        """The engine's process id, queue lengths and last step, as `/state` of the server shows them."""
        return self._client.worker_state()

    def close(self) -> None:
        """End the engine process. A second call does nothing; every other call then raises Unavailable."""
        self._finalise()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        """Run on the loop and wait. Whatever interrupts the wait (Ctrl-C) cancels the work."""
        if not self._finalise.alive:
            work.close()
            raise Unavailable("this LLM is closed: make a new one")
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        finally:
            future.cancel()

    def _requests(self, prompt: object, sampling: Sampling) -> list[Request]:
        """The `sampling.n` requests for one prompt, checked."""
        if not self._finalise.alive:
            raise Unavailable("this LLM is closed: make a new one")
        arrival, ids = time.monotonic(), tuple(self._token_ids(prompt))
        check_token_ids(ids, self.info, "prompt")
        check_sampling_ids(sampling, self.info, root="")
        check_length(len(ids), sampling.least_tokens, self.info, "prompt")
        return [
            Request(
                id=self._client.next_id(), model=self.info.name, prompt=ids, arrival=arrival, sampling=each
            )
            for each in sampling.fan_out()
        ]

    def _token_ids(self, prompt: object) -> Sequence[int]:
        if isinstance(prompt, str):
            return self._text.encode(prompt)
        parts: list[Any] = list(cast("Sequence[Any]", prompt)) if isinstance(prompt, Sequence) else [prompt]
        if all(isinstance(part, int) for part in parts):
            return parts
        if all(isinstance(part, dict) and "role" in part for part in parts):
            return self._text.encode_chat(parts)
        raise InvalidRequest("a prompt is text, a list of token ids, or a list of messages with a role")

    async def _complete(self, prompts: list[list[Request]]) -> list[Completion]:
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [[group.create_task(self._answer(each)) for each in requests] for requests in prompts]
        except BaseExceptionGroup as failures:
            raise failures.exceptions[0] from None
        answers = [[task.result() for task in copies] for copies in tasks]
        return [msgspec.structs.replace(first, alternatives=tuple(rest)) for first, *rest in answers]

    async def _answer(self, request: Request, on_text: Callable[[str], None] | None = None) -> Completion:
        """Run one request to its end. `on_text` is called with each piece of text as it comes."""
        sampling = request.sampling
        if sampling.grammar is not None:
            await self._sandbox.validate(sampling.grammar)
        detokenizer = self._text.detokenizer(sampling.stop, sampling.min_tokens)
        output = Output(request, self._client.submit(request), detokenizer)
        deltas: list[OutputDelta] = []
        try:
            async for events in output.stream:
                new = output.push(events)
                deltas += new
                if on_text is not None:
                    on_text(_text(new))
                if output.finish_reason is not None:
                    break
        finally:
            output.stream.close()
        events = [event for _, event in deltas if event is not None]
        logprobs = tuple(event.logprobs for event in events if event.logprobs is not None)
        return Completion(
            text=_text(deltas),
            token_ids=tuple(event.token for event in events if event.token is not None),
            finish_reason=output.finish_reason or Reason.STOP,
            prompt_tokens=output.prompt_tokens,
            cached_tokens=0 if output.began is None else output.began.cached_tokens,
            logprobs=None if sampling.logprobs is None else logprobs,
            prompt_logprobs=None if output.began is None else output.began.prompt_logprobs,
        )

    def _stream(self, request: Request) -> Generator[str]:
        pieces: SimpleQueue[str | None] = SimpleQueue()
        future = asyncio.run_coroutine_threadsafe(self._answer(request, pieces.put), self._loop)
        future.add_done_callback(lambda _: pieces.put(None))
        try:
            while (piece := pieces.get()) is not None:
                if piece:
                    yield piece
            future.result()
        finally:
            future.cancel()


def _text(deltas: Iterable[OutputDelta]) -> str:
    return "".join(delta.content or "" for delta, _ in deltas)


def _end(
    loop: asyncio.AbstractEventLoop, thread: Thread, client: EngineClient, sandbox: GrammarSandbox
) -> None:
    """End the processes, then the loop. Also runs when an LLM is collected, or at exit."""
    asyncio.run_coroutine_threadsafe(sandbox.close(), loop).result()
    asyncio.run_coroutine_threadsafe(client.shutdown(GRACE_S), loop).result()
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()
