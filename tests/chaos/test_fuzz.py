"""Thousands of random requests to every endpoint of a real server: no 5xx but a typed 503, and no hang.

The requests follow the server's own OpenAPI document, so a new endpoint or field is fuzzed without a change
here. Values are valid, at a boundary, of a wrong type, huge, deep or not Unicode. The seed makes them the
same in each run; `STRETTO_FUZZ` sets another number of requests.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest

from stretto.http.dialects import OVERLOADED
from tests.server_process import ServerProcess, serving

pytestmark = pytest.mark.slow
REQUESTS = int(os.environ.get("STRETTO_FUZZ", "5200"))
CLIENTS = 8
HANG_S = 60.0
SEED = 20261129
# Nothing ends in a bug, and only a 503 may say that the server cannot answer now.
BUGS = {"internal_error", "engine_error", "engine_died"}
JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with serving(tmp_path_factory.mktemp("fuzz"), "desk", "null=null", "--context", "256") as started:
        yield started


class Deep:
    """Marks where JSON is nested so deeply that Python cannot write it."""

    def __init__(self, depth: int) -> None:
        self.depth = depth


def written(value: Any) -> str:
    """The JSON of a value, with its deep parts."""
    text = json.dumps(value, default=lambda deep: f"deep {deep.depth}")
    for depth in DEPTHS:
        text = text.replace(f'"deep {depth}"', '{"a":[' * (depth // 2) + "]}" * (depth // 2))
    return text


DEPTHS = (70, 300, 500, 700, 900, 980, 3000)
WORDS = (
    "",
    "a",
    "Hi",
    "null",
    "desk",
    "\x00",
    "\ud83d",
    "\ude00\ud83d",
    "🎉",
    "a\u0301",
    "<|end|>",
    "{{ 1/0 }}",
    "(?:a?){1000}a{500}",
)
NUMBERS = (
    0,
    -0.0,
    1,
    -1,
    2,
    0.5,
    1e-320,
    1e-38,
    1e38,
    1e308,
    2**31 - 1,
    2**31,
    2**63,
    2**64,
    -(2**63),
    10**40,
)
OTHERS: tuple[Any, ...] = (None, True, False, [], {}, [None], [[]], {"": None}, "1", [1, "a"], {"type": "x"})
GRAMMARS: tuple[Any, ...] = (
    {"type": "object"},
    {"type": "integer", "minimum": 3},
    {"anyOf": [{"type": "string", "pattern": "^a+$"}, {"enum": [1, None]}]},
    {"$ref": "#/nowhere"},
    {"type": "array", "items": {"$ref": "#"}},
    True,
)


@dataclass
class Fuzzer:
    """Makes requests from an OpenAPI document."""

    document: dict[str, Any]
    draw: random.Random
    models: tuple[str, ...] = ("desk", "null")

    def hostile(self) -> Any:
        """Any value at all."""
        draw = self.draw
        kind = draw.random()
        if kind < 0.3:
            return draw.choice(WORDS)
        if kind < 0.6:
            return draw.choice(NUMBERS)
        if kind < 0.8:
            return draw.choice(OTHERS)
        if kind < 0.9:
            return Deep(draw.choice(DEPTHS))
        # A body that goes on for 16 MiB after it was refused is cut, so none is longer.
        size = draw.choice((300, 5000, 70_000)) if draw.random() < 0.95 else 300_000
        return draw.choice(("x" * size, [draw.choice(NUMBERS)] * size, {str(at): at for at in range(size)}))

    def value(self, schema: dict[str, Any], depth: int = 0) -> Any:
        """A value that a schema of the document allows, often at a boundary."""
        draw = self.draw
        if "$ref" in schema:
            name = schema["$ref"].rpartition("/")[2]
            return self.value(self.document["components"]["schemas"][name], depth)
        for choice in ("anyOf", "oneOf"):
            if choice in schema:
                return self.value(draw.choice(schema[choice]), depth)
        if "enum" in schema:
            return draw.choice(schema["enum"])
        if "const" in schema:
            return schema["const"]
        kind = schema.get("type")
        if kind in ("integer", "number"):
            return self.number(schema)
        if kind == "string":
            return self.text(schema)
        if kind == "array":
            count = max(schema.get("minItems", 0), draw.choice((0, 1, 1, 2, 3)))
            count = min(count, schema.get("maxItems", count))
            return [self.value(schema.get("items") or {}, depth + 1) for _ in range(count)]
        if kind == "object":
            return self.fields(schema, depth)
        if kind == "boolean":
            return draw.random() < 0.5
        return None if kind == "null" else draw.choice((*GRAMMARS, *OTHERS, "a"))

    def number(self, schema: dict[str, Any]) -> float:
        low = schema.get("minimum", schema.get("exclusiveMinimum", 0))
        high = schema.get("maximum", schema.get("exclusiveMaximum", 100))
        if schema["type"] == "integer":
            return self.draw.choice((low, high, low + 1, min(high, low + 3)))
        return self.draw.choice((low, high, low + 1e-9, (low + high) / 2, self.draw.uniform(low, high)))

    def text(self, schema: dict[str, Any]) -> str:
        word = self.draw.choice(("a", "f", "Hi there", *WORDS))
        longest = schema.get("maxLength", 40)
        if self.draw.random() < 0.05:
            word = "y" * longest
        return word.ljust(schema.get("minLength", 0), "z")[:longest]

    def fields(self, schema: dict[str, Any], depth: int) -> dict[str, Any]:
        known: dict[str, Any] = schema.get("properties", {})
        required = set(schema.get("required", ()))
        likely = 0.12 if depth == 0 else 0.4
        chosen = [name for name in known if name in required or self.draw.random() < likely]
        made = {name: self.value(known[name], depth + 1) for name in chosen if depth < 6}
        free = schema.get("additionalProperties")
        if isinstance(free, dict) or (not known and free is not False):
            keys = ("1", "5", "enable_thinking") if isinstance(free, dict) else ("type", "a")
            made |= {self.draw.choice(keys): self.value(free if isinstance(free, dict) else {}, depth + 1)}
        return made

    def body(self, schema: dict[str, Any]) -> dict[str, Any]:
        """A body that mostly starts an answer, with random fields, and often one hostile value somewhere."""
        draw = self.draw
        made: dict[str, Any] = self.value(schema)
        properties = self.properties(schema)
        if "model" in properties and draw.random() < 0.9:
            made["model"] = draw.choice(self.models)
        if "max_tokens" in properties and draw.random() < 0.9:
            made["max_tokens"] = draw.choice((1, 2, 3))
            made["min_tokens"] = None
        if "messages" in properties and draw.random() < 0.7:
            made["messages"] = [{"role": "user", "content": draw.choice(("Hi", "a" * 100, *WORDS))}]
        for name in ("prompt", "input"):
            if name in properties and draw.random() < 0.7:
                made[name] = draw.choice(("Hi", [5, 6], ["a", "b"], [[1], [2, 3]], *WORDS))
        for name in draw.sample(
            sorted(properties), min(8, len(properties))
        ):  # most pairs of options are refused together
            if name not in ("messages", "prompt", "input", "model", "max_tokens") and draw.random() < 0.5:
                made.pop(name, None)
        if draw.random() < 0.6:
            self.spoil(made)
        return made

    def properties(self, schema: dict[str, Any]) -> dict[str, Any]:
        name = schema["$ref"].rpartition("/")[2] if "$ref" in schema else ""
        return self.document["components"]["schemas"].get(name, schema).get("properties", {})

    def spoil(self, made: Any) -> None:
        """Put a hostile value in a random place."""
        while True:
            if isinstance(made, dict) and made:
                key: Any = self.draw.choice(list(made))
            elif isinstance(made, list) and made:
                key = self.draw.randrange(len(made))
            else:
                return
            if not isinstance(made[key], dict | list) or not made[key] or self.draw.random() < 0.4:
                made[key] = self.hostile()
                return
            made = made[key]

    def content(self, schema: dict[str, Any]) -> bytes:
        """The bytes of a body; now and then not JSON."""
        whole = written(self.body(schema)).encode(errors="surrogatepass")
        kind = self.draw.random()
        if kind < 0.02:
            return whole[: self.draw.randrange(len(whole) + 1)]
        if kind < 0.04:
            at = self.draw.randrange(len(whole) + 1)
            return whole[:at] + self.draw.randbytes(2) + whole[at:]
        return whole

    def request(self) -> httpx.Request:
        """A request to one of the endpoints; those that take a body most often."""
        routes = [(path, method) for path, methods in self.document["paths"].items() for method in methods]
        weights = [12 if method == "post" else 1 for _, method in routes]
        path, method = self.draw.choices(routes, weights)[0]
        operation = self.document["paths"][path][method]
        name = self.draw.choice(("desk", "%00", "%ed%a0%bd", "x" * 3000, "..%2f"))
        url = "http://localhost" + path.replace("{name}", name)
        if self.draw.random() < 0.02:
            method = self.draw.choice(("put", "delete", "get", "post", "head"))
        if "requestBody" not in operation:
            return httpx.Request(method, url)
        schema = operation["requestBody"]["content"]["application/json"]["schema"]
        return httpx.Request(method, url, content=self.content(schema), headers=JSON)


def kind_of(error: Any) -> str:
    """The code of an error of OpenAI's API, the type of Anthropic's, or Ollama's text."""
    return error if isinstance(error, str) else error.get("code") or error.get("type") or ""


