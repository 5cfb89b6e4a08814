"""Packed linear layers of the C kernels at every ISA level.

Unquantised weights are compared with float64. Quantised weights are compared with the same integer sums in
torch.
"""

from __future__ import annotations

from typing import cast

import pytest
import torch
from torch import Tensor

from stretto.kernels.cpu.native import Native, NativeWeights
from stretto.kernels.cpu.table import CpuTable
from stretto.kernels.cpu.weights import (
    Form,
    PackedLinear,
    WeightFormat,
    exact_in_bfloat16,
    memory,
    pack,
    packed_bytes,
    unpack,
)
from tests.kernels.levels import native

__all__ = ["native"]

SHAPES = [(1, 1), (5, 3), (32, 64), (33, 40), (70, 264), (200, 96)]
ROWS = [1, 2, 3, 7, 8, 9, 17, 100]
INT_TOLERANCE = 2e-6
WIDE_TOLERANCE = 2e-5  # Steps are so fine that some values lie halfway and are rounded the other way.


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def run(native: Native, x: Tensor, packed: PackedLinear) -> Tensor:
    return CpuTable(native, None).linear(x, packed)


def largest_activation(native: Native, packed: PackedLinear) -> int:
    """The largest quantised activation: up to 16 bits on AVX2 with int8 weights, less for large groups."""
    if native.level == "avx2" and packed.format == "int8":
        return min(2**15 - 1, (2**31 - 1) // (127 * packed.group))
    return 127


def quantised(x: Tensor, group: int, pad: int, most: int) -> tuple[Tensor, Tensor]:
    """Quantise activations as the kernels do: integers [m, groups, group] and scales [m, groups]."""
    x = torch.nn.functional.pad(x, (0, pad)).view(x.shape[0], -1, group)
    top = x.abs().amax(-1)
    inverse = torch.where(top > 0, most / top, torch.zeros(()))
    return (x * inverse[..., None]).round(), top / most


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm().clamp(min=1e-30))


@pytest.mark.parametrize("n,k", SHAPES)
@pytest.mark.parametrize("format", ["float32", "bfloat16"])
def test_unquantised_linear_equals_float64(native: Native, format: WeightFormat, n: int, k: int):
    weight, bias = drawn(n, k), drawn(n, seed=1)
    if format == "bfloat16":
        weight = weight.bfloat16().float()
    packed = pack(native, weight, bias, format)
    assert torch.equal(unpack(native, packed), weight)
    for m in ROWS:
        x = drawn(m, k, seed=2)
        wanted = x.double() @ weight.double().T + bias
        assert error(run(native, x, packed), wanted) < 1e-6
        half = x.bfloat16()
        wanted = half.double() @ weight.double().T + bias
        found = run(native, half, packed)
        assert found.dtype == torch.bfloat16
        assert error(found, wanted) < 5e-3


@pytest.mark.parametrize("n,k", SHAPES)
@pytest.mark.parametrize("format,group", [("int8", 0), ("int8", 8), ("int4", 0), ("int4", 8)])
def test_quantised_linear_equals_integer_sums_in_torch(
    native: Native, format: WeightFormat, group: int, n: int, k: int
):
    if group and k % group:
        pytest.skip("the group does not divide the row")
    weight, bias = drawn(n, k), drawn(n, seed=1)
    packed = pack(native, weight, bias, format, group)
    kept = unpack(native, packed)
    for m in ROWS:
        x = drawn(m, k, seed=2)
        pad = -k % packed.group
        most = largest_activation(native, packed)
        levels, scales = quantised(x, packed.group, pad, most)
        approximate = (levels.double() * scales[..., None].double()).flatten(1)[:, :k]
        wanted = approximate @ kept.double().T + bias
        assert error(run(native, x, packed), wanted) < (INT_TOLERANCE if most == 127 else WIDE_TOLERANCE)


@pytest.mark.parametrize("k", [128, 512, 520, 4096, 65536])
@pytest.mark.parametrize("format,sign", [("int8", 1), ("int8", -1), ("int4", 1), ("int4", -1)])
def test_the_largest_integer_sums_do_not_overflow(native: Native, format: WeightFormat, sign: int, k: int):
    weight, x = torch.ones(32, k), torch.full((3, k), float(sign))
    packed = pack(native, weight, None, format)
    wanted = x.double() @ unpack(native, packed).double().T
    assert error(run(native, x, packed), wanted) < INT_TOLERANCE


