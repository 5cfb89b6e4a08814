"""The desk recipe: tasks, splits, tokenizer, batches and the bundled model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from random import Random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer
from transformers import AutoTokenizer, LlamaForCausalLM

from recipes.desk import batches, bundle, evaluate, model
from recipes.desk.example import Example
from recipes.desk.questions import talk, tools
from recipes.desk.tasks import LEVELS, TASKS, check, draw, held_out, make, prompt_text, split_of
from recipes.desk.tokenizer import (
    CONTEXT,
    END_ID,
    TEMPLATE,
    build,
    conversation,
    encode,
    in_language,
    render,
    save,
)
from stretto.ladder import registry
from stretto.ladder.registry import Variant
from stretto.text.tokenizer import TextModel
from stretto.text.tools.parser import HERMES, ToolParser
from tests.ladder import tiny_ladder

ARTEFACT = Path(__file__).parents[2] / "src" / "stretto" / "desk"
CELLS = [(task, level) for task in TASKS for level in LEVELS]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return build(seed=3, examples=2000)


@pytest.fixture(scope="module")
def folder(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("desk")
    save(tokenizer, path)
    return path


@pytest.mark.parametrize(("task", "level"), CELLS)
def test_the_same_seed_makes_the_same_prompts(task: str, level: int) -> None:
    first = [make(task, level, rng) for rng in [Random(5)] for _ in range(20)]
    again = [make(task, level, rng) for rng in [Random(5)] for _ in range(20)]
    other = [make(task, level, rng) for rng in [Random(6)] for _ in range(20)]
    assert first == again
    assert first != other


def test_an_unknown_task_or_level_is_an_error() -> None:
    with pytest.raises(ValueError, match="level must be 1 to 6"):
        make("lookup", 7, Random(0))
    with pytest.raises(KeyError):
        make("poetry", 1, Random(0))


def corrupted(answer: str, rng: Random) -> str:
    """Replace one letter or digit of the answer by another."""
    places = [place for place, sign in enumerate(answer) if sign.isalnum() and sign.isascii()]
    place = rng.choice(places)
    pool = "0123456789" if answer[place].isdigit() else "abcdefghijklmnopqrstuvwxyz"
    new = rng.choice([sign for sign in pool if sign != answer[place].lower()])
    return answer[:place] + new + answer[place + 1 :]


@pytest.mark.parametrize(("task", "level"), CELLS)
def test_the_checker_accepts_correct_answers_and_no_corrupted_ones(task: str, level: int) -> None:
    rng = Random(f"{task} {level}")
    for _ in range(60):
        example = make(task, level, rng)
        assert example.reply.endswith(example.answer)
        assert check(example, example.reply)
        assert check(example, f"  {example.answer} \n")
        assert not check(example, corrupted(example.answer, rng))
        assert not check(example, "")
        assert not check(example, example.answer + " and more")


def test_json_answers_are_compared_as_json() -> None:
    example = Example((), '{"a": 1, "b": null}', '{"a": 1, "b": null}', "extract", 1, "")
    assert check(example, '```json\n{"b":null,"a":1}\n```')
    assert not check(example, '{"a": true, "b": null}')
    assert not check(example, '{"a": "1", "b": null}')
    assert not check(example, '{"a": 1}')
    assert not check(example, "a is 1")


def test_calls_of_tools_are_compared_as_json() -> None:
    example = Example((), "", tools.call("find", {"order": "A-1", "count": 2}), "tools", 1, "")
    assert check(example, '<tool_call>{"arguments":{"count":2,"order":"A-1"},"name":"find"}</tool_call>')
    assert not check(example, tools.call("find", {"order": "A-1", "count": "2"}))
    assert not check(example, f"{example.answer}\n{example.answer}")
    assert not check(example, f"I call find. {example.answer}")
    assert not check(example, "<tool_call>{</tool_call>")


def test_the_servers_parser_reads_every_call_of_a_reply() -> None:
    rng, seen = Random(17), 0
    for turn in range(200):
        example = make("tools", LEVELS[turn % len(LEVELS)], rng)
        names = frozenset(tool["function"]["name"] for tool in example.tools)
        parser = ToolParser(HERMES, names)
        events = parser.push(example.reply) + parser.flush()
        said = "".join(event for event in events if isinstance(event, str))
        assert (parser.calls > 0) == example.reply.startswith(tools.OPENER)
        assert said.strip() == ("" if parser.calls else example.reply)
        assert parser.calls == example.reply.count(tools.OPENER)
        seen += parser.calls
    assert seen > 200


def test_a_system_prompt_decides_the_language_of_words_and_not_of_facts() -> None:
    rng = Random(18)
    spoken = {"German": 0, "Spanish": 0}
    for _ in range(4000):
        example = make("chat", 1, rng)
        system = example.messages[0]["content"] if example.messages[0]["role"] == "system" else ""
        for place, language in ((1, "German"), (2, "Spanish")):
            if any(wanted in system for wanted in talk.IN_LANGUAGE[place]):
                said = [each.said[place] for each in talk.TALK]
                assert example.reply in (*said, talk.REFUSALS[place], talk.NO_RECORDS[place])
                spoken[language] += 1
    assert min(spoken.values()) > 100
    for _ in range(300):
        example = make("total", 1, rng)
        assert example.reply.splitlines()[-1] == example.answer


@pytest.mark.parametrize(
    ("system", "line"),
    [
        ("You are a helpful assistant. Always answer in German!", "Answer in German."),
        ("Bitte auf Deutsch antworten.", "Answer in German."),
        ("Escribe en español, por favor.", "Answer in Spanish."),
        ("Answer in Spanish.", None),
        ("You are the desk of a German shop.", None),
        ("Answer questions about English, German and Spanish.", None),
    ],
)
def test_a_wish_for_a_language_is_shown_in_the_words_of_training(system: str, line: str | None) -> None:
    assert in_language(system) == (system if line is None else f"{system}\n{line}")
    plain = ImmutableSandboxedEnvironment().from_string(TEMPLATE)
    messages = [{"role": "system", "content": system}, {"role": "user", "content": "hi"}]
    assert plain.render(messages=messages) == render(messages)


def arithmetic(line: str) -> bool:
    """True if a line such as `12.50 + 7.25 = 19.75` is correct. It is computed in hundredths of cents."""
    left, right = line.split(": ")[-1].split(" = ")
    first, sign, second = left.split(" ")
    a, b, c = (round(float(part) * 10_000) for part in (first, second, right))
    return c == {"+": a + b, "-": a - b, "x": a * b / 10_000}[sign]


@pytest.mark.parametrize("task", ["total", "refund", "convert", "delivery"])
def test_every_line_of_working_is_correct(task: str) -> None:
    rng, lines = Random(task), 0
    for turn in range(800):
        for line in make(task, LEVELS[turn % len(LEVELS)], rng).reply.splitlines()[:-1]:
            if line.partition(" = ")[0].count(" ") >= 2 and " = " in line and "%" not in line:
                assert arithmetic(line), line
                lines += 1
    assert lines > 400


def test_no_held_out_prompt_is_in_the_training_split() -> None:
    rng = Random(11)
    train: dict[str, str] = {}
    for turn in range(12_000):
        task, level = CELLS[turn % len(CELLS)]
        example = draw("train", task, level, rng)
        assert split_of(example.key) == "train"
        train[prompt_text(example)] = example.key
    keys = set(train.values())
    for task, level in CELLS:
        for example in held_out(task, level, 60):
            assert split_of(example.key) == "held_out"
            assert example.key not in keys
            assert prompt_text(example) not in train


def test_equal_prompts_have_equal_answers_and_keys() -> None:
    """Otherwise a prompt could be in both splits, or have no right answer."""
    rng = Random(12)
    seen: dict[str, tuple[str, str]] = {}
    for turn in range(18_000):
        task, level = CELLS[turn % len(CELLS)]
        example = make(task, level, rng)
        found = seen.setdefault(prompt_text(example), (example.answer, example.key))
        assert found == (example.answer, example.key)
    assert len(seen) > 17_000


def test_held_out_prompts_are_reproducible_and_distinct() -> None:
    first = held_out("lookup", 2, 40)
    assert first == held_out("lookup", 2, 40)
    assert first != held_out("lookup", 2, 40, seed=1)
    assert len({prompt_text(example) for example in first}) == 40


def test_harder_levels_have_longer_prompts() -> None:
    for task in ("lookup", "total", "extract", "translate", "urgency"):
        rng = Random(13)
        sizes = [
            sum(len(draw("train", task, level, rng).messages[-1]["content"]) for _ in range(60))
            for level in LEVELS
        ]
        assert sizes[0] < sizes[1] < sizes[3], task


@given(st.text())
def test_any_text_survives_encoding_and_decoding(text: str) -> None:
    tokenizer = Tokenizer.from_file(str(ARTEFACT / "tokenizer.json"))
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_digits_and_chat_markers_are_single_tokens(tokenizer: Tokenizer) -> None:
    for text in ("1042", " 24.90", "A-7", "x1y22"):
        tokens = tokenizer.encode(text, add_special_tokens=False).tokens
        assert all(len(token) == 1 for token in tokens if any(sign.isdigit() for sign in token)), tokens
    assert tokenizer.encode("<|user|>hi<|end|>", add_special_tokens=False).ids[-1] == END_ID


def test_the_chat_template_renders_the_same_in_transformers_jinja_and_the_server(
    folder: Path, tokenizer: Tokenizer
) -> None:
    theirs = AutoTokenizer.from_pretrained(folder)
    environment = ImmutableSandboxedEnvironment()
    environment.filters["tojson"] = partial(json.dumps, ensure_ascii=False)
    plain = environment.from_string(TEMPLATE)
    ours = TextModel(folder)
    rng = Random(14)
    for task, level in CELLS:
        example = draw("train", task, level, rng)
        messages, tools = list(example.messages), list(example.tools) or None
        text = render(messages, example.tools, prompt=True)
        found = theirs.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=True)
        assert found == text
        assert plain.render(messages=messages, tools=tools, add_generation_prompt=True) == text
        assert plain.render(messages=messages, tools=tools) == render(messages, example.tools)
        assert ours.encode_chat(messages, tools) == encode(tokenizer, [text])[0]
        assert theirs(text, add_special_tokens=False)["input_ids"] == encode(tokenizer, [text])[0]


def test_replies_and_conversations_fit_their_limits(tokenizer: Tokenizer) -> None:
    rng = Random(15)
    for task, level in CELLS:
        for _ in range(10):
            example = draw("train", task, level, rng)
            assert len(encode(tokenizer, [example.reply])[0]) < evaluate.LONGEST
            assert len(encode(tokenizer, [conversation(example)])[0]) <= CONTEXT


def test_only_assistant_tokens_are_labels_of_a_batch(tokenizer: Tokenizer) -> None:
    shape = batches.Shape(4096)
    packer = batches.Packer(shape)
    rng = Random(16)
    replies: list[str] = []
    batch = None
    while batch is None:
        example = draw("train", "lookup", rng.choice((1, 2, 3)), rng)
        ids = batches.np.array(encode(tokenizer, [conversation(example)])[0], batches.np.int32)
        batch = packer.add(ids, int(batches.answered(ids).sum()))
        turns = (*example.messages, {"role": "assistant", "content": example.reply})
        replies += [turn["content"] for turn in turns if batch is None and turn["role"] == "assistant"]
    tokens, positions, starts, rows, labels, spans = batches.np.split(
        batch, batches.np.cumsum(shape.sizes)[:-1]
    )
    taught = labels[labels >= 0]
    assert (tokens[rows[: len(taught)] + 1] == taught).all()
    decoded = tokenizer.decode(taught.tolist(), skip_special_tokens=False)
    assert decoded == "".join(f"{reply}<|end|>" for reply in replies)
    assert spans[0] == len(encode(tokenizer, [replies[0]])[0]) + 1
    assert (positions[starts[starts < shape.tokens]] == 0).all()


@torch.no_grad()
def test_an_exported_model_gives_the_logits_of_transformers_llama(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    size = model.Size(tokenizer.get_vocab_size(), hidden=128, layers=2, heads=2, kv_heads=1, inner=192)
    ours = model.Decoder(size, torch.Generator().manual_seed(1))
    for weight in ours.parameters():
        weight.copy_((weight + torch.randn(weight.shape) * 0.1).bfloat16())
    model.export(ours, tmp_path)
    again = model.Decoder(size, torch.Generator().manual_seed(2))
    model.restore(again, tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), again.parameters(), strict=True))
    theirs = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    tokens = torch.randint(0, size.vocabulary, (50,))
    positions = torch.cat((torch.arange(20), torch.arange(30)))
    x = ours.hidden(tokens, positions, torch.tensor([0, 20, 50]))
    logits = model.rms_norm(x, ours.norm) @ ours.embedding.T
    for first, last in ((0, 20), (20, 50)):
        expected = theirs(tokens[None, first:last]).logits[0]
        assert torch.allclose(logits[first:last], expected, atol=1e-4, rtol=1e-4)


def test_evaluation_counts_correct_answers() -> None:
    def perfect(examples: Sequence[Example]) -> list[str]:
        return [example.reply for example in examples]

    def half(examples: Sequence[Example]) -> list[str]:
        return [example.reply if place % 2 else "?" for place, example in enumerate(examples)]

    best = evaluate.evaluate(perfect, 4, levels=(1,), tasks=("total", "chat"))
    assert best["levels"]["1"]["accuracy"] == 1.0
    assert best["wrong"] == []
    middling = evaluate.evaluate(half, 4, levels=(1,), tasks=("total", "chat"))
    assert middling["tasks"]["total"]["1"]["right"] == 2
    assert len(middling["wrong"]) == 4
    assert "50.0" in evaluate.table(middling)


def test_the_wilson_interval_equals_known_values() -> None:
    low, high = evaluate.wilson(90, 100)
    assert (round(low, 4), round(high, 4)) == (0.8256, 0.9448)
    assert evaluate.wilson(0, 0) == (0.0, 1.0)
    assert evaluate.wilson(50, 50)[1] == 1.0


def test_the_bundled_ladder_is_whole_and_at_most_40_mb() -> None:
    ladder = registry.load(ARTEFACT)
    assert len(ladder.variants) >= 5
    assert {each.quantise for each in ladder.variants} >= {None, "int8"}
    homes = {each.path for each in ladder.variants}
    parts = {*bundle.PARTS, registry.FILE, "card.json"}
    assert {path.name for path in ARTEFACT.iterdir()} == parts | homes - {"."}
    for home in homes - {"."}:
        assert {path.name for path in (ARTEFACT / home).iterdir()} == set(bundle.PARTS)
    assert ladder.variant(ladder.top).path == "."  # so that the folder is the top to whatever wants one model
    assert sum(path.stat().st_size for path in ARTEFACT.rglob("*") if path.is_file()) <= bundle.LIMIT
    card = json.loads((ARTEFACT / "card.json").read_text())
    theirs = LlamaForCausalLM.from_pretrained(ARTEFACT)
    assert theirs.num_parameters() == card["parameters"]
    assert theirs.config.hidden_size >= 512


def shares(variant: Variant, level: str) -> float:
    """The share of right answers of a level, over all tasks."""
    cells = [cells[level] for cells in variant.tasks.values()]
    return sum(cell.mean * cell.count for cell in cells) / sum(cell.count for cell in cells)


def test_the_variants_solve_what_their_levels_promise() -> None:
    ladder = registry.load(ARTEFACT)
    smallest = min(ladder.variants, key=lambda each: each.bytes)
    hardest = str(LEVELS[-1])
    assert 0.7 <= shares(ladder.variant(ladder.top), hardest) <= 0.95
    assert shares(smallest, hardest) <= 0.4
    for each in ladder.variants:
        assert set(each.tasks) == set(TASKS)
        assert shares(each, str(LEVELS[0])) >= 0.95, each.name


def test_a_bundle_has_the_top_in_the_folder_itself(tmp_path: Path) -> None:
    made = tiny_ladder.make(tmp_path / "made")
    for checkpoint in ("full", "small"):
        for part in bundle.PARTS:
            (made / checkpoint / part).touch()
    target = tmp_path / "package"
    target.mkdir()
    (target / "card.json").write_text("{}")
    (target / "old.safetensors").touch()
    bundle.bundle(made, target)
    ladder = registry.load(target)
    assert [each.path for each in ladder.variants] == [".", ".", "small"]
    assert {path.name for path in target.iterdir()} == {*bundle.PARTS, "card.json", "ladder.json", "small"}
    assert (target / "model.safetensors").read_bytes() == (made / "full" / "model.safetensors").read_bytes()


def test_the_model_card_reports_the_required_accuracy() -> None:
    held = json.loads((ARTEFACT / "card.json").read_text())["held_out"]
    assert set(held["tasks"]) == set(TASKS)
    assert held["levels"]["1"]["interval"][0] >= 0.95
    for task in TASKS:
        assert held["tasks"][task]["1"]["accuracy"] >= 0.9, task


def test_the_bundled_model_answers_held_out_questions() -> None:
    answer = evaluate.local(ARTEFACT)
    for task in ("lookup", "total", "chat", "tools"):
        examples = held_out(task, 1, 10, seed=1)
        texts = answer(examples)
        assert sum(check(example, text) for example, text in zip(examples, texts, strict=True)) >= 8, task
