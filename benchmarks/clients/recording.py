"""A proxy that keeps what each client sends: without secrets, and without what differs from run to run.

`python -m benchmarks.clients --record` writes tests/server/recorded/bodies, which tests replay.
"""

from __future__ import annotations

import http.client
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

KEPT = ("accept", "anthropic-beta", "anthropic-version", "content-type")
HOP = {"connection", "keep-alive", "transfer-encoding", "content-length", "host"}
# Fields whose values are drawn at random, and the part of such a value that says its kind.
DRAWN = {"id", "call_id", "item_id", "previous_response_id", "request_id", "tool_call_id", "tool_use_id"}
KIND = re.compile(r"^(?:[a-z]+[_-]+)*")
SHORTEST_ID = 6
UUID = re.compile(r"\b[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}\b|\b[0-9a-f]{32}\b")
LONGEST = 60  # characters of a text that tell two requests apart


class Recorder:
    """A proxy on a free port in front of `target`. It keeps one request of each shape."""

    def __init__(self, target: str) -> None:
        self._kept: dict[str, dict[str, Any]] = {}
        self._lock = threading.Lock()
        recorder = self

        class Proxy(_Proxy):
            upstream = urlsplit(target).netloc
            keep = staticmethod(recorder.keep)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Proxy)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def keep(self, method: str, path: str, headers: dict[str, str], body: bytes, status: int) -> None:
        request: dict[str, Any] = {"method": method, "path": path, "headers": headers, "status": status}
        if body:
            request["body"] = json.loads(body)
        with self._lock:
            self._kept.setdefault(json.dumps(shape(request), sort_keys=True), request)

    def take(self) -> list[dict[str, Any]]:
        """The requests since the last call, in the order in which they came."""
        with self._lock:
            kept, self._kept = self._kept, {}
        return without_ids(list(kept.values()))

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Proxy(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    upstream = ""
    keep: Callable[[str, str, dict[str, str], bytes, int], None]

    def handle_one_request(self) -> None:
        with suppress(ConnectionError):  # the client has left
            super().handle_one_request()

    def relay(self) -> None:
        body = b"".join(self._body())
        sent = {name: value for name, value in self.headers.items() if name.lower() not in HOP}
        connection = http.client.HTTPConnection(self.upstream, timeout=600)
        try:
            connection.request(self.command, self.path, body or None, sent)
            answer = connection.getresponse()
            headers = {name: value for name in KEPT if (value := self.headers.get(name))}
            headers["user-agent"] = " ".join(re.findall(r"([\w.-]+)/", self.headers.get("user-agent", "")))
            self.keep(self.command, self.path, headers, body, answer.status)
            self._answer(answer)
        finally:
            connection.close()

    do_GET = do_POST = do_DELETE = do_HEAD = do_OPTIONS = relay

    def _body(self) -> Iterator[bytes]:
        if "chunked" not in self.headers.get("transfer-encoding", ""):
            yield self.rfile.read(int(self.headers.get("content-length", 0)))
            return
        while size := int(self.rfile.readline().partition(b";")[0], 16):
            yield self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()

    def _answer(self, answer: http.client.HTTPResponse) -> None:
        self.send_response_only(answer.status, answer.reason)
        for name, value in answer.getheaders():
            if name.lower() not in HOP:
                self.send_header(name, value)
        if self.command == "HEAD" or answer.status == 204:
            self.end_headers()
            return
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        while piece := answer.read1(1 << 16):
            self.wfile.write(b"%x\r\n%b\r\n" % (len(piece), piece))
        self.wfile.write(b"0\r\n\r\n")

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the table is the output of the command."""


def shape(value: Any) -> Any:
    """What tells two requests apart: not long texts, not numbers in lists, not ids."""
    if isinstance(value, dict):
        fields = cast("dict[str, Any]", value)
        return {name: "" if _free(name, each) else shape(each) for name, each in fields.items()}
    if isinstance(value, list):
        items = cast("list[Any]", value)
        if items and all(isinstance(each, int) for each in items):
            return [0]
        if items and all(isinstance(each, str) for each in items):
            return ["" if len(items) > 1 else shape(items[0])]
        return [shape(each) for each in items]
    if isinstance(value, str):
        return UUID.sub("", value) if len(value) <= LONGEST else ""
    return value


def _free(name: str, value: Any) -> bool:
    return (
        name in DRAWN
        or name in ("arguments", "city")
        or (name in ("content", "text") and isinstance(value, str))
    )


def without_ids(requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The requests with their ids numbered in the order in which they come."""
    text = json.dumps(requests, ensure_ascii=False)
    drawn = dict.fromkeys([*_drawn(requests), *UUID.findall(text)])
    for number, each in enumerate(drawn, 1):
        text = text.replace(each, f"{KIND.findall(each)[0]}{number:09}")
    return json.loads(text)


def _drawn(value: Any) -> Iterator[str]:
    if isinstance(value, list):
        for each in cast("list[Any]", value):
            yield from _drawn(each)
    elif isinstance(value, dict):
        for name, each in cast("dict[str, Any]", value).items():
            if (
                name in DRAWN
                and isinstance(each, str)
                and len(each) >= SHORTEST_ID
                and re.search("[0-9]", each)
            ):
                yield each
            yield from _drawn(each)


def write(folder: Path, client: str, version: str, requests: list[dict[str, Any]]) -> None:
    """One file for each client. The requests of an earlier run are replaced."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(f"  {json.dumps(request, ensure_ascii=False)}" for request in requests)
    head = f'{{"client": {json.dumps(client)}, "version": {json.dumps(version)}, "requests": [\n'
    name = re.sub(r"[^a-z0-9]+", "-", client.lower()).strip("-")
    (folder / f"{name}.json").write_text(f"{head}{lines}\n]}}\n")
