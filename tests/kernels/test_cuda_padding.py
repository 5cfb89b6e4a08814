"""Products that are padded to the number of rows at which the vendor's library is fastest."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.kernels.cuda import DEVICE, GPU

from stretto.kernels.cuda import linear, rows, table as tables  # isort: skip
from stretto.kernels.cuda.launch import is_loading, loading  # isort: skip
from stretto.kernels.cuda.linear import PaddedRows  # isort: skip

pytestmark = [pytest.mark.cuda] if GPU else []
OUTPUTS, COLUMNS = 96, 64


class Measured:
    """A measurement by a table of times, and what was measured."""

    def __init__(self, times: dict[int, float]) -> None:
        self.times = times
        self.asked: list[int] = []

    def __call__(self, count: int, weight: Tensor, bias: Tensor | None) -> float:
        self.asked.append(count)
        return self.times[count]


@pytest.fixture
def weight(monkeypatch: pytest.MonkeyPatch) -> Tensor:
    monkeypatch.setattr(linear, "LEAST_PADDED", 1)
    return torch.randn(OUTPUTS, COLUMNS, generator=torch.Generator().manual_seed(0)).to(DEVICE)


def some_rows(count: int) -> Tensor:
    x = rows.new_rows(torch.zeros(0, device=DEVICE), count, COLUMNS)
    return x.copy_(torch.randn(count, COLUMNS, generator=torch.Generator().manual_seed(count)))


def test_a_product_is_padded_to_the_fastest_number_of_rows_that_was_measured_while_loading(
    weight: Tensor,
) -> None:
    measured = Measured({320: 33.0, 384: 24.0, 448: 35.0})
    padded, x = PaddedRows(measured), some_rows(320)
    assert padded.pad(x, weight, None) is x, "nothing is measured while someone waits"
    with loading():
        for _ in range(2):
            assert padded.pad(x, weight, None).shape == (384, COLUMNS)
    longer = padded.pad(x, weight, None)
    assert longer.shape == (384, COLUMNS) and longer.data_ptr() == x.data_ptr()
    assert torch.equal(longer[:320], x)
    assert sorted(measured.asked) == [320, 384, 448], "each number once"


def test_each_matrix_and_number_of_rows_is_measured_by_itself(weight: Tensor) -> None:
    measured = Measured({100: 20.0, 128: 16.5, 192: 17.3, 228: 9.0, 256: 8.0, 320: 7.0})
    padded = PaddedRows(measured)
    with loading():
        assert padded.pad(some_rows(100), weight, None).shape[0] == 100, "too little is saved"
        assert padded.pad(some_rows(228), weight, None).shape[0] == 320
        assert padded.pad(some_rows(228), weight[:48], None).shape[0] == 320
        assert padded.pad(some_rows(228), weight, weight[:, 0]).shape[0] == 320
    assert len(measured.asked) == 3 + 3 * 3


def test_the_products_of_small_matrices_are_not_measured(
    weight: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear, "LEAST_PADDED", weight.numel() + 1)
    measured = Measured({})
    with loading():
        assert PaddedRows(measured).pad(some_rows(320), weight, None).shape[0] == 320


def test_rows_without_room_behind_them_are_not_padded(weight: Tensor) -> None:
    padded = PaddedRows(Measured({320: 33.0, 384: 24.0, 448: 35.0}))
    with loading():
        padded.pad(some_rows(320), weight, None)
    tight = torch.randn(320, COLUMNS, device=DEVICE)
    assert padded.pad(tight, weight, None) is tight
    nearly = torch.randn(383, COLUMNS, device=DEVICE)[:320]
    assert padded.pad(nearly, weight, None) is nearly
    wide = some_rows(448)
    assert padded.pad(wide[100:420], weight, None).shape[0] == 384
    assert padded.pad(wide[256 : 256 + 320], weight, None).shape[0] == 192, "fewer rows are others"


@pytest.mark.parametrize("count", [64, 65, 200, 512, 513])
def test_the_table_gives_the_products_of_the_rows_themselves(count: int, weight: Tensor) -> None:
    """What is behind them is no number, and is not looked at."""
    table = tables.CudaTable(DEVICE, None)
    measured = Measured({more: 1.0 if more == count else 0.5 for more in range(700)})
    table._padded = PaddedRows(measured)  # pyright: ignore[reportPrivateUsage]
    packed = table.pack(torch.cat([weight] * 128), None)
    x = some_rows(count)
    room = x.untyped_storage().nbytes() // x.itemsize // COLUMNS
    x.as_strided((room, COLUMNS), (COLUMNS, 1))[count:] = torch.nan
    with loading():
        found = table.linear(x, packed)
    assert found.shape == (count, 128 * OUTPUTS)
    assert (found - torch.cat([x @ weight.T] * 128, 1)).abs().max() <= 1e-3
    assert bool(measured.asked) == (count in rows.PADDED)


def test_kernels_leave_room_behind_what_a_product_reads() -> None:
    x, gains = torch.randn(100, COLUMNS, device=DEVICE), torch.ones(COLUMNS, device=DEVICE)
    made = [
        rows.norm(x, gains, 1e-5),
        rows.add_norm(x, torch.zeros_like(x), gains, 1e-5)[0],
        rows.act_and_mul(torch.randn(100, 2 * COLUMNS, device=DEVICE), "silu"),
    ]
    for each in made:
        assert each.untyped_storage().nbytes() >= (100 + rows.SPARE_ROWS) * COLUMNS * 4


def test_loading_ends_with_an_error() -> None:
    with pytest.raises(ValueError, match="x"), loading():
        assert is_loading()
        raise ValueError("x")
    assert not is_loading()


@pytest.mark.skipif(not GPU, reason="needs an NVIDIA GPU")
def test_a_product_is_timed_on_the_device(weight: Tensor) -> None:
    assert 0 < linear.product_us(128, weight, None) < 1e5
