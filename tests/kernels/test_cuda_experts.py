"""Mixtures of experts of the CUDA table against plain definitions, on a GPU or in Triton's interpreter."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from stretto.kernels.reference import REFERENCE, DenseExperts
from tests.kernels.cuda import DEVICE, GPU, TOLERANCES

from stretto.kernels.cuda import experts as mixtures, routing, streaming  # isort: skip
from stretto.kernels.cuda.experts import FEW_TOKENS  # isort: skip
from stretto.kernels.cuda.linear import Norm  # isort: skip
from stretto.kernels.cuda.rows import quantise_rows  # isort: skip
from stretto.kernels.cuda.table import table  # isort: skip
from stretto.kernels.cuda.weights import GROUP, CudaExperts, Fp8Experts, Int4, Int4Experts  # isort: skip

pytestmark = [pytest.mark.cuda] if GPU else []
dtypes = pytest.mark.parametrize("dtype", TOLERANCES)
DTYPE = torch.bfloat16 if GPU else torch.float32


@dataclass(frozen=True)
class Shape:
    """Sizes of a mixture: experts, experts of a token, width, width of an expert."""

    count: int
    top: int
    hidden: int
    inner: int


# Not multiples of a tile; experts that are not a power of two; widths of several tiles and groups.
SMALL, UNEVEN, WIDE = Shape(5, 3, 40, 24), Shape(6, 4, 144, 129), Shape(3, 2, 160, 304)
ODD = Shape(5, 2, 261, 131)  # int4 holds rows in pairs, and columns in groups
SHAPES = [SMALL, UNEVEN, WIDE, ODD] if GPU else [SMALL, UNEVEN, WIDE]
# How the tokens choose: freely; all take one expert among others; nobody takes the first experts.
SPREADS = ["free", "one", "none"]
# The interpreter is slow, so without a GPU only some of the combinations run.
COMBINATIONS = (
    list(product((1, 2, FEW_TOKENS, FEW_TOKENS + 1, 17, 33, 70), SHAPES, SPREADS))
    if GPU
    else [
        (1, SMALL, "free"),
        (FEW_TOKENS, SMALL, "none"),
        (FEW_TOKENS + 1, SMALL, "none"),
        (FEW_TOKENS + 1, WIDE, "free"),
        (17, UNEVEN, "free"),
        (33, SMALL, "one"),
        (70, SMALL, "free"),
        (70, UNEVEN, "one"),
    ]
)
INT4_COMBINATIONS = (
    COMBINATIONS
    if GPU
    else [
        (1, ODD, "none"),
        (FEW_TOKENS, SMALL, "free"),
        (FEW_TOKENS + 1, ODD, "none"),
        (17, WIDE, "free"),
        (70, SMALL, "one"),
    ]
)
combinations = pytest.mark.parametrize(("rows", "shape", "spread"), COMBINATIONS)
int4_combinations = pytest.mark.parametrize(("rows", "shape", "spread"), INT4_COMBINATIONS)


def near(found: Tensor, wanted: Tensor, tolerance: float) -> None:
    found, wanted = found.cpu().double(), wanted.cpu().double()
    assert found.shape == wanted.shape
    assert torch.isfinite(found).all()
    assert (found - wanted).norm() / wanted.norm() <= tolerance


def routed(rows: int, shape: Shape, spread: str) -> Tensor:
    """Router logits [rows, experts] without two that are equal in a row."""
    logits = torch.rand(rows, shape.count).argsort(1).float() / 2
    if spread == "one":
        logits[:, 1] += 9.0
    if spread == "none":
        logits[:, : shape.count - shape.top] -= 9.0
    return logits


def weights(shape: Shape, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`gate_up` and `down`. Rows differ in size, so that a scale on the wrong row shows."""
    gate_up = torch.randn(shape.count, 2 * shape.inner, shape.hidden) * shape.hidden**-0.5
    down = torch.randn(shape.count, shape.hidden, shape.inner) * shape.inner**-0.5
    gate_up, down = (each * (0.5 + torch.rand(each.shape[:2])[..., None]) for each in (gate_up, down))
    return gate_up.to(dtype), down.to(dtype)


