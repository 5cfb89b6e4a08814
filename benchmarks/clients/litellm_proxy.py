"""litellm's proxy between the openai package and Stretto."""

import json
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import openai
from report import ANSWER, MODEL, QUESTION, V1, WEATHER, feature

with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    PORT = free.getsockname()[1]
CONFIG = Path(tempfile.mkdtemp()) / "config.yaml"
DEPLOYMENT = {"model": f"openai/{MODEL}", "api_base": V1, "api_key": "none"}
MASTER = "sk-" + "4711" * 16  # the proxy starts with none but a long key
MODELS = [{"model_name": MODEL, "litellm_params": DEPLOYMENT}]
CONFIG.write_text(json.dumps({"model_list": MODELS, "general_settings": {"master_key": MASTER}}))
proxy = subprocess.Popen(
    [str(Path(sys.executable).parent / "litellm"), "--config", str(CONFIG), "--port", str(PORT)],
    stdout=sys.stderr,
)
client = openai.OpenAI(base_url=f"http://127.0.0.1:{PORT}/v1", api_key=MASTER, max_retries=0)
ASKED = [{"role": "user", "content": QUESTION}]


@feature("answer")
def answer():
    for _ in range(600):
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{PORT}/health/liveliness")
            break
        except OSError:
            time.sleep(1)
    said = client.chat.completions.create(model=MODEL, messages=ASKED, temperature=0)
    assert ANSWER in said.choices[0].message.content


@feature("stream")
def stream():
    parts = client.chat.completions.create(model=MODEL, messages=ASKED, temperature=0, stream=True)
    assert ANSWER in "".join(part.choices[0].delta.content or "" for part in parts if part.choices)


@feature("tools")
def tools():
    tool = {"type": "function", "function": WEATHER}
    said = client.chat.completions.create(
        model=MODEL, messages=ASKED, tools=[tool], tool_choice="required", max_tokens=200
    )
    assert said.choices[0].message.tool_calls[0].function.name == "get_weather"


@feature("embeddings")
def embeddings():
    assert len(client.embeddings.create(model=MODEL, input=["a"]).data) == 1


proxy.terminate()
proxy.wait(20)
