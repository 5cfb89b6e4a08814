"""Errors that no handler expected, as the client sees them."""

from __future__ import annotations

import threading

import pytest

from stretto.errors import OutOfMemory, StrettoError
from stretto.http.errors import internal


def thread_without_memory() -> RuntimeError:
    """What Python raises where the system gives no memory for a thread's stack."""
    usual = threading.stack_size(2**46)
    try:
        with pytest.raises(RuntimeError) as raised:
            threading.Thread(target=print).start()
    finally:
        threading.stack_size(usual)
    return raised.value


@pytest.mark.parametrize("error", [MemoryError(), thread_without_memory()], ids=["memory", "thread"])
def test_a_lack_of_memory_is_a_503_after_which_a_client_may_try_again(error: Exception) -> None:
    told = internal(error)
    assert isinstance(told, OutOfMemory) and told.status == 503 and told.retry_after


def test_any_other_error_is_a_500_that_quotes_nothing() -> None:
    told = internal(RuntimeError("the prompt was: secret"))
    assert type(told) is StrettoError and told.status == 500 and "secret" not in told.message
