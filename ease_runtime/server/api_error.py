"""What a server answers when it cannot: OpenAI's error object, with a status."""

from typing import Any

from ease_common.errors import RequestError

KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "invalid_request_error",
    405: "invalid_request_error",
}
KINDS |= dict.fromkeys((408, 413, 415, 421), "invalid_request_error")
KINDS |= {429: "rate_limit_error"}


class ApiError(RequestError):
    """A request that is refused with an HTTP status. `retry_after` is in seconds."""

    def __init__(
        self, status: int, message: str, *, code: str | None = None, retry_after: int | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.headers = {} if retry_after is None else {"Retry-After": str(retry_after)}
        if status == 401:
            self.headers["WWW-Authenticate"] = "Bearer"


def error_object(status: int, message: str, code: str | None = None) -> dict[str, Any]:
    """The body of an answer that is an error, and the last event of a stream that breaks."""
    return {
        "error": {"message": message, "type": KINDS.get(status, "server_error"), "param": None, "code": code}
    }
