"""Reading config.json: old and new RoPE fields, defaults, and every refusal."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
import transformers

from stretto.errors import CheckpointError
from stretto.kernels.reference import REFERENCE
from stretto.models import families
from stretto.models.load import load
from stretto.models.spec import ModelSpec
from tests.models.checkpoints import FAMILIES, expected, make, rewrite
from tests.models.stepping import Driver
from tests.models.test_families import close, prompt


def config(path: Path, **fields: Any) -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(fields))
    return path


SMALL: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
}


MIXTRAL = {"model_type": "mixtral", "num_key_value_heads": 2}


@pytest.mark.parametrize("family", FAMILIES)
def test_old_rope_fields_are_read_like_new_ones(family: str, tmp_path: Path) -> None:
    """`rope_theta`, `rope_scaling` with `type`, `rope_local_base_freq` and `torch_dtype` are old names."""
    make(family, tmp_path)
    modern = families.read(tmp_path)
    file = tmp_path / "config.json"
    outer = json.loads(file.read_text())
    inner = outer.get("text_config", outer)
    rope = inner.pop("rope_parameters")
    if "full_attention" in rope:
        inner["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = rope["full_attention"]
    inner["rope_theta"] = rope.pop("rope_theta")
    kind = rope.pop("rope_type")
    if "partial_rotary_factor" in rope:
        inner["partial_rotary_factor"] = rope.pop("partial_rotary_factor")
    inner["rope_scaling"] = None if kind == "default" else {"type": kind, **rope}
    inner["torch_dtype"] = outer.pop("dtype")
    file.write_text(json.dumps(outer))
    assert families.read(tmp_path) == modern


def test_old_rope_fields_give_the_logits_of_transformers(tmp_path: Path) -> None:
    model = make("llama-3", tmp_path)
    scaling = {**model.config.to_dict()["rope_parameters"]}
    theta = scaling.pop("rope_theta")
    rewrite(tmp_path, "rope_parameters", rope_theta=theta, rope_scaling=scaling)
    decoder = load(tmp_path, dtype=torch.float32, device=torch.device("cpu"), kernels=REFERENCE)
    close(Driver(decoder).read(prompt(40), 40), expected(model, prompt(40)))


@pytest.mark.parametrize(
    "family",
    ["llama", "mistral", "qwen2", "qwen3", "phi3", "gemma2", "gemma3_text", "olmo2", "mixtral", "qwen3_moe"],
)
def test_missing_fields_have_the_defaults_of_transformers(family: str, tmp_path: Path) -> None:
    """A config.json with only a family gets the defaults of transformers."""
    reference = transformers.AutoConfig.for_model(family)
    sizes = {k: getattr(reference, k) for k in ("hidden_size", "intermediate_size", "num_hidden_layers")}
    sizes |= {"num_attention_heads": reference.num_attention_heads, "vocab_size": reference.vocab_size}
    spec = families.read(config(tmp_path, model_type=family, **sizes))
    heads = reference.num_attention_heads
    assert spec.kv_heads == reference.num_key_value_heads
    assert spec.head_dim == (getattr(reference, "head_dim", None) or reference.hidden_size // heads)
    assert spec.eps == reference.rms_norm_eps
    assert spec.tied == reference.tie_word_embeddings
    assert spec.context == reference.max_position_embeddings
    rope = reference.rope_parameters
    thetas = [rope[kind]["rope_theta"] for kind in ("full_attention", "sliding_attention") if kind in rope]
    assert [each.theta for each in spec.ropes] == (thetas or [rope["rope_theta"]])
    sliding = reference.sliding_window if hasattr(reference, "sliding_window") else None
    kinds = getattr(reference, "layer_types", None) or ["sliding_attention"] * len(spec.layers)
    windows = [sliding or 0 if kind == "sliding_attention" else 0 for kind in kinds]
    assert [layer.window for layer in spec.layers] == windows
    if spec.routing:
        experts = spec.routing
        assert (experts.count, experts.top_k) == (reference.num_local_experts, reference.num_experts_per_tok)
        assert experts.normalise == getattr(reference, "norm_topk_prob", True)
    eos = reference.eos_token_id
    assert spec.eos == (() if eos is None else tuple(eos) if isinstance(eos, list) else (eos,))


def test_a_multimodal_config_may_omit_text_fields(tmp_path: Path) -> None:
    """The first gemma3 checkpoints have a text part with only the fields that differ from the defaults."""
    text = {
        "model_type": "gemma3_text",
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    }
    spec = families.read(
        config(tmp_path, model_type="gemma3", text_config=text, eos_token_id=[1, 106], torch_dtype="bfloat16")
    )
    assert (spec.family, spec.heads, spec.kv_heads, spec.head_dim) == ("gemma3_text", 8, 4, 256)
    assert (spec.vocab, spec.context, spec.tied, spec.dtype, spec.eos) == (
        262208,
        131072,
        True,
        "bfloat16",
        (1, 106),
    )
    assert [layer.window for layer in spec.layers[:7]] == [1024] * 5 + [0, 1024]
    full, local = spec.ropes
    assert (full.kind, full.theta, full.factor) == ("linear", 1e6, 8.0)
    assert (local.kind, local.theta) == ("default", 1e4)
    assert [layer.rope for layer in spec.layers[4:7]] == [1, 0, 1]
    assert spec.embed_scale == 2560**0.5 and spec.scale == 256**-0.5


def test_yarn_extends_the_context_and_longrope_does_not(tmp_path: Path) -> None:
    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}
    assert families.read(config(tmp_path, **SMALL, rope_scaling=yarn)).context == 1024
    factors = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    long = {**SMALL, "model_type": "phi3", "original_max_position_embeddings": 64}
    for kind in ("longrope", "su"):
        spec = families.read(config(tmp_path, **long, rope_scaling={"type": kind, **factors}))
        assert (spec.context, spec.ropes[0].kind) == (64, "longrope")


def test_eos_is_all_that_the_files_name(tmp_path: Path) -> None:
    path = config(tmp_path, **SMALL, eos_token_id=7)
    assert families.read(path).eos == (7,)
    (path / "generation_config.json").write_text('{"eos_token_id": [8, 9]}')
    assert families.read(path).eos == (7, 8, 9)


def test_sliding_windows_are_read_per_layer(tmp_path: Path) -> None:
    def windows(**fields: Any) -> list[int]:
        return [layer.window for layer in families.read(config(tmp_path, **{**SMALL, **fields})).layers]

    qwen = {"model_type": "qwen2", "sliding_window": 8, "max_window_layers": 3}
    assert windows(**qwen) == [0, 0, 0, 0]
    assert windows(**qwen, use_sliding_window=True) == [0, 0, 0, 8]
    mistral = {"model_type": "mistral", "num_key_value_heads": 2}
    assert windows(**mistral, sliding_window=8) == [8] * 4
    assert windows(**mistral, sliding_window=None) == [0] * 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "falcon"}, "family 'falcon', which is not one of .*qwen3_moe"),
        (
            {"model_type": "mine", "auto_map": {"AutoModel": "x.Y"}},
            r"Code in .* \(auto_map\) is never run",
        ),
        ({"model_type": None}, "family ''"),
        ({"model_type": 3}, r"\$\.model_type must be a string"),
        ({"quantization_config": {"quant_method": "gptq"}}, r"is quantised \(gptq\)"),
        ({"quantization_config": {}}, r"is quantised \(unknown\)"),
        ({"hidden_size": None}, r"config\.json: \$\.hidden_size is missing"),
        ({"hidden_size": "64"}, r"\$\.hidden_size must be a whole number, not '64'"),
        ({"hidden_size": 64.0}, r"\$\.hidden_size must be a whole number"),
        ({"num_hidden_layers": 0}, r"\$\.num_hidden_layers must be from 1 to 65536, not 0"),
        ({"num_hidden_layers": 2**40}, r"\$\.num_hidden_layers must be from 1 to 65536"),
        ({"num_hidden_layers": True}, r"\$\.num_hidden_layers must be a whole number"),
        ({"num_key_value_heads": 3}, r"num_key_value_heads \(3\) does not divide"),
        ({"num_attention_heads": 64}, "must be an even number"),
        ({"rms_norm_eps": 0}, "must be above zero"),
        ({"rms_norm_eps": "tiny"}, "must be a number"),
        ({"hidden_act": "xielu"}, r"\$\.hidden_act is 'xielu'; implemented are silu"),
        ({"tie_word_embeddings": "yes"}, "must be true or false"),
        ({"torch_dtype": "float8_e4m3fn"}, r"\$\.torch_dtype is 'float8_e4m3fn'"),
        (
            {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
            r"rope_scaling\.type is 'dynamic'; implemented",
        ),
        (
            {"rope_parameters": {"rope_type": "proportional"}},
            r"rope_type is 'proportional'",
        ),
        ({"rope_scaling": {"type": "linear"}}, r"\$\.rope_scaling\.factor is missing"),
        ({"rope_scaling": ["yarn"]}, r"\$\.rope_scaling must be an object"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor is missing"),
        (
            {
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 8,
                    "low_freq_factor": 4,
                    "high_freq_factor": 4,
                }
            },
            "must be above low_freq_factor",
        ),
        ({"rope_scaling": {"type": "longrope", "short_factor": [1.0]}}, "must be a list of 8 numbers"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5, which this family does not have"),
        ({"layer_types": ["full_attention"] * 3}, "must be 4 times"),
        ({"layer_types": ["linear_attention"] * 4}, "must be 4 times"),
        ({"layer_types": ["sliding_attention"] * 4}, "mixes kinds of attention"),
        (
            {"model_type": "gemma3_text", "use_bidirectional_attention": True},
            "use_bidirectional_attention is True",
        ),
        ({"model_type": "gemma3_text", "attn_logit_softcapping": 30.0}, "attn_logit_softcapping is 30.0"),
        ({**MIXTRAL, "num_experts_per_tok": 9}, r"\(9\) is more than there are experts \(8\)"),
        ({"eos_token_id": "</s>"}, "eos_token_id must be token ids"),
        ({"model_type": "gemma3", "text_config": 3}, r"\$\.text_config must be an object"),
    ],
)
def test_unsupported_and_invalid_fields_are_refused_by_name(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message) as error:
        families.read(config(tmp_path, **{**SMALL, **changes}))
    assert str(tmp_path) in error.value.message


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff\xfe", b'{"model_type": '])
def test_malformed_json_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        families.read(tmp_path)


def test_a_missing_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        families.read(tmp_path)


def test_a_model_spec_survives_json(tmp_path: Path) -> None:
    make("gemma3", tmp_path)
    spec = families.read(tmp_path)
    assert msgspec.json.decode(msgspec.json.encode(spec), type=ModelSpec) == spec


def test_the_end_token_that_only_the_tokenizer_names_ends_an_answer(tmp_path: Path):
    path = config(tmp_path, **SMALL)
    tokens = {"5": {"content": "<end>", "special": True}, "6": {"content": "<other>"}}
    stated = {"eos_token": {"content": "<end>"}, "added_tokens_decoder": tokens}
    (path / "tokenizer_config.json").write_text(json.dumps(stated))
    assert families.read(path).eos == (2, 5)  # with the family's own, as no config names one
    (path / "generation_config.json").write_text('{"eos_token_id": [8]}')
    assert families.read(path).eos == (8, 5)
    (path / "tokenizer_config.json").write_text('{"eos_token": "<end>"}')
    (path / "tokenizer.json").write_text('{"added_tokens": [{"id": 6, "content": "<end>"}]}')
    assert families.read(path).eos == (8, 6)
    (path / "tokenizer_config.json").write_text('{"eos_token": "<unknown>"}')
    assert families.read(path).eos == (8,)


def test_rope_scaling_that_was_added_counts_more_than_rope_parameters(tmp_path: Path):
    """As in transformers: people add YaRN by that field."""
    plain = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 1e6}
    both = families.read(config(tmp_path, **SMALL, **plain, rope_scaling=yarn)).ropes
    assert both == families.read(config(tmp_path, **SMALL, rope_parameters=yarn)).ropes
    assert both != families.read(config(tmp_path, **SMALL, **plain)).ropes
