"""Runs a gateway on its socket. The first signal drains: running answers may finish. The second ends it."""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import Callable, Generator
from contextlib import contextmanager

import uvicorn

from stretto.errors import StartError
from stretto.gateway.app import Gateway

BACKLOG = 2048
SIGNALS = (signal.SIGTERM, signal.SIGINT)


class _QuietServer(uvicorn.Server):
    """uvicorn without its own signal handlers, and with an event for its start."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.listening = asyncio.Event()

    @contextmanager
    def capture_signals(self) -> Generator[None]:
        """Does nothing: `run` handles the signals."""
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.listening.set()


async def run(gateway: Gateway, on_ready: Callable[[str], None] | None = None) -> None:
    """Serves until a signal ends it. Raises StartError when the address cannot be used."""
    config = gateway.config
    server = _QuietServer(
        uvicorn.Config(
            gateway,
            host=config.host,
            port=config.port,
            log_level="warning",
            access_log=False,
            loop="uvloop",
            http="httptools",
            lifespan="on",
            server_header=False,
            date_header=False,
            timeout_graceful_shutdown=1,
        )
    )
    draining = asyncio.Event()

    def end() -> None:
        if draining.is_set():
            server.should_exit = True
        draining.set()

    loop = asyncio.get_running_loop()
    for number in SIGNALS:
        loop.add_signal_handler(number, end)
    try:
        listener = socket.create_server((config.host, config.port), backlog=BACKLOG)
    except OSError as error:
        raise StartError(f"cannot listen on {config.host} port {config.port}: {error.strerror}") from error
    serving = asyncio.create_task(server.serve([listener]))
    try:
        await server.listening.wait()
        if on_ready is not None:
            on_ready(f"http://{config.host}:{listener.getsockname()[1]}")
        stopping = asyncio.create_task(draining.wait())
        await asyncio.wait({serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
        gateway.draining = True
        if gateway.active and not server.should_exit:
            await asyncio.wait(set(gateway.active), timeout=config.drain_s)
    finally:
        server.should_exit = True
        await serving
        for number in SIGNALS:
            loop.remove_signal_handler(number)
