"""The settings of a gateway: flags, then environment, then a file, as for a worker."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct, field
from msgspec.structs import fields

from stretto.config import ENVIRONMENT
from stretto.errors import StartError
from stretto.gateway.router import Method


class GatewayConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Settings of one gateway."""

    workers: Annotated[
        tuple[str, ...], Meta(description="URLs of the workers, as URL or SITE=URL; more may join later")
    ] = ()
    host: Annotated[str, Meta(description="address to listen on")] = "127.0.0.1"
    port: Annotated[int, Meta(ge=0, le=65535, description="port to listen on; 0: any free one")] = 8080
    gateway_key: Annotated[
        str, Meta(description="the secret that workers expect from their gateways (their `gateway_key`)")
    ] = ""
    api_keys: Annotated[
        dict[str, str],
        Meta(description="API keys, as a table of key = tenant; empty: no key needed, the tenant is `local`"),
    ] = {}
    route: Annotated[
        Method,
        Meta(
            description="how workers are chosen: `deadline` (where the first token is on time), or one of "
            "the baselines `round-robin`, `least-load`, `two-choices`, `sticky`"
        ),
    ] = "deadline"
    hedge_share: Annotated[
        float, Meta(ge=0, le=1, description="most requests that may start a second attempt, as a share")
    ] = 0.05
    max_body_bytes: Annotated[int, Meta(ge=1, description="largest body of a request")] = 4 << 20
    drain_s: Annotated[
        float, Meta(ge=0, description="seconds that a shutdown waits for unfinished answers")
    ] = field(default=30.0, name="drain")


def load(flags: Mapping[str, Any], environ: Mapping[str, str], file: Path | None) -> GatewayConfig:
    """The settings of one gateway: flags before environment (STRETTO_PORT) before file.

    Raises StartError that names the wrong setting and where it is.
    """
    merged: dict[str, Any] = {}
    if file is not None:
        try:
            merged = tomllib.loads(file.read_text())
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise StartError(f"cannot read the configuration {file}: {error}") from error
        _check(merged, f"{file}")
    for name in KNOWN.keys() - {"api_keys"}:
        variable = ENVIRONMENT + name.upper()
        if variable in environ:
            text = environ[variable]
            merged |= _check({name: text.split(",") if name == "workers" else text}, variable)
    for name, value in flags.items():
        merged |= _check({name: value}, f"--{name.replace('_', '-')}")
    settings = msgspec.convert(merged, GatewayConfig, strict=False)
    if not settings.workers and not settings.gateway_key:
        raise StartError(
            "a gateway needs workers: name them with --worker URL, or set gateway_key to let them join"
        )
    return settings


KNOWN = {info.encode_name: info for info in fields(GatewayConfig)}


def _check(values: dict[str, Any], where: str) -> dict[str, Any]:
    for name in values.keys() - KNOWN.keys():
        near = difflib.get_close_matches(name, KNOWN, 1)
        hint = f"; did you mean {near[0]}?" if near else f"; known are {', '.join(KNOWN)}"
        raise StartError(f"{where}: unknown setting {name}{hint}")
    for name, value in values.items():
        try:
            msgspec.convert(value, KNOWN[name].type, strict=False)
        except msgspec.ValidationError as error:
            raise StartError(f"{where}: {name}: {error}") from error
    return values
