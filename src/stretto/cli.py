"""The `stretto` command: one function per command. It wires the packages together and decides nothing itself.

The names and help lines of settings come from `stretto.config`.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from errno import EDQUOT, EFBIG, EIO, ENOSPC, EPIPE
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec
import typer
import uvloop
from typer.core import TyperGroup

from stretto import chat as conversation
from stretto import config, doctor, terminal
from stretto.bench import engine as alone
from stretto.bench import load, trace, traces
from stretto.bench.metrics import GoodputLimits
from stretto.commands import keys
from stretto.commands.remote import RemoteModel
from stretto.config import ServeConfig
from stretto.engine.client import EngineClient
from stretto.engine.structured.sandbox import GrammarSandbox
from stretto.errors import StartError, StrettoError
from stretto.gateway import settings as gateway_settings
from stretto.gateway.app import Gateway
from stretto.hardware import process_age
from stretto.http import serving as server
from stretto.ladder.locate import LocatedModels, locate, locate_variants
from stretto.llm import LLM
from stretto.optimise import recipe as recipes
from stretto.server import app as api
from stretto.settings.table import SettingsTable, meaning_of
from stretto.telemetry import log, start_times
from stretto.types import Sampling

T = TypeVar("T")
FAILURE, USAGE, INTERRUPTED = 1, 2, 130
UNWRITABLE = (ENOSPC, EDQUOT, EFBIG, EIO, EPIPE)  # what a write to an open file may fail with
DEVICES = ("auto", "cpu", "cuda")


def _one_spelling(flag: str) -> str:
    """Makes --quantize the same flag as --quantise."""
    return flag.replace("quantize", "quantise")


class _Commands(TyperGroup):
    """The commands. One that is interrupted ends with one line."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            terminal.err.print("interrupted")
            sys.exit(INTERRUPTED)


app = typer.Typer(
    cls=_Commands,
    help="A real-time LLM server.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"token_normalize_func": _one_spelling, "help_option_names": ["--help", "-h"]},
)
bench = typer.Typer(help="Measure a server, a schedule, or the engine alone.", no_args_is_help=True)
app.add_typer(bench, name="bench")
app.add_typer(keys.app, name="keys")


def _show_version(show: bool) -> None:
    if show:
        terminal.out.print(f"stretto {version('stretto')}")
        raise typer.Exit


@app.callback()
def root(
    show_version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="print the version and exit"),
    ] = False,
) -> None:
    """A real-time LLM server."""
    with _usage():
        config.SERVE.refuse_unknown(os.environ)


def setting(name: str, table: SettingsTable = config.SERVE) -> Any:
    """The option of a setting. It has no default, so that environment and file are read when it is absent."""
    info = table.infos[name]
    default = "none" if info.default is None else info.default
    text = f"{meaning_of(info)} [dim]\\[{default}][/]"
    return typer.Option(f"--{name.replace('_', '-')}", help=text, show_default=False)


def option(text: str, **rest: Any) -> Any:
    """An option that is no setting."""
    return typer.Option(help=text, **rest)


MODELS = typer.Argument(metavar="MODEL", help="directories or hub ids, as PATH or NAME=PATH \\[desk]")
Json = Annotated[bool, typer.Option("--json", help="print one JSON document")]
Tokens = Annotated[int | None, option("most tokens of an answer", min=1)]
Temperature = Annotated[float, option("sampling temperature; 0: always the likeliest token", min=0.0)]
Seed = Annotated[int | None, option("the same seed gives the same result")]


@app.command()
def serve(
    ctx: typer.Context,
    models: Annotated[list[str] | None, MODELS] = None,
    file: Annotated[Path | None, typer.Option("--config", help="a TOML file of settings")] = None,
    host: Annotated[str | None, setting("host")] = None,
    port: Annotated[int | None, setting("port")] = None,
    device: Annotated[str | None, setting("device")] = None,
    dtype: Annotated[str | None, setting("dtype")] = None,
    quantise: Annotated[str | None, setting("quantise")] = None,
    threads: Annotated[int | None, setting("threads")] = None,
    kv_memory: Annotated[str | None, setting("kv_memory")] = None,
    context: Annotated[int | None, setting("context")] = None,
    max_running: Annotated[int | None, setting("max_running")] = None,
    schedule: Annotated[str | None, setting("schedule")] = None,
    drain: Annotated[float | None, setting("drain")] = None,
) -> None:
    """Serve models over HTTP with OpenAI's API.

    Settings can also come from the environment (STRETTO_PORT) or a file: see docs/configuration.md.
    """
    given = {
        name: value for name, value in ctx.params.items() if value not in (None, [], ()) and name != "file"
    }
    with _usage():
        front, engine = config.load(given, os.environ, file)
    log.configure("server", front.log_level)
    with terminal.LoadingBars() as loading:
        uvloop.run(_serve(front, locate_variants(engine, loading), loading))


