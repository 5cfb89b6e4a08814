"""Loading checkpoints: shards, dtypes, memory, and the error for each kind of damage."""

# pyright: reportUnknownArgumentType=false, reportUnknownLambdaType=false, reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false
from __future__ import annotations

import json
import struct
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from weakref import ref

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from stretto.errors import CheckpointError
from stretto.kernels import Activation
from stretto.kernels.reference import REFERENCE, DenseExperts
from stretto.models.checkpoint import Checkpoint
from stretto.models.decoder import Decoder
from stretto.models.load import load
from stretto.models.source import ProgressCallback
from stretto.profiler import probe
from tests.models.checkpoints import expected, make, rewrite
from tests.models.stepping import Driver
from tests.models.test_families import close, prompt

CPU = torch.device("cpu")


def read(path: Path, dtype: torch.dtype = torch.float32, progress: ProgressCallback | None = None) -> Decoder:
    return load(path, dtype=dtype, device=CPU, kernels=REFERENCE, progress=progress)


def retensor(path: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    """Change the tensors of a checkpoint on disk."""
    file = path / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    change(tensors)
    save_file(tensors, file)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    make("llama", tmp_path, num_hidden_layers=2)
    return tmp_path


def test_a_sharded_checkpoint_loads_the_same_weights(tmp_path: Path) -> None:
    model = make("qwen3", tmp_path / "whole")
    model.save_pretrained(tmp_path / "cut", max_shard_size="100KB")
    assert len(list((tmp_path / "cut").glob("model-*.safetensors"))) > 2
    close(Driver(read(tmp_path / "cut")).read(prompt(9), 9), expected(model, prompt(9)))


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("held", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_are_converted_to_the_requested_dtype(
    tmp_path: Path, stored: torch.dtype, held: torch.dtype
) -> None:
    model = make("qwen3", tmp_path, dtype=stored, initializer_range=0.1)
    decoder = read(tmp_path, held)
    assert decoder.spec.dtype == str(stored).removeprefix("torch.")
    assert decoder.dtype == held
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.01}
    wanted = expected(model, prompt(30))
    close(Driver(decoder).read(prompt(30), 30), wanted, tolerance[held])
    close(Driver(decoder).read(prompt(30), 1), wanted, tolerance[held])


def test_weight_bytes_and_parameters_are_counted_once(tmp_path: Path) -> None:
    """A tied embedding is held once. The reported numbers are those of the tensors."""
    tied = make("qwen3", tmp_path / "tied")
    decoder = read(tmp_path / "tied", torch.bfloat16)
    assert decoder.parameters == sum(p.numel() for p in tied.parameters())
    assert decoder.weight_bytes == decoder.parameters * 2
    untied = make("llama", tmp_path / "untied")
    assert read(tmp_path / "untied").weight_bytes == 4 * sum(p.numel() for p in untied.parameters())
    cache = decoder.new_cache(10, 8)
    assert cache.nbytes == 10 * decoder.cache_bytes_per_block(8) == 10 * 2 * 4 * 2 * 32 * 8 * 2


def test_a_tied_checkpoint_may_store_its_output_head(tmp_path: Path) -> None:
    model = make("qwen3", tmp_path)
    retensor(tmp_path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    close(Driver(read(tmp_path)).read(prompt(5), 5), expected(model, prompt(5)))


def test_progress_counts_bytes_up_to_the_total(checkpoint: Path) -> None:
    calls: list[tuple[str, int, int]] = []
    read(checkpoint, progress=lambda *progress: calls.append(progress))
    assert {stage for stage, _, _ in calls} == {"weights"}
    done = [done for _, done, _ in calls]
    assert done == sorted(done) and len(set(done)) > 10
    assert (
        calls[-1][1]
        == calls[-1][2]
        == sum(t.nbytes for t in load_file(checkpoint / "model.safetensors").values())
    )


def test_rope_frequencies_in_a_checkpoint_are_ignored(checkpoint: Path) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    retensor(checkpoint, lambda t: t.update({name: torch.ones(8)}))
    read(checkpoint)


def _drop(tensors: dict[str, Tensor]) -> None:
    del tensors["model.layers.1.mlp.up_proj.weight"]


def _reshape(tensors: dict[str, Tensor]) -> None:
    tensors["model.layers.0.self_attn.k_proj.weight"] = torch.zeros(16, 64)


def _integers(tensors: dict[str, Tensor]) -> None:
    tensors["model.norm.weight"] = torch.zeros(64, dtype=torch.int8)


def _extra(tensors: dict[str, Tensor]) -> None:
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_drop, r"no tensor model\.layers\.1\.mlp\.up_proj\.weight"),
        (_reshape, r"k_proj\.weight in .*model\.safetensors has shape \[16, 64\].*must be \[32, 64\]"),
        (_integers, r"model\.norm\.weight in .* is I8; only F32, BF16, F16"),
        (
            _extra,
            r"1 tensors its config\.json does not explain, such as model\.layers\.0\.self_attn\.q_proj",
        ),
    ],
)
def test_missing_misshapen_and_unexpected_tensors_are_refused(
    checkpoint: Path, change: Callable[[dict[str, Tensor]], None], message: str
) -> None:
    retensor(checkpoint, change)
    with pytest.raises(CheckpointError, match=message):
        read(checkpoint)


