"""What every HTTP server of Stretto reads alike: the API key of a request, and its path."""

from __future__ import annotations

from collections.abc import Mapping
from hmac import compare_digest

from stretto.errors import Unauthorised

HEADERS = ("authorization", "x-api-key")


def tenant_of(headers: Mapping[str, str], keys: Mapping[str, str]) -> str:
    """The tenant whose key a request has, of `keys`: key -> tenant. Raises Unauthorised.

    A key comes as `Authorization: Bearer KEY` or as `x-api-key: KEY`, and one valid key is enough. A wrong
    key takes as long as a right one, so that the time tells nothing about the keys.
    """
    scheme, _, bearer = headers.get(HEADERS[0], "").partition(" ")
    given = [bearer.strip()] if scheme.lower() == "bearer" else []
    given.append(headers.get(HEADERS[1], "").strip())
    found = [
        tenant
        for key, tenant in keys.items()
        for each in given
        if compare_digest(key.encode(), each.encode())
    ]
    if not found:
        raise Unauthorised("send a valid API key: `Authorization: Bearer KEY` or `x-api-key: KEY`")
    return found[0]


def plain_path(path: str) -> str:
    """The path without a slash at its end, which many clients add to a base URL. No route ends in one."""
    return path[:-1] if len(path) > 1 and path[-1] == "/" else path
