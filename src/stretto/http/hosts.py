"""Which hosts and origins the server answers to. A browser cannot forge `Host` and `Origin`, so these checks
keep the web pages of strangers away from a server on this machine or in this network."""

from __future__ import annotations

import re
import socket
from ipaddress import ip_address

from stretto.config import HttpConfig

LOOPBACK = ("localhost", "127.0.0.1", "::1")
ANY = "*"
# `name`, `name:port`, `[IPv6]` or `[IPv6]:port`.
_HOST = re.compile(r"(?:\[([0-9a-f:.]+)\]|([^\s:/@\[\]]+))(?::\d{1,5})?", re.IGNORECASE)


def is_loopback(host: str) -> bool:
    """Whether an address to listen on can be reached from this machine only."""
    if host.lower() == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


class HostRule:
    """The values of `Host` that a server answers to: its own names with any port, and `allowed_hosts`.

    On a network every IP address is one of its names: a page can rebind the name it was loaded from, and an
    address is no name. `*` allows every host, and `*.example.org` all names below example.org.
    """

    def __init__(self, config: HttpConfig) -> None:
        self._addresses = not is_loopback(config.host)
        own = {*LOOPBACK, config.host.lower()}
        if self._addresses:
            machine = socket.gethostname().lower()
            own |= {machine, f"{machine}.local"}
        allowed = [name.lower() for name in config.allowed_hosts]
        self._any = ANY in allowed
        self._names = own | {name.strip("[]") for name in allowed}
        self._suffixes = tuple(name[1:] for name in allowed if name.startswith("*."))
        self._usual = {f"{name}:{config.port}" for name in own if ":" not in name}  # saves the parsing

    def allows(self, host: str) -> bool:
        """Whether the value of a `Host` header is one of them."""
        if host in self._usual or self._any:
            return True
        match = _HOST.fullmatch(host)
        if match is None:
            return False
        name = (match[1] or match[2]).lower().removesuffix(".")
        if name in self._names or name.endswith(self._suffixes or "\n"):
            return True
        try:
            address = ip_address(name)
        except ValueError:
            return False
        return self._addresses or str(address) in self._names


class OriginRule:
    """The web origins whose pages may use the server: its own, and `cors_origins`."""

    def __init__(self, config: HttpConfig) -> None:
        self._origins = {origin.lower().rstrip("/") for origin in config.cors_origins}
        self._any = ANY in self._origins

    def shares(self, origin: str) -> bool:
        """Whether `cors_origins` has this origin."""
        return self._any or origin.lower() in self._origins

    def own(self, origin: str, host: str) -> bool:
        """Whether the origin is the server itself, perhaps behind a proxy that adds TLS."""
        return origin.lower() in (f"http://{host.lower()}", f"https://{host.lower()}")
