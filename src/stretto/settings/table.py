"""How the settings of a command are read from its flags, the environment and a file.

A setting has one name everywhere. Flags override the environment (`STRETTO_PORT`), which overrides the file
(`port = 8000`), which overrides the defaults. The caller passes flags and environment in.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import msgspec
from msgspec import Struct
from msgspec.structs import FieldInfo, fields

from stretto.errors import StartError, reason_of

FILE_ONLY = ("api_keys", "tiers", "prices", "caches", "tenants_prefer")
LISTS = ("models", "workers", "allowed_hosts", "cors_origins", "feedback_prompts")
ONE_KEY = "STRETTO_API_KEY"
# Read by the gateway, the examples and the tests.
OTHERS = (
    *("KEYS_FILE", "USAGE_FILE", "GATEWAYS", "WORKERS", "ROUTE", "HEDGE_SHARE", "REDIS", "URL", "DATA"),
    *("KEY", "ANSWER_TIMEOUT", "SILENCE_TIMEOUT"),
)
SIZES = {"kv_memory", "cache_size", "response_store"}
ENVIRONMENT = "STRETTO_"
NAME_ERROR = re.compile(r"(Invalid enum value|.*unknown field) .* at (?:`key` in )?`\$\.(\w+)[^`]*`$")
SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(?:([KMGT])(i?)B?)?", re.IGNORECASE)


class SettingsTable:
    """The settings of one command, by name: how they are read from flags, environment and file."""

    def __init__(self, infos: Sequence[FieldInfo]) -> None:
        self.infos = {info.encode_name: info for info in infos}
        self._all = msgspec.defstruct(
            "Settings",
            [(name, info.type, None) for name, info in self.infos.items()],
            forbid_unknown_fields=True,
        )

    def read(self, flags: Mapping[str, Any], environ: Mapping[str, str], file: Path | None) -> dict[str, Any]:
        """The settings that are given somewhere: flags before environment before file.

        Raises StartError that names the file and key, the environment variable or the flag of a wrong value.
        """
        merged = {} if file is None else self._checked(_read(file), f"{file}", strict=True)
        self.refuse_unknown(environ)
        for name in self.infos:
            variable = ENVIRONMENT + name.upper()
            if name not in FILE_ONLY and variable in environ:
                text = environ[variable]
                value: Any = text.split(",") if name in LISTS else text
                merged |= self._checked({name: value}, variable, strict=False)
        if (key := environ.get(ONE_KEY)) is not None:
            if not key.strip():
                raise StartError(f"{ONE_KEY} is empty: set it to a key, or unset it")
            merged["api_keys"] = {key: "local"}
        for name, value in flags.items():
            merged |= self._checked({name: value}, f"--{name.replace('_', '-')}", strict=False)
        return merged

    def reference(self, flags: Mapping[str, str], arguments: Collection[str] = ()) -> str:
        """The settings as a Markdown table.

        `flags`: the flag of each setting that has one. `arguments`: the settings that are arguments instead.
        """
        rows = ["| in the file | environment | flag | default | meaning |", "| --- | --- | --- | --- | --- |"]
        for name, info in self.infos.items():
            variable = "" if name in FILE_ONLY else f"`{ENVIRONMENT}{name.upper()}`"
            variable = f"`{ONE_KEY}` (one key)" if name == "api_keys" else variable
            flag = f"`{flags[name]}`" if name in flags else "arguments" if name in arguments else ""
            default = info.default if info.default is not msgspec.NODEFAULT else info.default_factory()
            shown = msgspec.json.encode(default).decode()
            rows.append(f"| `{name}` | {variable} | {flag} | `{shown}` | {meaning_of(info)} |")
        return "\n".join(rows) + "\n"

    def refuse_unknown(self, environ: Mapping[str, str]) -> None:
        """Raises StartError for a variable STRETTO_... that nothing reads, and names the likely one."""
        usable = [name.upper() for name in self.infos if name not in FILE_ONLY]
        usable += [name.removeprefix(ENVIRONMENT) for name in (ONE_KEY, *OTHERS)]
        for variable in environ:
            name = variable.upper().removeprefix(ENVIRONMENT)
            if name != variable.upper() and variable not in (ENVIRONMENT + each for each in usable):
                near = difflib.get_close_matches(name, usable, 1)
                hint = f"did you mean {ENVIRONMENT}{near[0]}?" if near else "docs/configuration.md lists them"
                raise StartError(f"{variable}: nothing reads this environment variable; {hint}")

    def _checked(self, values: dict[str, Any], where: str, *, strict: bool) -> dict[str, Any]:
        for name in values.keys() - self.infos.keys():
            near = difflib.get_close_matches(name, self.infos, 1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(self.infos)}"
            raise StartError(f"{where}: unknown setting {name}; {hint}")
        if "gateway_key" in values and not str(values["gateway_key"]).strip():
            raise StartError(f"{where}: gateway_key is empty: set it to a secret, or leave it out")
        try:
            values = values | {name: size(values[name]) for name in SIZES & values.keys()}
            parsed = msgspec.convert(values, self._all, strict=strict)
        except ValueError as error:
            raise StartError(f"{where}: {error}{self._hint(str(error))}") from error
        return {name: getattr(parsed, name) for name in values}

    def _hint(self, error: str) -> str:
        """The allowed values or names of the setting that a message of msgspec names, if they are fixed."""
        at = NAME_ERROR.search(error)
        of = "values" if at and at[1].startswith("Invalid") else "names"
        return f"; choose from {', '.join(_choices(self.infos[at[2]].type, of))}" if at else ""


def meaning_of(info: FieldInfo) -> str:
    """The description of a setting."""
    return info.type.__metadata__[0].description


def part(struct: type[Struct], merged: dict[str, Any]) -> dict[str, Any]:
    """The settings of one structure, by the names of its fields."""
    return {info.name: merged[info.encode_name] for info in fields(struct) if info.encode_name in merged}


def size(text: object) -> int:
    """The bytes of a size like `2GiB`, `512M` or `1.5` (GiB). Raises ValueError for anything else."""
    match = SIZE.fullmatch(str(text).strip())
    if match is None:
        raise ValueError(f"{text!r} is no size: write one like 2GiB, 512MiB or 1.5 (GiB)")
    return int(float(match[1]) * 2 ** (10 * ("KMGT".index(match[2].upper()) + 1) if match[2] else 30))


def _read(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, RecursionError, tomllib.TOMLDecodeError) as error:
        raise StartError(f"cannot read the configuration {file}: {reason_of(error)}") from error


def _choices(kind: Any, of: Literal["values", "names"]) -> list[str]:
    if get_origin(kind) is Literal and of == "values":
        return list(get_args(kind))
    names: tuple[str, ...] = getattr(kind, "__struct_fields__", ()) if of == "names" else ()
    return [*names, *(choice for part in get_args(kind) for choice in _choices(part, of))]