async def _serve(front: ServeConfig, located: LocatedModels, loading: terminal.LoadingBars) -> None:
    """The engine process starts first, as importing torch takes longest; the server is built meanwhile."""
    engine, ladders = located
    client, sandbox = EngineClient(engine, on_progress=loading), GrammarSandbox()

    def announce(url: str) -> None:
        loading.stop()
        default = next(iter(application.server.texts))
        terminal.show_ready(url, client.worker_state(), default, locked=bool(front.api_keys))
        parts = {"command": command_s, **client.start_s}
        logging.getLogger(__name__).info("ready in %s", start_times.told(process_age(), parts))

    command_s = process_age()
    try:
        await client.start()
        models = {model.name: Path(model.path) for model in engine.models}
        application = api.build(
            front, client, models, lambda _, grammar, tenant: sandbox.validate(grammar, tenant), ladders
        )
        await server.run(front, application, client, announce)
    finally:
        await sandbox.close()
        await client.shutdown(0.0)


@app.command("gateway")
def gateway_command(
    ctx: typer.Context,
    workers: Annotated[
        list[str] | None, typer.Option("--worker", help="URL of a worker, as URL or SITE=URL; repeat it")
    ] = None,
    file: Annotated[Path | None, typer.Option("--config", help="a TOML file of settings")] = None,
    host: Annotated[str | None, setting("host", gateway_settings.GATEWAY)] = None,
    port: Annotated[int | None, setting("port", gateway_settings.GATEWAY)] = None,
) -> None:
    """Put many workers behind one address: routing by deadline, and failover in the middle of an answer."""
    given = {
        name: value for name, value in ctx.params.items() if value not in (None, [], ()) and name != "file"
    }
    with _usage():
        settings = gateway_settings.load(given, os.environ, file)
    log.configure("gateway", settings.log_level)
    gateway = Gateway(settings, reread=lambda: gateway_settings.load(given, os.environ, file))
    uvloop.run(server.run(settings, gateway, gateway, typer.echo))


@app.command()
def chat(
    source: Annotated[
        str, typer.Argument(metavar="MODEL|URL", help="a directory, a hub id, or the URL of a server")
    ] = "desk",
    model: Annotated[str | None, option("with a URL: the model on the server; default: its first")] = None,
    system: Annotated[str, option("system prompt")] = "",
    max_tokens: Tokens = None,
    temperature: Temperature = 0.0,
    seed: Seed = None,
) -> None:
    """Chat in the terminal with a model loaded here, or with one on a server.

    Type /help for the commands. The API key of a server is read from STRETTO_API_KEY or OPENAI_API_KEY.
    """
    with _usage():
        sampling = Sampling(max_tokens=max_tokens, temperature=temperature, seed=seed)
        if model is not None and "://" not in source:
            raise StartError(f"--model is for the URL of a server; to load it here: stretto chat {model}")
    if "://" in source:
        with asyncio.Runner() as runner:
            remote = RemoteModel(runner, source, _key(), sampling, model)
            conversation.converse(remote, f"{remote.model} at {source}", system)
        return
    with _loaded(source) as llm:
        conversation.converse(lambda messages: llm.stream(messages, sampling), llm.info.name, system)


@app.command()
def run(
    prompt: Annotated[str, typer.Argument(help="the prompt; - reads it from standard input")],
    model: Annotated[str, option("a directory, a hub id, or the bundled model desk")] = "desk",
    max_tokens: Tokens = None,
    temperature: Temperature = 0.0,
    seed: Seed = None,
    as_json: Json = False,
) -> None:
    """Answer one prompt and exit."""
    text = sys.stdin.read() if prompt == "-" else prompt
    with _usage():
        sampling = Sampling(max_tokens=max_tokens, temperature=temperature, seed=seed)
    with _loaded(model) as llm:
        messages = [{"role": "user", "content": text}]
        if as_json:
            terminal.print_json(
                llm.chat(messages, sampling) if llm.chats else llm.generate(text, sampling)[0]
            )
            return
        for piece in llm.stream(messages if llm.chats else text, sampling):
            sys.stdout.write(piece)
            sys.stdout.flush()
    sys.stdout.write("\n")


