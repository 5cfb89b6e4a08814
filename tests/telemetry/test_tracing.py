"""Traces: the W3C header, the stages of a request, and that nothing of it is loaded while they are off."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stretto.errors import StartError
from stretto.telemetry import tracing
from stretto.telemetry.metrics import Ended
from stretto.telemetry.tracing import TraceParent, attributes_of, parent_of, stages_of

GOOD = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@given(st.integers(1, 2**128 - 1), st.integers(1, 2**64 - 1), st.booleans())
def test_a_traceparent_is_read_as_it_was_written(trace: int, span: int, sampled: bool):
    parent = TraceParent(trace, span, sampled)
    assert TraceParent.of(str(parent)) == parent


@pytest.mark.parametrize(
    "text",
    [
        *("", "00", GOOD.upper(), GOOD + " ", GOOD + "-extra", GOOD[:-1], GOOD.replace("00-", "ff-", 1)),
        "00-" + "0" * 32 + "-b7ad6b7169203331-01",
        "00-0af7651916cd43dd8448eb211c80319c-" + "0" * 16 + "-01",
        "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-zz",
    ],
)
def test_a_malformed_traceparent_begins_a_new_trace(text: str):
    assert TraceParent.of(text) is None


def test_a_later_version_may_have_more_fields():
    assert TraceParent.of(GOOD.replace("00-", "01-", 1) + "-more") == TraceParent.of(GOOD)


def test_two_traceparents_are_none():
    header = (b"traceparent", GOOD.encode())
    assert parent_of([header]) == TraceParent.of(GOOD)
    assert parent_of([header, header]) is None and parent_of([]) is None


def test_the_stages_of_a_request_follow_each_other():
    ended = Ended("chat", "ok", 1.0, queued=0.1, first=0.3, gaps=[0.2, 0.3])
    queue, prefill, decode = stages_of(ended)
    assert [each.name for each in (queue, prefill, decode)] == ["queue", "prefill", "decode"]
    assert queue.end == prefill.start and prefill.end == decode.start == decode.tokens[0]
    assert decode.tokens[-1] == decode.end and len(decode.tokens) == 3
    assert decode.end - queue.start == pytest.approx(0.8e9, abs=1e3)
    assert stages_of(Ended("chat", "invalid_value", 0.1)) == []
    assert [each.name for each in stages_of(Ended("chat", "ok", 1.0, first=0.3))] == ["first token"]
    assert len(stages_of(Ended("chat", "ok", 9.0, first=0.3, gaps=[0.001] * 5000))[1].tokens) == 100


def test_the_attributes_hold_what_is_known():
    ended = Ended("chat", "ok", 1.0, model="m", prompt_tokens=3, output_tokens=0)
    assert attributes_of(ended) == {
        "gen_ai.request.model": "m",
        "gen_ai.usage.input_tokens": 3,
        "stretto.outcome": "ok",
    }


def test_off_means_that_nothing_is_loaded():
    code = (
        "import sys; from stretto.telemetry import tracing; import stretto.cli; "
        "assert tracing.connect('', 's') is None; "
        "print([name for name in sys.modules if name.startswith('opentelemetry')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_without_the_extra_the_start_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "opentelemetry.context", None)
    monkeypatch.delitem(sys.modules, "stretto.telemetry.otel", raising=False)
    with pytest.raises(StartError, match=r"pip install 'stretto\[otel\]'"):
        tracing.connect("http://127.0.0.1:4318", "s")
