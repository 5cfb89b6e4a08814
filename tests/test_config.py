"""Configuration: the sources of settings, their precedence and the error messages."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import msgspec
import pytest

from stretto.config import SERVE, EngineConfig, ModelConfig, ServeConfig, load
from stretto.errors import StartError
from stretto.gateway.settings import GATEWAY
from stretto.settings.table import FILE_ONLY, size


def test_without_sources_settings_have_their_defaults() -> None:
    serve, engine = load({}, {}, None)
    assert serve == ServeConfig()
    assert engine == EngineConfig(models=(ModelConfig(name="desk", path="desk"),))


def test_flags_override_the_environment_which_overrides_the_file(tmp_path: Path) -> None:
    file = tmp_path / "stretto.toml"
    file.write_text('port = 1\nhost = "h"\nmax_running = 3\nkv_memory = "1.5GiB"\n[api_keys]\nk = "acme"\n')
    environ = {"STRETTO_PORT": "2", "STRETTO_MAX_RUNNING": "4", "STRETTO_PREFIX_CACHE": "false"}
    serve, engine = load({"port": 5}, environ, file)
    assert (serve.port, serve.host, serve.api_keys) == (5, "h", {"k": "acme"})
    assert (engine.max_running, engine.kv_bytes, engine.prefix_cache) == (4, 3 * 2**29, False)


def test_the_environment_can_give_one_api_key() -> None:
    assert load({}, {"STRETTO_API_KEY": "s3cret"}, None)[0].api_keys == {"s3cret": "local"}


def test_lists_are_separated_by_commas_in_the_environment() -> None:
    environ = {"STRETTO_ALLOWED_HOSTS": "a.org,*.b.org", "STRETTO_CORS_ORIGINS": "https://a.org"}
    serve = load({}, environ, None)[0]
    assert (serve.allowed_hosts, serve.cors_origins) == (("a.org", "*.b.org"), ("https://a.org",))


@pytest.mark.parametrize("key", ["", " ", "\t", "\u00a0", "two words", "schl\u00fcssel", " padded "])
def test_an_empty_key_or_one_that_no_client_can_send_is_refused(tmp_path: Path, key: str) -> None:
    file = tmp_path / "stretto.toml"
    for text in (f"[api_keys]\n{msgspec.json.encode(key).decode()} = 'acme'", f"gateway_key = '{key}'"):
        file.write_text(text)
        with pytest.raises(StartError, match=r"api_keys|gateway_key"):
            load({}, {}, file)
    for variable in ("STRETTO_API_KEY", "STRETTO_GATEWAY_KEY"):
        with pytest.raises(StartError, match=r"API_KEY|GATEWAY_KEY|api_keys|gateway_key") as caught:
            load({}, {variable: key}, None)
        assert not key.strip() or key not in str(caught.value), "a key is a secret"
    with pytest.raises(StartError, match="api_keys"):
        ServeConfig(api_keys={"key": " "})


@pytest.mark.parametrize(
    ("variable", "hint"),
    [
        ("STRETTO_API_KEYS", r"did you mean STRETTO_API_KEY\?"),
        ("STRETTO_HOSTS", r"did you mean STRETTO_HOST\?"),
        ("stretto_port", r"did you mean STRETTO_PORT\?"),
        ("STRETTO_XYZZY", r"docs/configuration\.md"),
        ("STRETTO_TIERS", r"docs/configuration\.md|did you mean"),
        ("STRETTO_", ""),
    ],
)
def test_an_unknown_environment_variable_is_an_error(variable: str, hint: str) -> None:
    with pytest.raises(StartError, match=f"{variable}: .*{hint}"):
        load({}, {variable: "secret"}, None)


def test_every_documented_environment_variable_is_known() -> None:
    page = (Path(__file__).parent.parent / "docs" / "configuration.md").read_text()
    for variable in set(re.findall(r"`(STRETTO_\w+)`", page)):
        try:
            load({}, {variable: "1"}, None)
        except StartError as error:
            assert "nothing reads" not in str(error), variable
    load({}, {"STRETTO_URL": "http://127.0.0.1:8000", "STRETTO_DATA": "/data"}, None)
    load(
        {},
        {
            f"STRETTO_{name.upper()}": "1"
            for name in GATEWAY.infos.keys() - SERVE.infos.keys() - set(FILE_ONLY)
        },
        None,
    )


def test_a_model_is_named_after_its_directory_or_hub_id(tmp_path: Path) -> None:
    folder = tmp_path / "my-model"
    folder.mkdir()
    flags = {"models": [f"{folder}/", "big=/elsewhere", "org/name"], "dtype": "float32"}
    models = load(flags, {}, None)[1].models
    assert [model.name for model in models] == ["my-model", "big", "org/name"]
    assert [model.path for model in models] == [f"{folder}/", "/elsewhere", "org/name"]
    assert {model.dtype for model in models} == {"float32"}
    assert [m.name for m in load({}, {"STRETTO_MODELS": "a,b"}, None)[1].models] == ["a", "b"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prot = 1", r"stretto\.toml: unknown setting prot; did you mean port\?"),
        ("colour = 1", r"unknown setting colour; known are models, .*host"),
        ('port = "x"', r"stretto\.toml: Expected `int`, got `str` - at `\$\.port`"),
        ("port = 70000", r"Expected `int` <= 65535 - at `\$\.port`"),
        ("[api_keys]\nk = 1", r"Expected `str`, got `int` - at `\$\.api_keys\[\.\.\.\]`"),
        ('kv_memory = "lots"', r"'lots' is no size"),
        ('schedule = "lifo"', r"Invalid enum value 'lifo' - at `\$\.schedule`; choose from fcfs, deadline"),
        ("[tiers.priority]\nmin_quality = 1.5", r"Expected `float` <= 1.0 - at `\$\.tiers"),
        ('prefer = "speed"', r"Invalid enum value 'speed' - at `\$\.prefer`; choose from quality, energy"),
        ("[tiers.gold]\nttft_ms = 5", "Invalid enum value 'gold' .*; choose from priority, default, flex$"),
        ("[tiers.flex]\nttft = 5", "unknown field `ttft` .*; choose from ttft_ms, itl_ms"),
        ("models = []", r"at `\$\.models`"),
        ("port = ", "cannot read the configuration"),
    ],
)
def test_an_error_names_the_file_and_the_key(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "stretto.toml"
    file.write_text(text)
    with pytest.raises(StartError, match=message):
        load({}, {}, file)


@pytest.mark.parametrize(
    ("flags", "environ", "message"),
    [
        ({"threads": -1}, {}, r"--threads: Expected `int` >= 0"),
        ({}, {"STRETTO_MAX_WAITING": "many"}, r"STRETTO_MAX_WAITING: Expected `int`"),
        ({"models": ["a", "a"]}, {}, "two models are called a"),
        ({"models": ["=path"]}, {}, "names no model"),
        ({"quantise": "int5"}, {}, "Invalid enum value 'int5' .*; choose from int8, int4, fp8"),
        ({}, {"STRETTO_DTYPE": "f8"}, "choose from auto, float32, bfloat16, float16"),
    ],
)
def test_an_error_names_the_flag_or_the_variable(
    flags: dict[str, Any], environ: dict[str, str], message: str
) -> None:
    with pytest.raises(StartError, match=message):
        load(flags, environ, None)
    with pytest.raises(StartError, match="cannot read the configuration"):
        load({}, {}, Path("/nowhere/stretto.toml"))


def test_a_size_is_read_with_and_without_a_unit() -> None:
    assert [size(text) for text in ("2GiB", "512M", "1.5", 3, "8 kb")] == [
        2 * 2**30,
        512 * 2**20,
        3 * 2**29,
        3 * 2**30,
        8 * 2**10,
    ]


def test_the_engine_config_survives_a_json_round_trip() -> None:
    engine = load({"kv_memory": "1GiB"}, {}, None)[1]
    assert msgspec.json.decode(msgspec.json.encode(engine), type=EngineConfig) == engine


def test_the_reference_table_has_every_setting() -> None:
    page = SERVE.reference({"port": "--port"}, {"models"})
    assert len(page.splitlines()) == 2 + len(SERVE.infos)
    assert "| `port` | `STRETTO_PORT` | `--port` | `8000` |" in page
    assert all(f"| `{name}` |" in page for name in SERVE.infos)
