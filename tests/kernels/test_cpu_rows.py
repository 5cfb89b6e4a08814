"""Norms, gated activations and rescored logits of the C kernels at every ISA level, against torch."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from torch import Tensor

from stretto.kernels import Activation
from stretto.kernels import reference as torch_kernels
from stretto.kernels.cpu.native import F32, Native
from stretto.kernels.cpu.table import CpuTable
from tests.kernels.levels import native

__all__ = ["native"]

WIDTHS = [1, 7, 64, 130, 1024]
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 8e-3}
DTYPES = list(TOLERANCE)
RESCORED = 77.0


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    assert found.dtype == wanted.dtype
    tolerance = TOLERANCE[found.dtype]
    torch.testing.assert_close(found, wanted, rtol=4 * tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_norm_and_add_norm_equal_the_reference(native: Native, width: int, dtype: torch.dtype):
    table, draw = CpuTable(native, None), torch.Generator().manual_seed(width)
    for rows in (1, 3, 200):
        x, residual = (torch.randn(rows, width, generator=draw).to(dtype) for _ in range(2))
        weight = torch.rand(width, generator=draw).to(dtype)
        close(table.norm(x, weight, 1e-6), torch_kernels.norm(x.clone(), weight, 1e-6))
        found, total = table.add_norm(x.clone(), residual.clone(), weight, 1e-6)
        wanted, summed = torch_kernels.add_norm(x.clone(), residual.clone(), weight, 1e-6)
        close(total, summed)
        close(found, wanted)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", get_args(Activation))
def test_act_and_mul_equals_the_reference(native: Native, activation: Activation, dtype: torch.dtype):
    table, draw = CpuTable(native, None), torch.Generator().manual_seed(1)
    for rows, width in ((1, 1), (3, 50), (300, 64)):
        x = (4 * torch.randn(rows, 2 * width, generator=draw)).to(dtype)
        wanted = torch_kernels.act_and_mul(x.float(), activation).to(dtype)
        close(table.act_and_mul(x.clone(), activation), wanted)


@pytest.mark.parametrize("activation", get_args(Activation))
def test_act_and_mul_equals_the_reference_at_extreme_values(native: Native, activation: Activation):
    """Results overflow or become NaN exactly where those of torch do."""
    gates = torch.tensor([-1e30, -200.0, -88.0, -0.0, 0.0, 88.0, 200.0, 1e18, float("nan")])
    x = torch.cat((gates, torch.ones(len(gates))))[None]
    wanted = torch_kernels.act_and_mul(x.clone(), activation)
    found = CpuTable(native, None).act_and_mul(x.clone(), activation)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6, equal_nan=True)


def test_nan_in_one_row_does_not_reach_other_rows(native: Native):
    x = torch.ones(5, 64)
    x[2, 3] = float("nan")
    found = CpuTable(native, None).norm(x, torch.ones(64), 1e-6)
    assert torch.equal(found.isnan().any(-1), torch.tensor([False, False, True, False, False]))


def test_wrong_shapes_are_refused_and_named(native: Native):
    table = CpuTable(native, None)
    with pytest.raises(ValueError, match=r"\(2, 8\).*\(9,\)"):
        table.norm(torch.ones(2, 8), torch.ones(9), 1e-6)
    with pytest.raises(ValueError, match=r"\(3, 8\)"):
        table.add_norm(torch.ones(2, 8), torch.ones(3, 8), torch.ones(8), 1e-6)
    with pytest.raises(ValueError, match=r"\(2, 7\)"):
        table.act_and_mul(torch.ones(2, 7), "silu")


def rescored(native: Native, logits: Tensor, k: int) -> Tensor:
    """The (row, index) of each logit that `rescore_top_k` computed again, in ascending order.

    Every exact logit of this test is `RESCORED`. No approximate logit has that value.
    """
    rows, n = logits.shape
    x, weights, found = torch.ones(rows, 1), torch.full((n, 1), RESCORED), logits.clone()
    addresses = (found.data_ptr(), x.data_ptr(), weights.data_ptr())
    native.rescore_top_k(*addresses, rows, n, 1, k, F32, F32)
    untouched = found != RESCORED
    assert torch.equal(found[untouched].nan_to_num(), logits[untouched].nan_to_num())
    return (found == RESCORED).nonzero()


@pytest.mark.parametrize("n", [1, 63, 64, 1000, 5003])
def test_the_largest_logits_are_rescored_and_no_others(native: Native, n: int):
    logits = torch.randn(3, n, generator=torch.Generator().manual_seed(n))
    for k in {1, min(n, 5), min(n, 64), n if n < 100 else 100}:
        wanted = torch.zeros_like(logits).scatter_(1, logits.topk(k).indices, 1.0)
        assert torch.equal(rescored(native, logits, k), wanted.nonzero())


def test_of_equal_logits_the_lowest_ids_are_rescored(native: Native):
    logits = torch.zeros(1, 200)
    logits[0, 150] = 1
    assert torch.equal(rescored(native, logits, 4), torch.tensor([[0, 0], [0, 1], [0, 2], [0, 150]]))


def test_nan_logits_are_never_rescored(native: Native):
    logits = torch.full((2, 100), float("nan"))
    logits[0, 70] = -3.0
    logits[0, 90] = -float("inf")
    assert torch.equal(rescored(native, logits, 3), torch.tensor([[0, 70], [0, 90]]))


@pytest.mark.parametrize("count", [0, 9])
def test_rescoring_no_logits_or_more_than_there_are_is_refused(native: Native, count: int):
    logits, x, weights = torch.ones(2, 8), torch.ones(2, 1), torch.ones(8, 1)
    addresses = (logits.data_ptr(), x.data_ptr(), weights.data_ptr())
    with pytest.raises(ValueError, match="rescore_top_k"):
        native.rescore_top_k(*addresses, 2, 8, 1, count, F32, F32)
