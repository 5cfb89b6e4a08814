"""Exact held-out accuracy by task and level, for a model directory or an OpenAI-compatible server.

python -m recipes.desk.evaluate src/stretto/desk
python -m recipes.desk.evaluate --url http://127.0.0.1:8000 --count 50 --json result.json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import torch

from recipes.desk.example import Example
from recipes.desk.questions import tools
from recipes.desk.tasks import LEVELS, TASKS, check, held_out
from stretto.models import families
from stretto.optimise.answers import AnswerOptions, generate
from stretto.optimise.job import load_decoder
from stretto.statistics import wilson
from stretto.text.tokenizer import TextModel

Answer = Callable[[Sequence[Example]], list[str]]
LONGEST = 320  # tokens of the longest reply, with room


def local(path: Path, device: str = "cpu") -> Answer:
    """Greedy answers of a checkpoint, on the kernels that serve it."""
    spec = families.read(path)
    decoder, text = load_decoder(path, torch.device(device)), TextModel(path)
    how = AnswerOptions(LONGEST, spec.context, frozenset(spec.eos))

    def answer(examples: Sequence[Example]) -> list[str]:
        prompts = [
            text.encode_chat(list(example.messages), list(example.tools) or None) for example in examples
        ]
        return [text.decode(ids) for ids in generate(decoder, prompts, how)]

    return answer


def served(url: str, model: str | None = None, threads: int = 8) -> Answer:
    """Answers of a server's `/v1/chat/completions` at temperature 0."""
    base = url.rstrip("/").removesuffix("/v1")

    def call(path: str, body: dict[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = Request(f"{base}{path}", data, {"content-type": "application/json"})
        with urlopen(request, timeout=120) as reply:
            return json.load(reply)

    name = model or call("/v1/models")["data"][0]["id"]

    def ask(example: Example) -> str:
        body = {"model": name, "messages": list(example.messages), "temperature": 0, "max_tokens": LONGEST}
        if example.tools:
            body["tools"] = list(example.tools)
        message = call("/v1/chat/completions", body | {"messages": _sent(example)})["choices"][0]["message"]
        calls = [each["function"] for each in message.get("tool_calls") or ()]
        said = [tools.call(each["name"], json.loads(each["arguments"])) for each in calls]
        return "\n".join([message["content"] or "", *said]).strip()

    def answer(examples: Sequence[Example]) -> list[str]:
        with ThreadPoolExecutor(threads) as pool:
            return list(pool.map(ask, examples))

    return answer


def _sent(example: Example) -> list[dict[str, Any]]:
    """The messages as the API takes them: arguments of calls are text."""
    found = json.loads(json.dumps(example.messages))
    for message in found:
        for each in message.get("tool_calls", ()):
            each["function"]["arguments"] = json.dumps(each["function"]["arguments"])
    return found


def score(right: int, count: int) -> dict[str, float | int | list[float]]:
    low, high = wilson(right, count)
    return {
        "right": right,
        "count": count,
        "accuracy": round(right / max(1, count), 4),
        "interval": [round(low, 4), round(high, 4)],
    }


def evaluate(
    answer: Answer,
    count: int,
    levels: Sequence[int] = LEVELS,
    tasks: Sequence[str] = tuple(TASKS),
    seed: int = 0,
) -> dict[str, Any]:
    """Scores of `count` held-out prompts per task and level, totals per level, and some wrong answers."""
    cells: dict[str, dict[str, Any]] = {}
    wrong: list[dict[str, Any]] = []
    totals = {level: [0, 0] for level in levels}
    for task in tasks:
        cells[task] = {}
        for level in levels:
            examples = held_out(task, level, count, seed)
            texts = answer(examples)
            misses = [(e, t) for e, t in zip(examples, texts, strict=True) if not check(e, t)]
            cells[task][str(level)] = score(count - len(misses), count)
            totals[level][0] += count - len(misses)
            totals[level][1] += count
            for example, text in misses[:3]:
                asked = example.messages[-1]["content"]
                wrong.append(
                    {"task": task, "level": level, "asked": asked, "expected": example.reply, "said": text}
                )
    overall = {str(level): score(right, asked) for level, (right, asked) in totals.items()}
    return {"count": count, "seed": seed, "levels": overall, "tasks": cells, "wrong": wrong}


def table(result: dict[str, Any]) -> str:
    """The result as a table in per cent: a row for each task, a column for each level."""
    levels = list(result["levels"])
    rows = [f"{'task':<10}" + "".join(f"{'level ' + level:>10}" for level in levels)]
    for task, cells in (*result["tasks"].items(), ("all", result["levels"])):
        rows.append(f"{task:<10}" + "".join(f"{100 * cells[level]['accuracy']:>10.1f}" for level in levels))
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", nargs="?", type=Path, default=Path("src/stretto/desk"))
    parser.add_argument("--url", help="ask this server instead of loading the model")
    parser.add_argument("--name", help="model name to ask the server for (default: its first)")
    parser.add_argument("--count", type=int, default=100, help="prompts per task and level")
    parser.add_argument("--levels", default=",".join(map(str, LEVELS)))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, help="write the full result here")
    options = parser.parse_args()
    answer = served(options.url, options.name) if options.url else local(options.model, options.device)
    levels = [int(level) for level in options.levels.split(",")]
    result = evaluate(answer, options.count, levels, seed=options.seed)
    print(table(result))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