def file_of(header: bytes | dict[str, Any], data: bytes = b"") -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data


def entry(start: int, stop: int, shape: list[Any], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a safetensors file, or is truncated"),
        (b"\x05\0\0", "not a safetensors file, or is truncated"),
        (b"PK\x03\x04 a zip file, as pickles are", "not a safetensors file, or is truncated"),
        (struct.pack("<Q", 2**63) + b"{}", "header does not fit"),
        (file_of(b"\xff\xfe not json at all"), "header is not JSON"),
        (file_of(b"[1, 2, 3]"), "header is not a JSON object"),
        (file_of({"a": [1]}), "entry for a is malformed"),
        (file_of({"a": {"dtype": "F32", "shape": [1]}}), "entry for a is malformed"),
        (file_of({"a": entry(0, 4, [1], "COMPLEX")}, bytes(4)), "is 'COMPLEX'; only F32"),
        (file_of({"a": entry(0, 4, [-1])}, bytes(4)), "entry for a is malformed"),
        (file_of({"a": entry(0, 4, [1.0])}, bytes(4)), "entry for a is malformed"),
        (file_of({"a": entry(0, 4, [True])}, bytes(4)), "entry for a is malformed"),
        (file_of({"a": entry(0, 8, [1])}, bytes(8)), "yet takes 8 bytes"),
        (file_of({"a": entry(0, 8, [2])}, bytes(4)), "is truncated: a ends at byte"),
        (file_of({"a": entry(0, 8, [2]), "b": entry(4, 12, [2])}, bytes(12)), "b overlaps"),
    ],
)
def test_headers_with_wrong_sizes_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as error:
        Checkpoint(tmp_path)
    assert "model.safetensors" in error.value.message


def test_a_truncated_file_is_refused(checkpoint: Path) -> None:
    file = checkpoint / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match="is truncated"):
        read(checkpoint)


def test_a_file_truncated_during_loading_is_refused(checkpoint: Path) -> None:
    with Checkpoint(checkpoint) as tensors:
        with (checkpoint / "model.safetensors").open("r+b") as file:
            file.truncate(4096)
        with pytest.raises(CheckpointError, match="ends early"):
            tensors.read(tensors.find("model.norm.weight", (64,)), torch.empty(64))


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "cannot be read"),
        ("{}", "weight_map must map"),
        ('{"weight_map": {"a": 3}}', "weight_map must map"),
        ('{"weight_map": {"a": "../../etc/passwd"}}', "weight_map must map"),
        ('{"weight_map": {"a": "gone.safetensors"}}', r"gone\.safetensors is missing"),
    ],
)
def test_a_wrong_index_is_refused(checkpoint: Path, index: str, message: str) -> None:
    (checkpoint / "model.safetensors.index.json").write_text(index)
    with pytest.raises(CheckpointError, match=message):
        read(checkpoint)


def test_a_tensor_in_two_files_is_refused(checkpoint: Path) -> None:
    for name in ("one", "two"):
        (checkpoint / f"{name}.safetensors").write_bytes((checkpoint / "model.safetensors").read_bytes())
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="another file of"):
        read(checkpoint)


