"""All errors that Stretto raises for users, with their HTTP status and OpenAI's type and code.

A message states what is wrong, where, and what to do. `param` is the path of the field, like `$.messages[0]`.
"""

from __future__ import annotations

LONGEST_MESSAGE, LONGEST_PARAM = 2000, 200


def reason_of(error: BaseException) -> str:
    """Why a file cannot be read or written, for a message that names the file: without number and path."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, UnicodeDecodeError):
        return f"it is not UTF-8: {error.reason} at byte {error.start}"
    return str(error)


def cut(text: str, most: int) -> str:
    """At most `most` characters of a text, and how long it was. What a client sent may be megabytes long."""
    return text if len(text) <= most else f"{text[:most]}... ({len(text)} characters)"


class StrettoError(Exception):
    """The base of all errors. `retry_after` is in seconds. A long message or path is cut."""

    status = 500
    type = "server_error"
    code = "internal_error"

    def __init__(self, message: str, *, param: str | None = None, retry_after: float | None = None) -> None:
        self.message = cut(message, LONGEST_MESSAGE)
        self.param = None if param is None else cut(param, LONGEST_PARAM)
        super().__init__(self.message)
        self.retry_after = retry_after

    def body(self) -> dict[str, dict[str, str | None]]:
        """The error as an object of OpenAI's API."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


class InvalidRequest(StrettoError):
    """The request is malformed or out of range."""

    status = 400
    type = "invalid_request_error"
    code = "invalid_value"


class UnsupportedField(InvalidRequest):
    """Stretto does not implement this field, or this value of it."""

    code = "unsupported_field"


class ContextExceeded(InvalidRequest):
    """Prompt and answer together exceed the model's context."""

    code = "context_length_exceeded"


class QualityOutOfReach(InvalidRequest):
    """No variant reaches `min_quality` for this prompt, and the objective has `on_miss: reject`."""

    code = "quality_out_of_reach"


class InvalidGrammar(InvalidRequest):
    """A regex or JSON schema does not compile, or needs too much time or memory to compile."""

    code = "invalid_grammar"


class InvalidHttp(StrettoError):
    """The bytes are no HTTP/1.1 request, or a header is wrong."""

    status = 400
    type = "invalid_request_error"
    code = "invalid_http"


class PipelineTooDeep(InvalidHttp):
    """The client has sent too many requests without waiting for their answers."""

    code = "pipeline_too_deep"


class ForeignHost(StrettoError):
    """The `Host` header names a host that this server does not answer for."""

    status = 403
    type = "permission_error"
    code = "host_not_allowed"


class ForeignOrigin(StrettoError):
    """The request comes from a web page of an origin that may not use this server."""

    status = 403
    type = "permission_error"
    code = "origin_not_allowed"


class RequestTimeout(StrettoError):
    """The client took too long to send its request."""

    status = 408
    type = "invalid_request_error"
    code = "request_timeout"


class UnsupportedMedia(StrettoError):
    """The body has a content type or an encoding that this server does not read."""

    status = 415
    type = "invalid_request_error"
    code = "unsupported_media_type"


class HeadersTooLarge(StrettoError):
    """The request line and the headers are too large."""

    status = 431
    type = "invalid_request_error"
    code = "headers_too_large"


class Unauthorised(StrettoError):
    """The API key is missing or unknown."""

    status = 401
    type = "authentication_error"
    code = "invalid_api_key"


class KeyRevoked(Unauthorised):
    """The API key was revoked."""

    code = "key_revoked"


class KeyExpired(Unauthorised):
    """The API key has expired."""

    code = "key_expired"


class NotAllowed(StrettoError):
    """The API key does not allow this path, tier or model."""

    status = 403
    type = "permission_error"
    code = "not_allowed"


class RateLimited(StrettoError):
    """The API key or its tenant has used up a rate: requests or tokens per second or minute."""

    status = 429
    type = "rate_limit_error"
    code = "rate_limit_exceeded"


class BudgetExceeded(StrettoError):
    """The API key or its tenant has used up a budget."""

    status = 429
    type = "insufficient_quota"
    code = "budget_exceeded"


class UnknownModel(StrettoError):
    """This server has no model of that name."""

    status = 404
    type = "invalid_request_error"
    code = "model_not_found"


class UnknownResponse(StrettoError):
    """This server keeps no answer of that id for the tenant."""

    status = 404
    type = "invalid_request_error"
    code = "previous_response_not_found"


class ActiveResponse(InvalidRequest):
    """A session has one response at a time."""

    code = "conversation_already_has_active_response"


class NoActiveResponse(InvalidRequest):
    """The response to cancel does not run."""

    code = "response_cancel_not_active"


class SessionExpired(StrettoError):
    """A session had no event of its client for too long."""

    status = 408
    type = "invalid_request_error"
    code = "session_expired"


class UpgradeRequired(StrettoError):
    """The path is a WebSocket, and the request is no handshake."""

    status = 426
    type = "invalid_request_error"
    code = "upgrade_required"


class UnknownRequest(StrettoError):
    """No request of that id waits for the tenant's feedback."""

    status = 404
    type = "invalid_request_error"
    code = "request_not_found"


class NotFound(StrettoError):
    """There is no such path."""

    status = 404
    type = "invalid_request_error"
    code = "not_found"


class NotImplementedHere(StrettoError):
    """No server behind this address can do that."""

    status = 501
    type = "invalid_request_error"
    code = "not_implemented"


class WrongMethod(StrettoError):
    """The path exists, but not for this HTTP method."""

    status = 405
    type = "invalid_request_error"
    code = "method_not_allowed"


class TooLarge(StrettoError):
    """The body of the request is too large."""

    status = 413
    type = "invalid_request_error"
    code = "request_too_large"


class Unavailable(StrettoError):
    """The request cannot be served now, but later or by another server."""

    status = 503
    type = "unavailable_error"
    code = "unavailable"


class OutOfMemory(Unavailable):
    """The process has no memory left for the request."""

    code = "out_of_memory"


class Overloaded(Unavailable):
    """The queue is full."""

    code = "overloaded"


class TooManyConnections(Unavailable):
    """All connections that the server keeps are busy."""

    code = "too_many_connections"


class CannotBeOnTime(Unavailable):
    """The request would be late, and its objective has `on_miss: reject`."""

    code = "cannot_be_on_time"


class Draining(Unavailable):
    """The worker is shutting down."""

    code = "draining"


class EngineDied(Unavailable):
    """The engine process ended during the request. It restarts by itself."""

    code = "engine_died"


class EngineStalled(Unavailable):
    """The engine process runs and does not respond. It goes on, or is started again after a while."""

    code = "engine_stalled"


class EngineError(StrettoError):
    """The engine could not finish this request. Other requests are not affected."""

    code = "engine_error"


class StartError(StrettoError):
    """The server cannot start with these settings. The command prints this error and exits."""

    code = "cannot_start"


class CheckpointError(StartError):
    """A checkpoint cannot be loaded: missing, damaged, of an unknown family or of an unsafe format."""

    code = "bad_checkpoint"
