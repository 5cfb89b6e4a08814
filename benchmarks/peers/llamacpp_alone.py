"""Runs llama.cpp as an engine without a server. Reads tasks and prints timings, one line of JSON each.

The fields are those of `stretto.profiler.protocol`. Runs in the environment of llama-cpp-python: `python
llamacpp_alone.py MODEL.gguf THREADS`. All settings except threads and sizes are the library's defaults.
"""

import json
import random
import sys
import time
from pathlib import Path

import llama_cpp as c
import numpy as np

ANSWER_TOKENS = 64


class Context:
    """llama.cpp's state for some sequences of one prompt length.

    `seed`: that of the prompts in its KV cache.
    """

    def __init__(self, model, sequences, length, threads):
        params = c.llama_context_default_params()
        params.n_ctx, params.n_seq_max = sequences * (length + ANSWER_TOKENS), sequences
        params.n_threads = params.n_threads_batch = threads
        self.handle = c.llama_init_from_model(model, params)
        if not self.handle:
            sys.exit(f"no context for {sequences} sequences of {length} tokens")
        self.memory = c.llama_get_memory(self.handle)
        self.batch = c.llama_batch_init(c.llama_n_batch(self.handle), 0, 1)
        self.seed = None

    def decode(self, rows):
        """Run one step over rows of (token, position, sequence, whether its logits are needed)."""
        batch = self.batch
        batch.n_tokens = len(rows)
        for index, (token, position, sequence, wanted) in enumerate(rows):
            batch.token[index], batch.pos[index] = token, position
            batch.n_seq_id[index], batch.seq_id[index][0], batch.logits[index] = 1, sequence, wanted
        if c.llama_decode(self.handle, batch):
            sys.exit("llama_decode failed")

    def drawn(self, index, vocab):
        """The likeliest next token of a row."""
        return int(np.ctypeslib.as_array(c.llama_get_logits_ith(self.handle, index), (vocab,)).argmax())


def run(context, task, vocab):
    """Run one task. Prompts with the seed of the last task are in the KV cache already."""
    size, length = task["batch"], task["prompt_tokens"]
    rng = random.Random(f"{task['seed']} {length}")
    prompts = [rng.choices(range(vocab // 4, vocab * 3 // 4), k=length) for _ in range(size)]
    kept = length - 1 if context.seed == task["seed"] else 0
    context.seed = task["seed"]
    longest = c.llama_n_batch(context.handle)
    started, tokens = time.monotonic(), []
    for sequence, prompt in enumerate(prompts):
        c.llama_memory_seq_rm(context.memory, sequence, kept, -1)
        for start in range(kept, length, longest):
            end = min(start + longest, length)
            rows = [(prompt[at], at, sequence, at == length - 1) for at in range(start, end)]
            context.decode(rows)
        tokens.append(context.drawn(len(rows) - 1, vocab))
    first = time.monotonic()
    for step in range(task["output_tokens"] - 1):
        rows = [(token, length + step, sequence, True) for sequence, token in enumerate(tokens)]
        context.decode(rows)
        tokens = [context.drawn(index, vocab) for index in range(size)]
    return {
        "ttft_ms": (first - started) * 1e3,
        "cached_tokens": kept * size,
        "decode_tokens": size * (task["output_tokens"] - 1),
        "decode_ms": (time.monotonic() - first) * 1e3,
        "peak_bytes": peak_bytes(),
    }


def peak_bytes():
    """The largest memory that this process has had."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def main():
    path, threads = sys.argv[1], int(sys.argv[2])
    c.llama_backend_init()
    model = c.llama_model_load_from_file(path.encode(), c.llama_model_default_params())
    if not model:
        sys.exit(f"llama.cpp cannot load {path}")
    vocab = c.llama_vocab_n_tokens(c.llama_model_get_vocab(model))
    contexts = {}
    print(json.dumps({"version": f"llama-cpp-python {c.__version__}"}), flush=True)
    for line in sys.stdin:
        task = json.loads(line)
        key = task["batch"], task["prompt_tokens"]
        if key not in contexts:
            contexts[key] = Context(model, *key, threads)
        print(json.dumps(run(contexts[key], task, vocab)), flush=True)


main()
