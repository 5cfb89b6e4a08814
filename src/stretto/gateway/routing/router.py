"""Which worker a request goes to. Pure: it reads no clock and sends nothing.

Each worker has an outlook, which predicts with the scheduler's own estimate when a request's first token
would be out there. Choosing and recording the choice are one act (`Router.place`), so requests that arrive
together do not all go to the worker that was idle a moment ago.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from heapq import nlargest, nsmallest
from math import inf
from typing import Literal, NamedTuple

from msgspec import Struct, structs

from stretto.engine.scheduler.admission import Forecast, Outlook
from stretto.gateway.routing.prefixes import PrefixIndex
from stretto.types import Request

Method = Literal["deadline", "round-robin", "least-load", "two-choices", "sticky"]
STALE_S = 2.0  # an older state says nothing
OWN_WORK = 2.0  # how much worse a second of own work is than a second of waiting
DEFERRED = 0.5  # how much of the work that waits for spare time a request may delay
CACHED_WORTH = 4.0  # how many requests more a worker may have that holds all of an untimed prompt
LEAST_LOADED, MOST_CACHED = 8, 4  # so many workers are looked at closely
SATURATED = 8  # requests more than the least loaded worker has: then `sticky` lets go


class Ask(Struct, frozen=True):
    """What the router knows of a request. `arrival`: seconds of the gateway's clock.

    `keys` are those of the prompt's pieces (`prefixes.keys_of`), `piece` the tokens in one of them.
    """

    request: Request
    keys: Sequence[int] = ()
    piece: float = 0.0


@dataclass(slots=True)
class WorkerView:
    """A worker as the gateway sees it. Times are seconds of the gateway's clock.

    `offset`: what to add to the gateway's clock to get the worker's. `weight`: the share of its usual load
    that it may get, below 1 after a restart or a failure.
    """

    name: str
    site: str = ""
    outlooks: dict[str, Outlook] = field(default_factory=dict[str, Outlook])
    usable: bool = True
    round_trip: float = 0.0
    offset: float = 0.0
    quality: float = 1.0  # what its answers are worth
    seen: float = -inf  # when the last state arrived
    active: int = 0  # requests that this gateway has there
    weight: float = 1.0
    pieces: int = 1 << 16  # keys that its KV cache holds

    def fresh(self, now: float) -> bool:
        """Whether its state is recent enough to predict from."""
        return now - self.seen < STALE_S


class Placement(NamedTuple):
    """A choice. `ttft_s`: the predicted time from arrival to first token, inf if unknown; `cached`: tokens of
    the prompt that the worker is believed to hold."""

    worker: WorkerView
    ttft_s: float
    feasible: bool
    cached: int
    retry_after: float = 0.0


class Router:
    """Places requests on workers by one of the methods; all but `deadline` are baselines.

    `draw(n)` returns a random index below n.
    """

    def __init__(self, method: Method, draw: Callable[[int], int]) -> None:
        self.workers: dict[str, WorkerView] = {}
        self.prefixes = PrefixIndex()
        self._draw = draw
        self._turn = 0
        self.choose_by(method)

    def choose_by(self, method: Method) -> None:
        """Places requests by that method from now on."""
        self._method: Callable[[Ask, list[WorkerView], float], Placement] = {
            "deadline": self._by_deadline,
            "round-robin": self._round_robin,
            "least-load": self._least_load,
            "two-choices": self._two_choices,
            "sticky": self._sticky,
        }[method]

    def place(self, ask: Ask, now: float, avoid: Collection[str] = ()) -> Placement | None:
        """Chooses a worker and records that the request goes there; None when no worker can take it.

        Call `done` with the worker when the request has ended there.
        """
        able = self.able(ask.request.model, avoid)
        if not able:
            return None
        floor = ask.request.objective.min_quality or 0.0
        able = [worker for worker in able if worker.quality >= floor] or able
        placement = self._method(ask, able, now) if len(able) > 1 else self.predictions(ask, able, now)[0]
        self.record(ask, placement.worker, placement.cached)
        return placement

    def place_session(self, ask: Ask, now: float, avoid: Collection[str] = ()) -> WorkerView | None:
        """Chooses a worker for a session, which stays there, and counts it; None when no worker can take it.

        Of the workers where a request like `ask` would be on time now, those of the best quality, and of
        them the least loaded one. Call `done` with the worker when the session has ended.
        """
        able = self.able(ask.request.model, avoid)
        if not able:
            return None
        best = min(
            self.predictions(ask, able, now),
            key=lambda each: (not each.feasible, -each.worker.quality, _load(each.worker)),
        ).worker
        best.active += 1
        return best

    def able(self, model: str, avoid: Collection[str] = ()) -> list[WorkerView]:
        """The workers that may get a request for the model now."""
        return [
            worker
            for worker in self.workers.values()
            if worker.usable and model in worker.outlooks and worker.name not in avoid
        ]

    def record(self, ask: Ask, worker: WorkerView, cached: int) -> None:
        """The request goes to that worker."""
        worker.active += 1
        worker.outlooks[ask.request.model].sent(_there(ask, worker, cached))
        if ask.keys:
            self.prefixes.add(worker.name, ask.keys, worker.pieces)

    def done(self, worker: WorkerView) -> None:
        """A request has ended on that worker."""
        worker.active -= 1

    def refused(self, ask: Ask, placement: Placement) -> None:
        """The worker has refused the request, so it does not read what of the prompt it did not hold."""
        held = round(placement.cached / ask.piece) if ask.piece else 0
        self.prefixes.remove(placement.worker.name, ask.keys[held:])

    def predictions(self, ask: Ask, workers: Sequence[WorkerView], now: float) -> list[Placement]:
        """What would become of the request on each of these workers."""
        held = self.prefixes.match(ask.keys)
        return [self._predict(ask, worker, now, held.get(worker.name, 0)) for worker in workers]

    def _predict(self, ask: Ask, worker: WorkerView, now: float, pieces: int) -> Placement:
        cached = min(int(pieces * ask.piece), max(len(ask.request.prompt) - 1, 0))
        forecast: Forecast | None = None
        if worker.fresh(now):
            request = _there(ask, worker, cached)
            forecast = worker.outlooks[request.model].forecast(
                request, now + worker.offset + worker.round_trip / 2
            )
        if forecast is None:
            return Placement(worker, inf, False, cached)
        return Placement(worker, forecast.ttft_ms / 1e3, forecast.feasible, cached, forecast.retry_after)

    def _by_deadline(self, ask: Ask, able: list[WorkerView], now: float) -> Placement:
        """Of the workers where it would be on time, those of the best quality, and of them the one that it
        burdens least; else the least late one.

        The burden is its time to the first token, the work that it may delay there, and its own work, which
        is less where its prompt is cached. Prompts that are late already or have no deadline wait for spare
        time, but in the end they go first, so they count in part. Without a deadline or a fresh state: the
        least loaded worker, where a cached prompt counts as one request less.
        """
        options = self.predictions(ask, self._shortlist(ask, able), now)
        known = [option for option in options if option.ttft_s < inf]
        length = len(ask.request.prompt)
        if not known or ask.request.objective.ttft_ms is None:
            return min(
                options,
                key=lambda option: (
                    -option.worker.quality,
                    _load(option.worker) - CACHED_WORTH * option.cached / length,
                ),
            )

        def burden(option: Placement) -> tuple[bool, float, float, float]:
            outlook = option.worker.outlooks[ask.request.model]
            waiting = outlook.backlog_ms + DEFERRED * outlook.deferred_ms
            work = waiting + OWN_WORK * outlook.prefill_ms(length - option.cached)
            return (
                not option.feasible,
                -option.worker.quality if option.feasible else 0.0,
                (option.ttft_s + work / 1e3) / option.worker.weight,
                _load(option.worker),
            )

        return min(known, key=burden)

    def _shortlist(self, ask: Ask, able: list[WorkerView]) -> list[WorkerView]:
        """The workers that are worth a prediction: of each site and quality the least loaded ones, and those
        that hold most of the prompt. So a choice among 64 workers takes little longer than among 8."""
        groups: dict[tuple[str, float], list[WorkerView]] = {}
        for worker in able:
            groups.setdefault((worker.site, worker.quality), []).append(worker)
        chosen = {
            worker.name: worker
            for group in groups.values()
            for worker in nsmallest(LEAST_LOADED, group, _load)
        }
        if len(chosen) < len(able):
            held = self.prefixes.match(ask.keys)
            holders = [worker for worker in able if worker.name in held]
            for worker in nlargest(MOST_CACHED, holders, lambda worker: held[worker.name]):
                chosen[worker.name] = worker
        return list(chosen.values())

    def _round_robin(self, ask: Ask, able: list[WorkerView], now: float) -> Placement:
        self._turn += 1
        return Placement(able[self._turn % len(able)], inf, True, 0)

    def _least_load(self, ask: Ask, able: list[WorkerView], now: float) -> Placement:
        return Placement(min(able, key=_load), inf, True, 0)

    def _two_choices(self, ask: Ask, able: list[WorkerView], now: float) -> Placement:
        """Mitzenmacher, The power of two choices in randomized load balancing, 2001."""
        first, second = self._draw(len(able)), self._draw(len(able) - 1)
        second += second >= first
        return Placement(min(able[first], able[second], key=_load), inf, True, 0)

    def _sticky(self, ask: Ask, able: list[WorkerView], now: float) -> Placement:
        """The worker that holds most of the prompt, until it has SATURATED requests more than the least
        loaded one."""
        held = self.prefixes.match(ask.keys)
        least = min(able, key=_load)
        best = max(able, key=lambda worker: held.get(worker.name, 0))
        if not held.get(best.name, 0) or best.active > least.active + SATURATED:
            return Placement(least, inf, True, 0)
        return Placement(best, inf, True, int(held[best.name] * ask.piece))


def _there(ask: Ask, worker: WorkerView, cached: int) -> Request:
    """The request on the worker's clock, without the tokens that the worker need not read. It came as much
    earlier there as a token takes to come back."""
    request, arrival = ask.request, ask.request.arrival + worker.offset - worker.round_trip / 2
    return structs.replace(request, arrival=arrival, prompt=request.prompt[cached:])


def _load(worker: WorkerView) -> float:
    return worker.active / worker.weight
