"""The supported model families, one row each, and how a row and a config.json give a ModelSpec.

A family is data: the names of its tensors, the defaults of its config.json, and the rules it follows. A field
that would change the numbers and is not implemented is refused by name, never ignored.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, cast

from msgspec import Struct

from stretto.disk.files import loading
from stretto.errors import CheckpointError
from stretto.kernels import Activation
from stretto.models import rope
from stretto.models.fields import Fields
from stretto.models.spec import Layer, ModelSpec, Rope, Routing, StoredDtype

ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "relu": "relu",
}
MAX_COUNT = 65_536  # layers or experts; a config with more is a mistake or an attack
FULL, SLIDING = "full_attention", "sliding_attention"


class Names(Struct, frozen=True, kw_only=True):
    """Tensor names of a layer, without the prefix `model.layers.N.` and without `.weight`. Parts of a fused
    weight are in stacking order; `{}` stands for an expert's number; None: the family has no such norm."""

    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    out: str = "self_attn.o_proj"
    query_norm: str = "self_attn.q_norm"
    key_norm: str = "self_attn.k_norm"
    gate_up: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    down: str = "mlp.down_proj"
    router: str = "mlp.gate"
    expert_gate_up: tuple[str, ...] = ("mlp.experts.{}.gate_proj", "mlp.experts.{}.up_proj")
    expert_down: str = "mlp.experts.{}.down_proj"
    pre_attention_norm: str | None = "input_layernorm"
    post_attention_norm: str | None = None
    pre_mlp_norm: str | None = "post_attention_layernorm"
    post_mlp_norm: str | None = None


SANDWICH = Names(
    post_attention_norm="post_attention_layernorm",
    pre_mlp_norm="pre_feedforward_layernorm",
    post_mlp_norm="post_feedforward_layernorm",
)


class Family(Struct, frozen=True, kw_only=True):
    """A row of the table of families.

    `defaults`: the values of fields that config.json lacks.
    `only`: fields that must have this value.
    `has_window(fields, i)`: whether layer i has a sliding window, if `layer_types` does not say so.
    `uses_layer_types`: whether the family follows `layer_types`.
    `*_bias`: whether these layers have a bias; None: as config.json says.
    """

    defaults: dict[str, Any] = {}
    only: dict[str, Any] = {}
    names: Names = Names()
    has_window: Callable[[Fields, int], bool] = lambda fields, layer: False
    uses_layer_types: bool = False
    query_norm: Literal["none", "head", "row"] = "none"
    qkv_bias: bool | None = False
    out_bias: bool | None = False
    mlp_bias: bool | None = False
    partial_rotary: bool = False
    gemma: bool = False
    experts: bool = False


def _always(fields: Fields, layer: int) -> bool:
    return True


def _if_used(fields: Fields, layer: int) -> bool:
    return fields.flag("use_sliding_window")


def _upper_if_used(fields: Fields, layer: int) -> bool:
    return fields.flag("use_sliding_window") and layer >= fields.count("max_window_layers", minimum=0)


def _pattern(fields: Fields, layer: int) -> bool:
    return (layer + 1) % fields.count("sliding_window_pattern") != 0


