"""The Python API over a real engine, with a tiny random checkpoint or the null model."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from stretto import LLM, Completion, Grammar, Sampling
from stretto.errors import (
    CheckpointError,
    ContextExceeded,
    EngineDied,
    InvalidGrammar,
    InvalidRequest,
    StartError,
    StrettoError,
    Unavailable,
)
from tests.models.checkpoints import VOCAB, make

TEMPLATE = "{% for m in messages %}{{ m['role'][0] }}{{ m['content'] }}{% endfor %}a"
GREEDY = Sampling(temperature=0.0, max_tokens=8, ignore_eos=True)


def tokenizer() -> Tokenizer:
    """A tokenizer of three special tokens and the printable bytes, as many as the checkpoints have logits."""
    letters = [*"<>|", *sorted(pre_tokenizers.ByteLevel.alphabet())][:VOCAB]
    made = Tokenizer(models.BPE({letter: index for index, letter in enumerate(dict.fromkeys(letters))}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return made


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    make("qwen3", path)
    tokenizer().save(str(path / "tokenizer.json"))
    (path / "chat_template.jinja").write_text(TEMPLATE)
    return path


@pytest.fixture(scope="module")
def llm(checkpoint: Path) -> Iterator[LLM]:
    with LLM(str(checkpoint), threads=1, kv_memory="64MiB") as made:
        yield made


@pytest.fixture(scope="module")
def null() -> Iterator[LLM]:
    with LLM("null") as made:
        yield made


def test_a_prompt_and_its_token_ids_give_the_same_answer(llm: LLM) -> None:
    ids = llm.encode("hello")
    from_text, from_ids = llm.generate(["hello"], GREEDY) + llm.generate([ids], GREEDY)
    assert from_text.token_ids == from_ids.token_ids
    assert (len(from_text.token_ids), from_text.finish_reason, from_text.prompt_tokens) == (8, "length", 5)
    assert from_text.text == llm.decode(from_text.token_ids)
    assert llm.generate("hello", GREEDY)[0].token_ids == from_text.token_ids


def test_answers_are_in_the_order_of_the_prompts(llm: LLM) -> None:
    prompts = [f"prompt {number}" for number in range(12)]
    samplings = [Sampling(temperature=0.0, max_tokens=1 + number, ignore_eos=True) for number in range(12)]
    together = llm.generate(prompts, samplings)
    assert [len(answer.token_ids) for answer in together] == list(range(1, 13))
    alone = [llm.generate([prompt], sampling)[0] for prompt, sampling in zip(prompts, samplings, strict=True)]
    assert [answer.text for answer in alone] == [answer.text for answer in together]
    assert llm.generate([]) == []


def test_stream_yields_the_same_text_as_generate(llm: LLM) -> None:
    assert "".join(llm.stream("hello", GREEDY)) == llm.generate("hello", GREEDY)[0].text
    messages = [{"role": "user", "content": "hello"}]
    assert llm.chats
    assert "".join(llm.stream(messages, GREEDY)) == llm.chat(messages, GREEDY).text
    assert llm.chat(messages, GREEDY).token_ids == llm.generate("uhelloa", GREEDY)[0].token_ids


def test_no_tokens_computes_the_prompt_for_a_later_answer(llm: LLM, checkpoint: Path) -> None:
    prompt = "the quick brown fox jumps over the lazy dog"
    read = llm.generate(prompt, Sampling(max_tokens=0))[0]
    assert (read.token_ids, read.text, read.finish_reason) == ((), "", "length")
    later = llm.generate(prompt, GREEDY)[0]
    assert 0 < later.cached_tokens < later.prompt_tokens
    with LLM(str(checkpoint), threads=1, kv_memory="64MiB") as fresh:
        assert fresh.generate(prompt, GREEDY)[0].token_ids == later.token_ids


def test_a_stop_string_ends_the_answer_and_is_not_returned(llm: LLM) -> None:
    whole = llm.generate("hello", GREEDY)[0]
    stop = whole.text[3]
    cut = llm.generate("hello", Sampling(temperature=0.0, max_tokens=8, ignore_eos=True, stop=(stop,)))[0]
    assert cut.finish_reason == "stop"
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert cut.token_ids == whole.token_ids[: len(cut.token_ids)]


def test_n_answers_to_one_prompt_differ_and_follow_the_seed(llm: LLM) -> None:
    sampling = Sampling(n=3, seed=7, max_tokens=8, ignore_eos=True)
    answer = llm.generate("hello", sampling)[0]
    every = [answer, *answer.alternatives]
    assert len({each.text for each in every}) == 3
    third = llm.generate("hello", Sampling(seed=9, max_tokens=8, ignore_eos=True))[0]
    assert third.token_ids == every[2].token_ids, "the k-th answer has seed + k"
    with pytest.raises(InvalidRequest, match="leave n at 1"):
        llm.stream("hello", sampling)


def test_logprobs_are_returned_for_every_token_when_requested(llm: LLM) -> None:
    answer = llm.generate("hello", Sampling(temperature=0.0, max_tokens=4, logprobs=2, ignore_eos=True))[0]
    assert answer.logprobs is not None and len(answer.logprobs) == 4
    for token, each in zip(answer.token_ids, answer.logprobs, strict=True):
        assert each.top[0] == (token, each.chosen), "greedy: the chosen token is the likeliest"
        assert each.chosen <= 0 and len(each.top) == 2
    assert llm.generate("hello", GREEDY)[0].logprobs is None


def test_a_grammar_constrains_the_answer(llm: LLM) -> None:
    sampling = Sampling(temperature=1.0, seed=1, grammar=Grammar("choice", '["yes", "no"]'))
    assert llm.generate("hello", sampling)[0].text in ("yes", "no")
    with pytest.raises(InvalidGrammar):
        llm.generate("hello", Sampling(grammar=Grammar("regex", "(")))


@pytest.mark.parametrize(
    ("prompt", "sampling", "error", "message"),
    [
        ("", None, InvalidRequest, "prompt is empty"),
        ([[5, VOCAB]], None, InvalidRequest, f"no token {VOCAB}"),
        ("x", Sampling(logit_bias={VOCAB: 1.0}), InvalidRequest, "logit_bias"),
        ("x", Sampling(stop_token_ids=(-1,)), InvalidRequest, "stop_token_ids"),
        ("x" * 300, None, ContextExceeded, "300 tokens"),
        ("x" * 200, Sampling(max_tokens=100), ContextExceeded, "lower max_tokens"),
        (["a", "b"], [Sampling()], InvalidRequest, "2 prompts and 1 samplings"),
        ([3.5], None, InvalidRequest, "a prompt is text"),
        ([["a"]], None, InvalidRequest, "a prompt is text"),
    ],
)
def test_invalid_input_is_refused_before_any_work(
    llm: LLM, prompt: object, sampling: object, error: type[StrettoError], message: str
) -> None:
    with pytest.raises(error, match=message):
        llm.generate(prompt, sampling)  # pyright: ignore[reportArgumentType]
    assert llm.generate("hello", GREEDY)[0].finish_reason == "length", "and hurts nobody"


def test_a_model_that_cannot_be_served_is_an_error(tmp_path: Path, checkpoint: Path) -> None:
    with pytest.raises(CheckpointError, match="is neither a directory, nor a hub id"):
        LLM("nowhere")
    with pytest.raises(StartError, match="quantise: Invalid enum value 'int3'"):
        LLM("null", quantise="int3")
    with pytest.raises(StartError, match="unknown setting colour"):
        LLM("null", colour="blue")
    with pytest.raises(StartError, match="beyond the model's own 256"):
        LLM(str(checkpoint), context=512)


def test_closing_a_stream_cancels_it(null: LLM) -> None:
    pieces = null.stream("hello", Sampling(max_tokens=8000))
    next(pieces)
    pieces.close()
    deadline = time.monotonic() + 5
    while null.state.active and time.monotonic() < deadline:
        time.sleep(0.01)
    assert null.state.active == 0


def test_a_keyboard_interrupt_cancels_the_requests(null: LLM) -> None:
    main = threading.main_thread().ident
    threading.Timer(0.3, signal.pthread_kill, (main, signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        null.generate(["hello"] * 256, Sampling(max_tokens=8000))
    deadline = time.monotonic() + 5
    while null.state.active and time.monotonic() < deadline:
        time.sleep(0.01)
    assert null.state.active == 0
    assert null.generate("hello", Sampling(max_tokens=3))[0].finish_reason == "length"


def test_a_dead_engine_fails_its_requests_and_restarts(null: LLM) -> None:
    pid = null.state.engine_pid
    assert pid is not None
    threading.Timer(0.2, os.kill, (pid, signal.SIGKILL)).start()
    with pytest.raises(EngineDied):
        null.generate(["hello"] * 64, Sampling(max_tokens=8000))
    answer: Completion | None = None
    deadline = time.monotonic() + 30
    while answer is None and time.monotonic() < deadline:
        try:
            answer = null.generate("hello", Sampling(max_tokens=3))[0]
        except EngineDied:
            time.sleep(0.1)
    assert answer is not None and null.state.engine_pid not in (None, pid)


def test_a_closed_llm_refuses_every_call() -> None:
    made = LLM("null")
    pid = made.state.engine_pid
    made.close()
    made.close()
    assert pid is not None and not Path(f"/proc/{pid}").exists()
    for use in (lambda: made.generate("x"), lambda: made.stream("x"), lambda: made.chat([{"role": "user"}])):
        with pytest.raises(Unavailable, match="closed"):
            use()


def test_a_script_needs_no_main_guard_and_leaves_no_process_or_file(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "from stretto import LLM, Sampling\n"
        "llm = LLM('null')\n"
        "print(llm.state.engine_pid, llm.generate('hi', Sampling(max_tokens=2))[0].finish_reason)\n"
    )
    done = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, env={"TMPDIR": str(tmp_path)}
    )
    assert (done.returncode, done.stderr) == (0, "")
    pid, reason = done.stdout.split()
    assert reason == "length"
    assert not Path(f"/proc/{pid}").exists()
    assert list(tmp_path.glob("stretto-*")) == []
