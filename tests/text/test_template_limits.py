"""Templates that fail, run for ever or fill the memory: each ends in a 400 that names the line."""

from __future__ import annotations

import resource
import time
from typing import Any

import pytest

from stretto.errors import CheckpointError, InvalidRequest
from stretto.text import template_sandbox
from stretto.text.chat_template import ChatTemplate

MESSAGES: list[dict[str, Any]] = [{"role": "user", "content": "Hi"}]
DOUBLING = (
    "{%- set ns = namespace(x='ab') -%}{% for i in range(60) %}{% set ns.x = BODY %}{% endfor %}{{ ns.x }}"
)
LONG = "{% set ns = namespace(x='a' * 10**6) %}"

FAILING = {
    "division": "{{ 1 / 0 }}",
    "remainder": "{{ 1 % 0 }}",
    "overflow": "{{ 10.0 ** 400 }}",
    "attribute": "{{ messages.nothing.at_all }}",
    "type": "{{ 1 + 'a' }}",
    "index": "{{ messages[5].content }}",
    "key": "{{ 'a'.format() ~ '{b}'.format() }}",
    "unpacking": "{% for a, b in messages[0].content %}{% endfor %}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "recursive loop": "{% for x in [1] recursive %}{{ loop([1]) }}{% endfor %}",
    "recursive block": "{% block a %}{{ self.a() }}{% endblock %}",
    "a number of many digits": "{{ (10 ** 1000) ** 1000 }}",
    "an integer that is printed": "{{ (10 ** 1000) * (10 ** 1000) }}",
    "forbidden": "{{ ''.__class__.__mro__ }}",
}
ENDLESS = {
    "nested loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "filters in loops": "{% for i in range(99999) %}{{ range(99999) | list | length }}{% endfor %}",
    "macros": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "calls": "{% macro f(n) %}{% if n %}{{ caller() }}{% call f(n - 1) %}{% endcall %}"
    "{% call f(n - 1) %}{% endcall %}{% endif %}{% endmacro %}{% call f(60) %}{% endcall %}",
}
HUGE = {
    "product": "{{ 'a' * 10**10 }}",
    "product of lists": "{{ ([0] * 10**10) | length }}",
    "product from the left": "{{ 10**10 * 'a' }}",
    "concatenation": DOUBLING.replace("BODY", "ns.x ~ ns.x"),
    "sum": DOUBLING.replace("BODY", "ns.x + ns.x"),
    "sum of lists": DOUBLING.replace("BODY", "ns.x + ns.x").replace("'ab'", "[1]"),
    "formatting": DOUBLING.replace("BODY", "'%s%s' % (ns.x, ns.x)"),
    "format": DOUBLING.replace("BODY", "'{0}{0}'.format(ns.x)"),
    "format filter": DOUBLING.replace("BODY", "'%s%s' | format(ns.x, ns.x)"),
    "join": DOUBLING.replace("BODY", "[ns.x, ns.x] | join"),
    "join with a long separator": LONG + "{{ range(99999) | join(ns.x) }}",
    "join method": LONG + "{{ ns.x.join(['a'] * 99999) }}",
    "replace": LONG + "{{ ns.x.replace('a', ns.x) }}",
    "replace filter": LONG + "{{ ns.x | replace('a', ns.x) }}",
    "width of a format": "{{ '%999999999d' % 1 }}",
    "star in a format": "{{ '%*d' % (999999999, 1) }}",
    "width of a format string": "{{ '{:>999999999}'.format(1) }}",
    "width as an argument": "{{ '{:>{}}'.format(1, 999999999) }}",
    "center": "{{ 'a'.center(999999999) }}",
    "ljust": "{{ 'a'.ljust(999999999) }}",
    "zfill": "{{ '1'.zfill(999999999) }}",
    "expandtabs": "{{ '\t'.expandtabs(999999999) }}",
    "translate": LONG + "{{ ns.x.translate({97: ns.x}) }}",
    "indent": "{{ 'a\nb' | indent(999999999) }}",
    "indent of a long text": "{{ ('a\n' * 1000000) | indent(9999) }}",
    "indent of JSON": "{{ messages | tojson(indent=999999999) }}",
    "JSON of JSON": DOUBLING.replace("BODY", "ns.x | tojson").replace("ab", '"'),
    "a list in itself": DOUBLING.replace("BODY", "[ns.x, ns.x]"),
    "a list in itself as JSON": DOUBLING.replace("BODY", "[ns.x, ns.x]").replace(
        "{{ ns.x }}", "{{ ns.x | tojson }}"
    ),
    "a list in itself as text": DOUBLING.replace("BODY", "[ns.x, ns.x]").replace(
        "{{ ns.x }}", "{{ ns.x | upper }}"
    ),
    "a list in itself joined": DOUBLING.replace("BODY", "[ns.x, ns.x]").replace(
        "{{ ns.x }}", "{{ '' ~ ns.x }}"
    ),
    "output": LONG + "{% for i in range(99999) %}{{ ns.x }}{% endfor %}",
    "a block of output": LONG + "{% set y %}{% for i in range(99999) %}{{ ns.x }}{% endfor %}{% endset %}",
    "output of a macro": LONG
    + "{% macro f() %}{% for i in range(99999) %}{{ ns.x }}{% endfor %}{% endmacro %}{{ f() }}",
}


