"""Clients that are commands: llm, aider, lm-eval, guidellm, vllm. The name of the client is the argument."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from report import ANSWER, BASE, KEY, MODEL, QUESTION, V1, feature

HOME = Path(tempfile.mkdtemp())
BIN = Path(sys.executable).parent
ENVIRONMENT = os.environ | {
    "OPENAI_API_BASE": V1, "OPENAI_BASE_URL": V1, "OPENAI_API_KEY": KEY, "HOME": str(HOME),
    "LLM_USER_PATH": str(HOME), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1",
}  # fmt: skip


def run(*words: str, seconds: int = 300) -> str:
    """What a command prints."""
    done = subprocess.run(
        [str(BIN / words[0]), *words[1:]],
        cwd=HOME,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=seconds,
    )
    sys.stderr.write(done.stdout + done.stderr)
    assert done.returncode == 0, (done.stdout + done.stderr)[-150:]
    return done.stdout


def llm() -> None:
    entry = {"model_id": "served", "model_name": MODEL, "api_base": V1, "supports_schema": True}
    (HOME / "extra-openai-models.yaml").write_text(json.dumps([entry]))

    @feature("answer")
    def answer():
        assert ANSWER in run("llm", "-m", "served", "--no-stream", "-o", "temperature", "0", QUESTION)

    @feature("stream")
    def stream():
        assert ANSWER in run("llm", "-m", "served", "-o", "temperature", "0", QUESTION)

    @feature("structured")
    def structured():
        schema = (
            '{"type": "object", "properties": {"city": {"enum": ["Rome", "Oslo"]}}, "required": ["city"]}'
        )
        said = run("llm", "-m", "served", "--schema", schema, "-o", "max_tokens", "200", QUESTION)
        assert "city" in json.loads(said)

    @feature("turns")
    def turns():
        assert run("llm", "-c", "Thank you!") is not None


def aider() -> None:
    @feature("answer")
    def answer():
        flags = [
            "--yes-always",
            "--no-git",
            "--no-show-model-warnings",
            "--no-check-update",
            "--analytics-disable",
        ]
        said = run(
            "aider", "--model", f"openai/{MODEL}", *flags, "--edit-format", "ask", "--message", QUESTION
        )
        assert "Tokens:" in said, said


def lm_eval() -> None:
    """A multiple choice by log-likelihood, as hellaswag is one, from a local file."""
    endings = [" 7", " 12", " 41"]
    lines = [json.dumps({"ctx": f"{at} + {7 - at} =", "endings": endings, "label": 0}) for at in range(1, 7)]
    (HOME / "data.jsonl").write_text("\n".join(lines))
    task = {
        "task": "local_choice", "dataset_path": "json", "test_split": "test",
        "output_type": "multiple_choice",
        "dataset_kwargs": {"data_files": {"test": str(HOME / "data.jsonl")}}, "doc_to_text": "{{ctx}}",
        "doc_to_target": "{{label}}", "doc_to_choice": "{{endings}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }  # fmt: skip
    (HOME / "task.yaml").write_text(json.dumps(task))

    @feature("logprobs")
    def logprobs():
        tokenizer = os.environ["STRETTO_TOKENIZER"]
        to = f"model={MODEL},base_url={V1}/completions,tokenizer={tokenizer},num_concurrent=4"
        run(
            "lm_eval", "--model", "local-completions", "--model_args", to, "--tasks", "local_choice",
            "--include_path", str(HOME), "--output_path", str(HOME / "out"),
        )  # fmt: skip
        (results,) = (HOME / "out").rglob("results*.json")
        assert 0 <= json.loads(results.read_text())["results"]["local_choice"]["acc,none"] <= 1


def guidellm() -> None:
    @feature("stream")
    def stream():
        run(
            "guidellm", "run", "--disable-console-interactive",
            "--backend", f"kind=openai_http,target={V1.removesuffix('/v1')},model={MODEL}",
            "--profile", "kind=concurrent,streams=2", "--constraint", "kind=max_requests,count=6",
            "--tokenizer", f"kind=hf_auto,model={os.environ['STRETTO_TOKENIZER']}",
            "--data", "kind=synthetic_text,prompt_tokens=20,output_tokens=8",
        )  # fmt: skip


def vllm() -> None:
    """`vllm bench serve` with its dataset of random tokens. Each run counts its requests that failed."""

    def bench(backend: str, endpoint: str, *more: str, count: int = 3) -> dict:
        name = f"{backend}.json"
        run(
            "vllm", "bench", "serve", "--backend", backend, "--base-url", BASE, "--endpoint", endpoint,
            "--model", MODEL, "--tokenizer", os.environ["STRETTO_TOKENIZER"], "--dataset-name", "random",
            "--random-input-len", "20", "--random-output-len", "8", "--num-prompts", str(count),
            "--max-concurrency", "2", "--save-result", "--result-filename", name, *more, seconds=850,
        )  # fmt: skip
        found = json.loads((HOME / name).read_text())
        assert (found["completed"], found.get("failed", 0)) == (count, 0), found
        return found

    @feature("stream")
    def stream():
        exact = bench("vllm", "/v1/completions", "--ignore-eos", "--goodput", "ttft:60000")
        assert exact["total_output_tokens"] == 3 * 8 and exact["total_input_tokens"] > 0

    @feature("answer")
    def answer():
        chat = bench("openai-chat", "/v1/chat/completions", "--temperature", "0", "--top-p", "0.9")
        assert chat["total_output_tokens"] > 0

    @feature("embeddings")
    def embeddings():
        bench("openai-embeddings", "/v1/embeddings")

    @feature("logprobs")
    def logprobs():
        bench("openai", "/v1/completions", "--logprobs", "2")


COMMANDS = {"llm": llm, "aider": aider, "lm-eval": lm_eval, "guidellm": guidellm, "vllm": vllm}
COMMANDS[sys.argv[1]]()
