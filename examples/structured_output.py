"""Get an answer that follows a JSON schema. The grammar guarantees its form, whatever the model would prefer.

Start a server with `stretto serve`, then run `python examples/structured_output.py`.
"""

from __future__ import annotations

import json
import os

from openai import OpenAI

URL = os.environ.get("STRETTO_URL", "http://127.0.0.1:8000")
SCHEMA = {
    "type": "object",
    "properties": {"language": {"enum": ["German", "Spanish", "other"]}},
    "required": ["language"],
    "additionalProperties": False,
}


def main() -> None:
    client = OpenAI(base_url=f"{URL}/v1", api_key="none")
    answer = client.chat.completions.create(
        model="desk",
        messages=[{"role": "user", "content": "Which language is this? Gracias por tu ayuda"}],
        response_format={"type": "json_schema", "json_schema": {"name": "message", "schema": SCHEMA}},
        max_tokens=64,
        temperature=0,
    )
    print(json.loads(answer.choices[0].message.content or "")["language"])


if __name__ == "__main__":
    main()