def reference(
    x: Tensor, logits: Tensor, held: tuple[Tensor, Tensor], shape: Shape, normalise: bool
) -> Tensor:
    packed = DenseExperts(*(each.double().cpu() for each in held), "silu")
    return REFERENCE.experts(x.double(), logits.double(), packed, shape.top, normalise)


def widened(packed: CudaExperts) -> tuple[Tensor, Tensor]:
    held = packed if isinstance(packed, DenseExperts) else packed.widened(torch.float64)
    return held.gate_up.cpu(), held.down.cpu()


def rounded(values: Tensor, size: int) -> Tensor:
    """Rows in e4m3 with a scale for each `size` columns, in float64."""

    def each(part: Tensor) -> Tensor:
        scale = part.float().abs().amax(-1, keepdim=True).clamp_min(1e-12) / 448
        return (part.float() / scale).to(torch.float8_e4m3fn).double() * scale.double()

    return torch.cat([each(part) for part in values.split(size, -1)], -1)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("normalise", [True, False])
def test_a_token_chooses_its_likeliest_experts(shape: Shape, normalise: bool) -> None:
    torch.manual_seed(0)
    logits = routed(11, shape, "free")
    found = routing.choose(logits.to(DEVICE), shape.top, normalise)
    shares, chosen = logits.double().softmax(-1).topk(shape.top)
    assert torch.equal(found.experts.cpu().long(), chosen)
    near(found.shares, shares / shares.sum(-1, keepdim=True) if normalise else shares, 1e-6)
    x = torch.randn(11, shape.hidden).to(DTYPE).to(DEVICE)
    same, rows = routing.choose_and_quantise(logits.to(DEVICE), shape.top, normalise, x)
    assert torch.equal(same.experts, found.experts) and torch.equal(same.shares, found.shares)
    wanted, wanted_scales = quantise_rows(x)
    assert rows.scales is not None
    assert torch.equal(rows.values.float(), wanted.float()) and torch.equal(rows.scales, wanted_scales)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_a_row_that_is_not_a_number_chooses_experts_that_exist() -> None:
    logits = torch.full((3, 5), torch.nan)
    chosen = routing.choose(logits.to(DEVICE), 3, True).experts
    assert chosen.min() >= 0 and chosen.max() < 5
    order = routing.sort(routing.ExpertChoice(chosen, chosen), 5)
    assert torch.equal(order.picks.cpu().sort().values.long(), torch.arange(9))


@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize("rows", [1, 70, 300])
def test_picks_are_sorted_by_expert_and_then_by_token(rows: int, spread: str) -> None:
    torch.manual_seed(rows)
    shape = Shape(9, 2, 0, 0)
    chosen = routed(rows, shape, spread).topk(shape.top).indices.int().to(DEVICE)
    choice = routing.ExpertChoice(chosen, chosen)
    order = routing.sort(choice, shape.count)
    picks = choice.experts.flatten().cpu()
    assert torch.equal(order.picks.cpu().long(), picks.argsort(stable=True))
    counts = torch.bincount(picks, minlength=shape.count)
    assert order.starts.tolist() == [0, *counts.cumsum(0).tolist()]
    assert counts.max() == rows if spread == "one" else spread == "free" or counts.min() == 0


@dtypes
@combinations
def test_experts_equal_their_definition(dtype: torch.dtype, rows: int, shape: Shape, spread: str) -> None:
    torch.manual_seed(rows)
    kernels, normalise = table(DEVICE), rows % 2 == 0
    x, logits, held = (
        torch.randn(rows, shape.hidden).to(dtype),
        routed(rows, shape, spread),
        weights(shape, dtype),
    )
    packed = kernels.pack_experts(*(each.to(DEVICE) for each in held), "silu")
    found = kernels.experts(x.to(DEVICE), logits.to(dtype).to(DEVICE), packed, shape.top, normalise)
    near(found, reference(x, logits, held, shape, normalise), TOLERANCES[dtype])


