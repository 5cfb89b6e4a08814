"""The life of a request for text: `generate` is the whole pipeline, from the body to the last byte."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from msgspec import UNSET, json
from starlette.responses import Response

from stretto.errors import EngineError
from stretto.ladder.learning.feedback import MadeChoice
from stretto.protocol.openai import ChatRequest, CompletionRequest, Generation
from stretto.protocol.parsing import JSON, parse
from stretto.protocol.relay import MARKED, PATHS, RESPONSES, OperationName, RelayedRequest, mark, variant_mark
from stretto.server import responses
from stretto.server.admission_gate import Slot
from stretto.server.feedback.choices import follow, remember, user_of
from stretto.server.objectives import PRIORITY, ServiceLevel, requested_tier, resolve_objective
from stretto.server.responses import ResponseWriter, Style
from stretto.server.state import Call
from stretto.server.validation import (
    AnswerSpec,
    EncodedPrompt,
    ModelHandle,
    RequestLimits,
    check_chat,
    check_completion,
)
from stretto.server.variants.placement import begun_with, learn_lengths, place, reprice
from stretto.text.output import AnswerPlace, Output, OutputDelta
from stretto.text.tools import markers
from stretto.types import Request, Sampling, TokenEvent

R = TypeVar("R", bound=Generation)
Arrived = tuple[Output, list[TokenEvent]]
Delivered = tuple[Output, list[OutputDelta]]
Handler = Callable[[Call], Awaitable[None]]
UNBUFFERED = [(b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no")]


@dataclass(frozen=True, slots=True)
class Operation(Generic[R]):
    """How chat and plain completions differ: the type of the request, its checks, the shape of the answer."""

    decoder: json.Decoder[R]
    check: Callable[[R, ModelHandle, RequestLimits], AnswerSpec]
    style: Style


CHAT = Operation(json.Decoder(ChatRequest), check_chat, responses.CHAT)
COMPLETION = Operation(json.Decoder(CompletionRequest), check_completion, responses.TEXT)
OLDEST_MS = 600_000.0  # no gateway holds a request for longer
NO_MARKERS = frozenset[str]()
RELAYED = json.Decoder(RelayedRequest)


async def relay(call: Call, operations: Mapping[OperationName, Handler]) -> None:
    """Answers a request that a gateway passes on: the same handler, for the gateway's tenant, with deadlines
    that count from its arrival there. Errors are written as the API of the operation has them. Raises
    StrettoError; Unauthorised for a caller that is no gateway."""
    call.server.ensure_gateway(call.tenant, "relay requests")
    relayed = parse(RELAYED, call.body)
    call.body = bytes(relayed.request)
    call.size = len(call.body)
    call.tenant = relayed.tenant
    call.arrival -= min(max(relayed.age_ms, 0.0), OLDEST_MS) / 1e3
    call.relayed = True
    call.believed_cached = relayed.cached
    call.continuation = relayed.continuation
    call.nonce = relayed.nonce or call.nonce
    call.placed = AnswerPlace(relayed.site or UNSET, relayed.degraded or UNSET)
    call.request.scope["path"] = PATHS.get(relayed.operation, (RESPONSES,))[0]
    await operations[relayed.operation](call)


class AnswerWriter(Protocol):
    """Deltas -> bytes of one API. A stream is `events`, then `end`; one piece is `keep`, then `whole`."""

    def events(self, output: Output, deltas: Sequence[OutputDelta]) -> bytes: ...
    def skip(self, output: Output, deltas: Sequence[OutputDelta]) -> None: ...
    def end(self, outputs: list[Output]) -> bytes: ...
    def keep(self, output: Output, deltas: list[OutputDelta]) -> None: ...
    def whole(self, outputs: list[Output]) -> bytes: ...


async def generate(call: Call, operation: Operation[R]) -> None:
    """Answers one request. Raises StrettoError; `call.streaming` says whether a stream had begun."""
    request = parse(operation.decoder, call.body)

    def writer(spec: AnswerSpec, tier: str) -> ResponseWriter:
        return ResponseWriter(operation.style, spec, tier, call.exchange.id, call.continuation)

    await run(call, request, operation.check, writer)


async def run(
    call: Call,
    request: R,
    check: Callable[[R, ModelHandle, RequestLimits], AnswerSpec],
    writer_of: Callable[[AnswerSpec, str], AnswerWriter],
) -> None:
    """Answers a parsed request with the writer that `writer_of(spec, tier)` makes. An adapter of another API
    calls this with its own writer and a chat request. Raises StrettoError."""
    server = call.server
    call.label(request.model, requested_tier(request))
    model = server.model(request.model)
    spec = check(request, model, server.limits)
    with server.gate.reserve(spec.answers) as slot:
        slo = resolve_objective(
            request, server.policy, call.tenant, lambda: server.quota.allows(call.tenant, time.monotonic())
        )
        if call.continuation is not None:
            slo = slo.for_begun()
        call.tier = slo.tier
        await server.check_grammar(call, spec.sampling.grammar, spec.grammar_path)
        prompts = await server.run_text(call, spec.encode)
        call.user = user_of(request)
        call.placement = place(call, spec, slo, prompts)
        samplings = spec.sampling.fan_out()
        for prompt in prompts:
            for copy, sampling in enumerate(samplings):
                submit(call, spec, slo, prompt, sampling, first=copy == 0)
        await asyncio.sleep(0)  # now the requests leave, and the engine works while the rest is done
        server.encoded(model.name, call.size, max(sum(len(prompt.ids) for prompt in prompts), 1))
        variant = call.placement.model or model.info.name
        reprice(call, model.name)
        remember(call, request, call.placement.made or MadeChoice(model.name, variant))
        await (stream if spec.stream else answer)(call, writer_of(spec, slo.tier), slot)
    learn_lengths(call, model.name)
    follow(call, request)


def submit(
    call: Call, spec: AnswerSpec, slo: ServiceLevel, prompt: EncodedPrompt, sampling: Sampling, *, first: bool
) -> None:
    """Sends one sequence to the engine; the call owns its output. `first`: of the answers to its prompt."""
    server, model, placed, index = call.server, spec.model, call.placement, len(call.outputs)
    emitted = call.emitted(index)
    name = begun_with(call, model.name, index) or placed.model or model.info.name
    request = Request(
        id=server.engine.next_id(),
        model=name,
        prompt=prompt.ids,
        arrival=call.arrival,
        sampling=sampling,
        tenant=call.tenant,
        salt=spec.salt,
        objective=slo.objective,
        tier=slo.tier,
        emitted=tuple(emitted.tokens),
        request_id=call.exchange.id,
        lighter=() if emitted.tokens else placed.lighter,
        cascade=placed.cascade,
        expected_tokens=placed.expected_tokens,
        cached=max(call.read_ahead.common(name, prompt.ids), min(call.believed_cached, len(prompt.ids) - 1)),
    )
    sequence = server.engine.submit(request)
    visible = markers.VISIBLE if spec.parser else NO_MARKERS
    parser = spec.answer_parser(prompt.thinking)
    if parser is not None:
        parser.nonce = f"{call.nonce}.{index}"
    output = Output(
        sequence.request,
        sequence,
        model.text.detokenizer(
            sampling.stop if prompt.thinking is None else (),
            sampling.min_tokens,
            visible,
            stop_shown=spec.stop_shown,
        ),
        index=index,
        prompt_counts=first,
        echo=prompt.echo,
        parser=parser,
        placed=call.placed,
        energies=server.energies,
        grammar_path=None if sampling.grammar is None else spec.grammar_path,
        variant_reason=placed.reason if sequence.request.model == request.model else "moved",
    )
    call.outputs.append(output)
    if slo.tier == PRIORITY:
        server.quota.charge(call.tenant, sequence.work_ms, time.monotonic())


async def stream(call: Call, writer: AnswerWriter, slot: Slot) -> None:
    """Sends the answers as server-sent events. Tokens that wait leave in one send; a client that reads slowly
    holds up its own stream alone. A gateway gets a mark after the events of each send."""
    running = len(call.outputs) - replay(call, writer)
    send, named = call.send, set[int]()
    if not running:
        await send_head(call)
        ending = writer.end(call.outputs)
        if call.relayed:
            ending += call.took().mark() + mark(0, [], complete=True, last=True)
        await send({"type": "http.response.body", "body": ending})
    async with aclosing(deltas(call.outputs, slot)) as parts:
        async for output, fresh in parts:
            body = writer.events(output, fresh)
            complete = output.finish_reason is not None
            running -= complete
            if not running:
                body += writer.end(call.outputs)
            if call.relayed:
                if output.index not in named:
                    named.add(output.index)
                    body += name_variant(call, output)
                tokens = [event.token for _, event in fresh if event is not None and event.token is not None]
                if not running:
                    body += call.took().mark()
                body += mark(
                    output.index, tokens, complete=complete, last=not running, late=output.times.late
                )
            if not call.streaming:
                await send_head(call)
            if body:
                await send({"type": "http.response.body", "body": body, "more_body": running > 0})


def name_variant(call: Call, output: Output) -> bytes:
    """Tells a gateway which variant of a ladder answers, so that it can go on elsewhere."""
    return b"" if output.variant == call.model else variant_mark(output.index, output.variant)


async def send_head(call: Call) -> None:
    """Begins a stream."""
    call.streaming = True
    headers = [(b"content-type", call.stream_type), *UNBUFFERED]
    if call.relayed:
        headers.append((MARKED.encode(), b"1"))
    await call.send({"type": "http.response.start", "status": 200, "headers": headers})


def replay(call: Call, writer: AnswerWriter) -> int:
    """Takes the tokens that the client has from another worker; returns how many answers are complete."""
    if call.continuation is None:
        return 0
    for output in call.outputs:
        writer.skip(output, output.replay(call.emitted(output.index)))
    return sum(output.finish_reason is not None for output in call.outputs)


async def answer(call: Call, writer: AnswerWriter, slot: Slot) -> None:
    """Sends the answers in one piece: the deltas of a stream, joined."""
    async with aclosing(deltas(call.outputs, slot)) as parts:
        async for output, fresh in parts:
            writer.keep(output, fresh)
    await call.respond(Response(writer.whole(call.outputs), media_type=JSON))


def deltas(outputs: list[Output], slot: Slot) -> DeltaStream:
    """The deltas of all outputs as they come, until each has its finish reason. Close it at the end."""
    return _OneAnswer(outputs[0], slot) if len(outputs) == 1 else _deltas_of_all(outputs, slot)


class DeltaStream(Protocol):
    """New deltas, each time of one output."""

    def __aiter__(self) -> AsyncIterator[Delivered]: ...
    def aclose(self) -> Awaitable[object]: ...


class _OneAnswer:
    """The deltas of the only output, as nearly always. A generator would take 5 us more for each request."""

    __slots__ = ("_output", "_slot")

    def __init__(self, output: Output, slot: Slot) -> None:
        self._output = output
        self._slot = slot

    def __aiter__(self) -> AsyncIterator[Delivered]:
        return self

    async def __anext__(self) -> Delivered:
        output = self._output
        if output.finish_reason is not None:
            raise StopAsyncIteration
        try:
            arrived = await output.stream.__anext__()
        except StopAsyncIteration:
            _require_end(output)
            raise
        if not output.started:
            self._slot.first_token()
        return output, output.push(arrived)

    async def aclose(self) -> None:
        """Nothing is open: the call closes the engine's stream."""


