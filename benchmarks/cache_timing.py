"""Whether the time of an answer tells a tenant what another one has asked.

    python -m benchmarks.cache_timing [--tries 1000] [--each 1] [--what answers|prefixes]

Two tenants share a gateway and a worker. In each try one tenant, the owner, asks two new prompts. Then, in
random order, the other tenant asks the first of them (foreign) and a prompt that nobody has asked (fresh),
and the owner asks the second one again (own) and a fresh one. With `answers` the gateway keeps answers, and
the worker is the null model with steps of 5 ms. With `prefixes` nothing is kept, the worker serves the
bundled model, and a prompt has about 1,500 tokens. Prints the area under the ROC curve of the times: 0.5
means that they tell nothing, 1 that they tell everything.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx

from benchmarks.failover import Process, free_port
from stretto.statistics import quantile

KEYS = {"ann": "key-of-ann", "bob": "key-of-bob"}
GATEWAY = "key-of-the-gateway"
WARM_UP = 10  # tries that do not count
WORDS = (
    "order lamp chair price city card invoice voucher delivery Berlin Madrid Oslo blue red late paid".split()
)


def parser() -> argparse.ArgumentParser:
    """The options."""
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("--tries", type=int, default=1000)
    options.add_argument(
        "--each", type=int, default=1, help="prompts of each kind in a try; their median counts"
    )
    options.add_argument("--what", choices=["answers", "prefixes"], default="answers")
    options.add_argument("--seed", type=int, default=0)
    return options


def auc(shorter: list[float], longer: list[float]) -> float:
    """The chance that a value of the first list is below one of the second; equal ones count half."""
    ranked = sorted([(value, 0) for value in shorter] + [(value, 1) for value in longer])
    total, at = 0.0, 0
    while at < len(ranked):
        end = at
        while end < len(ranked) and ranked[end][0] == ranked[at][0]:
            end += 1
        total += sum(1 for _, which in ranked[at:end] if which == 1) * (at + end + 1) / 2
        at = end
    m, n = len(longer), len(shorter)
    return (total - m * (m + 1) / 2) / (m * n)


def prompt(rng: random.Random, *, long: bool) -> str:
    """A prompt that nobody has asked before."""
    number = rng.randrange(10**12)
    return f"{number} " + " ".join(rng.choices(WORDS, k=700 if long else 12))


async def timed(client: httpx.AsyncClient, tenant: str, text: str, *, kept: bool) -> float:
    """Milliseconds of one answer."""
    body: dict[str, Any] = {
        "messages": [{"role": "user", "content": text}],
        "max_tokens": 1,
        "temperature": 0 if kept else 1,
    }
    headers = {"Authorization": f"Bearer {KEYS[tenant]}"}
    began = time.perf_counter()
    answer = await client.post("/v1/chat/completions", json=body, headers=headers)
    took = (time.perf_counter() - began) * 1e3
    answer.raise_for_status()
    return took


async def measure(options: argparse.Namespace) -> dict[str, list[float]]:
    """The times of foreign, own and fresh prompts."""
    ports, kept = [free_port(), free_port()], options.what == "answers"
    tables = "[api_keys]\n" + "".join(f'{key} = "{name}"\n' for name, key in KEYS.items())
    caches = "".join(f"[caches.{name}]\n" for name in KEYS) if kept else ""
    with TemporaryDirectory() as folder:
        file = Path(folder) / "gateway.toml"
        file.write_text(
            f'workers = ["http://127.0.0.1:{ports[0]}"]\ngateway_key = "{GATEWAY}"\n{tables}{caches}'
        )
        worker_file = Path(folder) / "worker.toml"
        worker_file.write_text(f'gateway_key = "{GATEWAY}"\n')
        model = "null:5" if kept else "desk"
        processes = [
            Process(
                ["serve", model, "--port", str(ports[0]), "--config", str(worker_file)],
                f"http://127.0.0.1:{ports[0]}",
            ),
            Process(
                ["gateway", "--port", str(ports[1]), "--config", str(file)], f"http://127.0.0.1:{ports[1]}"
            ),
        ]
        try:
            for process in processes:
                process.start()
            async with httpx.AsyncClient(base_url=processes[1].url, timeout=60) as client:
                for process in processes:
                    await process.ready(client)
                return await tries(client, options, kept=kept)
        finally:
            for process in processes:
                process.end()


async def tries(
    client: httpx.AsyncClient, options: argparse.Namespace, *, kept: bool
) -> dict[str, list[float]]:
    """Asks, and sorts the times by what was asked."""
    rng = random.Random(options.seed)
    found: dict[str, list[float]] = {
        name: [] for name in ("foreign", "fresh for the other", "own", "fresh for the owner")
    }
    for number in range(options.tries + WARM_UP):
        took: dict[str, list[float]] = {name: [] for name in found}
        owner, other = rng.sample(list(KEYS), 2)
        for _ in range(options.each):
            foreign, own, new, newer = (prompt(rng, long=not kept) for _ in range(4))
            for text in (foreign, own):
                await timed(client, owner, text, kept=kept)
            asked = [
                ("foreign", other, foreign),
                ("fresh for the other", other, new),
                ("own", owner, own),
                ("fresh for the owner", owner, newer),
            ]
            rng.shuffle(asked)
            for name, tenant, text in asked:
                took[name].append(await timed(client, tenant, text, kept=kept))
        if number >= WARM_UP:
            for name, times in took.items():
                found[name].append(quantile(sorted(times), 0.5))
    return found


def main() -> None:
    options = parser().parse_args()
    found = asyncio.run(measure(options))
    print(f"{options.what}, {options.tries} tries of {options.each} prompts, milliseconds")
    print("| prompt | p50 | p99 | max |\n| --- | --- | --- | --- |")
    for name, times in found.items():
        ordered = sorted(times)
        print(
            f"| {name} | {quantile(ordered, 0.5):.2f} | {quantile(ordered, 0.99):.2f} | {ordered[-1]:.2f} |"
        )
    print(f"AUC, another tenant's prompt: {auc(found['foreign'], found['fresh for the other']):.3f}")
    print(f"AUC, the tenant's own prompt: {auc(found['own'], found['fresh for the owner']):.3f}")


if __name__ == "__main__":
    main()