@dataclass
class Seen:
    """What came back, and what is wrong with it."""

    statuses: Counter[str] = field(default_factory=Counter[str])
    wrong: list[str] = field(default_factory=list[str])

    def note(self, request: httpx.Request, status: int, text: str) -> None:
        self.statuses[f"{request.method} {request.url.path[:25]} {status}"] += 1
        code, problem = "", None
        if status >= 400 and request.method != "HEAD":
            code = kind_of(json.loads(text)["error"])
            problem = "untyped" if not code else None
        elif text.startswith("data: ") and (last := text.rpartition("data: ")[2]).startswith('{"error":'):
            code = json.loads(last)["error"]["code"]
        if status >= 500 and status not in (503, OVERLOADED):
            problem = "a server error"
        if code in BUGS or problem:
            body = request.content[:1500].decode(errors="replace")
            self.wrong.append(
                f"{problem or 'a bug'}: {request.method} {request.url} {body} -> {status} {text[-400:]}"
            )


async def send(client: httpx.AsyncClient, request: httpx.Request, seen: Seen) -> None:
    try:
        async with asyncio.timeout(HANG_S):
            response = await client.send(request, stream=True)
            if request.url.path == "/live":
                await response.aclose()  # it never ends
                return
            await response.aread()
    except TimeoutError:
        seen.wrong.append(f"a hang: {request.method} {request.url} {request.content[:1500]!r}")
        return
    seen.note(request, response.status_code, response.text)


