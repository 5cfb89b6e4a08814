"""Typed reading of a JSON object from outside. Every error names the file and the path to the field."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import msgspec

from stretto.disk.files import read_file
from stretto.errors import CheckpointError

LARGEST = 1e300  # a whole number of JSON may be beyond any float


class Fields:
    """A JSON object, with defaults for absent fields. A field that is null has no value.

    The typed getters raise CheckpointError for a field without a value, unless they are given a default, and
    for a value of the wrong type.
    """

    def __init__(
        self, data: Mapping[str, Any], where: str, defaults: Mapping[str, Any] | None = None
    ) -> None:
        self.data = data
        self.where = where
        self.defaults = defaults or {}

    @classmethod
    def load(cls, path: Path) -> Fields:
        """Raises CheckpointError when the file is missing or not a JSON object."""
        try:
            data = msgspec.json.decode(read_file(path))
        except (ValueError, RecursionError) as error:
            raise CheckpointError(
                f"{path} cannot be read: it is not JSON ({error}); fetch it again"
            ) from error
        if not isinstance(data, dict):
            raise CheckpointError(f"{path} must hold a JSON object, not {type(data).__name__}")
        return cls(cast("dict[str, Any]", data), f"{path}: $")

    def get(self, key: str) -> Any:
        return self.data[key] if key in self.data else self.defaults.get(key)

    def error(self, key: str, problem: str) -> CheckpointError:
        return CheckpointError(f"{self.where}.{key} {problem}")

    def _typed(self, key: str, kind: type | tuple[type, ...], name: str, default: Any) -> Any:
        value = self.get(key)
        if value is None:
            value = default
        if value is None:
            raise self.error(key, "is missing")
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise self.error(key, f"must be {name}, not {value!r}")
        return value

    def count(self, key: str, default: int | None = None, *, minimum: int = 1, maximum: int = 2**31) -> int:
        value = self._typed(key, int, "a whole number", default)
        if not minimum <= value <= maximum:
            raise self.error(key, f"must be from {minimum} to {maximum}, not {value}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self._typed(key, (int, float), "a number", default)
        value = float(value) if abs(value) < LARGEST else float("inf")
        if not 0 < value < float("inf"):
            raise self.error(key, f"must be above zero, not {value}")
        return value

    def maybe(self, key: str) -> float | None:
        return None if self.get(key) is None else self.number(key)

    def flag(self, key: str, default: bool = False) -> bool:
        return self._typed(key, bool, "true or false", default)

    def text(self, key: str, default: str | None = None) -> str:
        return self._typed(key, str, "a string", default)

    def list(self, key: str) -> list[Any]:
        return self._typed(key, list, "a list", [])

    def object(self, key: str) -> Fields:
        value = self._typed(key, dict, "an object", {})
        return Fields(value, f"{self.where}.{key}")