COMMON: dict[str, Any] = {"rms_norm_eps": 1e-6, "hidden_act": "silu"}
QWEN: dict[str, Any] = {
    "max_position_embeddings": 32768,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "vocab_size": 151936,
}
GEMMA: dict[str, Any] = {
    "hidden_activation": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "eos_token_id": 1,
}
FAMILIES: dict[str, Family] = {
    "llama": Family(
        defaults={"vocab_size": 32000, "max_position_embeddings": 2048, "eos_token_id": 2},
        qkv_bias=None,
        out_bias=None,
        mlp_bias=None,
    ),
    "mistral": Family(
        defaults={
            "vocab_size": 32000,
            "max_position_embeddings": 131072,
            "num_key_value_heads": 8,
            "sliding_window": 4096,
            "eos_token_id": 2,
        },
        has_window=_always,
    ),
    "qwen2": Family(defaults=QWEN, has_window=_upper_if_used, uses_layer_types=True, qkv_bias=True),
    "qwen3": Family(
        defaults={**QWEN, "head_dim": 128},
        has_window=_upper_if_used,
        uses_layer_types=True,
        query_norm="head",
        qkv_bias=None,
        out_bias=None,
    ),
    "phi3": Family(
        defaults={"max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "eos_token_id": 32000},
        names=Names(qkv=("self_attn.qkv_proj",), gate_up=("mlp.gate_up_proj",)),
        has_window=_always,
        partial_rotary=True,
    ),
    "gemma2": Family(
        defaults={
            **GEMMA,
            "vocab_size": 256000,
            "max_position_embeddings": 8192,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
            "sliding_window_pattern": 2,
        },
        only={"use_bidirectional_attention": False},
        names=SANDWICH,
        has_window=_pattern,
        uses_layer_types=True,
        qkv_bias=None,
        out_bias=None,
        gemma=True,
    ),
    "gemma3_text": Family(
        defaults={
            **GEMMA,
            "vocab_size": 262208,
            "max_position_embeddings": 131072,
            "rope_theta": 1e6,
            "rope_local_base_freq": 1e4,
            "sliding_window_pattern": 6,
        },
        only={"use_bidirectional_attention": False, "attn_logit_softcapping": None},
        names=SANDWICH,
        has_window=_pattern,
        uses_layer_types=True,
        query_norm="head",
        qkv_bias=None,
        out_bias=None,
        gemma=True,
    ),
    "olmo2": Family(
        defaults={"max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "eos_token_id": 50279},
        names=Names(
            pre_attention_norm=None,
            post_attention_norm="post_attention_layernorm",
            pre_mlp_norm=None,
            post_mlp_norm="post_feedforward_layernorm",
        ),
        query_norm="row",
        qkv_bias=None,
        out_bias=None,
    ),
    "mixtral": Family(
        defaults={
            "vocab_size": 32000,
            "max_position_embeddings": 131072,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1e6,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "norm_topk_prob": True,
            "eos_token_id": 2,
        },
        only={"norm_topk_prob": True},
        names=Names(
            router="block_sparse_moe.gate",
            expert_gate_up=("block_sparse_moe.experts.{}.w1", "block_sparse_moe.experts.{}.w3"),
            expert_down="block_sparse_moe.experts.{}.w2",
        ),
        has_window=_always,
        experts=True,
    ),
    "qwen3_moe": Family(
        defaults={
            **QWEN,
            "num_key_value_heads": 4,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
        },
        has_window=_if_used,
        query_norm="head",
        qkv_bias=None,
        out_bias=None,
        experts=True,
    ),
}
# A checkpoint of text and images whose text part is a family of its own.
NESTED = {"gemma3": ("text_config", "gemma3_text")}
SHARED = {"tie_word_embeddings", "torch_dtype", "dtype", "eos_token_id"}


def read(path: Path) -> ModelSpec:
    """The model in directory `path`, from its config.json (and generation_config.json).

    Raises CheckpointError for an unknown family, a quantised checkpoint, or a field that is missing,
    malformed or asks for something that is not implemented.
    """
    with loading(f"{path / 'config.json'}"):
        return _read(path)


# Files in which older tools say how they quantised the weights.
QUANTISERS = {"quantize_config.json": "gptq", "quant_config.json": "awq"}


def _quantised(path: Path, config: Fields) -> str | None:
    """How the weights are quantised, by any of the ways to say so; None for plain floats."""
    if config.get("quantization_config") is not None or config.get("compression_config") is not None:
        return config.object("quantization_config").text("quant_method", "unknown")
    if config.get("quantization") is not None:
        return "mlx"
    return next((method for name, method in QUANTISERS.items() if (path / name).exists()), None)


def _read(path: Path) -> ModelSpec:
    config = Fields.load(path / "config.json")
    name = config.text("model_type", "")
    if (method := _quantised(path, config)) is not None:
        raise CheckpointError(
            f"{path} is quantised ({method}); only float32, bfloat16 and float16 weights are read: "
            "use the checkpoint it was made from"
        )
    if name in NESTED:
        key, name = NESTED[name]
        nested = config.object(key)
        outer = {k: v for k, v in config.data.items() if k in SHARED}
        config = Fields({**nested.data, **outer}, nested.where)
    if name not in FAMILIES:
        remote = " Code in a checkpoint (auto_map) is never run." if "auto_map" in config.data else ""
        known = ", ".join(sorted([*FAMILIES, *NESTED]))
        raise CheckpointError(f"{path} is of family {name!r}, which is not one of {known}.{remote}")
    family = FAMILIES[name]
    fields = Fields(config.data, config.where, {**COMMON, **family.defaults})
    for key, value in family.only.items():
        if fields.get(key) not in (value, None):
            raise fields.error(key, f"is {fields.get(key)!r}; only {value!r} is implemented")
    return _spec(name, family, fields, _eos(path, fields))


def _spec(name: str, family: Family, fields: Fields, eos: tuple[int, ...]) -> ModelSpec:
    hidden, heads = fields.count("hidden_size"), fields.count("num_attention_heads")
    kv_heads = fields.count("num_key_value_heads", heads)
    head_dim = fields.count("head_dim", max(1, hidden // heads))
    if heads % kv_heads:
        raise fields.error("num_key_value_heads", f"({kv_heads}) does not divide num_attention_heads")
    key = "hidden_activation" if family.gemma else "hidden_act"
    activation = fields.text(key)
    if activation not in ACTIVATIONS:
        raise fields.error(key, f"is {activation!r}; implemented are {', '.join(ACTIVATIONS)}")
    bias = fields.flag("attention_bias")
    ropes = _ropes(family, fields, head_dim)
    return ModelSpec(
        family=name,
        vocab=fields.count("vocab_size"),
        hidden=hidden,
        intermediate=fields.count("intermediate_size"),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        layers=_layers(family, fields),
        ropes=ropes,
        context=_context(fields, ropes),
        eps=fields.number("rms_norm_eps"),
        scale=(fields.number("query_pre_attn_scalar") if family.gemma else head_dim) ** -0.5,
        activation=ACTIVATIONS[activation],
        dtype=_dtype(fields),
        tied=fields.flag("tie_word_embeddings"),
        unit_offset=family.gemma,
        query_norm=family.query_norm,
        qkv_bias=bias if family.qkv_bias is None else family.qkv_bias,
        out_bias=bias if family.out_bias is None else family.out_bias,
        mlp_bias=fields.flag("mlp_bias") if family.mlp_bias is None else family.mlp_bias,
        embed_scale=hidden**0.5 if family.gemma else 1.0,
        attention_cap=fields.maybe("attn_logit_softcapping") or 0.0,
        final_cap=fields.maybe("final_logit_softcapping") or 0.0,
        routing=_routing(family, fields),
        eos=eos,
    )


def _eos(path: Path, config: Fields) -> tuple[int, ...]:
    """The tokens that config.json, generation_config.json or the tokenizer say end an answer; if none of them
    does, those of the family."""
    generation = path / "generation_config.json"
    found: dict[int, None] = {}
    stated = [Fields(config.data, config.where)]
    stated += [Fields.load(generation)] if generation.exists() else []
    for fields in [*stated, config]:
        value = None if fields is config and found else fields.get("eos_token_id")
        listed = [] if value is None else [value]
        tokens = cast("list[Any]", value) if isinstance(value, list) else listed
        if not all(isinstance(token, int) and token >= 0 for token in tokens):
            raise fields.error("eos_token_id", f"must be token ids, not {value!r}")
        found |= dict.fromkeys(tokens)
    own = _tokenizer_eos(path)
    return tuple(found) if own is None else tuple(found | {own: None})


def _tokenizer_eos(path: Path) -> int | None:
    """The id of the token that the tokenizer calls `eos_token`; None if its added tokens do not list it."""
    file, whole = path / "tokenizer_config.json", path / "tokenizer.json"
    config = Fields.load(file) if file.exists() else Fields({}, str(file))
    name: Any = config.get("eos_token")
    if isinstance(name, dict):
        name = cast("dict[str, Any]", name).get("content")
    listed: Any = config.get("added_tokens_decoder")
    entries: list[tuple[Any, Any]] = []
    if isinstance(listed, dict):
        entries = list(cast("dict[str, Any]", listed).items())
    elif isinstance(name, str) and whole.exists():
        added: Any = Fields.load(whole).get("added_tokens")
        tokens = cast("list[Any]", added) if isinstance(added, list) else []
        entries = [
            (cast("dict[str, Any]", each).get("id"), each) for each in tokens if isinstance(each, dict)
        ]
    for ident, entry in entries:
        content = cast("dict[str, Any]", entry).get("content") if isinstance(entry, dict) else None
        if content is not None and content == name and str(ident).isdecimal():
            return int(ident)
    return None


def _dtype(fields: Fields) -> StoredDtype | None:
    key = "dtype" if fields.get("dtype") is not None else "torch_dtype"
    if fields.get(key) is None:
        return None
    name = fields.text(key)
    if name not in ("float32", "bfloat16", "float16"):
        raise fields.error(key, f"is {name!r}; implemented are float32, bfloat16 and float16")
    return name


def _layers(family: Family, fields: Fields) -> tuple[Layer, ...]:
    count = fields.count("num_hidden_layers", maximum=MAX_COUNT)
    windowed = fields.get("sliding_window") is not None
    slides = [family.has_window(fields, layer) for layer in range(count)]
    types = fields.list("layer_types")
    if types:
        if len(types) != count or any(kind not in (FULL, SLIDING) for kind in types):
            raise fields.error("layer_types", f"must be {count} times {FULL!r} or {SLIDING!r}, not {types}")
        stated = [kind == SLIDING for kind in types]
        if family.uses_layer_types:
            used = not isinstance(fields.get("use_sliding_window"), bool) or fields.flag("use_sliding_window")
            slides = [slide and used for slide in stated]
        elif stated != [slide and windowed for slide in slides]:
            raise fields.error("layer_types", "mixes kinds of attention, which this family does not")
    window = fields.count("sliding_window") if windowed and any(slides) else 0
    split = isinstance(fields.get("rope_local_base_freq"), int | float) or _by_type(fields)
    return tuple(
        Layer(window if slide else 0, int(slide and split), _sparse(family, fields, layer))
        for layer, slide in enumerate(slides)
    )


def _sparse(family: Family, fields: Fields, layer: int) -> bool:
    if not family.experts or layer in fields.list("mlp_only_layers"):
        return False
    return (layer + 1) % fields.count("decoder_sparse_step", 1) == 0


def _routing(family: Family, fields: Fields) -> Routing | None:
    if not family.experts:
        return None
    key = "num_local_experts" if fields.get("num_local_experts") is not None else "num_experts"
    count, top_k = fields.count(key, maximum=MAX_COUNT), fields.count("num_experts_per_tok")
    if top_k > count:
        raise fields.error("num_experts_per_tok", f"({top_k}) is more than there are experts ({count})")
    intermediate = fields.count("moe_intermediate_size", fields.count("intermediate_size"))
    return Routing(count, top_k, fields.flag("norm_topk_prob"), intermediate)


def _by_type(fields: Fields) -> bool:
    return bool({FULL, SLIDING} & set(fields.object("rope_parameters").data))


def _ropes(family: Family, fields: Fields, head_dim: int) -> tuple[Rope, ...]:
    """The rotary embedding of full-attention layers, and where they differ that of sliding ones."""
    theta = fields.number("rope_theta", 10_000.0)
    found = fields.object("rope_parameters")
    if _by_type(fields):
        if fields.object("rope_scaling").data:
            why = "is beside rope_parameters that differ by layer; leave one of them out"
            raise fields.error("rope_scaling", why)
        local = fields.number("rope_local_base_freq", theta)
        pairs = [(found.object(FULL), theta), (found.object(SLIDING), local)]
    else:
        scaling = fields.object("rope_scaling")  # what a user adds counts more, as in transformers
        pairs = [(scaling if scaling.data else found, theta)]
        if fields.get("rope_local_base_freq") is not None:
            pairs.append((Fields({}, fields.where), fields.number("rope_local_base_freq")))
    ropes: list[Rope] = []
    for parameters, default in pairs:
        part = parameters.number("partial_rotary_factor", fields.number("partial_rotary_factor", 1.0))
        if part != 1.0 and not (family.partial_rotary and part < 1.0):
            raise fields.error("partial_rotary_factor", f"is {part}, which this family does not have")
        dims = int(head_dim * part)
        if dims < 2 or dims % 2:
            raise fields.error("head_dim", f"gives {dims} dimensions to rotate; it must be an even number")
        if family.partial_rotary and parameters.get("type") == "yarn":
            parameters = Fields({**parameters.data, "type": "longrope"}, parameters.where)
        ropes.append(rope.read(parameters, fields, dims, theta=default))
    return tuple(ropes)


def _context(fields: Fields, ropes: tuple[Rope, ...]) -> int:
    context = fields.count("max_position_embeddings")
    for each in ropes:
        if each.kind == "yarn":
            context = max(context, int(each.original * each.factor))
        if each.kind == "longrope":
            # The factors for longer texts change every key, so a sequence could not grow past the border.
            context = min(context, each.original)
    return context
