"""The page's files: its own, and plotly.js out of the installed package. It knows no routes."""

from __future__ import annotations

import gzip
from functools import cache
from hashlib import sha256
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

PAGE = files("stretto.server") / "static"
KINDS = {"html": "text/html", "css": "text/css", "js": "text/javascript"}
PLOTLY = "plotly.min.js"
# The one stylesheet that plotly.js brings, for maps; without its hash every load would be a complaint.
MAPS = "'sha256-ji27qzEtxXZW+7dun6UwjHXJ18e6WAin1VvNtkzIE/o='"
HEADERS = {
    "Content-Security-Policy": f"default-src 'none'; script-src 'self'; style-src 'self' {MAPS}; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Vary": "Accept-Encoding",
}
# plotly.js is 4.5 MB, and only another release of its package changes it.
A_WEEK = "public, max-age=604800"


class Asset(NamedTuple):
    """One file as it is sent, and as it is sent to those who read gzip. `tag` changes with the content."""

    kind: str
    plain: bytes
    packed: bytes
    tag: str
    caching: str


@cache
def asset(name: str) -> Asset | None:
    """The file of that name; None where there is none. The first call of each reads and packs it."""
    kind = KINDS.get(name.rpartition(".")[2])
    held = name in {file.name for file in PAGE.iterdir()}
    if kind is None or not (held or name == PLOTLY):
        return None
    plain = (PAGE / name).read_bytes() if held else _plotly()
    if plain is None:
        return None
    tag = f'"{sha256(plain).hexdigest()[:16]}"'
    return Asset(kind, plain, gzip.compress(plain, 6), tag, "no-cache" if held else A_WEEK)


def _plotly() -> bytes | None:
    """Found, not imported: the package itself is of no use here."""
    spec = find_spec("plotly")
    if spec is None or spec.origin is None:
        return None
    file = Path(spec.origin).parent / "package_data" / PLOTLY
    return file.read_bytes() if file.is_file() else None