@pytest.mark.parametrize("format,group", [("bfloat16", 0), ("int8", 0), ("int8", 128), ("int4", 32)])
def test_many_rows_give_the_same_results_as_few(native: Native, format: WeightFormat, group: int):
    weight = drawn(96, 256).bfloat16().float()
    packed = pack(native, weight, None, format, group)
    x = drawn(1024, 256, seed=3)
    together = run(native, x, packed)
    assert error(together, x.double() @ unpack(native, packed).double().T) < 1e-2
    for rows in (slice(0, 1), slice(511, 520), slice(1020, 1024)):
        torch.testing.assert_close(run(native, x[rows], packed), together[rows], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("format,group", [("bfloat16", 0), ("float32", 0), ("int8", 0), ("int4", 32)])
def test_results_do_not_depend_on_the_number_of_threads(native: Native, format: WeightFormat, group: int):
    packed = pack(native, drawn(3000, 128), drawn(3000), format, group)
    for m in (1, 40):
        x, results = drawn(m, 128, seed=5), []
        for threads in (1, 2, 3):
            native.threads(threads)
            results.append(run(native, x, packed))
        assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_int8_rounds_each_weight_by_at_most_half_a_step(native: Native):
    weight = drawn(40, 64)
    for group in (0, 16):
        kept = unpack(native, pack(native, weight, None, "int8", group))
        peaks = weight.view(40, -1, group or 64).abs().amax(-1, keepdim=True)
        off = (kept - weight).view(40, -1, group or 64).abs()
        assert bool((off <= peaks / 127 * 0.51).all())


def test_int4_error_is_below_that_of_rounding_to_nearest(native: Native):
    weight = drawn(64, 256)
    kept = unpack(native, pack(native, weight, None, "int4", 32))
    groups = weight.view(64, -1, 32)
    scale = groups.abs().amax(-1, keepdim=True) / 7
    nearest = (groups / scale).round().clamp(-8, 7) * scale
    assert (kept - weight).square().mean() < 0.85 * (nearest.view_as(weight) - weight).square().mean()


def test_zero_weights_or_inputs_give_zeros(native: Native):
    for format in ("int8", "int4", "bfloat16"):
        packed = pack(native, torch.zeros(33, 32), None, format)
        assert not run(native, drawn(3, 32), packed).any()
        packed = pack(native, drawn(33, 32), None, format)
        assert not run(native, torch.zeros(3, 32), packed).any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("format,group", [("bfloat16", 0), ("int8", 0), ("int8", 32), ("int4", 32)])
def test_nan_and_infinity_in_one_row_do_not_reach_other_rows(
    native: Native, format: WeightFormat, group: int, bad: float
):
    packed = pack(native, drawn(50, 64), None, format, group)
    for m in (1, 20):
        x = drawn(m, 64, seed=9)
        clean = run(native, x, packed)
        x[m // 2, 5] = bad
        found = run(native, x, packed)
        others = torch.arange(m) != m // 2
        assert torch.equal(found[others], clean[others])
        assert not found[m // 2].isfinite().any()


def test_an_input_without_rows_gives_an_empty_output(native: Native):
    packed = pack(native, drawn(50, 64), None, "int8")
    assert run(native, torch.empty(0, 64), packed).shape == (0, 50)


def test_wrong_shapes_and_dtypes_are_refused_and_named(native: Native):
    packed = pack(native, drawn(50, 64), None, "int8")
    with pytest.raises(ValueError, match=r"\(2, 63\).*\(50, 64\)"):
        run(native, drawn(2, 63), packed)
    with pytest.raises(ValueError, match="float64"):
        run(native, drawn(2, 64).double(), packed)
    with pytest.raises(ValueError, match=r"groups of 24 .* rows of 64"):
        pack(native, drawn(50, 64), None, "int8", 24)
    with pytest.raises(ValueError, match="groups of 4 "):
        pack(native, drawn(50, 64), None, "int4", 4)
    with pytest.raises(ValueError, match=r"\(50,\)"):
        pack(native, drawn(50), None, "int8")
    with pytest.raises(ValueError, match=r"bias of shape \(49,\)"):
        pack(native, drawn(50, 64), drawn(49), "int8")
    with pytest.raises(ValueError, match="65540"):
        pack(native, torch.zeros(1, 65540), None, "int8")


def test_an_isa_level_that_the_cpu_lacks_is_refused(native: Native):
    with pytest.raises(ValueError, match="mmx"):
        native.use("mmx")


def test_weights_that_bfloat16_holds_exactly_are_recognised():
    weight = drawn(8, 8)
    assert exact_in_bfloat16(weight.bfloat16().float())
    assert not exact_in_bfloat16(weight)


@pytest.mark.parametrize("size", [1, 100, 2**21, 2**21 + 64])
def test_allocated_memory_is_aligned_and_writable(size: int):
    found = memory(size)
    assert found.shape == (size,) and found.data_ptr() % 64 == 0
    found.fill_(7)
    assert int(found[-1]) == 7


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rescore_top_k_makes_the_top_logits_of_an_int4_head_exact(native: Native, dtype: torch.dtype):
    table = CpuTable(native, "int4")
    embedding, x = drawn(30_000, 64).to(dtype), drawn(3, 64, seed=4)
    head = table.pack_tied(embedding)
    assert head.format == "int4"
    rough, exact = table.linear(x, head), x @ embedding.float().T
    sharp = rough.clone()
    table.rescore_top_k(sharp, x, head, embedding)
    torch.testing.assert_close(sharp.topk(8).values, exact.topk(8).values, rtol=1e-4, atol=1e-4)
    assert torch.equal(sharp.argmax(-1), exact.argmax(-1))
    assert int((sharp != rough).sum(-1).max()) <= 64
    with pytest.raises(ValueError, match=r"\(3, 30000\)"):
        table.rescore_top_k(sharp, x[:2], head, embedding)
    smooth = table.linear(x, table.pack_tied(embedding[:300]))
    assert smooth.shape == (3, 300)


class Late:
    """A library that reads the shape only after another thread has taken memory of the same size."""

    def packed_bytes(self, address: int) -> int:
        others = [NativeWeights(0, 0, -1, -1, -1, 0) for _ in range(100)]
        return NativeWeights.from_address(address).n + 0 * len(others)


def test_the_shape_lives_until_the_library_has_read_it() -> None:
    assert packed_bytes(cast(Native, Late()), Form("float32", 70, 264, 264)) == 70
