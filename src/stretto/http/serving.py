"""Runs the application on a socket, and shuts it down: the first signal drains, the second stops at once.

While the server drains, `/ready` fails and new requests are refused. Running requests may finish for
`drain_s` seconds. Then each one ends with a Draining error. The log never holds the content of a request.
"""

from __future__ import annotations

import asyncio
import errno
import gc
import logging
import resource
import signal
import socket
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any, Protocol

import uvicorn
from starlette.types import Receive, Scope, Send

from stretto.config import HttpConfig
from stretto.errors import Draining, StartError, StrettoError
from stretto.http.connection import ConnectionConfig
from stretto.http.hosts import is_loopback
from stretto.http.limits import Edge
from stretto.http.socket import PING_S, SocketConnection
from stretto.telemetry.log import LineWriter, describe

log = logging.getLogger(__name__)
BACKLOG = 2048
OPEN_FILES = 65536
SPARE_FILES = 128  # for sockets to the engine, logs and pages
LAST_EVENTS_S = 1.0
SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Backend(Protocol):
    """What starts and stops with the server: a worker's engine, or a gateway's workers."""

    async def wait_ready(self) -> None: ...
    async def shutdown(self, grace_s: float) -> None: ...


class Service(Protocol):
    """What the application does, as far as it must be limited, drained and ended."""

    @property
    def access_log(self) -> LineWriter | None:
        """Where the lines of the access log go; None: nowhere."""
        ...

    @property
    def running(self) -> int:
        """How many calls are running."""
        ...

    def rejected(self, reason: str) -> None:
        """Counts what was cut short."""
        ...

    def close(self) -> None:
        """Refuses new calls from now on."""
        ...

    def end_calls(self, error: StrettoError) -> None:
        """Ends all calls with `error`."""
        ...

    async def idle(self) -> None:
        """Returns when no call is running."""
        ...


class Application(Protocol):
    """An ASGI application over a service."""

    @property
    def server(self) -> Service:
        """What it serves."""
        ...

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None: ...


async def run(
    config: HttpConfig, app: Application, backend: Backend, on_ready: Callable[[str], None] | None = None
) -> None:
    """Serves until a signal ends it, then stops the backend. `on_ready` gets the URL when that is ready.

    Raises StartError when the address cannot be used or the backend cannot start.
    """
    try:
        listener = listen(config.host, config.port)
        if not config.locked and not is_loopback(config.host):
            log.warning(
                "listening on %s without API keys: everybody who reaches port %d can use the models and read"
                " /state; set STRETTO_API_KEY or api_keys, or listen on 127.0.0.1",
                config.host,
                listener.getsockname()[1],
            )
        with listener:
            await _serve(config, app, backend, listener, on_ready)
    finally:
        await backend.shutdown(LAST_EVENTS_S)
        if app.server.access_log is not None:
            app.server.access_log.close()


async def _serve(
    config: HttpConfig,
    app: Application,
    backend: Backend,
    listener: socket.socket,
    on_ready: Callable[[str], None] | None,
) -> None:
    files = _raise_open_files_limit()
    # All objects of this point live until the end. Frozen, they do not lengthen the collector's pauses.
    gc.collect()
    gc.freeze()
    most = min(config.max_connections, max(files - SPARE_FILES, 2) // 2)
    edge = Edge(config, most, app.server.rejected)
    server = _Server(app, edge, config.max_body_bytes)
    shutdown = _Shutdown(config, app, server)
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(_log_failure)
    await asyncio.sleep(0)  # an interrupt that has come by now ends the start here, and is not handled twice
    for number in SIGNALS:
        loop.add_signal_handler(number, shutdown.signal)
    serving = asyncio.create_task(server.serve([listener]))
    loading = asyncio.create_task(backend.wait_ready())
    try:
        await asyncio.wait({serving, loading}, return_when=asyncio.FIRST_COMPLETED)
        if loading.done():
            loading.result()
            if on_ready is not None:
                on_ready(url(config.host, listener.getsockname()[1]))
        # A cancellation here must not reach uvicorn, which closes its sockets only when it is asked to exit.
        await asyncio.wait({serving})
    finally:
        loading.cancel()
        server.should_exit = True
        await serving
        for number in SIGNALS:
            loop.remove_signal_handler(number)


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens on the address. Raises StartError with the reason when that fails."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except socket.gaierror as error:
        raise StartError(f"--host {host}: {error.strerror}") from error
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
        # Listening here finds a port in use before anything else starts.
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise StartError(
                f"port {port} on {host} is in use; choose another one with --port or STRETTO_PORT, as in"
                " STRETTO_PORT=8001 make run"
            ) from error
        raise StartError(f"cannot listen on {host} port {port}: {error.strerror}") from error
    return listener


def url(host: str, port: int) -> str:
    """The URL of the server for a browser on this machine."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _raise_open_files_limit() -> int:
    """Raises the limit of open files, because each connection needs one and the usual limit is 1,024.
    Returns the limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < limit:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
        return limit
    return OPEN_FILES if soft == resource.RLIM_INFINITY else soft


def _log_failure(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Logs an error that no task awaited. asyncio's own line has its message, which may quote a prompt."""
    log.error("a task of the server failed with %s", describe(context.get("exception")))


class _Server(uvicorn.Server):
    """uvicorn without its own signal handlers, and with limits for its connections."""

    def __init__(self, app: Application, edge: Edge, max_body_bytes: int) -> None:
        self._edge = edge
        config = ConnectionConfig(
            app,
            edge,
            ws=SocketConnection,
            ws_max_size=max_body_bytes,
            ws_ping_interval=PING_S,
            ws_ping_timeout=PING_S,
            ws_per_message_deflate=False,  # it would cost more time for each token than its bytes take
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            backlog=BACKLOG,
            timeout_graceful_shutdown=int(LAST_EVENTS_S),
        )
        super().__init__(config)

    async def on_tick(self, counter: int) -> bool:
        """uvicorn calls this ten times a second."""
        self._edge.tick(time.monotonic())
        return await super().on_tick(counter)

    @contextmanager
    def capture_signals(self) -> Generator[None]:
        yield


class _Shutdown:
    """Shuts the server down on signals. The event loop calls `signal`."""

    def __init__(self, config: HttpConfig, app: Application, server: uvicorn.Server) -> None:
        self._config = config
        self._api = app.server
        self._server = server
        self._stop_now = asyncio.Event()
        self._drain: asyncio.Task[None] | None = None

    def signal(self) -> None:
        if self._drain is not None:
            self._stop_now.set()
            return
        self._api.close()
        log.info("draining: %d requests running", self._api.running)
        self._drain = asyncio.create_task(self._end())

    async def _end(self) -> None:
        idle = asyncio.create_task(self._api.idle())
        stop_now = asyncio.create_task(self._stop_now.wait())
        await asyncio.wait(
            {idle, stop_now}, timeout=self._config.drain_s, return_when=asyncio.FIRST_COMPLETED
        )
        stop_now.cancel()
        self._api.end_calls(Draining("the server shut down before the answer was complete"))
        await asyncio.wait({idle}, timeout=LAST_EVENTS_S)
        idle.cancel()
        self._server.should_exit = True
