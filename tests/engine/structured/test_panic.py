"""A bug in the grammar library ends one sequence: its panics are no Exception."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from stretto.engine.structured import grammar
from stretto.engine.structured.grammar import Matcher
from stretto.types import Grammar


class Panic(BaseException):
    pass


class BrokenState:
    """The state of llguidance's matcher, with a bug."""

    def is_error(self) -> bool:
        return False

    def consume_token(self, token: int) -> bool:
        raise Panic("index out of bounds")

    def unsafe_compute_mask_ptr(self, pointer: int, size: int) -> None:
        raise Panic("index out of bounds")


def test_a_panic_of_the_library_is_an_error_of_its_matcher() -> None:
    state: Any = BrokenState()
    accepting, masking, bits = Matcher(state, 64, 64), Matcher(state, 64, 64), np.ones(2, dtype=np.int32)
    assert accepting.error is masking.error is None
    assert not accepting.accept(1)
    masking.mask_into(bits)
    assert not bits.any(), "no token is allowed"
    assert accepting.error == masking.error == "the grammar cannot be followed: Panic in its library"


def test_a_grammar_is_compiled_anew_after_a_panic_of_one_of_its_matchers(tmp_path: Path, monkeypatch: Any):
    class CaughtPanic(BrokenState):
        def deep_copy(self) -> CaughtPanic:
            return self

        def is_error(self) -> bool:
            return True

        def get_error(self) -> str:
            return "panic: assertion failed"

        def consume_token(self, token: int) -> bool:
            return False

    made: list[CaughtPanic] = []

    def compile_again(*_: object) -> CaughtPanic:
        made.append(CaughtPanic())
        return made[-1]

    monkeypatch.setattr(grammar, "compiled", compile_again)
    desk = Path(grammar.__file__).parents[2] / "desk"
    grammars = grammar.Grammars(desk, frozenset({0}), 64)
    wanted = Grammar("json_object")
    first, second = grammars.compile(wanted), grammars.compile(wanted)
    assert len(made) == 1
    assert not first.accept(1)
    assert grammars.known(wanted) is None
    grammars.compile(wanted)
    assert len(made) == 2 and "panic" in str(second.error)
