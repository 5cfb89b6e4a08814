"""Open WebUI: its backend, connected to Stretto as to OpenAI or as to Ollama, asked as its page asks.

The argument is the kind of connection: `openai` or `ollama`.
"""

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx
from report import ANSWER, BASE, KEY, MODEL, QUESTION, V1, WEATHER, feature

KIND = sys.argv[1]
OLLAMA = KIND == "ollama"
HOME = tempfile.mkdtemp()
with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    PORT = free.getsockname()[1]
ENVIRONMENT = os.environ | {
    "DATA_DIR": HOME, "HOME": HOME, "WEBUI_AUTH": "False", "WEBUI_SECRET_KEY": "4711" * 8,
    "OFFLINE_MODE": "True", "HF_HUB_OFFLINE": "1", "ANONYMIZED_TELEMETRY": "False", "DO_NOT_TRACK": "true",
    "ENABLE_OPENAI_API": str(not OLLAMA), "OPENAI_API_BASE_URLS": V1, "OPENAI_API_KEYS": KEY,
    "ENABLE_OLLAMA_API": str(OLLAMA), "OLLAMA_BASE_URLS": BASE,
    "RAG_EMBEDDING_ENGINE": KIND, "RAG_EMBEDDING_MODEL": MODEL, "RAG_EMBEDDING_BATCH_SIZE": "8",
    "RAG_OPENAI_API_BASE_URL": V1, "RAG_OPENAI_API_KEY": KEY, "RAG_OLLAMA_BASE_URL": BASE,
}  # fmt: skip
ASKED = [{"role": "user", "content": QUESTION}]
EXACT = {"temperature": 0, "max_tokens": 200}
TUNED = EXACT | {"top_p": 0.9, "min_p": 0.05, "seed": 1, "stop": ["###"], "frequency_penalty": 0.1}
if OLLAMA:
    TUNED |= {"top_k": 40, "repeat_penalty": 1.1, "repeat_last_n": -1, "num_ctx": 2048, "num_keep": 24}
    TUNED |= {"num_batch": 512, "num_thread": 2, "use_mmap": True, "keep_alive": "5m", "think": False}
TASKS = ("title", "tags", "follow_up", "queries", "emoji")

backend = subprocess.Popen(
    [str(Path(sys.executable).parent / "open-webui"), "serve", "--host", "127.0.0.1", "--port", str(PORT)],
    env=ENVIRONMENT,
    cwd=HOME,
    stdout=sys.stderr,
)
page = httpx.Client(base_url=f"http://127.0.0.1:{PORT}", timeout=300)


def sign_in() -> None:
    """Waits for the backend, and takes the only user that it has without accounts."""
    for _ in range(900):
        try:
            if page.get("/health").status_code == 200:
                break
        except httpx.HTTPError:
            pass
        assert backend.poll() is None, "the backend ended"
        time.sleep(1)
    signed = page.post("/api/v1/auths/signin", json={"email": "", "password": ""}).json()
    page.headers["authorization"] = f"Bearer {signed['token']}"


def post(path: str, **body):
    answer = page.post(path, json=body)
    assert answer.status_code == 200, (path, answer.status_code, answer.text[:150])
    return answer.json()


def chat(**body):
    return post("/api/chat/completions", model=MODEL, **body)["choices"][0]["message"]


@feature("answer")
def answer():
    sign_in()
    if OLLAMA:
        assert post("/ollama/verify", url=BASE, key="")["version"]
        assert page.get("/ollama/api/version").json()["version"]
        assert post("/ollama/api/show", model=MODEL)["details"]
    else:
        assert post("/openai/verify", url=V1, key=KEY)["data"]
    models = [each["id"] for each in page.get("/api/models").json()["data"]]
    assert MODEL in models, models
    assert ANSWER in chat(messages=ASKED, stream=False, params=EXACT)["content"]
    assert chat(messages=ASKED, stream=False, params=TUNED)["content"] is not None
    if OLLAMA:
        page.get("/ollama/api/ps").raise_for_status()
        post("/ollama/api/unload", model=MODEL)


@feature("stream")
def stream():
    text = ""
    body = {"model": MODEL, "messages": ASKED, "stream": True, "params": EXACT}
    with page.stream("POST", "/api/chat/completions", json=body) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                for choice in json.loads(line[6:]).get("choices", []):
                    text += choice["delta"].get("content") or ""
    assert ANSWER in text, text


@feature("structured")
def structured():
    schema = {"type": "object", "properties": {"city": {"enum": ["Rome", "Oslo"]}}, "required": ["city"]}
    wanted = {"type": "json_schema", "json_schema": {"name": "city", "schema": schema}}
    said = chat(messages=ASKED, stream=False, params=EXACT, response_format=wanted)
    assert json.loads(said["content"])["city"]


@feature("tools")
def tools():
    tool = {"type": "function", "function": WEATHER}
    asked = [{"role": "user", "content": "What is the weather in Rome?"}]
    choice = {} if OLLAMA else {"tool_choice": "required"}  # Ollama cannot force a call
    said = chat(messages=asked, stream=False, params=EXACT, tools=[tool], **choice)
    calls = said.get("tool_calls") or []
    assert calls or OLLAMA, said
    call = {
        "id": "call_1",
        "type": "function",
        "function": {"name": WEATHER["name"], "arguments": '{"city": "Rome"}'},
    }
    history = [
        *asked,
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
    ]
    assert chat(messages=history, stream=False, params=EXACT, tools=[tool])["content"] is not None


@feature("turns")
def turns():
    said = chat(messages=ASKED, stream=False, params=EXACT)
    history = [
        *ASKED,
        {"role": "assistant", "content": said["content"]},
        {"role": "user", "content": "Thank you!"},
    ]
    assert chat(messages=history, stream=False, params=EXACT)["content"] is not None
    for task in TASKS:
        more = {"prompt": "Thank you!", "type": "web_search"} if task in ("queries", "emoji") else {}
        made = post(f"/api/v1/tasks/{task}/completions", model=MODEL, messages=history, **more)
        assert made["choices"], (task, made)


@feature("embeddings")
def embeddings():
    post(
        "/api/v1/retrieval/process/text",
        name="a.txt",
        content="Rome is old. Oslo is cold.",
        collection_name="notes",
    )
    found = post("/api/v1/retrieval/query/collection", collection_names=["notes"], query="Rome", k=1)
    assert found["documents"][0], found


backend.terminate()
backend.wait(60)
