"""Every way the gateway says no, and how each is told on the wire.

GatewayError
├── BadRequest 400               malformed JSON, wrong types, a bad Host
│   └── Unsupported 400          the model exists but does not answer this route
├── Unauthenticated 401          no key, not a key, revoked
├── Forbidden 403                a real key that may not do this
│   └── KeyExpired 403
├── NotFound 404                 unknown path
│   └── ModelNotFound 404        unknown model
├── MethodNotAllowed 405
├── RequestTimeout 408           the client was too slow to send its request
├── TooLarge 413
├── HeaderTooLarge 431
├── QuotaExceeded 429            retry after the stated time
│   ├── QuotaTooSmall 429        can never fit the limit: not retryable
│   └── BudgetSpent 429          no money left until the stated time: not worth a client's retries
├── EngineFailed 502             the engine answered nonsense, or broke off
│   ├── EngineTimeout 504        the engine has the call and does not begin to answer
│   └── ModelFailed 502          the model itself failed at this call: not retryable
├── EngineUnavailable 503        no replica can answer now
├── QueueFull 503                the model's bounded queue is full
├── TooManyConnections 503
├── Draining 503                 this gateway is stopping
├── JournalFull 503              usage can't be recorded, so nothing is served
└── DeadlineExceeded 504         waited or ran too long

The edge reads the attributes, nothing else: `status`, `grpc`, `type`, `code`, `param`, `retryable`, `retry_after_s`.
`retryable` becomes `x-should-retry`, which OpenAI's SDKs obey over their own table of statuses.
"""

from __future__ import annotations

import msgspec


class GatewayError(Exception):
    """A refusal or failure with a message that is safe to show to the client."""

    status = 500
    grpc = "INTERNAL"
    """The name of a grpc.StatusCode."""
    type = "server_error"
    code = "internal_error"
    retryable = False

    def __init__(self, message: str, *, param: str | None = None, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s

    def body(self) -> bytes:
        """OpenAI's error object; the `type` beside it is what Anthropic's clients look for."""
        error = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return msgspec.json.encode({"type": "error", "error": error})

    def plain_body(self) -> bytes:
        """The Open Inference Protocol's error object."""
        return msgspec.json.encode({"error": self.message})


class BadRequest(GatewayError):
    status, grpc, type, code = 400, "INVALID_ARGUMENT", "invalid_request_error", "invalid_request"


class Unsupported(BadRequest):
    grpc, code = "UNIMPLEMENTED", "unsupported_route"


class Unauthenticated(GatewayError):
    status, grpc, type, code = 401, "UNAUTHENTICATED", "invalid_request_error", "invalid_api_key"


class Forbidden(GatewayError):
    status, grpc, type, code = 403, "PERMISSION_DENIED", "permission_error", "insufficient_permissions"


class KeyExpired(Forbidden):
    code = "key_expired"


class NotFound(GatewayError):
    status, grpc, type, code = 404, "NOT_FOUND", "invalid_request_error", "not_found"


class ModelNotFound(NotFound):
    code = "model_not_found"


class MethodNotAllowed(GatewayError):
    status, grpc, type, code = 405, "UNIMPLEMENTED", "invalid_request_error", "method_not_allowed"

    def __init__(self, message: str, *, allow: str = "POST") -> None:
        super().__init__(message)
        self.allow = allow


class RequestTimeout(GatewayError):
    status, grpc, type, code, retryable = 408, "DEADLINE_EXCEEDED", "invalid_request_error", "request_timeout", True


class TooLarge(GatewayError):
    status, grpc, type, code = 413, "RESOURCE_EXHAUSTED", "invalid_request_error", "request_too_large"


class HeaderTooLarge(GatewayError):
    status, grpc, type, code = 431, "RESOURCE_EXHAUSTED", "invalid_request_error", "header_too_large"


class QuotaExceeded(GatewayError):
    status, grpc, type, code, retryable = 429, "RESOURCE_EXHAUSTED", "rate_limit_error", "rate_limit_exceeded", True


class QuotaTooSmall(QuotaExceeded):
    code, retryable = "request_exceeds_limit", False


class BudgetSpent(QuotaExceeded):
    type, code, retryable = "insufficient_quota", "insufficient_quota", False


class EngineFailed(GatewayError):
    status, grpc, type, code, retryable = 502, "UNAVAILABLE", "server_error", "engine_failed", True


class EngineTimeout(EngineFailed):
    status, code = 504, "engine_timeout"


class ModelFailed(EngineFailed):
    grpc, code, retryable = "INTERNAL", "model_failed", False


class EngineUnavailable(GatewayError):
    status, grpc, type, code, retryable = 503, "UNAVAILABLE", "server_error", "engine_unavailable", True


class QueueFull(GatewayError):
    status, grpc, type, code, retryable = 503, "UNAVAILABLE", "server_error", "queue_full", True


class TooManyConnections(GatewayError):
    status, grpc, type, code, retryable = 503, "UNAVAILABLE", "server_error", "too_many_connections", True


class Draining(GatewayError):
    status, grpc, type, code, retryable = 503, "UNAVAILABLE", "server_error", "draining", True


class JournalFull(GatewayError):
    status, grpc, type, code, retryable = 503, "UNAVAILABLE", "server_error", "journal_full", True


class DeadlineExceeded(GatewayError):
    status, grpc, type, code, retryable = 504, "DEADLINE_EXCEEDED", "server_error", "deadline_exceeded", False


def field_error(message: str) -> str:
    """msgspec's `what - at `$.a[0].b`` as `a[0].b: what`."""
    what, at, where = message.rpartition(" - at `$")
    field = where.rstrip("`").lstrip(".") if at else ""
    return f"{field}: {what}." if field else f"{(what or message).rstrip('.')}."
