"""The accounts of a running gateway: reads the key file when it changes, and saves what was used.

A key file that cannot be read changes nothing: the keys that were read last stay in force, and the log and
`/state` say so. One task looks at the file twice a second.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from msgspec import Struct

from stretto.errors import StartError
from stretto.gateway.accounts.accounts import Account, Accounts, Bill, Demand, Prepared
from stretto.gateway.accounts.keys import KeyBook, KeyFile
from stretto.gateway.accounts.limits import Now
from stretto.gateway.accounts.prices import Price
from stretto.gateway.accounts.shared import SharedSpending
from stretto.gateway.accounts.usage import Saved, Tally, UsageFile, UsageTable
from stretto.types import Request

log = logging.getLogger(__name__)
LOOK_S = 0.5  # between two looks at the key file
SAVE_S = 5.0  # between two writes of the usage file
Revoked = Callable[[set[str]], None]


def clock() -> Now:
    """This moment."""
    return Now(time.monotonic(), time.time())


class KeySettings(Struct, frozen=True):
    """The settings that accounts depend on. `operator`: the gateway's own key; `share`: of each limit."""

    plain: Mapping[str, str]
    operator: str
    keys_file: str
    usage_file: str
    prices: Mapping[str, Price]
    share: float
    redis: str = ""


class Ledger:
    """The accounts and their files. `revoked(ids)` is called with the keys that are no longer valid."""

    def __init__(
        self,
        settings: KeySettings,
        revoked: Revoked,
        now: Callable[[], Now] = clock,
        joules: Callable[[str], float | None] = lambda model: None,
    ) -> None:
        """`joules(model)`: what a token of an answer takes, as workers say; None: they do not know.

        Raises StartError for a file that cannot be read.
        """
        self.error = ""  # what is wrong with the key file now
        self._unsaved = False
        self.now = now
        self.joules = joules
        self.accounts = Accounts(settings.prices, settings.share)
        self._settings = settings
        self._revoked = revoked
        self._keys = KeyFile(Path(settings.keys_file)) if settings.keys_file else None
        self._stamp = None if self._keys is None else self._keys.stamp()
        self._book = KeyBook() if self._keys is None else self._keys.read()
        self._usage_file = UsageFile(Path(settings.usage_file)) if settings.usage_file else None
        saved = Saved() if self._usage_file is None else self._usage_file.read()
        self._shared = SharedSpending(settings.redis, settings.operator) if settings.redis else None
        self.usage = UsageTable(row for rows in saved.days.values() for row in rows)
        if self._shared is None:
            self.accounts.restore(saved.budgets)
        else:
            self.accounts.share(settings.share, 1.0)  # Redis knows what is spent
        self._take(self._prepare())
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Begins to watch the key file, to save the usage, and to share what is spent."""
        self._tasks.append(asyncio.create_task(self._run()))
        if self._shared is not None:
            self._tasks.append(asyncio.create_task(self._exchange(self._shared)))

    async def close(self) -> None:
        """Saves the usage and lets go of its file."""
        while self._tasks:
            self._tasks.pop().cancel()
        if self._shared is not None:
            await self._shared.exchange(self.accounts.asked, self.now().wall)
            await self._shared.close()
            self._shared = None
        if self._usage_file is not None:
            await self._save(self._usage_file)
            self._usage_file.close()
            self._usage_file = None

    async def apply(self, settings: KeySettings) -> None:
        """Takes over other settings. The files stay those of the start."""
        self.accounts.prices = settings.prices
        if self._shared is None:
            self.accounts.share(settings.share, settings.share)
        self._settings = settings
        self._take(await asyncio.to_thread(self._prepare))

    async def look(self) -> None:
        """Reads the key file if it has changed."""
        if self._keys is None or (stamp := self._keys.stamp()) == self._stamp:
            return
        self._stamp = stamp
        try:
            # A thread reads many keys, so that no stream pauses for it.
            self._book = await asyncio.to_thread(self._keys.read)
        except StartError as error:
            self.error = error.message
            log.error("the keys stay as they were: %s", error.message)
            return
        self.error = ""
        self._take(await asyncio.to_thread(self._prepare))
        log.info("read %d keys from %s", len(self._book.keys), self._keys.path)

    def charge(self, account: Account, *, names_model: bool = True) -> Charge:
        """The bill of a request that begins. `names_model`: it is one of those that choose a model."""
        return Charge(self, account, names_model)

    def take_call(self, account: Account) -> None:
        """Counts a call that no model answers. Raises RateLimited or BudgetExceeded."""
        self.accounts.admit_call(account, self.now())
        self._unsaved = True

    def use(self, now: Now, tenant: str, model: str, tally: Tally) -> None:
        """Adds to what a tenant has used."""
        self._unsaved = True
        self.usage.add(now.wall, tenant, model, tally)

    def _prepare(self) -> Prepared:
        return self.accounts.prepare(self._book, self._settings.plain, self._settings.operator)

    def _take(self, prepared: Prepared) -> None:
        locked = bool(self._settings.plain) or self._keys is not None
        gone = self.accounts.take(prepared, locked=locked)
        if gone:
            self._revoked(gone)

    async def _save(self, file: UsageFile) -> None:
        if not self._unsaved:
            return
        self._unsaved = False
        try:
            # A disk may take its time, and no stream waits for it.
            await asyncio.to_thread(file.write, self.usage.encoded(), self.accounts.spent())
        except StartError as error:
            self._unsaved = True
            log.error("the usage is not saved: %s", error.message)

    @property
    def shared_error(self) -> str:
        """Why limits are not shared with other gateways now; empty when they are, or need not be."""
        return "" if self._shared is None else self._shared.error

    async def _exchange(self, shared: SharedSpending) -> None:
        asked = self.accounts.asked
        while True:
            if await shared.exchange(asked, self.now().wall):
                self.accounts.share(1 / shared.gateways, 1.0)
            await asyncio.sleep(LOOK_S)

    async def _run(self) -> None:
        due = time.monotonic() + SAVE_S
        while True:
            await asyncio.sleep(LOOK_S)
            await self.look()
            if self._usage_file is not None and time.monotonic() >= due:
                await self._save(self._usage_file)
                due = time.monotonic() + SAVE_S


class Charge:
    """What one request owes. It is admitted once, and settled once when it has ended."""

    def __init__(self, ledger: Ledger, account: Account, names_model: bool) -> None:
        self.account = account
        self._ledger = ledger
        self._names_model = names_model
        self._bill: Bill | None = None

    def admit(self, request: Request, answers: int) -> None:
        """Reserves what the answers may take. Raises NotAllowed, RateLimited or BudgetExceeded."""
        ledger = self._ledger
        work = Demand(
            request.model,
            request.tier,
            len(request.prompt),
            request.sampling.max_tokens,
            answers,
            ledger.joules(request.model),
        )
        if self._names_model:
            self.account.ensure_model(work.model)
        self._bill = ledger.accounts.admit(self.account, work, ledger.now())

    def settle(self, tally: Tally, model: str) -> Tally:
        """Counts what the answers took, and returns it with its cost. `model`: its name in the usage, which
        no client makes up."""
        if self._bill is None:
            return Tally()
        ledger, now = self._ledger, self._ledger.now()
        whole = ledger.accounts.settle(self._bill, tally, now)
        ledger.use(now, self.account.tenant, model, whole)
        self._bill = None
        return whole
