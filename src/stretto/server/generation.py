"""Runs jobs: submits them, reads the engine's events, and sends the answer as it comes or whole."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import aclosing
from dataclasses import replace
from itertools import count
from secrets import token_hex

from starlette.types import Send

from stretto.errors import EngineError
from stretto.server import asgi, responses
from stretto.server.state import Front, Run
from stretto.server.validation import Job
from stretto.text.output import Output
from stretto.text.tool_parser import MARKERS
from stretto.types import Request, TokenEvent

Heard = tuple[Output, list[TokenEvent]]


async def generate(front: Front, run: Run, job: Job, tenant: str, arrival: float, send: Send) -> None:
    """One job from start to end. Raises what goes wrong; `run.streaming` says whether a stream had begun."""
    front.ensure_open(len(job.prompts) * job.sampling.n)
    if not front.engine.within_share(tenant, job.aim.tier):
        job = replace(job, aim=job.modest)
        run.tier = job.aim.tier
    run.open(_submit(front, job, tenant, arrival))
    header = responses.Header(
        id=("chatcmpl-" if job.style is responses.CHAT else "cmpl-") + token_hex(12),
        created=int(time.time()),
        model=job.model,
        pieces=job.text.pieces,
        tier=job.aim.tier,
        metadata=job.metadata,
        logprobs=job.sampling.logprobs is not None,
        usage=bool(job.options.include_usage),
        each_usage=bool(job.options.continuous_usage_stats),
    )
    writer = responses.Writer(header, job.style)
    if job.stream:
        await _stream(run, writer, send)
    else:
        await _whole(run, writer, send)


def _submit(front: Front, job: Job, tenant: str, arrival: float) -> Iterator[Output]:
    index = count()
    for at, prompt in enumerate(job.prompts):
        for copy, sampling in enumerate(job.sampling.fan_out()):
            request = Request(
                id=front.engine.next_id(),
                model=job.model,
                prompt=prompt,
                arrival=arrival,
                sampling=sampling,
                tenant=tenant,
                salt=job.salt,
                objective=job.aim.objective,
                tier=job.aim.tier,
            )
            shown = MARKERS if job.parser else frozenset[str]()
            yield Output(
                request,
                front.engine.submit(request),
                job.text.detokenizer(sampling.stop, sampling.min_tokens, shown),
                index=next(index),
                prompt_counts=copy == 0,
                echo=job.echo[at],
                parser=job.answer_parser(),
            )


async def _stream(run: Run, writer: responses.Writer, send: Send) -> None:
    """All tokens that wait leave in one send. A reader that is slow holds up its own stream alone."""
    open_choices = len(run.choices)
    async with aclosing(_heard(run.choices)) as heard:
        async for choice, events in heard:
            if choice.times.first is None:
                run.heard(choice)
            body = writer.events(choice, choice.push(events))
            if choice.finish_reason is not None:
                open_choices -= 1
            if open_choices == 0:
                body += writer.trailer(run.choices)
            if not run.streaming:
                run.streaming = True
                await send(asgi.start_events())
            if body:
                await send({"type": "http.response.body", "body": body, "more_body": open_choices > 0})


async def _whole(run: Run, writer: responses.Writer, send: Send) -> None:
    async with aclosing(_heard(run.choices)) as heard:
        async for choice, events in heard:
            if choice.times.first is None:
                run.heard(choice)
            writer.keep(choice, choice.push(events))
    await asgi.answer(send, writer.whole(run.choices))


async def _heard(choices: list[Output]) -> AsyncGenerator[Heard]:
    """The events of all choices as they come, until each has its finish reason."""
    if len(choices) == 1:
        async for events in _one(choices[0]):
            yield events
        return
    # One place: a pump waits until its events were taken, so that a slow reader is felt by the streams.
    inbox: asyncio.Queue[Heard | Exception] = asyncio.Queue(1)
    pumps = [asyncio.create_task(_pump(choice, inbox)) for choice in choices]
    try:
        while any(choice.finish_reason is None for choice in choices):
            item = await inbox.get()
            if isinstance(item, Exception):
                raise item
            if item[0].finish_reason is None:
                yield item
    finally:
        for pump in pumps:
            pump.cancel()


async def _one(choice: Output) -> AsyncIterator[Heard]:
    async for events in choice.stream:
        yield choice, events
        if choice.finish_reason is not None or events[-1].finish is not None:
            return
    if choice.finish_reason is None:
        raise EngineError("the engine's stream ended without saying why")


async def _pump(choice: Output, inbox: asyncio.Queue[Heard | Exception]) -> None:
    try:
        async for heard in _one(choice):
            await inbox.put(heard)
    except Exception as error:
        await inbox.put(error)
