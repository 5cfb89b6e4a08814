"""What the connections of one server share: limits, a clock, and who has to yield when a limit is reached.

`Edge.tick` is called ten times a second and looks at every connection twice a second, so that no request
needs a timer of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from stretto.config import HttpConfig
from stretto.errors import Overloaded, StrettoError

HEAD_BYTES = 32 * 2**10
HEADERS = 128
PIPELINED = 16
KEEP_ALIVE_S = 60.0
LINGER_S = 2.0
LINGER_BYTES = 16 * 2**20
BODIES = 16  # Unfinished bodies of the largest size that are held at the same time.
TICKS_PER_CHECK = 5
LONGEST_TICK_S = 0.5


class Peer(Protocol):
    """What the edge asks of a connection."""

    def check(self) -> None:
        """Ends the connection if its time is over."""
        ...

    def refuse(self, error: StrettoError) -> None:
        """Ends the request that is being received."""
        ...

    def abort(self, reason: str) -> None:
        """Closes the connection at once. `reason` is the label of the metric."""
        ...


class Edge:
    """`count(reason)` counts what was cut short. `waiting` has the connections whose client owes a request or
    the rest of one, the longest first."""

    def __init__(self, config: HttpConfig, max_connections: int, count: Callable[[str], None]) -> None:
        self.max_connections = max_connections
        self.request_timeout_s = config.request_timeout_s
        self.send_timeout_s = config.send_timeout_s
        # Twice as many are open for a moment: a client that has just connected gets the time to be read.
        self.hard_limit = 2 * max_connections
        self.count = count
        self.now = 0.0
        self.waiting: dict[Peer, None] = {}
        self.connections: set[Peer] = set()
        self._most_body_bytes = BODIES * config.max_body_bytes
        self._bodies: dict[Peer, int] = {}
        self._body_bytes = 0
        self._ticks = 0
        self._ticked: float | None = None

    def tick(self, time: float) -> None:
        """Advances `now` to the monotonic `time` in seconds. Time in which the event loop stood still is no
        client's fault and does not count."""
        if self._ticked is not None:
            self.now += min(time - self._ticked, LONGEST_TICK_S)
        self._ticked = time
        while len(self.connections) > self.max_connections and self.make_room():
            pass
        self._ticks += 1
        if self._ticks % TICKS_PER_CHECK == 0:
            for connection in tuple(self.connections):
                connection.check()

    def make_room(self) -> bool:
        """Closes the connection that has waited longest for its client. False if there is none.

        A client that sends its requests promptly is hardly ever in `waiting`, so no slow one keeps it out.
        """
        oldest = next(iter(self.waiting), None)
        if oldest is None:
            return False
        oldest.abort("evicted")
        return True

    def hold(self, connection: Peer, size: int) -> None:
        """Notes that a connection holds `size` bytes of a body. If all hold too many, the largest yields."""
        self._body_bytes += size - self._bodies.get(connection, 0)
        self._bodies[connection] = size
        if self._body_bytes > self._most_body_bytes:
            largest = max(self._bodies, key=self._bodies.__getitem__)
            largest.refuse(
                Overloaded("the server holds too many unfinished bodies; send it again", retry_after=1.0)
            )

    def release(self, connection: Peer) -> None:
        """The connection holds no unfinished body."""
        self._body_bytes -= self._bodies.pop(connection, 0)