def refusal(source: str) -> str:
    # The second line fails, and the message says so.
    template = ChatTemplate({"default": "{% set unused = 1 %}\n" + source}, {})
    with pytest.raises(InvalidRequest) as caught:
        template.render(MESSAGES, None, {})
    assert caught.value.param == "$.messages"
    return caught.value.message


@pytest.mark.parametrize("name", FAILING)
def test_a_template_that_fails_is_named_with_its_line(name: str) -> None:
    message = refusal(FAILING[name])
    assert message.startswith("the model's chat template fails at line 2: ")
    assert len(message) < 500


@pytest.mark.parametrize("name", ENDLESS)
def test_a_template_that_runs_for_ever_is_stopped(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_sandbox, "SECONDS", 0.2)
    started = time.thread_time()
    message = refusal(ENDLESS[name])
    assert "at line 2: it runs for more than 0.2 s" in message or "RecursionError" in message
    assert time.thread_time() - started < 2.0


@pytest.mark.parametrize("name", HUGE)
def test_a_template_that_makes_gigabytes_is_stopped(name: str) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.thread_time()
    message = refusal(HUGE[name].replace("\n", "\\n").replace("\t", "\\t"))
    assert "at line 2: " in message
    assert time.thread_time() - started < 3.0
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 600_000, "KiB"


def test_what_real_templates_do_is_allowed() -> None:
    source = """{%- macro show(value, depth=0) -%}
{%- if value is mapping -%}{%- for key, inner in value | dictsort -%}
{{ "  " * depth }}{{ key }}:{{ show(inner, depth + 1) }}
{%- endfor -%}{%- else -%}{{ " " + (value | string) ~ "\n" }}{%- endif -%}
{%- endmacro -%}
{%- set ns = namespace(last=-1) -%}
{%- for m in messages[::-1] if m.role == "user" -%}{%- set ns.last = loop.index0 -%}{%- endfor -%}
{{ "%s|%d" % (messages[0].role, 3) }}|{{ "{:>5}".format("a") }}|{{ [1, 2] | join(",") }}
{{ "a-b".replace("-", "+") }}
{{ tools | tojson(indent=4) }}{{ show({"a": {"b": 1}}) }}{{ messages | map(attribute="role") | join }}
{%- for part in "x y".split(" ") %}
{{- loop.index }}{{ part.strip() | upper | indent(2) }}{% if not loop.last %};{% endif %}{% endfor -%}
{{ raise_exception("no " + "way") if messages | length > 1 }}"""
    template = ChatTemplate({"default": source}, {})
    text = template.render(MESSAGES, [{"name": "f"}], {})
    assert text == ('user|3|    a|1,2\na+b\n[\n    {\n        "name": "f"\n    }\n]a:  b: 1\nuser1X;2Y')
    with pytest.raises(InvalidRequest, match="chat template rejects these messages: no way"):
        template.render(MESSAGES * 2, None, {})


def test_a_template_that_does_not_parse_is_named_with_its_line() -> None:
    with pytest.raises(CheckpointError, match="line 2"):
        ChatTemplate({"default": "a\n{% for %}"}, {})
