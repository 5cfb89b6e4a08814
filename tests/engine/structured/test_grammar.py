"""Grammar matchers: texts are sampled from random logits under a grammar and then parsed."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from stretto.engine.runners.sampler import Sampler
from stretto.engine.sequence import Sequence
from stretto.engine.structured import grammar as module
from stretto.engine.structured.grammar import Grammars, Matcher
from stretto.errors import InvalidGrammar
from stretto.types import Grammar, Request, Sampling

END, PADDED = 0, 77
CORPUS = [
    '{"name": "Ada", "age": 36, "tags": ["a", "b"]}',
    "true false null 12.5e-3",
    "größe 日本 the quick brown fox",
]
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "mood": {"enum": ["good", "bad", None]},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 5}, "maxItems": 3},
    },
    "required": ["name", "age", "mood", "tags"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=alphabet, special_tokens=["<end>", "<user>"], show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def tokenizer(directory: Path) -> Tokenizer:
    return Tokenizer.from_file(str(directory / "tokenizer.json"))


@pytest.fixture(scope="module")
def vocab(tokenizer: Tokenizer) -> int:
    """A vocabulary larger than the tokenizer, as in models with padded embeddings."""
    return tokenizer.get_vocab_size() + PADDED


@pytest.fixture(scope="module")
def grammars(directory: Path, vocab: int) -> Grammars:
    return Grammars(directory, frozenset({END, vocab + 1000}), vocab)


def schema(value: object) -> Grammar:
    return Grammar("json_schema", json.dumps(value))


def allowed(matcher: Matcher) -> list[int]:
    bits = np.full(matcher.words, -1, dtype=np.int32)
    matcher.mask_into(bits)
    return np.flatnonzero(np.unpackbits(bits.view(np.uint8), bitorder="little")).tolist()


def spelled(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text).ids


def follows(matcher: Matcher, tokens: list[int]) -> bool:
    """True if the tokens form one complete text under the grammar."""
    return all(matcher.accept(token) for token in tokens) and END in allowed(matcher)


def write(grammars: Grammars, grammar: Grammar, tokenizer: Tokenizer, seed: int) -> str:
    """Sample a text from random logits. Closing brackets become likelier with its length, so it ends."""
    vocab = tokenizer.get_vocab_size() + PADDED
    closers = [tokenizer.token_to_id(piece) for piece in '"}]']
    rng, sampler = np.random.default_rng(seed), Sampler(vocab, frozenset({END}), torch.device("cpu"))
    sampling = Sampling(seed=seed, temperature=0.8, grammar=grammar)
    matcher, request = (
        grammars.compile(grammar),
        Request(id=seed, model="m", prompt=(1,), arrival=0.0, sampling=sampling),
    )
    seq = Sequence.of(request, 10_000, matcher)
    while not matcher.finished:
        logits = rng.normal(size=vocab).astype(np.float32)
        if seq.output_len > 30:
            logits[END] += 40
            logits[closers] += 10 + seq.output_len / 10
        (drawn,) = sampler(torch.tensor(logits)[None], [seq])
        assert 0 <= drawn.token < vocab - PADDED, matcher.error
        if drawn.token == END:
            break
        seq.tokens.append(drawn.token)
        assert matcher.accept(drawn.token), matcher.error
        assert seq.output_len < 3000
    return tokenizer.decode(seq.tokens[1:], skip_special_tokens=False)


@pytest.mark.parametrize("seed", range(12))
def test_text_under_json_object_is_a_json_object(grammars: Grammars, tokenizer: Tokenizer, seed: int):
    text = write(grammars, Grammar("json_object"), tokenizer, seed)
    assert isinstance(json.loads(text), dict), text


@pytest.mark.parametrize("seed", range(12))
def test_text_under_a_schema_satisfies_the_schema(grammars: Grammars, tokenizer: Tokenizer, seed: int):
    person = json.loads(write(grammars, schema(PERSON), tokenizer, seed))
    assert list(person) == ["name", "age", "mood", "tags"]
    assert (
        1 <= len(person["name"]) <= 12
        and 0 <= person["age"] <= 150
        and person["mood"] in ("good", "bad", None)
    )
    assert len(person["tags"]) <= 3 and all(len(tag) <= 5 for tag in person["tags"])


@pytest.mark.parametrize(
    "pattern", [r"(\d{3}-){2}[a-f]{1,4}", r"^(yes|no)( very)*$", "[^a]é+日?", r"a/b\n\\"]
)
def test_text_under_a_regex_matches_the_regex(grammars: Grammars, tokenizer: Tokenizer, pattern: str):
    for seed in range(4):
        text = write(grammars, Grammar("regex", pattern), tokenizer, seed)
        assert re.fullmatch(pattern, text), text


def test_text_under_a_choice_is_one_of_the_choices(grammars: Grammars, tokenizer: Tokenizer):
    choices = ["yes", "yes, please", 'a "b"\n\\c', "größe", "<end>", "a|b", "[x]{2}"]
    found = {write(grammars, Grammar("choice", json.dumps(choices)), tokenizer, seed) for seed in range(40)}
    assert found <= set(choices) and len(found) > 3


def test_every_choice_can_be_generated(grammars: Grammars, tokenizer: Tokenizer):
    choices = ["yes", "yes, please", 'a "b"\n\\c', "größe 😀", "a|b", "[x]{2}", "", "  ", "#$&~-"]
    for choice in choices:
        assert follows(
            grammars.compile(Grammar("choice", json.dumps(choices))), spelled(tokenizer, choice)
        ), choice


def test_eos_is_allowed_only_where_the_grammar_may_end(grammars: Grammars, tokenizer: Tokenizer):
    matcher = grammars.compile(Grammar("regex", "ab?c?"))
    assert END not in allowed(matcher) and not matcher.finished
    for token, whole in zip(spelled(tokenizer, "xaxbxc")[1::2], (False, False, True), strict=True):
        assert matcher.accept(token)
        assert END in allowed(matcher) and matcher.finished is whole
    stopped = grammars.compile(Grammar("regex", "ab?c?"))
    assert stopped.accept(spelled(tokenizer, "a")[0]) and stopped.accept(END)
    assert stopped.finished and stopped.error is None


def test_padding_ids_and_special_tokens_are_never_allowed(
    grammars: Grammars, tokenizer: Tokenizer, vocab: int
):
    matcher = grammars.compile(Grammar("regex", r"(.|\n)*"))
    ids = allowed(matcher)
    assert matcher.words == -(-vocab // 32) and max(ids) < tokenizer.get_vocab_size()
    assert tokenizer.token_to_id("<user>") not in ids and END in ids and len(ids) > 200


def test_masks_cover_the_tokenizer_when_the_model_has_fewer_logits(directory: Path, tokenizer: Tokenizer):
    matcher = Grammars(directory, frozenset({END}), 40).compile(Grammar("json_object"))
    assert matcher.words == -(-tokenizer.get_vocab_size() // 32)
    assert allowed(matcher)


def test_replaying_tokens_rebuilds_a_matcher_without_shared_state(grammars: Grammars, tokenizer: Tokenizer):
    tokens = spelled(tokenizer, write(grammars, schema(PERSON), tokenizer, 3))
    first, masks = grammars.compile(schema(PERSON)), []
    for token in tokens:
        masks.append(allowed(first))
        assert first.accept(token)
    for cut in range(0, len(tokens), 7):
        again = grammars.compile(schema(PERSON))
        assert all(again.accept(token) for token in tokens[:cut])
        assert allowed(again) == masks[cut]
    assert first.finished


def test_a_refused_token_ends_the_matcher_with_an_error(grammars: Grammars, tokenizer: Tokenizer, vocab: int):
    matcher = grammars.compile(Grammar("regex", "ab"))
    assert matcher.error is None
    assert not matcher.accept(spelled(tokenizer, "z")[0])
    assert matcher.error is not None and not matcher.finished and allowed(matcher) == []
    assert not grammars.compile(Grammar("regex", "ab")).accept(vocab - 1)


def test_a_mask_that_exceeds_the_limits_ends_only_its_matcher(
    grammars: Grammars, tokenizer: Tokenizer, vocab: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(module, "LIMITS", module.LLParserLimits(step_lexer_fuel=300, verbose_errors=False))
    explosive, calm = Grammar("regex", "(.*[a-z].{20}){20}"), Grammar("regex", "yes|no")
    matcher, neighbour = grammars.compile(explosive), grammars.compile(calm)
    assert allowed(matcher) == [] and matcher.error is not None and "too much work" in matcher.error
    assert not matcher.finished and not matcher.accept(5)
    sequences = [
        Sequence.of(Request(id=at, model="m", prompt=(1,), arrival=0.0, sampling=Sampling(seed=1)), 100)
        for at in range(2)
    ]
    sequences[0].grammar, sequences[1].grammar = matcher, neighbour
    failed, fine = Sampler(vocab, frozenset({END}), torch.device("cpu"))(torch.zeros(2, vocab), sequences)
    assert failed.token == -1 and neighbour.accept(fine.token)


def test_one_blank_is_allowed_between_values_unless_the_schema_asks_for_more(
    grammars: Grammars, tokenizer: Tokenizer
):
    tokens = spelled(tokenizer, " ")
    wide = schema({"type": "array", "x-guidance": {"whitespace_pattern": " {1,3}"}})
    for grammar, blanks in ((schema({"type": "array", "items": {"type": "integer"}}), 1), (wide, 3)):
        matcher = grammars.compile(grammar)
        assert matcher.accept(spelled(tokenizer, "[")[0])
        assert all(matcher.accept(tokens[0]) for _ in range(blanks))
        assert tokens[0] not in allowed(matcher)


@pytest.mark.parametrize(
    ("grammar", "message"),
    [
        (Grammar("regex", "a(b"), "unclosed group, at '(b'"),
        (Grammar("regex", r"a(?=b)"), "look-ahead"),
        (Grammar("regex", r"a\bc"), "look-around such as"),
        (Grammar("regex", "a" * 5000), "at most 4096"),
        (Grammar("json_schema", '{"type":'), "not JSON"),
        (Grammar("json_schema", '{}}, {"lark_grammar": "start: /x/"'), "not JSON"),
        (Grammar("json_schema", "[1]"), "object"),
        (schema({"type": "objekt"}), "Invalid type: objekt"),
        (schema({"type": "array", "uniqueItems": True}), '"uniqueItems" is not supported'),
        (schema({"if": {}, "then": {}}), '"if", "then" is not supported'),
        (schema({"oneOf": [{"type": "integer"}, {"type": "number"}]}), "use anyOf"),
        (schema({"$ref": "#/$defs/gone"}), "'/$defs/gone' does not exist"),
        (Grammar("json_schema", '{"items":' * 130 + "{}" + "}" * 130), "nested too deeply"),
        (Grammar("json_schema", '{"items":' * 5000 + "{}" + "}" * 5000), "recursion"),
        (Grammar("json_schema", '{"a":"\ud800"}'), "JSON"),
        (Grammar("choice", "[]"), "one or more strings"),
        (Grammar("choice", '["a", 1]'), "one or more strings"),
        (Grammar("choice", json.dumps(["x" * 2**17])), "at most 131072"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.kind,
)
def test_invalid_grammars_are_refused_with_a_reason(grammars: Grammars, grammar: Grammar, message: str):
    with pytest.raises(InvalidGrammar, match=re.escape(message)):
        grammars.compile(grammar)


def test_the_schema_true_allows_any_value(grammars: Grammars, tokenizer: Tokenizer):
    for text in ("null", "-12.5e3", '{"a": [1, true]}'):
        assert follows(grammars.compile(Grammar("json_schema", "true")), spelled(tokenizer, text))


def test_a_model_without_a_usable_tokenizer_refuses_grammars(tmp_path: Path):
    with pytest.raises(InvalidGrammar, match="tokenizer cannot follow a grammar"):
        Grammars(tmp_path, frozenset({END}), 100).compile(Grammar("json_object"))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InvalidGrammar, match="tokenizer cannot follow a grammar"):
        Grammars(tmp_path, frozenset({END}), 100).compile(Grammar("json_object"))


def test_byte_fallback_tokenizers_are_supported(tmp_path: Path):
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2}
    for piece in [*(f"<0x{byte:02X}>" for byte in range(256)), "▁", *'{}":,[]', "ab", "▁hi", '{"', '":']:
        vocab[piece] = len(vocab)
    model = models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    tokenizer = Tokenizer(model)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    matcher = Grammars(tmp_path, frozenset({2}), len(vocab)).compile(Grammar("json_object"))
    for piece in ('{"', "▁hi", "<0xC3>", "<0xA9>", '":', "<0x31>", "}"):
        assert vocab[piece] in allowed(matcher), piece
        assert matcher.accept(vocab[piece])
    assert matcher.finished


def test_the_number_of_cached_grammars_is_bounded(directory: Path, vocab: int):
    grammars = Grammars(directory, frozenset({END}), vocab)
    for number in range(module.COMPILED_GRAMMARS + 5):
        grammars.compile(Grammar("regex", f"a{{{number + 1}}}"))
    assert grammars.kept == module.COMPILED_GRAMMARS


def test_a_kept_grammar_is_known_and_the_least_recently_used_is_forgotten(
    directory: Path, vocab: int
) -> None:
    grammars = Grammars(directory, frozenset({END}), vocab)
    first = Grammar("regex", "a+")
    assert grammars.known(first) is None
    compiled = grammars.compile(first)
    for at in range(module.COMPILED_GRAMMARS - 1):
        grammars.compile(Grammar("regex", f"b{{{at}}}c"))
    known = grammars.known(first)  # which makes it the last one used
    assert known is not None
    assert allowed(known) == allowed(compiled)
    grammars.compile(Grammar("regex", "d"))
    assert grammars.known(first) is not None
    assert grammars.known(Grammar("regex", "b{0}c")) is None
    assert grammars.kept == module.COMPILED_GRAMMARS
