"""One engine process, from its start to its end: its messages, its heartbeats and its exit.

It belongs to the server's event loop. It knows no request and no stream.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import sys
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import zmq

from stretto.config import EngineConfig
from stretto.engine import ipc
from stretto.engine.heartbeat import TURNS

log = logging.getLogger(__name__)
ENGINE = "stretto.engine.worker"
CONNECT_MS = 20  # between two attempts to reach a process that does not listen yet
POLLIN = int(zmq.POLLIN)  # as a flag of an enum it takes 2 us for each message
TICKS_PER_S = os.sysconf("SC_CLK_TCK")

Context = zmq.Context[zmq.Socket[bytes]]
Receive = Callable[[ipc.FromEngine], None]


@dataclass(slots=True, eq=False)
class ChildProcess:
    """A started engine process. It has a socket of its own, so that no message of a dead engine is read.

    `receive` is called with each message of the engine.
    """

    _process: asyncio.subprocess.Process
    _address: Path
    _messages: zmq.Socket[bytes]
    _beats: socket.socket
    _receive: Receive
    _outbox: list[bytes] = field(default_factory=list[bytes])

    @classmethod
    async def start(
        cls, config: EngineConfig, address: Path, context: Context, receive: Receive
    ) -> ChildProcess:
        """Start a process that listens at `address`. It loads the models after that.

        Raises OSError or ZMQError, and leaves nothing behind, when it cannot: no descriptor or no memory is
        left, or the folder of the address is gone.
        """
        with ExitStack() as undo:
            beats, other_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            undo.enter_context(beats)
            undo.enter_context(other_end)
            beats.setblocking(False)
            messages = context.socket(zmq.PAIR)
            undo.callback(messages.close)
            messages.set(zmq.LINGER, 0)
            messages.set_hwm(0)
            # The engine binds and this side connects: a server without a free descriptor would be aborted by
            # libzmq when it accepts a connection, while a connect is tried again.
            messages.set(zmq.RECONNECT_IVL, CONNECT_MS)
            messages.connect(f"ipc://{address}")
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                *("-m", "stretto.engine", *(["--cpu"] if config.device == "cpu" else [])),
                *(ENGINE, str(address), str(other_end.fileno())),
                stdin=asyncio.subprocess.PIPE,
                pass_fds=(other_end.fileno(),),
                start_new_session=True,  # Ctrl-C in a terminal is for the server, which ends the engine
            )
            other_end.close()  # the process has its own
            undo.pop_all()
        assert process.stdin is not None
        process.stdin.write(msgspec.json.encode(config))
        process.stdin.write_eof()
        started = cls(process, address, messages, beats, receive)
        asyncio.get_running_loop().add_reader(messages.fileno(), started.drain)
        return started

    @property
    def pid(self) -> int | None:
        """The process id, None after its end."""
        return None if self._process.returncode is not None else self._process.pid

    async def wait(self) -> int:
        """Wait for the end of the process; returns its exit code, negative for a signal."""
        return await self._process.wait()

    def kill(self) -> None:
        """End the process at once, even one that is stopped."""
        with suppress(ProcessLookupError):  # it may end just now
            self._process.kill()

    def close(self) -> None:
        """Handle the last messages, and close the sockets."""
        self.drain()
        asyncio.get_running_loop().remove_reader(self._messages.fileno())
        self._messages.close()
        self._beats.close()
        with suppress(OSError):
            self._address.unlink(missing_ok=True)

    def newest_beat(self) -> int | None:
        """The turns of the engine's loop in its newest heartbeat since the last call, None without one."""
        turns: int | None = None
        with suppress(OSError):  # nothing more has arrived, or the sockets are closed
            while raw := self._beats.recv(TURNS.size):
                (turns,) = TURNS.unpack(raw)
        return turns

    def cpu_s(self) -> float:
        """The processor time that the process has used, in seconds; 0 after its end."""
        try:
            fields = (
                Path(f"/proc/{self._process.pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
            )
        except OSError:
            return 0.0
        return (int(fields[11]) + int(fields[12])) / TICKS_PER_S

    def send(self, message: bytes) -> None:
        """Send an encoded message at the event loop's next turn.

        Messages that are sent together arrive together, so that one step of the engine can run all of them.
        """
        if not self._outbox:
            asyncio.get_running_loop().call_soon(self.flush)
        self._outbox.append(message)

    def flush(self) -> None:
        """Send the messages that wait for the event loop's next turn now."""
        outbox, self._outbox = self._outbox, []
        if self._messages.closed:
            return
        try:
            for message in outbox:
                self._messages.send(message, zmq.NOBLOCK)
        except zmq.Again:
            return  # The engine has just died, and its end is about to be noticed.
        # The socket's descriptor is edge-triggered, and sending may consume the edge of an arrived message.
        self.drain()

    def drain(self) -> None:
        """Handle every message that has arrived. An exception of one is logged and hides no other."""
        while not self._messages.closed and int(self._messages.get(zmq.EVENTS)) & POLLIN:
            raw = self._messages.recv(zmq.NOBLOCK)
            try:
                self._receive(ipc.decode_from_engine(raw))
            except Exception:
                log.exception("a message of the engine could not be handled")
