"""What a gateway counts, and the routes that show it: `/metrics` and `/v1/usage`."""

from __future__ import annotations

import time
from http import HTTPStatus
from typing import NamedTuple

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from stretto.errors import StrettoError
from stretto.gateway.accounts.accounts import Account
from stretto.gateway.accounts.ledger import Charge, Ledger
from stretto.gateway.accounts.usage import Tally
from stretto.gateway.accounts.usage_page import usage_page
from stretto.gateway.cache.answers import Answers
from stretto.gateway.calls import Calls
from stretto.gateway.exchange import RelayedExchange
from stretto.gateway.operations.metrics import GatewayGauges, GatewayMetrics, RelayedEnd, WorkerGauge
from stretto.gateway.registry import UNKNOWN, Registry, Worker
from stretto.http.exchange import LEFT, Exchange
from stretto.telemetry.metrics import Ended

NOBODY = "none"  # the tenant of a request without a valid key


class CallEnd(NamedTuple):
    """How a relayed call ended. `relayed` and `charge` are None for one that was refused before."""

    operation: str
    arrival: float
    relayed: RelayedExchange | None
    charge: Charge | None
    failure: StrettoError | None
    gone: bool  # the client left

    @property
    def code(self) -> str:
        """`ok`, `client_gone`, or the code of the error."""
        return "client_gone" if self.gone else "ok" if self.failure is None else self.failure.code


class Monitor:
    """The counters of one gateway."""

    def __init__(self, registry: Registry, answers: Answers, calls: Calls, ledger: Ledger) -> None:
        self.metrics = GatewayMetrics(self.gauges)
        self._registry = registry
        self._answers = answers
        self._calls = calls
        self._ledger = ledger

    def routes(self) -> list[Route]:
        """The routes that show what is counted."""
        return [Route("/metrics", self.exposition), Route("/v1/usage", self.usage)]

    async def exposition(self, request: Request) -> Response:
        """Metrics for Prometheus. They name tenants, so with keys they need one with the scope metrics."""
        account = self._account(request)
        if not account.may("admin"):
            account.ensure("metrics")
        return Response(self.metrics.text(), media_type=self.metrics.content_type)

    async def usage(self, request: Request) -> Response:
        """What the key's tenant has used, or all tenants for an operator, and the key's limits."""
        return usage_page(request, self._account(request), self._ledger)

    def ended(self, exchange: Exchange, end: CallEnd) -> None:
        """Counts a request that is over, in its tenant's usage, the metrics and the access log."""
        relayed = end.relayed
        model, tally = UNKNOWN, Tally()
        if relayed is not None and end.charge is not None:
            model = self._registry.known(relayed.model)
            tally = end.charge.settle(relayed.tally(), model)
        refused = end.failure is not None and not end.gone
        status = exchange.status or (end.failure.status if refused and end.failure else LEFT)
        outcome = "worker_error" if end.code == "ok" and status >= HTTPStatus.BAD_REQUEST else end.code
        ttft = None if relayed is None else relayed.ttft
        self.metrics.ended(
            RelayedEnd(
                tenant=exchange.tenant or NOBODY,
                model=model,
                outcome=outcome,
                status=status,
                at=time.monotonic(),
                tally=tally,
                worker="" if relayed is None else relayed.worker,
                upstream=None if relayed is None or ttft is None else relayed.first,
                first=ttft,
                forecast=None if relayed is None else relayed.forecast,
            )
        )
        exchange.ended = Ended(
            end.operation,
            outcome,
            time.monotonic() - end.arrival,
            tier="" if relayed is None else relayed.tier,
            model="" if model == UNKNOWN else model,
            prompt_tokens=tally.prompt_tokens,
            output_tokens=tally.completion_tokens,
            cached_tokens=tally.cached_tokens,
            first=ttft,
            status=status,
        )

    def _account(self, request: Request) -> Account:
        return self._ledger.accounts.find(request.headers, self._ledger.now())

    def gauges(self) -> GatewayGauges:
        """The gateway now."""
        now, relay, log = time.monotonic(), self._answers.relay, self._calls.access_log
        return GatewayGauges(
            open=self._calls.running,
            draining=self._calls.draining,
            keys_stale=bool(self._ledger.error),
            shared_gone=self._answers.stats.shared == "gone" or bool(self._ledger.shared_error),
            log_dropped=0 if log is None else log.dropped,
            workers=[
                WorkerGauge(each.name, each.view.site, state_of(each), each.breaker.state(now))
                for each in self._registry.workers.values()
            ],
            counts={
                "stretto_gateway_failovers": relay.failovers,
                "stretto_gateway_retries": relay.retries,
                "stretto_gateway_hedges": relay.hedges,
                "stretto_gateway_hedges_won": relay.hedges_won,
            },
            rejected=dict(self._calls.rejections),
            cache=self._answers.stats.report(),
        )


def state_of(worker: Worker) -> str:
    """`usable`, `draining` or `lost`."""
    if worker.draining or worker.held:
        return "draining"
    return "usable" if worker.view.usable else "lost"
