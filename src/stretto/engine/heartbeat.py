"""The heartbeat between an engine process and its server, over a socket pair of their own.

`Pulse` is the engine's side: a thread shows that the process runs, and the count of the loop's turns that it
makes progress. `Watch` is the server's side: it judges, and knows neither process nor socket.
"""

from __future__ import annotations

import os
import select
import socket
import struct
from threading import Thread
from typing import Literal

BEAT_S = 0.25  # between two heartbeats, and between two looks at them
SILENT_BEATS = 6  # in a row are missing: requests are refused after 1.5 s
BUSY = 0.1  # a process that uses so much of a core runs, though it may be too busy to tell
PATIENCE = 10  # loading, and one turn of the loop, may take so many times the timeout
GONE = 70  # the engine's exit code when its server is gone
TURNS = struct.Struct("<Q")

Liveness = Literal["well", "stalled", "hung"]


class Pulse:
    """Sends the heartbeats of this process over the socket `descriptor`, from a thread of its own.

    The loop adds to `turns`. When the other end of the socket is closed, because the server ended or was
    killed, the process ends at once.
    """

    def __init__(self, descriptor: int) -> None:
        self.turns = 0
        self._socket = socket.socket(fileno=descriptor)
        Thread(target=self._beat, name="heartbeat", daemon=True).start()

    def _beat(self) -> None:
        while True:
            try:
                self._socket.send(TURNS.pack(self.turns), socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
            except BlockingIOError:
                pass  # the server is stopped, or busy: the beats that wait will tell it enough
            except OSError:
                os._exit(GONE)
            readable, _, _ = select.select([self._socket], [], [], BEAT_S)
            if readable and not self._socket.recv(1):
                os._exit(GONE)


class Watch:
    """Judges an engine by its heartbeats. `timeout_s`: how long it may show no sign of life.

    A sign of life is a heartbeat, or processor time: something that holds Python's lock for long, like a
    compiler, delays heartbeats and does not stop the process. Time is counted in calls of `tick`, not by a
    clock, so that a server that was itself held up accuses nobody.
    """

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._turns = -1
        self._cpu_s = 0.0
        self._silent = 0
        self._still = 0
        self.reason = ""

    def tick(self, turns: int | None, cpu_s: float, *, loaded: bool) -> Liveness:
        """The verdict BEAT_S after the last call.

        `turns`: the count in the newest heartbeat since then, None without one. `cpu_s`: the processor time
        that the process has used so far. `loaded`: whether its models are loaded. A verdict other than
        `well` has a `reason`.
        """
        used, self._cpu_s = cpu_s - self._cpu_s, cpu_s
        self._silent = self._silent + 1 if turns is None and used < BUSY * BEAT_S else 0
        self._still = self._still + 1 if turns is None or turns == self._turns else 0
        self._turns = self._turns if turns is None else turns
        silent_s, still_s = self._silent * BEAT_S, self._still * BEAT_S
        if silent_s >= self._timeout_s * (1 if loaded else PATIENCE):
            self.reason = f"the engine has not responded for {silent_s:g} s"
            return "hung"
        if loaded and still_s >= self._timeout_s * PATIENCE:
            self.reason = f"a step of the engine has not ended for {still_s:g} s"
            return "hung"
        if loaded and self._silent >= SILENT_BEATS:
            self.reason = f"the engine has not responded for {silent_s:g} s"
            return "stalled"
        return "well"
