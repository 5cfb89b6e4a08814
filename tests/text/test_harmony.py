"""The messages of gpt-oss, fed at every split."""

from __future__ import annotations

import pytest

from stretto.protocol.openai import ToolCallDelta
from stretto.text.tools.harmony_parser import HarmonyParser
from stretto.text.tools.parser import Reasoning

CALL = '<|channel|>commentary to=functions.weather <|constrain|>json<|message|>{"city": "Paris"}'
CASES: list[tuple[str, str, str, list[tuple[str, str]], int]] = [
    # text, reasoning, content, calls, how many calls are complete
    ("<|channel|>final<|message|>Hello.<|return|>", "", "Hello.", [], 0),
    (
        "<|channel|>analysis<|message|>Easy.<|end|><|start|>assistant<|channel|>final<|message|>4 < 5",
        "Easy.",
        "4 < 5",
        [],
        0,
    ),
    (f"{CALL}<|call|>", "", "", [("weather", '{"city": "Paris"}')], 1),
    # The engine keeps a stop token to itself.
    (
        f"<|channel|>analysis<|message|>Ask.<|end|><|start|>assistant{CALL}",
        "Ask.",
        "",
        [("weather", '{"city": "Paris"}')],
        1,
    ),
    (CALL[:-3], "", "", [("weather", '{"city": "Pari')], 0),
    (
        "<|channel|>commentary<|message|>I will look.<|end|><|start|>assistant to=functions.weather"
        "<|channel|>commentary json<|message|>{}<|call|>",
        "",
        "I will look.",
        [("weather", "{}")],
        1,
    ),
    ("<|channel|>commentary to=functions.other<|message|>{}<|call|>", "", "{}", [], 0),
    ('{"forced": "by a grammar"}', "", '{"forced": "by a grammar"}', [], 0),
    ("to=", "", "to=", [], 0),
    ("<|channel|>ana", "", "", [], 0),
]


@pytest.mark.parametrize(("text", "reasoning", "content", "calls", "complete"), CASES)
def test_messages_are_told_apart_however_the_text_is_split(
    text: str, reasoning: str, content: str, calls: list[tuple[str, str]], complete: int
):
    for size in (1, 2, 5, 13, len(text)):
        parser = HarmonyParser(frozenset({"weather"}))
        events = [event for at in range(0, len(text), size) for event in parser.push(text[at : at + size])]
        thought, answer, made = "", "", list[tuple[str, str]]()
        for event in events + parser.flush():
            if isinstance(event, str):
                answer += event
            elif isinstance(event, Reasoning):
                thought += event.text
            else:
                assert isinstance(event, ToolCallDelta)
                arguments = str(event.function.arguments)
                if event.function.name:
                    made.append((event.function.name, arguments))
                else:
                    made[event.index] = (made[event.index][0], made[event.index][1] + arguments)
        assert (thought, answer, made, parser.calls) == (reasoning, content, calls, complete), size