@bench.command("serve")
def bench_serve(
    url: Annotated[
        str,
        typer.Argument(
            help="an OpenAI-compatible server, like http://127.0.0.1:8000. Append /v1/completions or"
            " /v1/chat/completions to choose the endpoint; otherwise a file of prompts is sent as chats"
        ),
    ],
    requests: Annotated[int, option("number of requests", min=1)] = 100,
    rate: Annotated[float | None, option("requests per second, at random times (Poisson)")] = None,
    concurrency: Annotated[
        int | None, option("number of requests at the same time \\[1, without --rate]", min=1)
    ] = None,
    prompts: Annotated[Path | None, option("file of prompts: JSON lines or plain lines, perhaps .gz")] = None,
    random_input: Annotated[int, option("random tokens per prompt, when there is no --prompts", min=1)] = 128,
    output_tokens: Annotated[int, option("most tokens of an answer", min=1)] = 128,
    model: Annotated[str | None, option("name of the model on the server; default: its first")] = None,
    goodput: Annotated[str, option("limits of a good request in ms, like ttft:200,tpot:50,e2e:3000")] = "",
    seed: Annotated[int, option("seed of arrival times and random tokens")] = 0,
    as_json: Json = False,
) -> None:
    """Send load to a server and report TTFT, TPOT, ITL, E2E, throughput and goodput.

    The API key is read from STRETTO_API_KEY or OPENAI_API_KEY.
    """
    url, endpoint = load.split_endpoint(url)
    concurrency = 1 if rate is None and concurrency is None else concurrency
    with _usage():
        options = load.Load(
            requests=requests,
            rate=rate,
            concurrency=concurrency,
            prompts=prompts,
            random_input=random_input,
            output_tokens=output_tokens,
            endpoint=endpoint,
            model=model,
            limits=GoodputLimits.of(goodput),
            seed=seed,
        )
    with terminal.request_bar(requests) as count:
        outcome = uvloop.run(load.run(url, options, api_key=_key(), on_done=count))
    _print(outcome, terminal.show_outcome, as_json)
    if not outcome.report.completed:
        raise typer.Exit(FAILURE)


@bench.command("engine")
def bench_engine(
    model: Annotated[str, typer.Argument(help="a directory or hub id")] = "desk",
    batch: Annotated[
        str, option("sequences at the same time; several like 1,8 are measured in turn")
    ] = "1,8",
    context: Annotated[str, option("tokens of a prompt; several like 512,4096 are measured in turn")] = "512",
    output_tokens: Annotated[int, option("tokens of an answer", min=2)] = 32,
    quantise: Annotated[str | None, setting("quantise")] = None,
    threads: Annotated[int | None, setting("threads")] = None,
    as_json: Json = False,
) -> None:
    """Measure the engine without a server: start, TTFT, decode, and each layer against memory bandwidth."""
    given = {"models": [model], "quantise": quantise, "threads": threads}
    with _usage():
        engine = config.load({k: v for k, v in given.items() if v is not None}, os.environ, None)[1]
        batches, contexts = _numbers("--batch", batch), _numbers("--context", context)
    with terminal.LoadingBars() as loading:
        engine = msgspec.structs.replace(engine, models=locate(engine.models, loading))
    report = alone.measure(engine, batches, contexts, output_tokens)
    _print(report, terminal.show_engine, as_json)


def _numbers(flag: str, text: str) -> list[int]:
    """`1,8` as numbers above 0. Raises StartError."""
    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise StartError(f"{flag}: {text!r} is no list of numbers above 0: write it like 1,8")
    return [int(part) for part in parts]


@bench.command("trace")
def bench_trace(
    file: Annotated[
        Path, typer.Argument(help="a recorded load of Azure, Mooncake, LMCache or ServeGen, perhaps .gz")
    ],
    load: Annotated[
        str, option("load, as a multiple of what fcfs can serve; several like 0.7,1,2 run in turn")
    ] = "1",
    schedule: Annotated[
        str | None,
        option("fcfs, deadline, or both like deadline,fcfs \\[deadline]. With --url: the server's schedule"),
    ] = None,
    tiers: Annotated[
        str, option("share of each tier among the requests")
    ] = "priority=0.2,default=0.6,flex=0.2",
    virtual: Annotated[bool, option("simulate in virtual time: a 0.6B model on two CPU cores")] = False,
    url: Annotated[str | None, option("send the requests to this server, in real time")] = None,
    rate: Annotated[
        float | None, option("requests per second at load 1; default: measured", min=1e-6)
    ] = None,
    settings: Annotated[
        Path | None, typer.Option("--config", help="a TOML file whose \\[tiers] are the objectives")
    ] = None,
    requests: Annotated[int | None, option("replay only this many requests, from the start", min=1)] = None,
    seed: Annotated[
        int, option("seed of everything drawn at random: tiers, prompts, distributions in a trace")
    ] = 0,
    report: Annotated[Path | None, option("write an HTML page with plots to this file")] = None,
    as_json: Json = False,
) -> None:
    """Replay a recorded load and report attainment and goodput for each tier."""
    with _usage():
        if virtual == (url is not None):
            raise StartError("give either --virtual (simulate) or --url (send to a server)")
        held = None if settings is None else config.load({}, {}, settings)[0].tiers
        options = trace.TraceOptions.parse(
            load=load, schedule=schedule, tiers=tiers, objectives=held, seed=seed, rate=rate
        )
    arrivals = traces.read(file, requests=requests, seed=seed)
    if url is None:
        runs = trace.virtual(arrivals, options)
    else:
        with terminal.request_bar(None) as count:
            runs = uvloop.run(trace.live(url, arrivals, options, api_key=_key(), on_done=count))
    if report is not None:
        trace.write(report, file.name, runs)
    reports = [each for each, _ in runs]
    if as_json:
        terminal.print_json(reports[0] if len(reports) == 1 else reports)
    else:
        for each in reports:
            terminal.show_replay(each)


