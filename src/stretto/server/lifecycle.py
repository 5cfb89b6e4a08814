"""Runs the application on a socket, and ends it: the first signal drains, the second ends at once.

Draining: `/ready` is false and new requests are refused at once; what runs may finish for `drain_s` seconds,
then each answer ends in a typed error. Nothing of a request's content is ever logged.
"""

from __future__ import annotations

import asyncio
import errno
import gc
import logging
import resource
import signal
import socket
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Protocol

import uvicorn

from stretto.config import ServeConfig
from stretto.errors import Draining, StartError
from stretto.server.app import App

log = logging.getLogger(__name__)
BACKLOG = 2048
DESCRIPTORS = 65536
LAST_WORDS_S = 1.0
SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Loading(Protocol):
    """What ending and starting need of the engine client."""

    async def wait_ready(self) -> None: ...
    async def shutdown(self, grace_s: float) -> None: ...


async def run(
    config: ServeConfig, app: App, engine: Loading, on_ready: Callable[[str], None] | None = None
) -> None:
    """Serves until a signal says to stop, then ends the engine. `on_ready` hears the URL once it answers.

    Raises StartError when the address cannot be had or the engine cannot load.
    """
    try:
        listener = listen(config.host, config.port)
        with listener:
            await _serve(config, app, engine, listener, on_ready)
    finally:
        await engine.shutdown(LAST_WORDS_S)


async def _serve(
    config: ServeConfig,
    app: App,
    engine: Loading,
    listener: socket.socket,
    on_ready: Callable[[str], None] | None,
) -> None:
    _allow_descriptors()
    # What lives now lives to the end: the collector need not look at it, and pauses stay short.
    gc.collect()
    gc.freeze()
    server = _Server(app)
    ending = _Ending(config, app, server)
    loop = asyncio.get_running_loop()
    for number in SIGNALS:
        loop.add_signal_handler(number, ending.signal)
    serving = asyncio.create_task(server.serve([listener]))
    loading = asyncio.create_task(engine.wait_ready())
    try:
        await asyncio.wait({serving, loading}, return_when=asyncio.FIRST_COMPLETED)
        if loading.done():
            loading.result()
            if on_ready is not None:
                on_ready(url(config.host, listener.getsockname()[1]))
        await serving
    finally:
        loading.cancel()
        server.should_exit = True
        await serving
        for number in SIGNALS:
            loop.remove_signal_handler(number)


def listen(host: str, port: int) -> socket.socket:
    """A socket bound to the address. Raises StartError that says what is in the way."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except socket.gaierror as error:
        raise StartError(f"--host {host}: {error.strerror}") from error
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
        # Here, so that a port in use is found before anything else starts.
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise StartError(f"port {port} on {host} is in use; choose another one with --port") from error
        raise StartError(f"cannot listen on {host} port {port}: {error.strerror}") from error
    return listener


def url(host: str, port: int) -> str:
    """Where a browser on this machine finds the server."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _allow_descriptors() -> None:
    """A connection is a file descriptor, and the usual limit of 1,024 is too few."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


class _Server(uvicorn.Server):
    """uvicorn without its own idea of signals."""

    def __init__(self, app: App) -> None:
        config = uvicorn.Config(
            app,
            http="httptools",
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            backlog=BACKLOG,
            timeout_keep_alive=60,
            timeout_graceful_shutdown=int(LAST_WORDS_S),
        )
        super().__init__(config)

    @contextmanager
    def capture_signals(self) -> Generator[None]:
        yield


class _Ending:
    """What signals do. `signal` is called in the event loop."""

    def __init__(self, config: ServeConfig, app: App, server: uvicorn.Server) -> None:
        self._config = config
        self._api = app.server
        self._server = server
        self._hurry = asyncio.Event()
        self._drain: asyncio.Task[None] | None = None

    def signal(self) -> None:
        if self._drain is not None:
            self._hurry.set()
            return
        self._api.gate.close()
        log.info("draining: %d requests running", len(self._api.calls))
        self._drain = asyncio.create_task(self._end())

    async def _end(self) -> None:
        idle = asyncio.create_task(self._api.idle())
        hurry = asyncio.create_task(self._hurry.wait())
        await asyncio.wait({idle, hurry}, timeout=self._config.drain_s, return_when=asyncio.FIRST_COMPLETED)
        hurry.cancel()
        self._api.end_calls(Draining("the server shut down before the answer was complete"))
        await asyncio.wait({idle}, timeout=LAST_WORDS_S)
        idle.cancel()
        self._server.should_exit = True
