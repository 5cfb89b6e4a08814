"""The CUDA table against plain definitions in float64, on a GPU or in Triton's interpreter."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from stretto.kernels import (
    Activation,
    AnyKernels,
    Attention,
    DecoderLayer,
    Geometry,
    LayerStack,
    MixtureOfExperts,
    Mlp,
    Rotation,
)
from stretto.kernels.reference import REFERENCE
from tests.kernels.compiling import compiled
from tests.kernels.cuda import DEVICE, GPU, TOLERANCES, on_device
from tests.kernels.steps import Step, attention, rms, rotated, step

from stretto.kernels.cuda import attention as paged, linear, weights as formats  # isort: skip
from stretto.kernels.cuda.table import CudaQuantise, table  # isort: skip

pytestmark = [pytest.mark.cuda] if GPU else []
FEW_ROWS = """
from stretto.kernels.cuda.linear import skinny_gemm
from stretto.kernels.cuda.routing import ExpertChoice, sort
from stretto.kernels.cuda.weights import Unquantised
weights = Unquantised.pack(torch.zeros(512, 512, dtype=torch.bfloat16), None)
for rows in (40, 48, 56):
    skinny_gemm(torch.zeros(rows, 512, dtype=torch.bfloat16), weights, torch.zeros(64, dtype=torch.int32))
    chosen = torch.zeros(rows // 8, 8, dtype=torch.int32)
    sort(ExpertChoice(chosen, chosen.float()), 16)
"""
KIND = Attention(heads=6, kv_heads=2, head_dim=16, scale=0.3)
dtypes = pytest.mark.parametrize("dtype", TOLERANCES)
DTYPE = torch.bfloat16 if GPU else torch.float32


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use few splits: the interpreter runs all programs one after another, even the empty ones."""
    if not GPU:
        monkeypatch.setattr(paged, "MAX_SPLITS", 4)


@pytest.fixture(scope="module")
def kernels() -> AnyKernels:
    return table(DEVICE)


def test_rows_of_any_number_need_no_kernel_of_their_own(tmp_path: Path) -> None:
    """A size that is captured in spare time would compile it, while a new request waits."""
    assert len(compiled(FEW_ROWS, tmp_path)) == 2


def near(found: Tensor, wanted: Tensor, tolerance: float) -> None:
    found, wanted = found.cpu().double(), wanted.cpu().double()
    assert found.shape == wanted.shape
    assert torch.isfinite(found).all()
    assert (found - wanted).norm() / wanted.norm() <= tolerance


def attend(kernels: AnyKernels, made: Step, kind: Attention, q: Tensor) -> Tensor:
    batch, cache = on_device(made)
    plan = kernels.prepare(batch, cache, Geometry((Rotation(torch.zeros(8, device=DEVICE)),), (kind.window,)))
    new = [
        slice(context - count, None)
        for count, context in zip(made.batch.query_lens, made.batch.context_lens, strict=True)
    ]
    keys = torch.cat([keys[rows] for keys, rows in zip(made.keys, new, strict=True)])
    values = torch.cat([values[rows] for values, rows in zip(made.values, new, strict=True)])
    qkv = torch.cat((q, keys, values), 1).flatten(1).to(DEVICE)
    placed = kernels.rope_and_cache(qkv, None, kind, cache.layers[0], plan)
    kernels.paged_attention(
        placed, kind, cache.layers[0], plan
    )  # The second run checks that shared buffers are reset.
    return kernels.paged_attention(placed, kind, cache.layers[0], plan).view(q.shape)


def plain(made: Step, kind: Attention, q: Tensor) -> Tensor:
    parts = zip(made.rows, made.keys, made.values, strict=True)
    return torch.cat([attention(q[rows], keys, values, kind) for rows, keys, values in parts])


def queries(made: Step, kind: Attention, dtype: torch.dtype) -> Tensor:
    return torch.randn(made.batch.tokens.shape[0], kind.heads, kind.head_dim).to(dtype)


STEPS = {
    "one decode": [(1, 30)],
    "decodes far apart": [(1, 3), (1, 400), (1, 90), (1, 395), (1, 1)],
    "whole prompt": [(21, 21)],
    "continued prompt": [(6, 150)],
    "prompts": [(8, 8), (5, 21), (2, 2), (70, 90) if GPU else (30, 50)],
    "everything": [(1, 17), (9, 9), (1, 200), (4, 40), (1, 2), (3, 3)],
}
CHANGES = [{"window": 1}, {"window": 7}, {"softcap": 2.0}, {"window": 70, "softcap": 2.0}]


@dtypes
@pytest.mark.parametrize("name", STEPS)
def test_paged_attention_is_causal_attention_over_the_cache(
    kernels: AnyKernels, dtype: torch.dtype, name: str
) -> None:
    made = step(STEPS[name], KIND, dtype=dtype)
    q = queries(made, KIND, dtype)
    near(attend(kernels, made, KIND, q), plain(made, KIND, q), TOLERANCES[dtype])


@pytest.mark.parametrize("name", ["decodes far apart", "everything", "continued prompt"])
@pytest.mark.parametrize("changes", CHANGES)
@pytest.mark.parametrize("size", [3, 16] if GPU else [3])
def test_paged_attention_keeps_to_windows_and_soft_caps(
    kernels: AnyKernels, name: str, changes: dict[str, float], size: int
) -> None:
    kind = replace(KIND, **changes)  # type: ignore[arg-type]
    made = step(STEPS[name], kind, size=size)
    q = queries(made, kind, torch.float32)
    near(attend(kernels, made, kind, q), plain(made, kind, q), 1e-5)


@pytest.mark.parametrize("window", [0, 7])
@pytest.mark.parametrize("drafts", [1, 5, 13])
def test_rows_of_one_sequence_see_each_other_and_no_key_before_it_is_written(
    kernels: AnyKernels, drafts: int, window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Decodes of 1 + `drafts` tokens of one sequence, beside another's. In the interpreter their keys are
    there only once a program has waited, as on a device that starts it before the kernel in front has ended.
    """
    kind = replace(KIND, window=window)
    made = step([(1, 90), *((1, 380 + row) for row in range(drafts + 1))], kind)
    longest = drafts + 1
    for held in (made.keys, made.values):
        held[1:] = [held[longest][: 380 + row] for row in range(longest)]
    written = [89, *[379] * longest]
    made.batch.written = torch.tensor(written, dtype=torch.int32)
    made.batch.tables[1:] = made.batch.tables[longest]
    made.batch.slots[1:] = torch.tensor(
        [int(made.batch.tables[1, p // 4]) * 4 + p % 4 for p in range(379, 379 + longest)]
    )
    q = queries(made, kind, torch.float32)
    batch, cache = on_device(made)
    layer = cache.layers[0]
    plan = kernels.prepare(batch, cache, Geometry((Rotation(torch.zeros(8, device=DEVICE)),), (kind.window,)))
    keys = torch.stack([each[-1] for each in made.keys])
    values = torch.stack([each[-1] for each in made.values])
    qkv = torch.cat((q, keys, values), 1).flatten(1).to(DEVICE)
    placed = kernels.rope_and_cache(qkv, None, kind, layer, plan)
    if not GPU:
        there, before, late = layer.clone(), layer.clone(), batch.slots
        before[:, late // 4, :, late % 4] = 1e4
        monkeypatch.setattr(paged, "release", lambda: layer.copy_(before))
        monkeypatch.setattr(paged, "wait", lambda: layer.copy_(there))
    found = kernels.paged_attention(placed, kind, layer, plan).view(q.shape)
    near(found, plain(made, kind, q), 1e-5)


@pytest.mark.parametrize("heads", [(1, 1, 128), (4, 4, 24), (8, 1, 64), (14, 2, 96)])
def test_paged_attention_shares_keys_between_heads(kernels: AnyKernels, heads: tuple[int, int, int]) -> None:
    kind = replace(KIND, heads=heads[0], kv_heads=heads[1], head_dim=heads[2], scale=0.1)
    made = step(STEPS["everything"], kind)
    q = queries(made, kind, torch.float32)
    near(attend(kernels, made, kind, q), plain(made, kind, q), 1e-5)


@pytest.mark.parametrize("name", ["decodes far apart", "everything", "continued prompt"])
def test_paged_attention_reads_no_block_outside_the_window(kernels: AnyKernels, name: str) -> None:
    kind = replace(KIND, window=6)
    made = step(STEPS[name], kind)
    used = torch.zeros(made.cache.layers[0].shape[1], dtype=torch.bool)
    for table_, count, context in zip(
        made.batch.tables, made.batch.query_lens, made.batch.context_lens, strict=True
    ):
        oldest = max(0, context - count - 5)
        used[table_[oldest // 4 : (context - 1) // 4 + 1].long()] = True
    made.cache.layers[0][:, ~used] = torch.nan
    q = queries(made, kind, torch.float32)
    near(attend(kernels, made, kind, q), plain(made, kind, q), 1e-5)


@dtypes
@pytest.mark.parametrize("norm", ["none", "head", "row"])
@pytest.mark.parametrize("dims", [16, 12])
def test_rope_and_cache_rotates_queries_and_writes_keys_and_values(
    kernels: AnyKernels, dtype: torch.dtype, norm: str, dims: int
) -> None:
    kind = replace(KIND, norm=norm, eps=1e-5)
    frequencies = torch.tensor([1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001, 0.0003])
    made = step([(3, 9), (1, 30), (1, 1), (5, 5)], kind, dtype=dtype)
    batch, cache = on_device(made)
    rotation = Rotation(frequencies[: dims // 2].to(DEVICE), 1.2)
    plan = kernels.prepare(batch, cache, Geometry((Rotation(frequencies.to(DEVICE)), rotation), (0,)))
    qkv = torch.randn(10, 10 * 16).to(dtype)
    weights = None if norm == "none" else torch.randn(8 * 16).to(dtype)
    q, k, v = qkv.double().view(10, 10, 16).split((6, 2, 2), 1)
    if weights is not None:
        scales = weights.double().view(8, 16)
        normed = [rms(x if norm == "head" else x.flatten(1), 1e-5).view(x.shape) for x in (q, k)]
        q, k = normed[0] * scales[:6], normed[1] * scales[6:]
    q, k = (rotated(x, made.batch.positions, frequencies[: dims // 2], 1.2) for x in (q, k))
    layer, own = cache.layers[0], None if weights is None else weights.to(DEVICE)
    found = kernels.rope_and_cache(qkv.to(DEVICE), own, replace(kind, rotation=1), layer, plan)
    near(found, q, TOLERANCES[dtype])
    layer, before = layer.cpu(), made.cache.layers[0]
    blocks, offsets = made.batch.slots // 4, made.batch.slots % 4
    near(layer[0, blocks, :, offsets], k, TOLERANCES[dtype])
    near(layer[1, blocks, :, offsets], v, TOLERANCES[dtype])
    layer[:, blocks, :, offsets] = before[:, blocks, :, offsets]
    assert torch.equal(layer, before), "a slot of somebody else was written"


@pytest.mark.parametrize("least", [1, 2])
@pytest.mark.parametrize("tokens", [1, 32])
def test_tiles_cover_all_queries_and_those_with_the_most_keys_come_first(least: int, tokens: int) -> None:
    sequences = [(1, 500), (70, 70), (2, 300), (1, 2), (33, 97), (32, 32), (90, 90)]
    made = step(sequences, KIND)
    batch, _ = on_device(made)
    batch.contexts[-1] = 1  # as a graph pads a step
    for known in (made.batch.query_lens, []):
        batch.query_lens = known
        (total, *_), *rows = paged.number_tiles(batch, tokens, least).tolist()
        assert all(row[0] == -1 for row in rows[total:])
        last = [position + min(left, tokens) for _, _, left, position in rows[:total]]
        assert last == sorted(last, reverse=True)
        expected = [
            [seq, made.rows[seq].start + token, count - token, int(batch.contexts[seq]) - count + token]
            for seq, (count, _) in enumerate(sequences)
            if count >= least
            for token in range(0, count, tokens)
        ]
        assert sorted(rows[:total]) == expected


def test_rope_is_exact_at_far_positions(kernels: AnyKernels) -> None:
    made = step([(1, 1)], KIND)
    batch, cache = on_device(made)
    batch.positions = torch.tensor([131071], device=DEVICE)
    frequencies = 1.0 / 500000.0 ** (torch.arange(8) / 8)
    plan = kernels.prepare(batch, cache, Geometry((Rotation(frequencies.to(DEVICE)),), (0,)))
    angles = (131071 * frequencies).double()
    near(plan.cos_sin[0][0], torch.stack((angles.cos(), angles.sin())), 1e-5)


@dtypes
def test_norm_and_add_norm_equal_their_definitions(kernels: AnyKernels, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = (torch.randn(5, 40) * torch.tensor([[1e-4], [1e-2], [1.0], [10.0], [0.0]])).to(dtype)
    y, weight = torch.randn(5, 40).to(dtype), torch.randn(40).to(dtype)
    near(
        kernels.norm(x.to(DEVICE), weight.to(DEVICE), 1e-5), rms(x, 1e-5) * weight.double(), TOLERANCES[dtype]
    )
    wanted = x.double() + y.double()
    found, total = kernels.add_norm(x.to(DEVICE), y.to(DEVICE), weight.to(DEVICE), 1e-5)
    near(total, wanted, TOLERANCES[dtype])
    near(found, rms(wanted, 1e-5) * weight.double(), TOLERANCES[dtype])


def gate(both: Tensor, activation: Activation) -> Tensor:
    gates, ups = both.double().chunk(2, -1)
    return (
        ups
        * {
            "silu": gates / (1 + (-gates).exp()),
            "gelu": gates * (1 + torch.erf(gates / 2**0.5)) / 2,
            "gelu_tanh": gates * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (gates + 0.044715 * gates**3))) / 2,
            "relu": gates.clamp(min=0),
        }[activation]
    )


@dtypes
@pytest.mark.parametrize("activation", get_args(Activation))
def test_act_and_mul_equals_its_definition(
    kernels: AnyKernels, dtype: torch.dtype, activation: Activation
) -> None:
    torch.manual_seed(0)
    both = torch.randn(3, 24).to(dtype)
    near(kernels.act_and_mul(both.to(DEVICE), activation), gate(both, activation), TOLERANCES[dtype])


SHAPES = [(20, 33), (70, 300), (8, 5000)] if GPU else [(70, 33), (4, 2100)]


@dtypes
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 17, 64, 65] if GPU else [1, 3, 17, 65])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("biased", [True, False])
def test_linear_equals_a_matrix_product_for_every_number_of_rows(
    kernels: AnyKernels, dtype: torch.dtype, rows: int, shape: tuple[int, int], biased: bool
) -> None:
    torch.manual_seed(rows)
    x, weight, bias = torch.randn(rows, shape[1]), torch.randn(shape) * 0.05, torch.randn(shape[0])
    x, weight, bias = x.to(dtype), weight.to(dtype), bias.to(dtype) if biased else torch.zeros(shape[0])
    wanted = x.double() @ weight.double().t() + bias.double()
    packed = kernels.pack(weight.to(DEVICE), bias.to(DEVICE) if biased else None)
    for _ in range(2):
        near(kernels.linear(x.to(DEVICE), packed), wanted, TOLERANCES[dtype])
    near(kernels.linear_act_and_mul(x.to(DEVICE), packed, "silu"), gate(wanted, "silu"), TOLERANCES[dtype])


@pytest.mark.parametrize("splits", [1, 8])
def test_linear_gives_the_same_result_when_a_tile_is_split_by_columns(
    kernels: AnyKernels, splits: int
) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(9, 4096), torch.randn(100, 4096)
    arrived = torch.zeros(8, dtype=torch.int32, device=DEVICE)
    tiling = formats.Tiling(64, 64, 2, 2 * splits)
    found = linear.skinny_gemm(x.to(DEVICE), formats.Unquantised(weight.to(DEVICE), None), arrived, tiling)
    near(found, x.double() @ weight.double().t(), 1e-5)
    assert not arrived.any()


def block_by_block(x: Tensor, layer: DecoderLayer[Any, Any], made: Step, rotation: Rotation) -> Tensor:
    """Compute one decoder layer with the functions of the reference table."""
    torch_ = REFERENCE
    plan = torch_.prepare(made.batch, made.cache, Geometry((rotation,), (layer.attention.window,)))
    qkv = torch_.linear(torch_.norm(x, layer.pre_attention_norm, layer.eps), layer.qkv)
    q = torch_.rope_and_cache(qkv, layer.query_key_norm, layer.attention, made.cache.layers[0], plan)
    x = x + torch_.linear(torch_.paged_attention(q, layer.attention, made.cache.layers[0], plan), layer.out)
    normed, block = torch_.norm(x, layer.pre_mlp_norm, layer.eps), layer.feed_forward
    if isinstance(block, MixtureOfExperts):
        scores = torch_.linear(normed, block.router)
        return x + torch_.experts(normed, scores, block.experts, block.top_k, block.normalise)
    hidden = torch_.linear_act_and_mul(normed, block.gate_up, block.activation)
    return x + torch_.linear(hidden, block.down)


def int4_table(rounds: bool) -> AnyKernels:
    """A table whose every matrix is int4, on a device that has fp8 or as on one that does not."""

    def pack(weight: Tensor, bias: Tensor | None) -> formats.Int4:
        return formats.Int4.pack(weight, bias, rounds)

    def pack_experts(gate_up: Tensor, down: Tensor, activation: Activation) -> formats.Int4Experts:
        return formats.Int4Experts.pack(gate_up, down, activation, rounds)

    return replace(table(DEVICE, "int4"), pack=pack, pack_experts=pack_experts)


def widened_reference(own: AnyKernels) -> AnyKernels:
    """The reference table for the weights that those of `own` represent, in float32."""

    def pack(weight: Tensor, bias: Tensor | None) -> Any:
        held = own.pack(weight.to(DEVICE), None).widened(torch.float32)
        return REFERENCE.pack(held.cpu(), bias)

    def pack_experts(*held: Any) -> Any:
        made = own.pack_experts(*(each.to(DEVICE) for each in held[:2]), held[2]).widened(torch.float32)
        return REFERENCE.pack_experts(made.gate_up.cpu(), made.down.cpu(), held[2])

    return replace(REFERENCE, pack=pack, pack_experts=pack_experts)


LAYERS = [
    {"norm": "head", "dims": 16},
    {"norm": "row", "dims": 16},
    {"biased": True, "window": 7, "dims": 12},
    {"softcap": 2.0, "window": 70, "dims": 16},
    {"norm": "head", "dims": 16, "experts": 5},
]


@dtypes
@pytest.mark.parametrize("context", [30, 1, 400, 64, 65] if GPU else [70])
@pytest.mark.parametrize("options", LAYERS if GPU else [*LAYERS[1:3], LAYERS[4]])
def test_fused_layers_equal_separate_kernels(
    kernels: AnyKernels, dtype: torch.dtype, context: int, options: dict[str, object]
) -> None:
    check_layers(kernels, REFERENCE, dtype, context, options)


# Halves of `qkv` are whole heads, or not.
INT4_LAYERS = [*LAYERS, {**LAYERS[2], "heads": 5, "kv_heads": 1}]


@pytest.mark.parametrize("rounds", [True, False])
@pytest.mark.parametrize("options", INT4_LAYERS if GPU else [LAYERS[2], *INT4_LAYERS[4:]])
def test_fused_int4_layers_equal_separate_kernels(rounds: bool, options: dict[str, object]) -> None:
    own = int4_table(rounds)
    check_layers(own, widened_reference(own), DTYPE, 70, options)


def check_layers(
    kernels: AnyKernels,
    reference: AnyKernels,
    dtype: torch.dtype,
    context: int,
    options: dict[str, object],
) -> None:
    """The hidden state and the written keys and values equal those of the reference functions."""
    changes = {"eps": 1e-5} | {
        name: value for name, value in options.items() if name not in ("biased", "dims", "experts")
    }
    kind = replace(KIND, **changes)  # type: ignore[arg-type]
    made = step([(1, context)], kind, dtype=torch.float32)
    made.cache.layers[0] = made.cache.layers[0].to(dtype)
    batch, cache = on_device(made)
    made.cache.layers[0] = made.cache.layers[0].float()
    frequencies = torch.tensor([1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001, 0.0003])[: int(options["dims"]) // 2]  # type: ignore[call-overload]

    def layer(own: AnyKernels, device: torch.device, held: torch.dtype) -> DecoderLayer[Any, Any]:
        """Make a layer with the same numbers for any table, device and dtype."""
        torch.manual_seed(0)

        def pack(rows: int, columns: int) -> Any:
            weight, bias = torch.randn(rows, columns) * columns**-0.5, torch.randn(rows)
            weight, bias = (each.to(dtype).to(held).to(device) for each in (weight, bias))
            return own.pack(weight, bias if "biased" in options else None)

        def vector(count: int) -> Tensor:
            return (1 + torch.randn(count) / 9).to(dtype).to(held).to(device)

        def feed_forward() -> Mlp[Any] | MixtureOfExperts[Any, Any]:
            if "experts" not in options:
                return Mlp(pack(144, 48), "silu", pack(48, 72))
            # All experts are used, so that rounding cannot choose between two that are nearly equal.
            shapes = (5, 144, 48), (5, 48, 72)
            parts = [torch.randn(shape) * shape[-1] ** -0.5 for shape in shapes]
            experts = own.pack_experts(*(each.to(dtype).to(held).to(device) for each in parts), "silu")
            return MixtureOfExperts(pack(5, 48), experts, 5, True)

        return DecoderLayer(
            attention=kind,
            eps=1e-5,
            pre_attention_norm=vector(48),
            qkv=pack(16 * (kind.heads + 2 * kind.kv_heads), 48),
            query_key_norm=None if kind.norm == "none" else vector(16 * (kind.heads + kind.kv_heads)),
            out=pack(48, 16 * kind.heads),
            post_attention_norm=None,
            pre_mlp_norm=vector(48),
            feed_forward=feed_forward(),
            post_mlp_norm=None,
        )

    x = torch.randn(1, 48).to(dtype)
    assert kernels.layers is not None
    wanted = block_by_block(
        x.float(), layer(reference, torch.device("cpu"), torch.float32), made, Rotation(frequencies, 1.2)
    )
    # With an epsilon of one, the final norm cannot hide a common factor of all values.
    final = (1 + torch.randn(48) / 9).to(dtype)
    wanted = REFERENCE.norm(wanted, final.float(), 1.0)
    for _ in range(2):  # The second run checks that shared buffers are reset.
        plan = kernels.prepare(
            batch, cache, Geometry((Rotation(frequencies.to(DEVICE), 1.2),), (kind.window,))
        )
        stack = LayerStack([layer(kernels, DEVICE, dtype)], final.to(DEVICE), 1.0)
        found = kernels.layers(x.clone().to(DEVICE), stack, cache, plan)
        assert found is not None
        near(found, wanted, TOLERANCES[dtype])
    near(cache.layers[0], made.cache.layers[0], TOLERANCES[dtype])


@pytest.mark.skipif(not GPU, reason="needs a GPU: the interpreter knows no FP8")
@pytest.mark.parametrize("rows", [1, 3, 5, 33, 64, 65, 300])
@pytest.mark.parametrize("shape", [(320, 512), (1024, 4096), (272, 5024)])
def test_fp8_error_is_within_the_rounding_error_of_activations(rows: int, shape: tuple[int, int]) -> None:
    """The reference multiplies with the dequantised weights, so only the activations are rounded."""
    torch.manual_seed(rows)
    narrow = table(DEVICE, "fp8")
    x = (torch.randn(rows, shape[1]) * torch.logspace(-2, 2, rows)[:, None]).bfloat16().to(DEVICE)
    packed = narrow.pack(torch.randn(shape).bfloat16().to(DEVICE), None)
    assert isinstance(packed, formats.Fp8) and packed.nbytes == shape[0] * (shape[1] + 4)
    wanted = x.double() @ (packed.weight.double() * packed.scales.double()[:, None]).t()
    near(narrow.linear(x, packed), wanted, 4e-3 if rows <= linear.GEMV_ROWS else 4e-2)
    gated = narrow.linear_act_and_mul(x[:, : shape[1]], packed, "silu")
    near(gated[-1:], gate(wanted[-1:].cpu(), "silu"), 8e-3 if rows <= linear.GEMV_ROWS else 8e-2)


def rounded_rows(x: Tensor) -> Tensor:
    """Rows in e4m3 with a scale each, in float64."""
    scale = x.float().abs().amax(-1, keepdim=True).clamp_min(1e-12) / 448
    return (x.float() / scale).to(torch.float8_e4m3fn).double() * scale.double()


@pytest.mark.parametrize("rounds", [True, False])
@pytest.mark.parametrize("rows", [1, 3, 4, 5, 33, 64, 65, 300] if GPU else [1, 2, 5, 70])
@pytest.mark.parametrize("shape", [(320, 512), (1024, 4096), (273, 5000)] if GPU else [(22, 200), (21, 130)])
def test_int4_linear_equals_a_product_with_its_unpacked_weights(
    monkeypatch: pytest.MonkeyPatch, rounds: bool, rows: int, shape: tuple[int, int]
) -> None:
    """Where the device has fp8, some rows are rounded to e4m3. Levels are not around zero in the product: the
    further the mean of a row is from zero, the more must be subtracted."""
    monkeypatch.setattr(formats, "ROUNDED_WEIGHTS", 0)
    torch.manual_seed(rows)
    narrow = table(DEVICE, "int4")
    x = ((1 + torch.randn(rows, shape[1])) * torch.logspace(-2, 0, rows)[:, None]).to(DTYPE).to(DEVICE)
    bias = torch.randn(shape[0]).to(DTYPE).to(DEVICE)
    packed = formats.Int4.pack(torch.randn(shape).to(DTYPE).to(DEVICE), bias, rounds)
    assert packed.nbytes - bias.nbytes == -(-shape[0] // 2) * -(-shape[1] // 128) * (128 + 4)
    weight = packed.widened(torch.float32).double()
    exact = x.double() @ weight.t() + bias.double()
    wanted, tolerance = exact, 8e-3 if GPU else 1e-5
    if rounds and rows in formats.ROUNDED_ROWS:
        wanted, tolerance = rounded_rows(x) @ weight.t() + bias.double(), 8e-3 if GPU else 1e-3
        near(wanted, exact, 6e-2)
    for _ in range(2):  # The second run checks that shared buffers are reset.
        near(narrow.linear(x, packed), wanted, tolerance)
    if shape[0] % 2 == 0:
        found = narrow.linear_act_and_mul(x, packed, "silu")
        near(found, gate(wanted.cpu(), "silu"), 2 * tolerance if GPU else tolerance)


@pytest.mark.parametrize("rows", [1, 9, 70] if GPU else [1, 9])
@pytest.mark.parametrize("outputs", [24, formats.WIDE] if GPU else [22])
def test_logits_are_not_rounded_to_16_bits(kernels: AnyKernels, outputs: int, rows: int) -> None:
    """The vendor's product of the CPU, for many rows, rounds them."""
    torch.manual_seed(rows)
    dtype, tolerance = (torch.bfloat16, 1e-4) if GPU else (torch.float16, 1e-5)
    x, weight = (torch.randn(count, 72).to(dtype).to(DEVICE) for count in (rows, outputs))
    int4 = [formats.Int4.pack(weight, None, False)] if rows <= formats.SKINNY_ROWS else []
    assert kernels.logits is not None
    for packed in (kernels.pack(weight, None), *int4):
        found = kernels.logits(x, packed)
        assert found.dtype == torch.float32
        near(found, x.double() @ packed.widened(torch.float32).double().t(), tolerance)


@pytest.mark.parametrize("quantise", [None, "int4"])
def test_logits_of_many_rows_or_with_a_bias_are_float32(quantise: CudaQuantise | None) -> None:
    own, dtype = table(DEVICE, quantise), torch.bfloat16 if GPU else torch.float32
    x, weight, bias = (torch.randn(shape).to(dtype).to(DEVICE) for shape in ((70, 64), (256, 64), 256))
    assert own.logits is not None
    for packed in (own.pack(weight, None), own.pack(weight, bias)):
        found = own.logits(x, packed)
        assert found.dtype == torch.float32
        wanted = x.double() @ packed.widened(torch.float32).double().t()
        near(found, wanted if packed.bias is None else wanted + bias.double(), 1e-2 if GPU else 1e-5)


def test_small_int4_matrices_are_widened_for_many_rows() -> None:
    large, small = (formats.Int4(torch.empty(0), torch.empty(0), None, n, 4096, True) for n in (4096, 4095))
    assert large.skinny_rows(DTYPE) > 2**16
    assert small.skinny_rows(DTYPE) == formats.SKINNY_ROWS


@pytest.mark.parametrize("m_block", [16, 64])
def test_int4_products_are_split_by_rows_and_by_columns(m_block: int) -> None:
    """Nine groups of columns in four parts, of which the last is empty."""
    torch.manual_seed(0)
    x, weight = (1 + torch.randn(70, 1140)).to(DTYPE).to(DEVICE), torch.randn(150, 1140).to(DTYPE).to(DEVICE)
    packed = formats.Int4.pack(weight, None, True)
    arrived = torch.zeros(16, dtype=torch.int32, device=DEVICE)
    tiling = formats.Tiling(64, formats.GROUP, 2, 999, group=formats.GROUP, m_block=m_block)
    wanted = rounded_rows(x) @ packed.widened(torch.float32).double().t()
    near(linear.skinny_gemm(x, packed, arrived, tiling), wanted, 8e-3 if GPU else 1e-3)
    assert not arrived.any()


@pytest.mark.parametrize("outputs", [262, 261] if GPU else [22, 21])
@pytest.mark.parametrize("rounds", [True, False])
def test_one_row_of_int4_passes_through_a_norm_an_activation_and_a_sum(outputs: int, rounds: bool) -> None:
    """The columns are several spans, of which the last is not whole."""
    torch.manual_seed(0)
    columns = 2400
    x = (1 + torch.randn(1, columns)).to(DTYPE).to(DEVICE)
    gains, residual = torch.randn(columns).to(DTYPE).to(DEVICE), torch.randn(1, outputs).to(DTYPE).to(DEVICE)
    packed = formats.Int4.pack((torch.randn(outputs, columns) / 40).to(DTYPE).to(DEVICE), None, rounds)
    weight = packed.widened(torch.float32).double().cpu()
    normed = rms(x.cpu(), 1e-5) * gains.cpu().double()
    norm, tolerance = linear.Norm(gains, 1e-5), 8e-3 if GPU else 1e-5
    found = linear.gemv(x, packed, norm=norm, residual=residual)
    near(found, normed @ weight.t() + residual.cpu().double(), tolerance)
    found = linear.gemv(x, packed, residual=residual)
    near(found, x.cpu().double() @ weight.t() + residual.cpu().double(), tolerance)
    if outputs % 2 == 0:
        found = linear.gemv(x, packed, "silu", norm)
        near(found, gate(normed @ weight.t(), "silu"), 2 * tolerance)


def test_int4_is_exact_for_four_bit_weights_and_close_for_others() -> None:
    torch.manual_seed(0)
    levels = torch.randint(-8, 8, (256, 200)).float()
    levels[:, ::128] = -8.0
    scales = torch.randint(1, 9, (256, 2)).float().repeat_interleave(128, 1)[:, :200]
    exact = formats.Int4.pack((levels * scales).to(DEVICE), None, False).widened(torch.float32)
    assert torch.equal(exact.cpu(), levels * scales)
    for weight in (torch.randn(256, 200), torch.zeros(256, 200), torch.full((256, 200), 3e-4)):
        found = formats.Int4.pack(weight.to(DEVICE), None, False).widened(torch.float32).cpu()
        assert (found - weight).norm() <= 0.1 * weight.norm()


def test_int4_skips_small_matrices() -> None:
    narrow = table(DEVICE, "int4")
    assert isinstance(narrow.pack(torch.randn(8, 128, device=DEVICE), None), formats.Unquantised)
    assert isinstance(narrow.pack(torch.randn(256, 128, device=DEVICE), None), formats.Int4)
