"""The command line: output, errors and exit codes, mostly in a separate process."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast
from urllib.request import urlopen

import click
import pytest
import typer

from stretto import cli, config
from stretto.gateway import settings as gateway_settings
from tests.models.checkpoints import make

STRETTO = [sys.executable, "-m", "stretto"]
MOST_FLAGS = 31
NEWER, MOST_NEW_FLAGS = ("gateway", "optimise", "keys"), 8
ESCAPE = "\x1b["


def stretto(*arguments: str, stdin: str = "", **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*STRETTO, *arguments],
        capture_output=True,
        text=True,
        input=stdin,
        timeout=60,
        env=os.environ | environ,
    )


def commands() -> dict[str, click.Command]:
    """All commands by their full names."""
    found: dict[str, click.Command] = {}
    todo: list[tuple[str, Any]] = [("", typer.main.get_command(cli.app))]
    while todo:
        name, command = todo.pop()
        if hasattr(command, "commands"):
            todo += [(f"{name} {child}".strip(), each) for child, each in command.commands.items()]
        else:
            found[name] = command
    return found


@dataclass
class Served:
    url: str
    pid: int
    lines: list[str]
    errors: Path


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("serve")
    log, errors = folder / "out", folder / "err"
    with log.open("w") as out, errors.open("w") as err:
        process = subprocess.Popen([*STRETTO, "serve", "null=null:1", "--port", "0"], stdout=out, stderr=err)
    lines: list[str] = []
    deadline = time.monotonic() + 60
    while len(lines) < 4 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
        lines = log.read_text().splitlines()
    try:
        yield Served(lines[2].split()[-1], process.pid, lines, errors)
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0


def test_the_server_process_never_loads_torch() -> None:
    code = (
        "import sys, stretto.cli; "
        "print([name for name in ('torch', 'transformers', 'pandas', 'pydantic') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_importing_the_types_loads_nothing_else() -> None:
    code = "import sys, stretto.types; print([n for n in ('asyncio', 'typer') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_there_are_few_flags_and_at_most_eight_for_each_newer_command() -> None:
    flags = {
        name: {option for param in each.params for option in param.opts if option.startswith("--")}
        - {"--help"}
        for name, each in commands().items()
    }
    newer = {name: flags.pop(name) for name in list(flags) if name.split()[0] in NEWER}
    assert len(set[str]().union(*flags.values())) <= MOST_FLAGS, flags
    assert all(len(each) <= MOST_NEW_FLAGS for each in newer.values()), newer


def test_the_documented_settings_are_those_of_the_config() -> None:
    flags = {cast(str, each.name): each.opts[0] for each in commands()["serve"].params}
    page = Path(__file__).parent.parent / "docs" / "configuration.md"
    table = config.SERVE.reference({name: flags[name] for name in flags if name != "models"}, {"models"})
    assert table in page.read_text(), f"replace the table in {page}"
    page = page.with_name("gateway.md")
    flags = {cast(str, each.name): each.opts[0] for each in commands()["gateway"].params}
    table = gateway_settings.GATEWAY.reference(flags)
    assert table in page.read_text(), f"replace the table in {page}"


def test_help_shows_every_command_without_colours() -> None:
    done = stretto("--help", NO_COLOR="1")
    assert done.returncode == 0
    assert all(name.split()[0] in done.stdout for name in commands())
    assert ESCAPE not in done.stdout


@pytest.mark.parametrize("command", ["", "serve", "bench serve", "keys list"])
def test_help_has_its_short_name(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        run_main([*command.split(), "-h"])
    assert exit.value.code == 0 and "Usage:" in capsys.readouterr().out


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-"])
def test_a_standard_stream_may_be_closed(closed: str) -> None:
    """The others are as always."""
    command = shlex.join([*STRETTO, "run", "--model", "null:1", "--max-tokens", "1", "-"])
    done = subprocess.run(
        ["sh", "-c", f"{command} {closed}"], capture_output=True, text=True, input="Hi", timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert bool(done.stdout) == (closed != ">&-")
    wrong = ["sh", "-c", f"{shlex.join([*STRETTO, 'serve', '--colour'])} {closed}"]
    refused = subprocess.run(wrong, capture_output=True, text=True, timeout=60)
    assert refused.returncode == 2
    assert ("No such option" in refused.stderr) == (closed != "2>&-")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["serve", "--config", "none"], "cannot read the configuration none: No such file or directory"),
        (["serve", "--config", "."], "cannot read the configuration .: Is a directory"),
        (
            ["serve", "--config", "latin.txt"],
            "latin.txt: it is not UTF-8: invalid start byte at byte 1",
        ),
        (["optimise", "none"], "cannot read the recipe none: No such file or directory"),
        (["optimise", "."], "cannot read the recipe .: Is a directory"),
        (["optimise", "empty"], "empty is empty; docs/ladder.md shows a recipe"),
        (
            ["optimise", "open.yaml"],
            "open.yaml cannot be read as YAML: while parsing a flow node did not find",
        ),
        (["bench", "trace", "none", "--virtual"], "none cannot be read: No such file or directory"),
        (["bench", "trace", "latin.txt", "--virtual"], "latin.txt cannot be read: it is not UTF-8"),
    ],
)
def test_a_file_that_cannot_be_read_is_named_once_with_the_reason(
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "latin.txt").write_bytes("#ü x".encode("latin-1"))
    (tmp_path / "empty").touch()
    (tmp_path / "open.yaml").write_text("x: [")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        run_main(arguments)
    printed = capsys.readouterr().err
    assert message in printed and "Errno" not in printed
    assert printed.startswith("error: ") and printed.count("\n") == 1


def test_a_file_of_settings_is_utf_8_in_every_locale(tmp_path: Path) -> None:
    file = tmp_path / "settings.toml"
    file.write_text("# Grüße\nport = 70000\n", encoding="utf-8")
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = stretto("serve", "--config", str(file), **locale)
    assert (done.returncode, "Expected `int` <= 65535" in done.stderr) == (2, True), done.stderr


def test_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        run_main(["--version"])
    assert (exit.value.code, capsys.readouterr().out) == (0, f"stretto {version('stretto')}\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["serve", "--colour", "blue"], "No such option"),
        (["serve", "--port", "x"], "unable to parse string as an integer"),
        (["serve", "--port", "70000"], "--port: Expected `int` <= 65535"),
        (["serve", "--device", "tpu"], "--device: Invalid enum value 'tpu'"),
        (["serve", "--quantise", "int5"], "choose from int8, int4, fp8"),
        (["serve", "--quantize", "int5"], "--quantise: Invalid enum value 'int5'"),
        (["serve", "--kv-memory", "much"], "'much' is no size"),
        (["serve", "--config", "/nowhere.toml"], "cannot read the configuration /nowhere.toml"),
        (["serve", "a=null", "a=null"], "two models are called a"),
        (["run"], "Missing argument"),
        (["run", "x", "--temperature", "1000"], "temperature must be from 0 to 100"),
        (["chat", "desk", "--model", "x"], "--model is for the URL of a server"),
        (["bench", "serve", "http://x", "--rate", "1", "--concurrency", "1"], "give exactly one of --rate"),
        (["bench", "serve", "http://x", "--rate", "1", "--goodput", "ttft=9"], "write it like ttft:200"),
        (
            ["bench", "serve", "http://x", "--rate", "1", "--goodput", "itl:9"],
            "limits are ttft, tpot and e2e",
        ),
        (["gateway", "--worker", "http://a:b"], "error: 'http://a:b' is no URL of a worker"),
        (["gateway", "--workers", "http://a"], "(Possible options: --worker)"),
        (["serv"], "Did you mean 'serve'?"),
        (["bench", "engine", "--batch", "1,0"], "--batch: '1,0' is no list of numbers above 0"),
    ],
)
def test_wrong_usage_exits_with_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The test runs in this process, because it covers only the parsing."""
    with pytest.raises(SystemExit) as exit:
        run_main(arguments)
    assert exit.value.code == 2
    assert message in re.sub(r"\s*│\s*\n?│?\s*", " ", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["serve", "nowhere"], "error: 'nowhere' is neither a directory"),
        (["run", "x", "--model", "nowhere"], "error: 'nowhere' is neither a directory"),
        (["doctor", "nowhere"], "error: 'nowhere' is neither a directory"),
        (["chat", "http://127.0.0.1:9"], "error: http://127.0.0.1:9 does not answer"),
        (["bench", "serve", "127.0.0.1:9", "--rate", "1"], "error: 127.0.0.1:9 does not answer"),
    ],
)
def test_failures_are_one_line_and_exit_with_1(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit:
        run_main(arguments)
    error = capsys.readouterr().err
    assert exit.value.code == 1
    assert error.startswith(message)
    assert error.count("\n") == 1


@pytest.mark.parametrize("command", ["run x", "chat", "doctor", "bench serve http://x", "keys list"])
def test_every_command_refuses_an_unknown_variable(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STRETTO_PRT", "1")
    with pytest.raises(SystemExit) as exit:
        run_main(command.split())
    assert exit.value.code == 2
    assert capsys.readouterr().err.startswith("error: STRETTO_PRT: nothing reads this environment variable")


def run_main(arguments: list[str]) -> None:
    before, sys.argv = sys.argv, ["stretto", *arguments]
    try:
        cli.main()
    finally:
        sys.argv = before


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(
    "command", ["--version", "doctor", "doctor --json", "run hello", "serve null --port 0"]
)
def test_an_output_that_cannot_be_written_is_one_line(command: str, unbuffered: str) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [*STRETTO, *command.split()],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
            env=os.environ | {"PYTHONUNBUFFERED": unbuffered},
        )
    assert (done.returncode, done.stderr) == (
        1,
        "error: the output cannot be written: No space left on device\n",
    )


def test_a_reader_that_has_enough_is_no_error() -> None:
    command = f"{shlex.join(STRETTO)} doctor --json | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert done.returncode in (0, 1) and done.stderr == ""


@pytest.mark.parametrize("seconds", [0.5, 1.0, 2.0])
def test_ctrl_c_during_the_start_ends_with_one_line(seconds: float, tmp_path: Path) -> None:
    """The signal goes to the whole process group, as a terminal sends it."""
    process = subprocess.Popen(
        [*STRETTO, "serve", "--port", "0"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=os.environ | {"TMPDIR": str(tmp_path)},
    )
    time.sleep(seconds)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    drained = r"(\S+ info server http\.serving: draining: 0 requests running\n)"
    assert re.fullmatch(rf"interrupted\n|{drained}", errors), errors
    assert process.returncode == (130 if errors == "interrupted\n" else 0)
    assert list(tmp_path.iterdir()) == []


def test_a_port_in_use_is_an_error_that_names_it(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        done = stretto("serve", "null", "--port", str(taken.getsockname()[1]), TMPDIR=str(tmp_path))
    assert done.returncode == 1
    message = r"error: port \d+ on 127\.0\.0\.1 is in use; .*--port or STRETTO_PORT.*\n"
    assert re.fullmatch(message, done.stderr)
    assert list(tmp_path.iterdir()) == []


def test_serve_prints_its_start_time_and_a_curl_command_that_works(served: Served) -> None:
    assert re.fullmatch(r"ready in \d+\.\d s · http://127\.0\.0\.1:\d+", served.lines[2])
    assert (
        served.lines[1]
        == "objectives: priority: ttft_ms 5,000, itl_ms 150; default: ttft_ms 20,000, itl_ms 250; flex: none"
    )
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    done = subprocess.run(shlex.split(served.lines[3]), capture_output=True, text=True, timeout=30)
    answer = json.loads(done.stdout)
    assert (answer["model"], answer["object"]) == ("null", "chat.completion")
    assert answer["usage"]["completion_tokens"] > 0


def test_serve_logs_where_the_time_of_its_start_went(served: Served) -> None:
    line = r"\S+ info server cli: ready in (\S+) s: (command .*, imports .*, rest \S+)"
    logged = [found for text in served.errors.read_text().splitlines() if (found := re.fullmatch(line, text))]
    assert len(logged) == 1, served.errors.read_text()
    parts = [float(part.split()[-1]) for part in logged[0][2].split(", ")]
    assert sum(parts) == pytest.approx(float(logged[0][1]), abs=0.05 * (1 + len(parts)))


def test_bench_reports_in_one_json_document(served: Served) -> None:
    load = ["--requests", "6", "--concurrency", "2", "--output-tokens", "5", "--random-input", "7"]
    done = stretto("bench", "serve", served.url, *load, "--goodput", "e2e:60000", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    outcome = json.loads(done.stdout)
    assert (outcome["model"], outcome["endpoint"]) == ("null", "completions")
    report = outcome["report"]
    assert (report["sent"], report["completed"], report["output_tokens"], report["input_tokens"]) == (
        6,
        6,
        30,
        42,
    )
    assert report["good_share"] == 1.0
    assert set(report["ttft_ms"]) == {"mean", "p50", "p90", "p99", "max"}


def test_bench_sends_one_request_after_another_when_nothing_is_said(served: Served) -> None:
    done = stretto("bench", "serve", served.url, "--requests", "3", "--output-tokens", "4", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    report = json.loads(done.stdout)["report"]
    assert (report["completed"], report["peak_concurrency"]) == (3, 1)


def test_completion_knows_the_commands() -> None:
    done = stretto(_STRETTO_COMPLETE="complete_bash", COMP_WORDS="stretto ", COMP_CWORD="1")
    assert {"serve", "chat", "bench"} <= set(done.stdout.split()), done.stderr
    assert "--install-completion" in stretto("--help", NO_COLOR="1", COLUMNS="120").stdout


def test_chat_chooses_a_model_of_the_server_by_name(served: Served) -> None:
    named = stretto("chat", served.url, "--model", "null", "--max-tokens", "2", stdin="hello\n")
    wrong = stretto("chat", served.url, "--model", "nil", stdin="hello\n")
    assert named.returncode == 0 and named.stdout.strip()
    assert (wrong.returncode, wrong.stdout) == (1, "")
    assert wrong.stderr == f"error: {served.url} has no model 'nil'; choose from null\n"


def test_bench_with_prompts_prints_a_table(served: Served, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("one\ntwo\n")
    load = ["--requests", "3", "--rate", "100", "--output-tokens", "4", "--prompts", str(file)]
    done = stretto("bench", "serve", served.url, *load)
    assert done.returncode == 0
    assert "3 of 3 requests" in done.stdout
    assert all(name in done.stdout for name in ("TTFT", "TPOT", "ITL", "E2E"))
    assert ESCAPE not in done.stdout


def test_chat_streams_answers_from_a_server(served: Served) -> None:
    done = stretto(
        "chat",
        served.url,
        "--max-tokens",
        "3",
        "--seed",
        "1",
        stdin="hello\n/reset\nhello\n/what\n/quit\nnever\n",
    )
    first, second, *rest = done.stdout.splitlines()
    assert first == second and first, "after /reset the same question has the same answer"
    assert (done.returncode, rest) == (0, [])
    assert "forgotten" in done.stderr and "no such command" in done.stderr


@contextmanager
def terminal(*arguments: str) -> Iterator[Callable[[str, str], str]]:
    """The command on its own pseudo-terminal."""
    pid, screen = pty.fork()
    if pid == 0:
        os.environ.pop("NO_COLOR", None)
        os.environ["TERM"] = "xterm-256color"
        os.execv(sys.executable, [*STRETTO, *arguments])
    seen = ""

    def type_and_wait(typed: str, until: str) -> str:
        """Type a text and return the output up to and including `until`."""
        nonlocal seen
        os.write(screen, typed.encode())
        deadline = time.monotonic() + 30
        while until not in seen and time.monotonic() < deadline:
            if select.select([screen], [], [], 0.5)[0]:
                seen += os.read(screen, 65536).decode(errors="replace")
        before, found, seen = seen.partition(until)
        assert found, before[-2000:]
        return before

    try:
        yield type_and_wait
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(screen)


def test_ctrl_c_stops_the_answer_but_not_the_chat(served: Served) -> None:
    with terminal("chat", served.url, "--max-tokens", "8000") as type_and_wait:
        assert ESCAPE in type_and_wait("", "> "), "colours on a terminal"
        type_and_wait("hello\n", "\n")
        type_and_wait("", " ")
        type_and_wait("\x03", "(stopped)")
        type_and_wait("", "to the first token")
        type_and_wait("", "> ")
        time.sleep(0.5)  # the prompt is printed before anything is read
        type_and_wait("\x03", "/quit ends the chat")
        type_and_wait("/quit\n", "/quit")
    with urlopen(f"{served.url}/state") as page:
        assert json.load(page)["active"] == 0


def test_run_answers_one_prompt() -> None:
    options = ["--model", "null", "--max-tokens", "4", "--seed", "1"]
    plain = stretto("run", "-", *options, stdin="hello")
    as_json = stretto("run", "hello", *options, "--json")
    answer = json.loads(as_json.stdout)
    assert (plain.returncode, as_json.returncode, as_json.stderr) == (0, 0, "")
    assert plain.stdout == answer["text"] + "\n"
    assert (answer["finish_reason"], len(answer["token_ids"])) == ("length", 4)


def test_doctor_reports_in_one_json_document(tmp_path: Path) -> None:
    make("qwen3", tmp_path)
    done = stretto("doctor", str(tmp_path), "--json", STRETTO_THREADS="3")
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    assert found["threads"] == {"value": 3, "why": "set by the user"}
    assert found["machine"]["memory"] > found["machine"]["available"] > 0
    assert found["device"]["value"] in ("cpu", "cuda")
    fit = found["model"]
    assert (fit["stored"]["family"], fit["stored"]["dtype"], fit["problem"]) == ("qwen3", "float32", None)
    assert fit["weight_bytes"] == fit["stored"]["bytes"] > 100_000
    assert fit["kv"]["value"]["context"] == 256


def test_doctor_fails_when_a_model_does_not_fit(tmp_path: Path) -> None:
    make("qwen3", tmp_path)
    done = stretto("doctor", str(tmp_path), STRETTO_CONTEXT="512")
    assert done.returncode == 1
    assert "beyond the model's own 256" in " ".join(done.stdout.split())