async def _deltas_of_all(outputs: list[Output], slot: Slot) -> AsyncGenerator[Delivered]:
    async with aclosing(_of_all(outputs)) as events:
        async for output, arrived in events:
            if not output.started:
                slot.first_token()
            yield output, output.push(arrived)


def _require_end(output: Output) -> None:
    """Raises EngineError for a stream that ended before its answer."""
    if output.finish_reason is None:
        raise EngineError("the engine's stream ended without a finish reason")


async def _of_one(output: Output) -> AsyncGenerator[Arrived]:
    async for events in output.stream:
        yield output, events
        if output.finish_reason is not None or events[-1].finish is not None:
            return
    _require_end(output)


async def _of_all(outputs: list[Output]) -> AsyncGenerator[Arrived]:
    # The queue holds one item, and so do the pumps: a slow reader leaves the tokens in the engine's streams.
    inbox: asyncio.Queue[Arrived | Exception] = asyncio.Queue(1)
    pumps = [asyncio.create_task(_pump(output, inbox)) for output in outputs]
    try:
        while any(output.finish_reason is None for output in outputs):
            item = await inbox.get()
            if isinstance(item, Exception):
                raise item
            if item[0].finish_reason is None:
                yield item
    finally:
        for pump in pumps:
            pump.cancel()


async def _pump(output: Output, inbox: asyncio.Queue[Arrived | Exception]) -> None:
    try:
        async for arrived in _of_one(output):
            await inbox.put(arrived)
    except Exception as error:
        await inbox.put(error)