def emulated(x: Tensor, logits: Tensor, packed: CudaExperts, shape: Shape) -> Tensor:
    """The mixture with activations rounded to e4m3 as the kernels round them, in float64."""
    gate_up, down = widened(packed)
    shares, chosen = logits.double().softmax(-1).topk(shape.top)
    out = torch.zeros(x.shape, dtype=torch.float64)
    for row, value in enumerate(rounded(x, shape.hidden)):
        for share, expert in zip(shares[row], chosen[row].tolist(), strict=True):
            gates, ups = (gate_up[expert] @ value).chunk(2)
            out[row] += share * (down[expert] @ rounded(F.silu(gates) * ups, GROUP))
    return out


def check_rounding(x: Tensor, logits: Tensor, packed: CudaExperts, shape: Shape) -> None:
    """A few rows are not rounded. Of more, the error is what rounding activations explains."""
    found = mixtures.experts(x.to(DEVICE), logits.to(DEVICE), packed, shape.top, False)
    # Each row by itself, because their sizes differ by three orders.
    exact = reference(x, logits, widened(packed), shape, False)
    unit = exact.norm(dim=1, keepdim=True)
    if len(x) <= FEW_TOKENS:
        near(found.cpu().double() / unit, exact / unit, 8e-3 if GPU else 1e-5)
        return
    near(found.cpu().double() / unit, exact / unit, 6e-2)
    near(found.cpu().double() / unit, emulated(x, logits, packed, shape) / unit, 1.5e-2 if GPU else 5e-3)


@combinations
def test_fp8_experts_equal_their_definition(rows: int, shape: Shape, spread: str) -> None:
    torch.manual_seed(rows)
    x = (torch.randn(rows, shape.hidden) * torch.logspace(-2, 1, rows)[:, None]).to(DTYPE)
    packed = table(DEVICE, "fp8").pack_experts(*(each.to(DEVICE) for each in weights(shape, DTYPE)), "silu")
    assert isinstance(packed, Fp8Experts)
    check_rounding(x, routed(rows, shape, spread), packed, shape)


@int4_combinations
def test_int4_experts_on_a_device_with_fp8_equal_their_definition(
    rows: int, shape: Shape, spread: str
) -> None:
    """Levels are not around zero in the product: the more rows are, the more must be subtracted."""
    torch.manual_seed(rows)
    x = ((1 + torch.randn(rows, shape.hidden)) * torch.logspace(-2, 1, rows)[:, None]).to(DTYPE)
    packed = Int4Experts.pack(*(each.to(DEVICE) for each in weights(shape, DTYPE)), "silu", rounds=True)
    check_rounding(x, routed(rows, shape, spread), packed, shape)


@dtypes
@int4_combinations
def test_int4_experts_on_other_devices_equal_their_definition(
    dtype: torch.dtype, rows: int, shape: Shape, spread: str
) -> None:
    torch.manual_seed(rows)
    x, logits = torch.randn(rows, shape.hidden).to(dtype), routed(rows, shape, spread)
    packed = Int4Experts.pack(*(each.to(DEVICE) for each in weights(shape, dtype)), "silu", rounds=False)
    found = mixtures.experts(x.to(DEVICE), logits.to(dtype).to(DEVICE), packed, shape.top, rows % 2 == 0)
    near(found, reference(x, logits, widened(packed), shape, rows % 2 == 0), TOLERANCES[dtype])


