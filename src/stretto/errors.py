"""Every error Stretto raises on purpose, as one tree. Each owns its HTTP status and its OpenAI type and code.

A message says what is wrong, where, and what to do about it. `param` is the path to the field:
`$.messages[0]`.
"""

from __future__ import annotations


class StrettoError(Exception):
    """The root. `retry_after` is in seconds."""

    status = 500
    type = "server_error"
    code = "internal_error"

    def __init__(self, message: str, *, param: str | None = None, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after = retry_after

    def body(self) -> dict[str, dict[str, str | None]]:
        """The error object of OpenAI's API."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


class InvalidRequest(StrettoError):
    """The request is malformed or out of range."""

    status = 400
    type = "invalid_request_error"
    code = "invalid_value"


class UnsupportedField(InvalidRequest):
    """A field, or a value of one, that Stretto does not implement."""

    code = "unsupported_field"


class ContextExceeded(InvalidRequest):
    """Prompt and answer do not fit the model's context."""

    code = "context_length_exceeded"


class InvalidGrammar(InvalidRequest):
    """A regex or JSON schema that does not compile, or takes too much to compile."""

    code = "invalid_grammar"


class Unauthorised(StrettoError):
    """No key, or a key nobody knows."""

    status = 401
    type = "authentication_error"
    code = "invalid_api_key"


class UnknownModel(StrettoError):
    """No model of that name is held here."""

    status = 404
    type = "invalid_request_error"
    code = "model_not_found"


class NotFound(StrettoError):
    """No such page."""

    status = 404
    type = "invalid_request_error"
    code = "not_found"


class WrongMethod(StrettoError):
    """The page exists, and not for this method."""

    status = 405
    type = "invalid_request_error"
    code = "method_not_allowed"


class TooLarge(StrettoError):
    """The request's body is beyond the limit."""

    status = 413
    type = "invalid_request_error"
    code = "request_too_large"


class Unavailable(StrettoError):
    """Not now; later, or elsewhere, yes."""

    status = 503
    type = "unavailable_error"
    code = "unavailable"


class Overloaded(Unavailable):
    """The queue is full."""

    code = "overloaded"


class CannotBeOnTime(Unavailable):
    """The request asked to be refused rather than late, and would have been late."""

    code = "cannot_be_on_time"


class Draining(Unavailable):
    """The worker is shutting down."""

    code = "draining"


class EngineDied(Unavailable):
    """The engine process ended while the request was in it; it restarts by itself."""

    code = "engine_died"


class EngineError(StrettoError):
    """The engine could not finish this request; it goes on with the others."""

    code = "engine_error"


class StartError(StrettoError):
    """The server cannot start as it was asked to. Never seen over HTTP: the command prints it and exits."""

    code = "cannot_start"


class CheckpointError(StartError):
    """A checkpoint that cannot be loaded: missing, misshapen, of an unknown family or an unsafe format."""

    code = "bad_checkpoint"
