"""Answer a file of prompts without a server. The engine batches them.

`python examples/offline_batch.py [PROMPTS.txt]`: one prompt per line. It prints one JSON object per prompt.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from stretto import LLM, Sampling

PROMPTS = ["What is 22.53 + 32.62?", "Translate to German: thank you", "What does 'Hemd' mean in Spanish?"]


def main() -> None:
    prompts = Path(sys.argv[1]).read_text().splitlines() if len(sys.argv) > 1 else PROMPTS
    sampling = Sampling(temperature=0, min_tokens=4, max_tokens=48)
    with LLM("desk") as llm:
        for prompt, answer in zip(prompts, llm.generate(prompts, sampling), strict=True):
            print(json.dumps({"prompt": prompt, "text": answer.text, "tokens": len(answer.token_ids)}))


if __name__ == "__main__":
    main()
