"""What a client's script tells the table: one JSON line for each feature."""

from __future__ import annotations

import json
import os
import traceback
from collections.abc import Callable

BASE = os.environ.get("STRETTO_URL", "http://127.0.0.1:8000")
V1 = BASE + "/v1"
MODEL = os.environ.get("STRETTO_MODEL", "desk")
KEY = "none"
QUESTION = "What is 22.53 + 32.62?"
ANSWER = "55.15"
FACT = "Order 4711 costs 20.00 EUR."
MOST = {"ge": 0, "le": 9_999_999}  # bounds that end a number, also of a model that knows no city
WEATHER = {
    "name": "get_weather",
    "description": "The weather in a city.",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 20}},
        "required": ["city"],
        "additionalProperties": False,
    },
}


def feature(name: str) -> Callable[[Callable[[], object]], Callable[[], object]]:
    """Runs a check at once and prints how it went. A check passes unless it raises."""

    def run(check: Callable[[], object]) -> Callable[[], object]:
        try:
            check()
            outcome = "yes"
        except BaseException as error:  # a client may end the process
            traceback.print_exc()
            outcome = f"no: {type(error).__name__}: {error}".splitlines()[0][:160]
        print(json.dumps({"feature": name, "outcome": outcome}), flush=True)
        return check

    return run