def test_files_beside_the_whole_model_are_neither_read_nor_counted(checkpoint: Path) -> None:
    whole = (checkpoint / "model.safetensors").read_bytes()
    (checkpoint / "consolidated.safetensors").write_bytes(whole)
    with Checkpoint(checkpoint) as tensors:
        assert [file.name for file, _ in tensors.files] == ["model.safetensors"]
        assert tensors.nbytes < len(whole)
    read(checkpoint)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_the_dtype_of_the_weights_is_that_of_the_file_when_the_config_does_not_say(
    tmp_path: Path, stored: torch.dtype
) -> None:
    make("qwen3", tmp_path, dtype=stored)
    rewrite(tmp_path, "dtype", "torch_dtype")
    with Checkpoint(tmp_path) as tensors:
        assert tensors.dtype == str(stored).removeprefix("torch.")
        assert tensors.nbytes == tensors.parameters * stored.itemsize
    found = probe.stored(tmp_path)
    assert (found.dtype, found.bytes) == (tensors.dtype, tensors.nbytes)


def test_a_config_that_does_not_fit_the_tensors_is_refused(checkpoint: Path) -> None:
    rewrite(checkpoint, num_hidden_layers=3)
    with pytest.raises(CheckpointError, match=r"no tensor model\.layers\.2\."):
        read(checkpoint)
    rewrite(checkpoint, num_hidden_layers=2, vocab_size=2**31, hidden_size=2**31)
    with pytest.raises(CheckpointError, match=r"shape \[160, 64\]; by config\.json it must be \[2147483648"):
        read(checkpoint)
    rewrite(checkpoint, num_hidden_layers=1, vocab_size=160, hidden_size=64)
    with pytest.raises(CheckpointError, match=r"tensors its config\.json does not explain"):
        read(checkpoint)


MEASURE = """
import sys, torch
from pathlib import Path
from stretto.kernels import Activation
from stretto.kernels.reference import REFERENCE, DenseExperts
from stretto.models.load import load

def memory(key):
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith(key)) * 1024

torch.set_num_threads(1)
torch.ones(4) @ torch.ones(4)
before = memory("VmRSS")
dtype = getattr(torch, sys.argv[2])
decoder = load(Path(sys.argv[1]), dtype=dtype, device=torch.device("cpu"), kernels=REFERENCE)
print(memory("VmHWM") - before, decoder.weight_bytes)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("held", ["bfloat16", "float32"])
def test_loading_never_holds_a_weight_twice(tmp_path: Path, held: str) -> None:
    """Peak memory is at most 1.3 times the weights, with and without a conversion of the dtype."""
    wide = {"hidden_size": 1024, "intermediate_size": 3072, "vocab_size": 40_000, "head_dim": 64}
    make("qwen3", tmp_path, num_hidden_layers=1)
    rewrite(
        tmp_path, "layer_types", **wide, num_hidden_layers=6, num_attention_heads=16, num_key_value_heads=8
    )
    tensors = {"model.embed_tokens.weight": torch.zeros(40_000, 1024, dtype=torch.bfloat16)}
    tensors["model.norm.weight"] = torch.ones(1024, dtype=torch.bfloat16)
    shapes = {
        "input_layernorm": (1024,),
        "post_attention_layernorm": (1024,),
        "self_attn.q_norm": (64,),
        "self_attn.k_norm": (64,),
        "self_attn.q_proj": (1024, 1024),
        "self_attn.k_proj": (512, 1024),
        "self_attn.v_proj": (512, 1024),
        "self_attn.o_proj": (1024, 1024),
        "mlp.gate_proj": (3072, 1024),
        "mlp.up_proj": (3072, 1024),
        "mlp.down_proj": (1024, 3072),
    }
    for layer in range(6):
        for name, shape in shapes.items():
            tensors[f"model.layers.{layer}.{name}.weight"] = torch.ones(shape, dtype=torch.bfloat16)
    save_file(tensors, tmp_path / "model.safetensors")
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path), held], stdout=subprocess.PIPE, text=True, check=True
    )
    grown, weights = map(int, done.stdout.split())
    assert weights > 200e6
    assert weights * 0.95 <= grown <= weights * 1.3


def test_the_experts_of_a_layer_are_freed_once_they_are_packed(tmp_path: Path) -> None:
    """Only one layer of them is held as the checkpoint has it, however many are quantised."""
    make("qwen3_moe", tmp_path, mlp_only_layers=[])
    read_as_stored: list[ref[Tensor]] = []

    def pack(gate_up: Tensor, down: Tensor, activation: Activation) -> DenseExperts:
        assert not any(each() is not None for each in read_as_stored)
        read_as_stored.extend(ref(each) for each in (gate_up, down))
        return DenseExperts(gate_up.bfloat16(), down.bfloat16(), activation)

    kernels = replace(REFERENCE, pack_experts=pack)
    load(tmp_path, dtype=torch.float32, device=CPU, kernels=kernels)
    assert len(read_as_stored) == 2 * 4