def test_fp8_experts_hold_a_byte_for_a_weight_and_a_scale_for_a_row() -> None:
    torch.manual_seed(0)
    shape = SMALL
    held = weights(shape, DTYPE)
    held[0][0, 0] = 0.0
    packed = Fp8Experts.pack(*(each.to(DEVICE) for each in held), "silu")
    rows = shape.count * (2 * shape.inner + shape.hidden)
    assert packed.nbytes == sum(each.numel() for each in held) + 4 * rows
    assert not packed.shares(held[0])
    for found, weight in zip(widened(packed), held, strict=True):
        # Three bits of mantissa: at most a sixteenth of a number, or of the least normal one of its row.
        peak = weight.double().abs().amax(-1, keepdim=True)
        error = (found - weight.double()).abs()
        assert (error <= torch.maximum(weight.double().abs() / 16, peak / 448 * 2**-10) * 1.001).all()


@pytest.mark.parametrize("quantise", [None, "fp8", "int4"])
def test_streamed_rows_are_read_through_a_norm_and_added_to_a_sum(
    quantise: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(streaming, "STREAMED_COLUMNS", 32)  # a row of `down` is then several spans
    shape, kernels = Shape(5, 3, 40, 70), table(DEVICE, quantise)  # type: ignore[arg-type]
    packed = kernels.pack_experts(*(each.to(DEVICE) for each in weights(shape, DTYPE)), "silu")
    x, residual = (torch.randn(2, shape.hidden).to(DTYPE).to(DEVICE) for _ in range(2))
    gains = (1 + torch.randn(shape.hidden) / 9).to(DTYPE).to(DEVICE)
    logits = routed(2, shape, "free")
    choice = routing.choose(logits.to(DEVICE), shape.top, True)
    found = streaming.stream(x, choice, packed, Norm(gains, 1e-5), residual)
    normed = REFERENCE.norm(x.float(), gains.float(), 1e-5)
    wanted = reference(normed.cpu(), logits, widened(packed), shape, True) + residual.cpu().double()
    near(found, wanted, 8e-3 if GPU else 1e-5)


def test_tiles_hold_twice_the_picks_of_an_average_expert() -> None:
    """128 experts, 8 for a token."""
    tokens = {count: mixtures.tile_tokens(8 * count, 128) for count in (1, 64, 128, 256, 512, 2048, 8192)}
    assert tokens == {1: 16, 64: 16, 128: 16, 256: 32, 512: 64, 2048: 128, 8192: 128}


@pytest.mark.parametrize("slots", [1, 3])
def test_an_expert_with_more_tiles_than_programs_has_them_all_computed(
    slots: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(mixtures, "SLOTS", slots)
    shape = Shape(16, 1, 32, 16)
    x, held = torch.randn(90, 32).to(DTYPE), weights(shape, DTYPE)
    logits = routed(90, shape, "one")
    packed = DenseExperts(*(each.to(DEVICE) for each in held), "silu")
    found = mixtures.experts(x.to(DEVICE), logits.to(DEVICE), packed, 1, True)
    near(found, reference(x, logits, held, shape, True), TOLERANCES[DTYPE])


@pytest.mark.parametrize("shape", SHAPES if GPU else [SMALL, ODD])
def test_int4_experts_hold_each_matrix_as_a_linear_layer_would(shape: Shape) -> None:
    torch.manual_seed(0)
    held = weights(shape, DTYPE)
    packed = table(DEVICE, "int4").pack_experts(*(each.to(DEVICE) for each in held), "silu")
    assert isinstance(packed, Int4Experts)
    assert packed.rounds == (GPU and torch.cuda.get_device_capability() >= (8, 9))
    assert not packed.shares(held[0])
    half, groups = -(-shape.hidden // 2), [-(-width // GROUP) for width in (shape.hidden, shape.inner)]
    size = shape.inner * groups[0] * (GROUP + 4) + half * groups[1] * (GROUP + 4)
    assert packed.nbytes == shape.count * size
    for found, matrices in zip(widened(packed), held, strict=True):
        wanted = [Int4.pack(each.to(DEVICE), None, False).widened(torch.float64).cpu() for each in matrices]
        assert torch.equal(found, torch.stack(wanted))
