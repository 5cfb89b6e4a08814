"""Use Stretto from LangChain. An objective travels in `extra_body`.

Start a server with `stretto serve`, then run `python examples/langchain_chat.py`.
"""

from __future__ import annotations

import os

from langchain_openai import ChatOpenAI

URL = os.environ.get("STRETTO_URL", "http://127.0.0.1:8000")


def main() -> None:
    chat = ChatOpenAI(
        model="desk",
        base_url=f"{URL}/v1",
        api_key=lambda: "none",
        temperature=0,
        max_tokens=64,
        extra_body={"objective": {"ttft_ms": 5000}},
    )
    print(chat.invoke("What is 22.53 + 32.62?").content)
    for piece in chat.stream("Translate to German: thank you"):
        print(piece.content, end="", flush=True)
    print()


if __name__ == "__main__":
    main()
