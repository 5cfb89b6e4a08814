"""`/v1/usage`: what a tenant has used, as JSON or CSV, and the state of the limits of the key that asks."""

from __future__ import annotations

import re

from msgspec import Struct, json
from starlette.requests import Request
from starlette.responses import Response

from stretto.errors import InvalidRequest, NotAllowed
from stretto.gateway.accounts.accounts import Account, LimitState
from stretto.gateway.accounts.ledger import Ledger
from stretto.gateway.accounts.usage import UsageRow, csv_of
from stretto.protocol.parsing import JSON

DAY = re.compile(r"\d{4}-\d{2}-\d{2}")
KNOWN = ("tenant", "from", "to", "format")


class UsageReport(Struct, frozen=True):
    """`rows`: by day, tenant and model. `limits`: those of the key and of its tenant, with what is used."""

    rows: list[UsageRow]
    limits: list[LimitState]


def usage_page(request: Request, account: Account, ledger: Ledger) -> Response:
    """The answer. Raises NotAllowed for another tenant's usage, InvalidRequest for a wrong parameter."""
    given = request.query_params
    for name in given:
        if name not in KNOWN:
            raise InvalidRequest(f"there is no parameter {name!r}; known are {', '.join(KNOWN)}", param=name)
    days = {name: given.get(name, usual) for name, usual in (("from", ""), ("to", "9"))}
    for name in days.keys() & given.keys():
        if not DAY.fullmatch(days[name]):
            raise InvalidRequest(f"{name} must be a day like 2027-01-31", param=name)
    kind = given.get("format", "json")
    if kind not in ("json", "csv"):
        raise InvalidRequest("format must be json or csv", param="format")
    tenant = given.get("tenant")
    if not account.may("admin"):
        account.ensure("usage")
        if tenant not in (None, account.tenant):
            raise NotAllowed("another tenant's usage needs an API key with the scope admin", param="tenant")
        tenant = account.tenant
    rows = ledger.usage.rows(tenant, days["from"], days["to"])
    if kind == "csv":
        return Response(csv_of(rows), media_type="text/csv; charset=utf-8")
    return Response(
        json.encode(UsageReport(rows, ledger.accounts.limits(account, ledger.now()))), media_type=JSON
    )
