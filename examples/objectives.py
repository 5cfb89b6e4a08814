"""Ask for an answer by a deadline, and read whether it was on time.

Start a server with `stretto serve`, then run `python examples/objectives.py`.
"""

from __future__ import annotations

import os

from openai import APIStatusError, OpenAI

URL = os.environ.get("STRETTO_URL", "http://127.0.0.1:8000")


def main() -> None:
    client = OpenAI(base_url=f"{URL}/v1", api_key="none", max_retries=0)
    ask(client, {"ttft_ms": 5000, "itl_ms": 500})
    ask(client, {"total_ms": 1, "on_miss": "reject"})


def ask(client: OpenAI, objective: dict[str, object]) -> None:
    """Stream one answer. Fields that OpenAI does not have travel in `extra_body`."""
    print(f"objective {objective}")
    try:
        stream = client.chat.completions.create(
            model="desk",
            messages=[{"role": "user", "content": "What is 22.53 + 32.62?"}],
            stream=True,
            service_tier="priority",
            extra_body={"objective": objective},
        )
        report = None
        for chunk in stream:
            if chunk.choices:
                print(chunk.choices[0].delta.content or "", end="", flush=True)
            report = (chunk.model_extra or {}).get("stretto", report)
        print(f"\non time: {report['on_time']}, first token after {report['ttft_ms']:.0f} ms")
    except APIStatusError as error:
        # The server predicts that the answer would be late, and says so before any work.
        wait = error.response.headers.get("retry-after")
        print(f"refused with {error.status_code}: {error.code}; retry after {wait} s")


if __name__ == "__main__":
    main()
