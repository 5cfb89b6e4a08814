"""Runs OpenVINO GenAI as an engine without a server. Reads tasks and prints timings, one line of JSON each.

The fields are those of `stretto.profiler.protocol`. Runs in its own environment: `python openvino_alone.py
DIRECTORY THREADS`. Continuous batching is driven step by step, as a server does. As in OpenVINO's
LLMPipeline, a step reads a whole prompt, and the prefix cache is on.
"""

import json
import random
import sys
import time
from pathlib import Path

import numpy as np
import openvino as ov
import openvino_genai as genai

CACHE_GB = 1


def run(pipe, task, vocab):
    """Run one task."""
    size, length = task["batch"], task["prompt_tokens"]
    rng = random.Random(f"{task['seed']} {length}")
    prompts = [rng.choices(range(vocab // 4, vocab * 3 // 4), k=length) for _ in range(size)]
    config = genai.GenerationConfig()
    config.max_new_tokens, config.ignore_eos, config.do_sample = task["output_tokens"], True, False
    started = time.monotonic()
    handles = [
        pipe.add_request(index, ov.Tensor(np.array([prompt], np.int64)), config)
        for index, prompt in enumerate(prompts)
    ]
    firsts, drawn = {}, [0] * size
    while len(firsts) < size:
        pipe.step()
        read(handles, drawn)
        firsts |= {index: time.monotonic() for index in range(size) if drawn[index] and index not in firsts}
    first, before = time.monotonic(), sum(drawn)
    while max(drawn) < task["output_tokens"]:
        pipe.step()
        read(handles, drawn)
    ended, tokens = time.monotonic(), sum(drawn) - before
    while pipe.has_non_finished_requests():
        pipe.step()
        read(handles, drawn)
    return {
        "ttft_ms": (first - started) * 1e3,
        "cached_tokens": 0,
        "decode_tokens": tokens,
        "decode_ms": (ended - first) * 1e3,
        "peak_bytes": peak_bytes(),
    }


def read(handles, drawn):
    """Add the new tokens of each request to its count."""
    for index, handle in enumerate(handles):
        while handle.can_read():
            drawn[index] += sum(len(output.generated_ids) for output in handle.read().values())


def peak_bytes():
    """The largest memory that this process has had."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def main():
    directory, threads = Path(sys.argv[1]), int(sys.argv[2])
    scheduler = genai.SchedulerConfig()
    scheduler.cache_size, scheduler.enable_prefix_caching = CACHE_GB, True
    scheduler.max_num_batched_tokens = 2**20
    properties = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    pipe = genai.ContinuousBatchingPipeline(directory, scheduler, "CPU", properties)
    vocab = json.loads((directory / "config.json").read_text())["vocab_size"]
    print(json.dumps({"version": f"OpenVINO GenAI {genai.__version__}"}), flush=True)
    for line in sys.stdin:
        print(json.dumps(run(pipe, json.loads(line), vocab)), flush=True)


main()
