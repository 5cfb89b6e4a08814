"""A bug in the grammar library ends one sequence: its panics are no Exception."""

from __future__ import annotations

from typing import Any

import numpy as np

from stretto.engine.structured.grammar import Matcher


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
