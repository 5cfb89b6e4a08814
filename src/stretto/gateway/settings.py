"""The settings of a gateway: flags, then environment, then a file, as for a worker."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from msgspec import Meta, field
from msgspec.structs import fields

from stretto.config import HttpConfig
from stretto.errors import StartError
from stretto.gateway.accounts.ledger import KeySettings
from stretto.gateway.accounts.prices import Price
from stretto.gateway.cache.policy import CachePolicy
from stretto.gateway.routing.router import Method
from stretto.gateway.upstream.connection import Address
from stretto.settings.table import SettingsTable, part


class Patience(NamedTuple):
    """How long a server of another kind may send nothing, in seconds: from a request's arrival until its
    answer begins, and within an answer."""

    begin_s: float
    silence_s: float


class GatewayConfig(HttpConfig, frozen=True, kw_only=True):
    """Settings of one gateway."""

    workers: Annotated[
        tuple[str, ...], Meta(description="URLs of the workers, as URL or SITE=URL; more may join later")
    ] = ()
    port: Annotated[int, Meta(ge=0, le=65535, description="port to listen on; 0: any free port")] = 8080
    gateway_key: Annotated[
        str,
        Meta(description="the secret that workers expect from their gateways; with it, workers may join"),
    ] = ""
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
    answer_timeout_s: Annotated[
        float,
        Meta(
            gt=0,
            description="seconds in which a worker that is no Stretto must begin its answer; else 504",
        ),
    ] = field(default=600.0, name="answer_timeout")
    silence_timeout_s: Annotated[
        float,
        Meta(
            gt=0,
            description="seconds that such a worker may send nothing within an answer; else it ends",
        ),
    ] = field(default=60.0, name="silence_timeout")
    keys_file: Annotated[
        str, Meta(description="the file of `stretto keys`; with it every request needs a key")
    ] = ""
    usage_file: Annotated[
        str,
        Meta(
            description="file that keeps usage and spent budgets over a restart, one for each gateway; "
            "empty: they begin at zero"
        ),
    ] = ""
    gateways: Annotated[
        int,
        Meta(
            ge=1,
            description="gateways that share the limits of the keys without `redis`; each allows its part",
        ),
    ] = 1
    prices: Annotated[
        dict[str, Price],
        Meta(
            description="prices of models, as a table `[prices.MODEL]` with `input`, `cached` and `output`"
            " per million tokens and `joules` per token of an answer; `*` is for all others"
        ),
    ] = field(default_factory=dict[str, Price])

    caches: Annotated[
        dict[str, CachePolicy],
        Meta(
            description="which tenants have a cache of answers, as a table `[caches.TENANT]` with `semantic`,"
            " `max_error`, `ttl`, `size`, `sampled`; the tenant `*` stands for all others"
        ),
    ] = field(default_factory=dict[str, CachePolicy])
    redis: Annotated[
        str,
        Meta(
            description="URL of the Redis in which gateways share the kept answers, like redis://10.0.0.9:6379;"
            " empty: each keeps its own"
        ),
    ] = ""

    def __post_init__(self) -> None:
        HttpConfig.__post_init__(self)
        if self.redis and not self.gateway_key:
            raise StartError(
                "redis needs gateway_key: gateways that share kept answers derive their keys from it"
            )

    @property
    def keys(self) -> KeySettings:
        """The settings of keys and budgets."""
        return KeySettings(
            plain=self.api_keys,
            operator=self.gateway_key,
            keys_file=self.keys_file,
            usage_file=self.usage_file,
            prices=self.prices,
            share=1 / self.gateways,
            redis=self.redis,
        )

    @property
    def patience(self) -> Patience:
        """How long a server of another kind may send nothing."""
        return Patience(self.answer_timeout_s, self.silence_timeout_s)

    @property
    def locked(self) -> bool:
        """Whether a request needs a key."""
        return bool(self.api_keys or self.keys_file)


GATEWAY = SettingsTable(fields(GatewayConfig))


def load(flags: Mapping[str, Any], environ: Mapping[str, str], file: Path | None) -> GatewayConfig:
    """The settings of one gateway. Raises StartError that names the wrong setting and where it is."""
    settings = GatewayConfig(**part(GatewayConfig, GATEWAY.read(flags, environ, file)))
    if not settings.workers and not settings.gateway_key:
        raise StartError(
            "a gateway needs workers: name them with --worker URL, or set gateway_key to let them join"
        )
    try:
        for each in settings.workers:
            Address.of(each.rpartition("=")[2])
    except ValueError as error:
        raise StartError(str(error)) from None
    return settings