async def worker(url: str, fuzzer: Fuzzer, left: list[int], seen: Seen) -> None:
    async with httpx.AsyncClient(timeout=None) as client:
        while left[0] > 0 and len(seen.wrong) < 20:
            left[0] -= 1
            request = fuzzer.request()
            request.url = httpx.URL(url).copy_with(raw_path=request.url.raw_path)
            request.headers["host"] = httpx.URL(url).netloc.decode()
            try:
                await send(client, request, seen)
            except httpx.TransportError as error:
                seen.wrong.append(f"{error!r}: {request.method} {request.url} {request.content[:1500]!r}")


@pytest.mark.timeout(300)
async def test_no_request_breaks_the_server_or_hangs(server: ServerProcess) -> None:
    _, document = await asyncio.to_thread(server.get, "/openapi.json")
    fuzzer = Fuzzer(document, random.Random(SEED))
    seen, left = Seen(), [REQUESTS]
    await asyncio.gather(*(worker(server.url, fuzzer, left, seen) for _ in range(CLIENTS)))
    sys.stdout.write(f"\n{sum(seen.statuses.values())} requests: {dict(sorted(seen.statuses.items()))}\n")
    assert seen.wrong == [], "\n".join(seen.wrong)
    reached = {key.rpartition(" ")[0] for key in seen.statuses}
    for path, methods in document["paths"].items():
        assert (
            any(f"{method.upper()} {path[:25]}" in reached for method in methods)
            or "{" in path
            or path == "/live"
        )
    for path in ("/v1/chat/completions", "/v1/completions", "/v1/embeddings"):
        answered = seen.statuses[f"POST {path[:25]} 200"]
        sent = sum(count for key, count in seen.statuses.items() if key.startswith(f"POST {path[:25]} "))
        assert answered * 5 > sent or REQUESTS < 1000, f"{answered} of {sent} requests to {path} are valid"
    body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4}
    async with httpx.AsyncClient(base_url=server.url, timeout=30) as client:
        assert (await client.post("/v1/chat/completions", json=body)).status_code == 200
        state = (await client.get("/state")).json()
    assert (state["ready"], state["engine_restarts"], state["active"]) == (True, 0, 0)
