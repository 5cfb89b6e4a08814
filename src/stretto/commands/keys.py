"""`stretto keys`: makes and changes the key file of a gateway. A running gateway reads the file
within a second of a change.
"""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from msgspec import Struct, to_builtins
from rich.table import Table

from stretto import terminal
from stretto.gateway.accounts import issue
from stretto.gateway.accounts.keys import SCOPES, KeyFile, KeyRecord, TenantRecord

app = typer.Typer(help="Make, list, rotate and revoke the API keys of a gateway.", no_args_is_help=True)
HIDDEN = {"hash", "previous"}
LISTS = ("scopes", "tiers", "models", "limits")
File = Annotated[
    Path,
    typer.Option("--file", envvar="STRETTO_KEYS_FILE", help="the key file", show_default=False),
]
AsJson = Annotated[bool, typer.Option("--json", help="print one JSON document")]
KeyId = Annotated[str, typer.Argument(metavar="KEY", help="the id of a key, like key-0123456789")]


class ShownKey(Struct, frozen=True):
    """A key without its hashes. `key`: the secret, only when it is new."""

    status: str
    record: dict[str, Any]
    key: str | None = None


def _shown(record: KeyRecord, key: str | None = None) -> ShownKey:
    values: dict[str, Any] = {
        name: list(value) if name in LISTS else value
        for name, value in to_builtins(record).items()
        if name not in HIDDEN and value not in (None, ())
    }
    return ShownKey(issue.status_of(record, _now()), values, key)


def _now() -> datetime:
    return datetime.now(UTC).replace(microsecond=0)


def _print(shown: ShownKey, as_json: bool) -> None:
    if as_json:
        terminal.print_json(shown)
        return
    if shown.key is not None:
        terminal.out.print(shown.key)
        terminal.err.print("this is the only time that the key is shown; the file holds its hash")
    table = Table.grid(padding=(0, 2))
    for name, value in {**shown.record, "status": shown.status}.items():
        value = ", ".join(value) if name in LISTS else value
        table.add_row(name, str(value))
    terminal.err.print(table) if shown.key is not None else terminal.out.print(table)


@app.command()
def create(
    tenant: Annotated[str, typer.Argument(metavar="TENANT", help="whom the key belongs to")],
    file: File,
    scopes: Annotated[
        list[str] | None,
        typer.Option(
            "--scope", help="infer, usage, metrics or admin; repeat it \\[infer, usage]", show_default=False
        ),
    ] = None,
    tiers: Annotated[
        list[str] | None, typer.Option("--tier", help="a tier that it may use; repeat it \\[all]")
    ] = None,
    models: Annotated[
        list[str] | None, typer.Option("--model", help="a model that it may use; repeat it \\[all]")
    ] = None,
    limits: Annotated[
        list[str] | None,
        typer.Option(
            "--limit",
            help="like requests=60/minute, tokens=100000/minute, cost=10/month or joules=5e6/day; repeat it",
        ),
    ] = None,
    expires: Annotated[
        str | None, typer.Option(help="when it expires: after a span like 90d, or on a date \\[never]")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Make a key, and print it. It cannot be shown again."""
    now = _now()
    made = issue.create(
        KeyFile(file),
        now,
        tenant=tenant,
        scopes=tuple(scopes or SCOPES),
        tiers=tuple(tiers or ()),
        models=tuple(models or ()),
        limits=tuple(limits or ()),
        expires=None if expires is None else issue.moment(expires, now),
    )
    _print(_shown(made.record, made.key), as_json)


@app.command("list")
def list_keys(
    file: File,
    tenant: Annotated[str | None, typer.Option(help="only the keys of this tenant")] = None,
    as_json: AsJson = False,
) -> None:
    """List the keys by id. The secrets are not stored, so none is shown."""
    records = [each for each in KeyFile(file).read().keys if tenant in (None, each.tenant)]
    if as_json:
        terminal.print_json([_shown(record) for record in records])
        return
    table = Table(box=None, pad_edge=False)
    for name in ("key", "tenant", "status", "scopes", "limits", "expires"):
        table.add_column(name, overflow="fold")
    for record in records:
        expires = "" if record.expires is None else record.expires.strftime("%Y-%m-%d %H:%M")
        cells = (record.id, record.tenant, issue.status_of(record, _now()))
        table.add_row(*cells, " ".join(record.scopes), " ".join(record.limits), expires)
    terminal.out.print(table)


@app.command()
def show(key: KeyId, file: File, as_json: AsJson = False) -> None:
    """Show what a key may use, its limits and whether it is valid."""
    _print(_shown(issue.find(KeyFile(file).read(), key)), as_json)


@app.command()
def revoke(key: KeyId, file: File, as_json: AsJson = False) -> None:
    """Revoke a key. Within a second its running answers end in an error."""
    _print(_shown(issue.revoke(KeyFile(file), key, _now())), as_json)


@app.command()
def rotate(
    key: KeyId,
    file: File,
    grace: Annotated[str, typer.Option(help="how long the old key stays valid")] = "1d",
    as_json: AsJson = False,
) -> None:
    """Give a key a new secret, and print it. Its id, its limits and its usage stay."""
    made = issue.rotate(KeyFile(file), key, _now(), issue.span(grace))
    _print(_shown(made.record, made.key), as_json)


@app.command()
def tenant(
    name: Annotated[str, typer.Argument(metavar="TENANT", help="whose keys share the limits")],
    file: File,
    limits: Annotated[
        list[str] | None,
        typer.Option("--limit", help="like tokens=1e6/day; repeat it; without it the limits are removed"),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Set the limits that all keys of a tenant share."""
    record: TenantRecord = issue.limit_tenant(KeyFile(file), name, limits or ())
    if as_json:
        terminal.print_json({"tenant": name, "limits": record.limits})
    else:
        terminal.out.print(f"{name}: {', '.join(record.limits) or 'no limits'}")
