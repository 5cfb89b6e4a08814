"""Chunk attention on a Hopper GPU: that it compiles, what it computes, and for which kinds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from stretto.kernels import Attention
from tests.kernels.compiling import compiled
from tests.kernels.cuda import DEVICE, GPU, on_device
from tests.kernels.steps import step

pytest.importorskip("triton.experimental.gluon", reason="Triton has no Gluon")

from stretto.kernels.cuda import attention as paged  # isort: skip
from stretto.kernels.cuda.hopper import attention as hopper  # isort: skip

pytestmark = [pytest.mark.cuda] if GPU else []
on_hopper = pytest.mark.skipif(not hopper.HOPPER, reason="needs a Hopper GPU")
KIND = Attention(heads=8, kv_heads=2, head_dim=128, scale=0.1)

CODE = """
from stretto.kernels import Attention
from stretto.kernels.cuda.hopper import attention as hopper
q, layer = torch.zeros(64, 12, DIM).bfloat16()[:, :8], torch.zeros(2, 4, 2, 16, DIM).bfloat16()
ints = torch.zeros(SEQUENCES + 1, 4, dtype=torch.int32)
batch = SimpleNamespace(tables=ints, contexts=ints[:-1, 0])
hopper.chunk(q, Attention(8, 2, DIM, 0.1), layer, batch, ints, torch.empty(64, 8 * DIM).bfloat16())
"""


@pytest.mark.parametrize("dim", [64, 128])
def test_one_kernel_compiles_for_hopper_for_any_number_of_sequences(tmp_path: Path, dim: int) -> None:
    code = "\n".join(CODE.replace("DIM", str(dim)).replace("SEQUENCES", str(count)) for count in (1, 2, 66))
    assert compiled(code, tmp_path) == [{"m64n64k16", f"m64n{dim}k16", "cp.async.bulk.tensor.2d"}]


def test_other_devices_and_kinds_have_other_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = torch.zeros(2, 3, 2, 16, 128, dtype=torch.bfloat16)
    assert hopper.supported(KIND, layer) == hopper.HOPPER
    monkeypatch.setattr(hopper, "HOPPER", True)
    assert hopper.supported(KIND, layer)
    for changed in ({"window": 100}, {"softcap": 5.0}, {"head_dim": 96}, {"kv_heads": 1, "heads": 65}):
        fields = {"heads": 8, "kv_heads": 2, "head_dim": 128, "scale": 0.1, **changed}
        assert not hopper.supported(Attention(**fields), layer)  # pyright: ignore[reportArgumentType]
    assert not hopper.supported(KIND, layer.float())
    assert not hopper.supported(KIND, torch.zeros(2, 3, 2, 4, 128, dtype=torch.bfloat16))


def wanted(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Causal attention of the last queries of a sequence, [queries, heads, head_dim], in float64."""
    share, context = KIND.heads // KIND.kv_heads, len(keys)
    keys, values = (side.repeat_interleave(share, 1).double() for side in (keys, values))
    scores = torch.einsum("thd,khd->htk", q.double(), keys) * KIND.scale
    seen = torch.arange(context) <= torch.arange(context - len(q), context)[:, None]
    return torch.einsum("htk,khd->thd", scores.masked_fill(~seen, -torch.inf).softmax(-1), values)


@on_hopper
@pytest.mark.parametrize("least", [1, 2])
@pytest.mark.parametrize(
    "sequences",
    [
        [(1, 1)],
        [(300, 300)],
        [(129, 2000)],
        [(1, 700), (2, 2), (33, 64), (1, 5), (64, 400)],
        [(1, 20 * n + 1) for n in range(70)],
    ],
)
def test_it_is_causal_attention_over_the_cache(sequences: list[tuple[int, int]], least: int) -> None:
    made = step(sequences, KIND, dtype=torch.bfloat16, size=16)
    for side, held in enumerate((made.keys, made.values)):
        for row, (_, context) in enumerate(sequences):
            for position in range(context):
                block = made.batch.tables[row, position // 16]
                made.cache.layers[0][side, block, :, position % 16] = held[row][position]
    batch, cache = on_device(made)
    q = torch.randn(len(made.batch.tokens), KIND.heads, KIND.head_dim).bfloat16()
    tiles = paged.number_tiles(batch, paged.tile_tokens(KIND, 2), least)
    out = torch.full((len(q), KIND.heads * KIND.head_dim), torch.nan, dtype=q.dtype, device=DEVICE)
    hopper.chunk(q.to(DEVICE), KIND, cache.layers[0], batch, tiles, out)
    for index, rows in enumerate(made.rows):
        found, count = out[rows].view(-1, KIND.heads, KIND.head_dim).cpu().double(), sequences[index][0]
        if count < least:
            assert found.isnan().all()
        else:
            right = wanted(q[rows], made.keys[index], made.values[index])
            assert (found - right).norm() / right.norm() < 5e-3
