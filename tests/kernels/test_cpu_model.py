"""Whole decoders on the C kernels: their logits, unquantised and quantised, against the torch table."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from stretto.errors import StartError
from stretto.kernels import AnyKernels, Attention, DecoderLayer, LayerStack, Mlp
from stretto.kernels.choice import choose_kernels
from stretto.kernels.cpu.native import Native
from stretto.kernels.cpu.program import LayerProgram
from stretto.kernels.cpu.table import CpuQuantise, fitting, table
from stretto.kernels.reference import REFERENCE
from stretto.models.decoder import Decoder
from stretto.models.load import load
from tests.kernels.levels import native
from tests.models.checkpoints import make
from tests.models.stepping import Driver

__all__ = ["native"]

CPU = torch.device("cpu")
PROMPT = [(7 * i * i + 3 * i) % 150 + 4 for i in range(60)]


def decoder(path: Path, kernels: AnyKernels, dtype: torch.dtype = torch.float32) -> Decoder:
    return load(path, dtype=dtype, device=CPU, kernels=kernels)


@pytest.fixture(scope="module", params=["qwen3", "gemma3", "mistral", "phi3", "qwen3_moe"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint")
    make(request.param, path)
    return path


@pytest.mark.parametrize("chunk", [60, 7, 1])
def test_logits_equal_those_of_the_reference(native: Native, checkpoint: Path, chunk: int):
    found = Driver(decoder(checkpoint, table(native))).read(PROMPT, chunk)
    wanted = Driver(decoder(checkpoint, REFERENCE)).read(PROMPT, 60)
    assert (found - wanted).norm() / wanted.norm() < 1e-4


def test_bfloat16_logits_are_as_close_to_float32_as_those_of_torch(native: Native, checkpoint: Path):
    if "moe" in str(json.loads((checkpoint / "config.json").read_text())["model_type"]):
        pytest.skip("a router's near ties fall either way")
    found = Driver(decoder(checkpoint, table(native), torch.bfloat16)).read(PROMPT, 16)
    wanted = Driver(decoder(checkpoint, REFERENCE)).read(PROMPT, 60)
    plain = Driver(decoder(checkpoint, REFERENCE, torch.bfloat16)).read(PROMPT, 60)
    assert (found - wanted).norm() < 1.2 * (plain - wanted).norm()


@pytest.mark.parametrize("quantise", ["int8", "int4"])
def test_quantised_logits_are_close_to_the_reference(
    native: Native, checkpoint: Path, quantise: CpuQuantise, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("stretto.kernels.cpu.table.SMALLEST_QUANTISED", 32)
    model = decoder(checkpoint, table(native, quantise))
    found = Driver(model).read(PROMPT, 16)
    wanted = Driver(decoder(checkpoint, REFERENCE)).read(PROMPT, 60)
    off = float((found - wanted).norm() / wanted.norm())
    assert 1e-4 < off < (0.1 if quantise == "int8" else 0.8)


def test_quantisation_falls_back_when_no_group_size_divides_the_row():
    assert fitting("int8", 1024) == ("int8", 128)
    assert fitting("int4", 1024) == ("int4", 32)
    assert fitting("int4", 24) == ("int4", 8)
    assert fitting("int4", 20) == ("int8", 0)
    assert fitting("int8", 100) == ("int8", 0)


def test_the_kernels_table_depends_on_dtype_and_on_the_built_library(
    native: Native, monkeypatch: pytest.MonkeyPatch
):
    cpu = torch.device("cpu")
    assert choose_kernels(cpu, torch.bfloat16)[0].name == f"cpu-{native.level}"
    assert choose_kernels(cpu, torch.float32, "int8")[0].name == f"cpu-{native.level}-int8"
    assert choose_kernels(cpu, torch.float16)[0] is REFERENCE
    with pytest.raises(StartError, match="float16"):
        choose_kernels(cpu, torch.float16, "int8")
    monkeypatch.setattr("stretto.kernels.cpu.native.load", lambda: None)
    assert choose_kernels(cpu, torch.float32)[0] is REFERENCE
    with pytest.raises(StartError, match="gcc"):
        choose_kernels(cpu, torch.float32, "int4")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("quantise", [None, "int8"])
def test_the_fused_layer_program_gives_the_same_logits(
    native: Native, checkpoint: Path, quantise: CpuQuantise | None, dtype: torch.dtype
):
    kernels = table(native, quantise)
    whole = decoder(checkpoint, kernels, dtype)
    plain = decoder(checkpoint, replace(kernels, layers=None), dtype)
    assert torch.equal(Driver(whole).read(PROMPT, 1), Driver(plain).read(PROMPT, 1))


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"out": (16, 9)}, r"weights \(16, 9\) do not fit rows of 8"),
        ({"down": (17, 12)}, "writes rows of 17 to rows of 16"),
        ({"qkv": (15, 16)}, "writes rows of 16 to rows of 15"),
    ],
)
def test_layer_weights_with_mismatched_shapes_are_refused_and_named(
    native: Native, changes: dict[str, tuple[int, int]], message: str
):
    shapes = {"qkv": (16, 16), "out": (16, 8), "gate_up": (24, 16), "down": (16, 12)} | changes
    packed = {name: table(native).pack(torch.zeros(shape), None) for name, shape in shapes.items()}
    layer = DecoderLayer(
        attention=Attention(heads=2, kv_heads=1, head_dim=4, scale=1.0),
        eps=1e-6,
        pre_attention_norm=torch.ones(16),
        qkv=packed["qkv"],
        query_key_norm=None,
        out=packed["out"],
        post_attention_norm=None,
        pre_mlp_norm=torch.ones(16),
        feed_forward=Mlp(packed["gate_up"], "silu", packed["down"]),
        post_mlp_norm=None,
    )
    with pytest.raises(ValueError, match=message):
        LayerProgram(native, LayerStack([layer], torch.ones(16), 1e-6), lambda _: 0)
