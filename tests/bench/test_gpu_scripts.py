"""What the benchmarks of a GPU share and compute, on a GPU or in Triton's interpreter, with tiny shapes."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

import sys
from collections.abc import Iterator
from math import inf
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from stretto.engine.scheduler.types import Limits
from stretto.engine.step_time import StepTime
from tests.engine.runners.cuda_bench import Counting, events
from tests.kernels.cuda import DEVICE, GPU

from stretto.kernels.cuda.table import table  # isort: skip

__all__ = ["events"]
pytestmark = [pytest.mark.cuda] if GPU else []

FOLDER = Path(__file__).parent.parent.parent / "benchmarks"
LIMITS, CYCLE = Limits(4, 32), 4
SHAPE = {
    "model_type": "qwen3",
    "hidden_size": 64,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "vocab_size": 8 * CYCLE,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "torch_dtype": "bfloat16",
}


@pytest.fixture(scope="module")
def scripts() -> Iterator[Any]:
    """The scripts, imported as when they run: with their folder on the import path."""
    sys.path.insert(0, str(FOLDER))
    names = ("gpu_engine", "gpu", "gpu_speculation", "gpu_experts", "gpu_draw")
    try:
        yield SimpleNamespace(**{name: __import__(name) for name in names})
    finally:
        sys.path.remove(str(FOLDER))


@pytest.fixture
def engine(scripts: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`gpu_engine`, whose runners capture no graphs without a GPU. The interpreter truncates bfloat16."""
    monkeypatch.setattr(scripts.gpu_engine, "CudaRunner", Counting)
    if not GPU:
        monkeypatch.setattr(scripts.gpu_engine, "DTYPE", torch.float32)
    return scripts.gpu_engine


def test_a_driver_answers_and_decodes_in_batches(engine: Any, scripts: Any) -> None:
    runner = engine.new_runner(engine.build(SHAPE, table(DEVICE)), LIMITS, 16, 64)
    runner.start()
    driver = engine.Driver(runner, LIMITS)
    ident, first = driver.answer(3, 2)
    assert len(driver.tokens[ident]) == 2 and 0 < first < inf
    assert len(driver.decode(2, 3, 9)) == 1, "the first eight steps are not timed"
    assert driver.engine.idle and 5 <= min(len(driver.tokens[each]) for each in (2, 3)) < 9
    assert scripts.gpu.beside(driver, 1, 3, 1) > 0
    again = engine.Driver(runner, LIMITS)
    again.answer(3, 2)
    assert again.tokens[1] == driver.tokens[1], "a prompt is that of its id"


def test_answers_of_the_copying_checkpoint_walk_their_cycle(
    engine: Any, scripts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    copying = scripts.gpu_speculation
    for name, value in {"CYCLE": CYCLE, "PIECE": 2, "LIMITS": LIMITS}.items():
        monkeypatch.setattr(copying, name, value)
    config = SHAPE | {"tie_word_embeddings": False}
    decoder = engine.build(config, table(DEVICE), copying.Copying())
    runner = engine.new_runner(decoder, LIMITS, 16, 64)
    runner.start()
    driver = copying.Answers(runner, StepTime(), None)
    result, tokens = driver.run("repeats", 2, 3)
    assert tokens == [[0, 1, 2], [8, 9, 10]]
    assert result.tokens == 4 and result.steps >= 2 and result.proposed == 0


@pytest.mark.parametrize("name", ["fp8", "int4", "bf16"])
def test_the_parts_of_a_mixture_make_the_whole(
    name: str, scripts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    shapes = scripts.gpu_experts
    for constant, value in {"EXPERTS": 3, "TOP": 2, "HIDDEN": 40, "INNER": 24, "LAYERS": 1}.items():
        monkeypatch.setattr(shapes, constant, value)
    if not GPU:
        monkeypatch.setattr(shapes, "DTYPE", torch.float32)
    (mixture,) = shapes.step(shapes.layers(shapes.FORMATS[name]), 5)
    parts = shapes.parts(mixture)
    assert list(parts) == ["choose", "sort", "gate_up", "down", "combine"]
    parts["down"]()
    assert torch.equal(parts["combine"](), shapes.whole(mixture)())
    floor = shapes.floors([mixture], 1e6)
    assert floor["whole"] == pytest.approx(mixture.packed.nbytes * mixture.chosen / 3)


@pytest.mark.parametrize("name", ["fp8", "int4"])
def test_a_sweep_times_each_tiling_and_leaves_the_usual_ones(
    name: str, scripts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = scripts.gpu_experts
    tiny = {"EXPERTS": 3, "TOP": 2, "HIDDEN": 40, "INNER": 24, "LAYERS": 1, "STAGES": (3,)}
    for constant, value in tiny.items():
        monkeypatch.setattr(shapes, constant, value)
    if not GPU:
        monkeypatch.setattr(shapes, "DTYPE", torch.float32)
    columns: list[int] = []

    def timed(works: list[Any]) -> float:
        columns.append(shapes.streaming.STREAMED_COLUMNS)
        return float(len([work() for work in works]))

    monkeypatch.setattr(shapes, "timed", timed)
    packed = shapes.layers(shapes.FORMATS[name])
    found = shapes.sweep(packed, 1e6, 5)
    assert list(found["gate_up"]) == [
        f"{tokens} tokens, 128 rows, {warps} warps, 3 stages" for tokens in (16, 32) for warps in (4, 8)
    ]
    assert len(found["down"]) == 8 and {*found["gate_up"].values(), *found["down"].values()} == {1.0}
    assert list(shapes.sweep(packed, 1e6, 1)["whole"]) == ["256 columns", "512 columns", "1024 columns"]
    assert columns[-3:] == [256, 512, 1024] and shapes.streaming.STREAMED_COLUMNS == columns[0]


def test_the_benchmark_of_draws_draws_and_compares_logits(scripts: Any) -> None:
    torch.manual_seed(0)
    works = scripts.gpu_draw.draws(3, 2500)
    greedy = works["greedy"]()
    assert greedy.tolist() == works["greedy"].args[0].argmax(1).tolist()
    assert list(works) == list(scripts.gpu_draw.KINDS)
    assert all(((work() >= 0) & (work() < 2500)).all() for work in works.values())
    weight = torch.randn(48, 32, dtype=torch.bfloat16 if GPU else torch.float32, device=DEVICE)
    own, copied = (work() for work in scripts.gpu_draw.products(3, weight, None).values())
    assert own.dtype == copied.dtype == torch.float32
    assert torch.allclose(own, copied, atol=0.1 if GPU else 1e-4)
