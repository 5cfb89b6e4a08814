"""The tutorial says what `desk` answers, and names commands and pages that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from stretto import LLM, Sampling

PAGE = (Path(__file__).parent.parent / "docs" / "tutorial.md").read_text()
ROWS = re.findall(r"^\| \w+ \| (.+) \| (.+) \|$", PAGE.partition("## What the bundled")[2], re.MULTILINE)[1:]


@pytest.mark.slow
def test_desk_answers_as_the_tutorial_says() -> None:
    assert len(ROWS) == 7
    greedy = Sampling(temperature=0, max_tokens=64)
    with LLM("desk") as llm:
        answers = [llm.chat([{"role": "user", "content": question}], greedy).text for question, _ in ROWS]
    assert [answer.splitlines()[-1] for answer in answers] == [answer for _, answer in ROWS]
