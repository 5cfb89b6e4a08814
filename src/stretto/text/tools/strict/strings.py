"""Strings that stand in a call as they are, without quotes and escapes, and the regexes that they satisfy."""

from __future__ import annotations

import re
from collections.abc import Sequence

from stretto.text.schema import Schema
from stretto.text.tools.strict.branches import NotWritable, patterns_of
from stretto.text.tools.strict.lark import Rules, TerminalText, slashed, without

_DATE = r"[0-9]{4}-(0[1-9]|1[0-2])-(0[1-9]|1[0-9]|2[0-8])"
_TIME = r"([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](\.[0-9]{1,9})?([zZ]|[+-]([01][0-9]|2[0-3]):[0-5][0-9])"
_LABEL = r"[a-zA-Z0-9]([a-zA-Z0-9-]{0,61}[a-zA-Z0-9])?"
_BYTE = r"(25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])"
_URI = r"([a-zA-Z0-9\-._~!$&'()*+,;=:@/?]|%[0-9a-fA-F]{2})*"
# Each allows part of what the format allows, so that every reader of the format accepts it.
FORMATS = {
    "date": _DATE,
    "time": _TIME,
    "date-time": f"{_DATE}T{_TIME}",
    "duration": r"P([0-9]{1,6}D(T[0-9]{1,6}[HMS])?|T[0-9]{1,6}[HMS]|[0-9]{1,6}[YMW])",
    "email": rf"[a-zA-Z0-9_+-]+(\.[a-zA-Z0-9_+-]+)*@{_LABEL}(\.{_LABEL})+",
    "hostname": rf"{_LABEL}(\.{_LABEL}){{0,3}}",
    "ipv4": rf"({_BYTE}\.){{3}}{_BYTE}",
    "ipv6": r"([0-9a-fA-F]{1,4}:){7}[0-9a-fA-F]{1,4}|::([0-9a-fA-F]{1,4}:){0,6}[0-9a-fA-F]{1,4}",
    "uuid": r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}",
    "uri": rf"[a-zA-Z][a-zA-Z0-9+.-]*:(//{_LABEL}(\.{_LABEL})*(:[0-9]{{1,5}})?)?(/{_URI})?",
}
_BLANKS = "[ \\t\\n\\r]*"
NUMBER = r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?"
# What a text must not look like, to be no JSON of that type.
JSON_TEXTS = {
    "null": f"{_BLANKS}null{_BLANKS}",
    "boolean": f"{_BLANKS}(true|false){_BLANKS}",
    "integer": f"{_BLANKS}{NUMBER}{_BLANKS}",
    "number": f"{_BLANKS}{NUMBER}{_BLANKS}",
    "object": rf"{_BLANKS}\{{(?s:.*)",
    "array": rf"{_BLANKS}\[(?s:.*)",
}


def string_terminal(
    rules: Rules, plain: Schema, stops: Sequence[str], others: frozenset[str] = frozenset()
) -> TerminalText:
    """Strings that satisfy a plain schema, without `stops` in them, and that are no JSON of the types
    `others`. Raises NotWritable."""
    parts: list[str] = []
    least, most = plain.get("minLength", 0), plain.get("maxLength", "")
    if least or most != "":
        parts.append(f"(?s:.{{{least},{most}}})")
    parts += map(searched, patterns_of(plain))
    if (form := plain.get("format")) in FORMATS:
        parts.append(FORMATS[str(form)])
    expressions = [f"/{without(stops)}/", *(f"/{slashed(part)}/" for part in parts)]
    expressions += [f"~/{JSON_TEXTS[name]}/" for name in sorted(others & JSON_TEXTS.keys())]
    return rules.terminal(" & ".join(expressions))


# What Python's regular expressions lack and the grammar's have.
_NOT_PYTHON = re.compile(r"\\[pPu]\{[^{}]*\}")


def searched(pattern: str) -> str:
    """A regex for the texts in which `pattern` is found, as JSON Schema means it. Raises NotWritable."""
    try:
        re.compile(_NOT_PYTHON.sub("x", pattern))
    except (re.error, RecursionError, OverflowError):
        raise NotWritable(f"pattern {pattern[:40]!r}, which is no regular expression") from None
    found: list[str] = []
    for branch in _alternatives(_ascii_digits(pattern)):
        start = "" if branch.startswith("^") else "(?s:.*)"
        anchored = re.search(r"(?<!\\)(\\\\)*\$$", branch) is not None
        end = "" if anchored else "(?s:.*)"
        inner = branch.removeprefix("^")
        found.append(f"{start}({inner[:-1] if anchored else inner}){end}")
    return "|".join(found)


def _ascii_digits(pattern: str) -> str:
    """The pattern with 0-9 for \\d, as JSON Schema means it."""
    inside = False
    found: list[str] = []
    for part in re.findall(r"\\.|.", pattern, re.DOTALL):
        if part == "\\d":
            part = "0-9" if inside else "[0-9]"
        elif part in "[]":
            inside = part == "["
        found.append(part)
    return "".join(found)


def _alternatives(pattern: str) -> list[str]:
    """The pattern, split at each `|` outside brackets."""
    found, depth, inside = [""], 0, False
    for part in re.findall(r"\\.|.", pattern, re.DOTALL):
        if part == "|" and not depth and not inside:
            found.append("")
            continue
        if inside:
            inside = part != "]"
        elif part == "[":
            inside = True
        else:
            depth += (part == "(") - (part == ")")
        found[-1] += part
    return found
