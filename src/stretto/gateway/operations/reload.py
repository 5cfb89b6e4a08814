"""Takes over changed settings while requests run: all of them, or none.

A setting that the process cannot change refuses the whole reload by its name, because half of a
configuration is one that nobody wrote.
"""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Awaitable, Callable

from msgspec.structs import fields

from stretto.errors import StartError, StrettoError
from stretto.gateway.settings import GatewayConfig
from stretto.telemetry.log import describe

log = logging.getLogger(__name__)
RELOADED = frozenset(
    {
        *("workers", "route", "hedge_share", "api_keys", "prices", "gateways", "caches"),
        *("max_body_bytes", "log_level", "answer_timeout", "silence_timeout"),
    }
)
Reread = Callable[[], GatewayConfig]
Take = Callable[[GatewayConfig], Awaitable[None]]


def changes(old: GatewayConfig, new: GatewayConfig) -> list[str]:
    """The names of the settings that differ. Raises StartError that names those which need a restart."""
    changed = [
        info.encode_name
        for info in fields(GatewayConfig)
        if getattr(old, info.name) != getattr(new, info.name)
    ]
    fixed = [name for name in changed if name not in RELOADED]
    if fixed:
        raise StartError(f"{', '.join(fixed)} cannot change without a restart; nothing was changed")
    return changed


class Reloader:
    """Reads the settings again on SIGHUP. `take(settings)` takes them over; `config` are the present ones."""

    def __init__(self, config: GatewayConfig, reread: Reread | None, take: Take) -> None:
        self.config = config
        self.error = ""  # why the last reload changed nothing
        self._reread = reread
        self._take = take
        self._task: asyncio.Task[None] | None = None
        self._wanted = False

    def listen(self) -> None:
        """Reloads at each SIGHUP from now on."""
        if self._reread is not None:
            asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, self._signal)

    async def reload(self) -> None:
        """Takes over what has changed. A setting that is wrong or needs a restart changes nothing; the log
        and `error` say so."""
        assert self._reread is not None
        try:
            fresh = await asyncio.to_thread(self._reread)
            changed = changes(self.config, fresh)
            await self._take(fresh)
        except Exception as error:  # whatever is in the file, the log and `error` say so
            known = isinstance(error, StrettoError)
            self.error = error.message if known else f"the settings cannot be read: {describe(error)}"
            log.error("the settings stay as they were: %s", self.error)
            return
        self.config, self.error = fresh, ""
        log.info("read the settings again; changed: %s", ", ".join(changed) or "nothing")

    def _signal(self) -> None:
        self._wanted = True
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        while self._wanted:  # a signal in the middle of a reload asks for another one
            self._wanted = False
            await self.reload()
