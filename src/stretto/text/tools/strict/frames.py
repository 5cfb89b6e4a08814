"""Where calls stand in an answer: text is free until a call begins, and then the call is held to its schema.

Each function gives the sequences with which the grammar of one answer may begin.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from stretto.text.tools.strict.lark import GrammarPiece, RuleName, Rules, TerminalText

Frame = list[list[GrammarPiece]]
BLANK = r"\s\x1c-\x1f"  # what Python takes for blanks


def between_text(
    rules: Rules,
    opener: str,
    calls: RuleName,
    wrappers: Sequence[str],
    others: Sequence[int],
    bare: Sequence[str] = (),
) -> Frame:
    """Calls anywhere in a text, each after `opener`. `wrappers` may stand around them. `others`: the special
    tokens that may occur in the text. `bare`: what begins calls without an opener; no text may hold it."""
    free = rules.free(opener, *bare)
    pieces: list[list[GrammarPiece]] = [[free, *rules.literal(opener), calls]]
    pieces += [[free, *rules.literal(each)] for each in wrappers if rules.special(each)]
    if others:  # readers do not see these tokens, so the text on both sides is one text for them
        pieces.append([rules.free(opener, *bare, whole=True), rules.mark(list(others))])
    return [[rules.repeated([rules.rule(*pieces)], "*"), free]]


def from_the_start(rules: Rules, opener: str, call: RuleName, separator: str, others: Sequence[int]) -> Frame:
    """Calls at the very beginning, or after `opener`; they end the answer. Any other text may not begin with
    a brace, because a reader takes that for a call."""
    calls: list[GrammarPiece] = [call, rules.repeated([TerminalText(separator), call], "*")]
    opened: list[GrammarPiece] = [*rules.literal(opener), *calls]
    least = rf"[{BLANK}]*[^{BLANK}{{](?s:.*)"
    if not others:
        text = rules.free(opener, least=least)
        return [[], calls, opened, [text], [text, *opened]]
    mark = rules.mark(list(others))
    skipped = rules.repeated([mark], "*")
    more = rules.repeated([mark, rules.free(opener, whole=True)], "*")
    text = rules.free(opener, least=least, whole=True)
    opened_later = rules.rule(opened)
    return [
        [skipped, *each] for each in ([], calls, [opened_later], [text, more], [text, more, opened_later])
    ]


def in_messages(rules: Rules, calls: Sequence[tuple[str, RuleName]], ends: Sequence[str]) -> Frame:
    """Harmony: an answer is messages, each with a header that may name a function. `ends`: the special
    tokens after a message that do not end the answer."""
    channel, message, start = (rules.literal(each) for each in ("<|channel|>", "<|message|>", "<|start|>"))
    constrain = rules.literal("<|constrain|>")
    markers = (
        "<|channel|>",
        "<|message|>",
        "<|start|>",
        "<|constrain|>",
        "<|end|>",
        "<|call|>",
        "<|return|>",
    )
    header = rules.terminal(r"/[^<]*/ & ~/(?s:.*)to=functions\.(?s:.*)/")
    text = rules.free(*markers)
    messages: list[list[GrammarPiece]] = [
        [*channel, header, *message, text],
        [*channel, header, *constrain, header, *message, text],
    ]
    for name, arguments in calls:
        to = f" to=functions.{name}"
        kind = rules.rule(
            [], [TerminalText('" "'), *constrain, TerminalText('"json"')], [TerminalText('" json"')]
        )
        messages.append([*channel, TerminalText(json.dumps("commentary" + to)), kind, *message, arguments])
        messages.append(
            [TerminalText(json.dumps(to)), *channel, TerminalText('"commentary"'), kind, *message, arguments]
        )
    one = rules.rule(*messages)
    ended = [rules.literal(each) for each in ends]
    end = rules.rule(*ended)
    return [
        [
            one,
            rules.repeated([end, *start, TerminalText('"assistant"'), one], "*"),
            rules.repeated([end], "?"),
        ]
    ]
