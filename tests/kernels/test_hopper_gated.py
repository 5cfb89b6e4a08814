"""The gated product on a Hopper GPU: that it compiles, when it is used, and what it computes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from stretto.kernels import Activation
from tests.kernels.compiling import compiled
from tests.kernels.cuda import DEVICE, GPU

pytest.importorskip("triton.experimental.gluon", reason="Triton has no Gluon")

from stretto.kernels.cuda import table as tables  # isort: skip
from stretto.kernels.cuda.hopper import gated  # isort: skip

pytestmark = [pytest.mark.cuda] if GPU else []
on_hopper = pytest.mark.skipif(not gated.HOPPER, reason="needs a Hopper GPU")
CODE = """
from stretto.kernels.cuda.hopper.gated import linear_act_and_mul
for rows in (384, 1000):
    for bias in (None, torch.zeros(512).bfloat16()):
        x, weight = torch.zeros(rows, 64).bfloat16(), torch.zeros(512, 64).bfloat16()
        linear_act_and_mul(x, weight, bias, "silu")
"""


def test_one_kernel_compiles_for_all_numbers_of_rows(tmp_path: Path) -> None:
    """Those that have a bias have another one."""
    assert compiled(CODE, tmp_path) == [{"m64n256k16", "cp.async.bulk.tensor.2d"}] * 2


def test_it_multiplies_many_rows_in_16_bits_on_hopper_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = torch.zeros(gated.LEAST_ROWS, 72).bfloat16(), torch.zeros(48, 72).bfloat16()
    assert gated.supported(x, weight) == gated.HOPPER
    monkeypatch.setattr(gated, "HOPPER", True)
    assert gated.supported(x, weight) and gated.supported(x.half(), weight.half())
    assert not gated.supported(x[1:], weight), "too few rows"
    assert not gated.supported(x.float(), weight.float()) and not gated.supported(x.half(), weight)
    assert not gated.supported(x, weight[:40]), "rows of the result would not begin at multiples of 16 bytes"
    assert not gated.supported(x[:, :60].contiguous(), weight[:, :60].contiguous()), "nor do those of x"
    assert not gated.supported(x[:, 4:68], weight[:, :64]), "nor does its first one"
    assert not gated.supported(x.T.contiguous().T, weight), "its rows are not contiguous"


@pytest.mark.parametrize(("rows", "quantise"), [(0, None), (-1, None), (0, "int4")])
def test_the_table_uses_it_for_plain_weights_and_many_rows(
    rows: int, quantise: tables.CudaQuantise | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, others = torch.zeros(1), torch.zeros(1)
    monkeypatch.setattr(gated, "HOPPER", True)
    monkeypatch.setattr(gated, "linear_act_and_mul", lambda *_: ours)
    monkeypatch.setattr(tables.rows, "act_and_mul", lambda *_: others)
    table = tables.table(DEVICE, quantise)
    packed = table.pack(torch.zeros(512, 64).bfloat16().to(DEVICE), None)
    monkeypatch.setattr(tables.CudaTable, "linear", lambda *_: others)
    x = torch.zeros(gated.LEAST_ROWS + rows, 64).bfloat16().to(DEVICE)
    found = table.linear_act_and_mul(x, packed, "silu")
    assert (found is ours) == (rows == 0 and quantise is None)


def plain(x: Tensor, weight: Tensor, bias: Tensor | None, activation: Activation) -> Tensor:
    """The gated product in float64."""
    gates, ups = F.linear(x.double(), weight.double(), None if bias is None else bias.double()).chunk(2, -1)
    if activation in ("silu", "relu"):
        return (F.silu(gates) if activation == "silu" else F.relu(gates)) * ups
    return F.gelu(gates, approximate="none" if activation == "gelu" else "tanh") * ups


@on_hopper
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 65, 128, 385, 1300, 2305])
@pytest.mark.parametrize(
    ("shape", "activation", "biased"),
    [
        ((24576, 1024), "silu", False),  # many tiles for each program
        ((1360, 208), "gelu_tanh", True),  # fewer blocks than stages, and no multiple of a tile
        ((2064, 1096), "gelu", True),
        ((512, 4096), "relu", False),
    ],
)
def test_it_is_a_gated_product(
    dtype: torch.dtype, rows: int, shape: tuple[int, int], activation: Activation, biased: bool
) -> None:
    torch.manual_seed(rows)
    x = torch.randn(rows, shape[1], dtype=dtype, device=DEVICE)
    weight = torch.randn(shape, dtype=dtype, device=DEVICE) * shape[1] ** -0.5
    bias = torch.randn(shape[0], dtype=dtype, device=DEVICE) if biased else None
    wanted = plain(x, weight, bias, activation)
    for _ in range(2):
        found = gated.linear_act_and_mul(x, weight, bias, activation)
        assert found.shape == wanted.shape
        assert (found.double() - wanted).norm() / wanted.norm() <= 4e-3


@on_hopper
def test_it_reads_rows_that_are_part_of_wider_ones() -> None:
    x = torch.randn(500, 512, dtype=torch.bfloat16, device=DEVICE)[:, 64:320]
    weight = torch.randn(1024, 256, dtype=torch.bfloat16, device=DEVICE) / 16
    assert gated.supported(x, weight)
    found, wanted = gated.linear_act_and_mul(x, weight, None, "silu"), plain(x, weight, None, "silu")
    assert (found.double() - wanted).norm() / wanted.norm() <= 4e-3
