"""The Python API: `LLM` is the same engine process and the same text code as the server's, without HTTP.

A blocking face over one event loop in a daemon thread. It wires; it holds no rule of its own about models.
"""

from __future__ import annotations

import asyncio
import time
import weakref
from collections.abc import Callable, Coroutine, Generator, Iterable, Sequence
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from types import TracebackType
from typing import Any, TypeVar

import msgspec
from msgspec import Struct

from stretto import config
from stretto.config import ModelConfig
from stretto.engine.client import EngineClient
from stretto.engine.structured.sandbox import GrammarSandbox
from stretto.errors import ContextExceeded, InvalidRequest, Unavailable
from stretto.models import source
from stretto.text.output import Output, Spoken, Times
from stretto.text.tokenizer import TextModel
from stretto.types import Logprobs, ModelInfo, Reason, Request, Sampling

T = TypeVar("T")
Message = dict[str, Any]
Prompt = str | Sequence[int] | Sequence[Message]
DEFAULT = Sampling()
GRACE_S = 5.0


class Completion(Struct, frozen=True, kw_only=True):
    """One answer. `token_ids` are all tokens drawn, those of a stop string included, which `text` leaves out.

    `finish_reason` is `stop` or `length`. `logprobs` has one entry per token when they were asked for. With
    `Sampling(n=k)`, `alternatives` holds the k - 1 other answers.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    prompt_tokens: int
    cached_tokens: int = 0
    logprobs: tuple[Logprobs, ...] | None = None
    alternatives: tuple[Completion, ...] = ()


class LLM:
    """A model in an engine process of its own, ready when the constructor returns.

    `path` is a directory in the Hugging Face layout, a hub id, or `desk`, the bundled model. `settings` are
    those of `stretto serve` under the same names: `device`, `threads`, `kv_memory="2GiB"`, `context`, ...
    Close it, or use it in a `with` block. If the engine process dies, calls under way raise EngineDied and it
    starts again. Raises StartError or CheckpointError when the model cannot be served as asked.
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
        """Complete every prompt (text, or token ids), all at once; answers come in the prompts' order.

        `sampling` is one for all or one for each. Raises InvalidRequest and its kin for what cannot be asked,
        before any work is done; EngineDied when the engine process ends.
        """
        several = [prompts] if isinstance(prompts, str) else list(prompts)
        if sampling is None or isinstance(sampling, Sampling):
            sampling = [sampling or DEFAULT] * len(several)
        if len(sampling) != len(several):
            raise InvalidRequest(f"{len(several)} prompts and {len(sampling)} samplings: give one for each")
        asked = [self._requests(prompt, each) for prompt, each in zip(several, sampling, strict=True)]
        return self._wait(self._all(asked))

    def chat(self, messages: Sequence[Message], sampling: Sampling | None = None) -> Completion:
        """Answer a conversation of `{"role": ..., "content": ...}` through the model's chat template."""
        return self._wait(self._all([self._requests(messages, sampling or DEFAULT)]))[0]

    def stream(self, prompt: Prompt, sampling: Sampling | None = None) -> Generator[str]:
        """The text of one answer as it comes; `prompt` may be a conversation. Closing it cancels the rest."""
        chosen = sampling or DEFAULT
        if chosen.n != 1:
            raise InvalidRequest("stream gives one answer: leave n at 1", param="n")
        return self._pieces(self._requests(prompt, chosen)[0])

    @property
    def chats(self) -> bool:
        """Whether the model has a chat template."""
        return self._text.template is not None

    def close(self) -> None:
        """End the engine process. Calling it again does nothing; any other call then raises Unavailable."""
        self._finalise()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
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

    def _requests(self, prompt: Prompt, sampling: Sampling) -> list[Request]:
        """The n requests of one prompt, checked. With a seed, the k-th answer has seed + k."""
        if not self._finalise.alive:
            raise Unavailable("this LLM is closed: make a new one")
        arrival, ids = time.monotonic(), tuple(self._encode(prompt))
        self._check(ids, sampling)
        seeds = [None if sampling.seed is None else sampling.seed + index for index in range(sampling.n)]
        return [
            Request(
                id=self._client.next_id(),
                model=self.info.name,
                prompt=ids,
                arrival=arrival,
                sampling=msgspec.structs.replace(sampling, seed=seed, n=1),
            )
            for seed in seeds
        ]

    def _encode(self, prompt: Prompt) -> Sequence[int]:
        if isinstance(prompt, str):
            return self._text.encode(prompt)
        parts = list(prompt) if isinstance(prompt, Sequence) else [prompt]
        if ids := [part for part in parts if isinstance(part, int)]:
            messages = []
        else:
            messages = [part for part in parts if isinstance(part, dict) and "role" in part]
        if len(ids) + len(messages) < len(parts):
            raise InvalidRequest("a prompt is text, a list of token ids, or a list of messages with a role")
        return self._text.encode_chat(messages) if messages else ids

    def _check(self, ids: tuple[int, ...], sampling: Sampling) -> None:
        if not ids:
            raise InvalidRequest("the prompt is empty: there is nothing to continue", param="prompt")
        for name, tokens in (
            ("prompt", ids),
            ("logit_bias", sampling.logit_bias),
            ("stop_token_ids", sampling.stop_token_ids),
        ):
            wrong = next((token for token in tokens if not 0 <= token < self.info.vocab), None)
            if wrong is not None:
                message = f"{name}: the model has no token {wrong}; its ids end at {self.info.vocab - 1}"
                raise InvalidRequest(message, param=name)
        wanted = sampling.max_tokens or 1
        if len(ids) + wanted > self.info.context:
            raise ContextExceeded(
                f"a prompt of {len(ids)} tokens and {wanted} to answer do not fit the context of"
                f" {self.info.context} tokens: shorten the prompt or lower max_tokens"
            )

    async def _all(self, asked: list[list[Request]]) -> list[Completion]:
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [[group.create_task(self._answer(each)) for each in requests] for requests in asked]
        except BaseExceptionGroup as failures:
            raise failures.exceptions[0] from None
        answers = [[task.result() for task in several] for several in tasks]
        return [msgspec.structs.replace(first, alternatives=tuple(rest)) for first, *rest in answers]

    async def _answer(self, request: Request, said: Callable[[str], None] | None = None) -> Completion:
        """One request to its end, by the server's own rules for text. `said` hears it piece by piece."""
        if request.sampling.grammar is not None:
            await self._sandbox.validate(request.sampling.grammar)
        choice = Output(
            index=0,
            model=request.model,
            stream=self._client.submit(request),
            decoder=self._text.decoder(request.sampling.stop, request.sampling.min_tokens),
            times=Times(request.arrival),
            prompt_tokens=len(request.prompt),
        )
        spoken: list[Spoken] = []
        try:
            async for events in choice.stream:
                fresh = choice.take(events)
                spoken += fresh
                if said is not None:
                    said(_text(fresh))
                if choice.finish_reason is not None:
                    break
        finally:
            choice.stream.close()
        heard = [event for _, event in spoken if event is not None]
        probable = tuple(event.logprobs for event in heard if event.logprobs is not None)
        return Completion(
            text=_text(spoken),
            token_ids=tuple(event.token for event in heard if event.token is not None),
            finish_reason=choice.finish_reason or Reason.STOP,
            prompt_tokens=choice.prompt_tokens,
            cached_tokens=0 if choice.began is None else choice.began.cached_tokens,
            logprobs=None if request.sampling.logprobs is None else probable,
        )

    def _pieces(self, request: Request) -> Generator[str]:
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


def locate(
    models: Iterable[ModelConfig], on_progress: Callable[[str, int, int], None] | None
) -> tuple[ModelConfig, ...]:
    """The models with directories in place of what a user wrote; hub ids are downloaded first."""
    return tuple(
        model
        if model.null_ms is not None
        else msgspec.structs.replace(model, path=str(source.resolve(model.path, on_progress)))
        for model in models
    )


def _text(spoken: Iterable[Spoken]) -> str:
    return "".join(delta.content or "" for delta, _ in spoken)


def _end(
    loop: asyncio.AbstractEventLoop, thread: Thread, client: EngineClient, sandbox: GrammarSandbox
) -> None:
    """End the processes, then the loop; also when an LLM is collected unclosed, or the interpreter ends."""
    asyncio.run_coroutine_threadsafe(sandbox.close(), loop).result()
    asyncio.run_coroutine_threadsafe(client.shutdown(GRACE_S), loop).result()
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()