@app.command("doctor")
def examine(
    model: Annotated[
        str | None, typer.Argument(help="also check whether this directory or hub id fits")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show this machine, the choices Stretto makes on it, and whether a model fits."""
    with _usage():
        engine = config.load({"models": [model]} if model else {}, os.environ, None)[1]
    with terminal.LoadingBars() as loading:
        located = locate(engine.models, loading)[0] if model else None
    found = doctor.diagnose(engine, located)
    _print(found, lambda found: terminal.show_facts(doctor.sections(found)), as_json)
    if found.model is not None and found.model.problem is not None:
        raise typer.Exit(FAILURE)


@app.command()
def optimise(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="a YAML file: model, data and steps")],
    out: Annotated[Path | None, option("folder of the ladder \\[RECIPE without .yaml]")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on with an interrupted run")] = False,
    skip_bad_lines: Annotated[
        bool, typer.Option("--skip-bad-lines", help="leave out lines of the data that cannot be used")
    ] = False,
    until: Annotated[
        str | None, option("end after the step that makes this variant; go on with --resume")
    ] = None,
    from_feedback: Annotated[
        Path | None, option("a file of corrected answers to fine-tune on, from /v1/feedback/export")
    ] = None,
    device: Annotated[str, option("device to train and measure on: auto, cpu or cuda")] = "auto",
    as_json: Json = False,
) -> None:
    """Make a ladder: variants of a model, measured, with a report. See docs/ladder.md."""
    with _usage():
        parsed = recipes.read(recipe, from_feedback)
        if device not in DEVICES:
            raise StartError(f"--device: {device!r} is none of {', '.join(DEVICES)}")
    with terminal.StepBars() as bars, _usage():
        toolchain = _toolchain()
        options = toolchain.RunOptions(
            out=out or recipe.with_suffix(""),
            folder=recipe.parent,
            resume=resume,
            skip_bad_lines=skip_bad_lines,
            until=until,
            device=device,
            progress=bars,
        )
        report = toolchain.run(parsed, options)
    if as_json:
        terminal.print_json(report)
    else:
        terminal.show_ladder(report)


def _toolchain() -> Any:
    """The steps of `optimise`, imported on demand: they need torch and transformers. Raises StartError."""
    try:
        return import_module("stretto.optimise.steps")
    except ModuleNotFoundError as error:
        raise StartError(
            f"stretto optimise needs {error.name}, which is not installed: pip install 'stretto[optimise]'"
        ) from error


@contextmanager
def _usage() -> Generator[None]:
    """Errors in this block are errors of usage: print them and exit with 2."""
    try:
        yield
    except (StartError, ValueError) as error:
        terminal.print_error(error if isinstance(error, StartError) else StartError(str(error)))
        raise typer.Exit(USAGE) from error


def _print(report: T, show: Callable[[T], None], as_json: bool) -> None:
    terminal.print_json(report) if as_json else show(report)


def _key() -> str | None:
    return os.environ.get("STRETTO_API_KEY") or os.environ.get("OPENAI_API_KEY")


def _loaded(model: str) -> LLM:
    """A model in this process's own engine, with a progress bar while it loads."""
    with terminal.LoadingBars() as loading:
        return LLM(model, on_progress=loading)


def main() -> None:
    """Run a command. A StrettoError is printed as one line, without a traceback."""
    terminal.write_any_text()
    try:
        _run()
    except OSError as error:
        if error.errno not in UNWRITABLE or error.filename is not None:
            raise
        terminal.drop_output()
        if error.errno != EPIPE:  # whoever read a pipe has enough
            terminal.print_error(StrettoError(f"the output cannot be written: {error.strerror}"))
        sys.exit(FAILURE)


def _run() -> None:
    try:
        app()
    except StrettoError as error:
        terminal.print_error(error)
        sys.exit(FAILURE)
    finally:
        sys.stdout.flush()
