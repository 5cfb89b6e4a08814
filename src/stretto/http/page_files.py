"""The files of a web page: found by name alone, compressed once, and with headers that allow nothing else."""

from __future__ import annotations

import gzip
from collections.abc import Callable, Mapping
from hashlib import sha256
from importlib.resources.abc import Traversable

from starlette.requests import Request
from starlette.responses import Response

from stretto.errors import NotFound

TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript"}
# The hash of a stylesheet that plotly.js adds to the page. Without it the browser reports a violation.
MAPS = "'sha256-ji27qzEtxXZW+7dun6UwjHXJ18e6WAin1VvNtkzIE/o='"
SECURITY = {
    "Content-Security-Policy": f"default-src 'none'; script-src 'self'; style-src 'self' {MAPS}; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Vary": "Accept-Encoding",
}
A_WEEK = "public, max-age=604800"
Locate = Callable[[], Traversable]


class PageFiles:
    """Files by name. `lasting` are those that change only with a release of another package: a browser keeps
    them for a week. A `Locate` that raises NotFound is a file that is not installed."""

    def __init__(
        self, files: Mapping[str, Traversable | Locate], lasting: frozenset[str] = frozenset()
    ) -> None:
        self._files = files
        self._lasting = lasting
        self._made: dict[tuple[str, bool], Response] = {}

    def answer(self, request: Request, name: str) -> Response:
        """The file, or 304. Starlette runs this in a thread: the first call of each file compresses it.

        Raises NotFound.
        """
        zipped = "gzip" in request.headers.get("accept-encoding", "")
        if name not in self._files:  # Before what is kept, which would keep every name.
            raise NotFound(f"the page has no file {name!r}")
        found = self._made.get((name, zipped)) or self._make(name, zipped)
        if request.headers.get("if-none-match") != found.headers["ETag"]:
            return found
        kept = {name: found.headers[name] for name in (*SECURITY, "Cache-Control", "ETag")}
        return Response(status_code=304, headers=kept)

    def _make(self, name: str, zipped: bool) -> Response:
        located = self._files[name]
        plain = (located() if callable(located) else located).read_bytes()
        headers = SECURITY | {
            "Cache-Control": A_WEEK if name in self._lasting else "no-cache",
            "ETag": f'"{sha256(plain).hexdigest()[:16]}"',
        }
        if zipped:
            headers["Content-Encoding"] = "gzip"
        body = gzip.compress(plain, 6) if zipped else plain
        made = Response(body, media_type=TYPES[name.rpartition(".")[2]], headers=headers)
        self._made[name, zipped] = made
        return made
