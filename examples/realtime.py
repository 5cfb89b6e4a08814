"""Type a message that the server reads meanwhile, send it, and interrupt the answer with another one.

Start a server with `stretto serve`, then run `python examples/realtime.py`.
"""

from __future__ import annotations

import asyncio
import os
from typing import Any

from openai import AsyncOpenAI

URL = os.environ.get("STRETTO_URL", "http://127.0.0.1:8000")
MESSAGE = (
    "Hello, I ordered a blue lamp two weeks ago, and the parcel has not come yet. "
    "The order number is A-1042, and the address is the same as last time. "
    "Could you tell me where the parcel is, and when it will be here? Thank you very much."
)


async def type_message(connection: Any, text: str) -> None:
    """Send each word when it is typed, and the message when it is complete."""
    for word in text.split(" "):
        await connection.send({"type": "input_text.append", "text": word + " "})
        await asyncio.sleep(0.05)
    await connection.send({"type": "input_text.commit", "response": {"objective": {"ttft_ms": 2000}}})


async def answer(connection: Any) -> Any:
    """Print an answer as it comes; returns the response."""
    async for event in connection:
        if event.type == "input_text.read":
            print(f"[{event.tokens} tokens of the prompt are read]")
        elif event.type == "response.output_text.delta":
            print(event.delta, end="", flush=True)
        elif event.type == "error":
            raise SystemExit(event.error.message)
        elif event.type == "response.done":
            print()
            return event.response
    raise SystemExit("the server closed the session")


async def main() -> None:
    client = AsyncOpenAI(base_url=f"{URL}/v1", api_key="none")
    async with client.realtime.connect(model="desk") as connection:
        await connection.session.update(
            session={"type": "realtime", "output_modalities": ["text"], "instructions": "Be kind."}
        )
        await type_message(connection, MESSAGE)
        response = await answer(connection)
        cached = response.usage.input_token_details.cached_tokens
        print(f"{cached} of {response.usage.input_tokens} tokens were read before the message was sent")
        print(f"first token after {response.stretto['ttft_ms']:.0f} ms")

        for text in ("Write a very long story about a lamp.", "No, stop. What is 20 + 22?"):
            await connection.send({"type": "input_text.append", "text": text})
            await connection.send({"type": "input_text.commit"})
        print(f"first answer: {(await answer(connection)).status}")
        print(f"second answer: {(await answer(connection)).status}")


if __name__ == "__main__":
    asyncio.run(main())
