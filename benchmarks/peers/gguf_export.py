"""Writes a qwen2 or qwen3 checkpoint as GGUF and quantises it with llama.cpp's own quantiser.

Runs in the environment of llama-cpp-python: `python gguf_export.py CHECKPOINT OUT.gguf Q8_0|Q4_0`. The file
has no tokenizer, because the engines get token ids. Prints nothing.
"""

import json
import sys
import tempfile
from pathlib import Path

import gguf
import llama_cpp as c
import numpy as np


def tensors(path):
    """Every bfloat16 tensor of a safetensors file, as float32.

    numpy has no bfloat16; torch is not installed.
    """
    data = np.memmap(path, np.uint8, "r")
    start = 8 + int(data[:8].view(np.uint64)[0])
    for name, entry in json.loads(bytes(data[8:start])).items():
        if name != "__metadata__":
            if entry["dtype"] != "BF16":
                sys.exit(f"{path}: {name} is {entry['dtype']}; export a checkpoint in BF16")
            first, last = entry["data_offsets"]
            words = data[start + first : start + last].view(np.uint16).astype(np.uint32) << 16
            yield name, words.view(np.float32).reshape(entry["shape"])


def write(checkpoint, out):
    """Write the weights without quantising them: bfloat16 matrices and float32 vectors."""
    config = json.loads((checkpoint / "config.json").read_text())
    kind = config["model_type"]
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[kind.upper()], config["num_hidden_layers"])
    writer = gguf.GGUFWriter(out, kind)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    if "head_dim" in config:
        writer.add_key_length(config["head_dim"])
        writer.add_value_length(config["head_dim"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")
    for name, tensor in tensors(checkpoint / "model.safetensors"):
        found = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if tensor.ndim == 1:
            writer.add_tensor(found, tensor)
        else:
            kept = gguf.GGMLQuantizationType.BF16
            writer.add_tensor(found, gguf.quants.quantize(tensor, kept), raw_dtype=kept)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main():
    checkpoint, out, kind = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    with tempfile.TemporaryDirectory(dir=out.parent) as folder:
        plain = Path(folder) / "plain.gguf"
        write(checkpoint, plain)
        params = c.llama_model_quantize_default_params()
        params.ftype = getattr(c, f"LLAMA_FTYPE_MOSTLY_{kind}")
        unfinished = Path(folder) / "quantised.gguf"
        if c.llama_model_quantize(str(plain).encode(), str(unfinished).encode(), params):
            sys.exit(f"llama.cpp could not quantise {checkpoint} as {kind}")
        unfinished.rename(out)


main()
