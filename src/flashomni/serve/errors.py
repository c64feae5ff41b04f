"""What went wrong, in OpenAI's form: ``{"error": {"message", "type", "param", "code"}}``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

WRONG, SERVER, BUSY = "invalid_request_error", "server_error", "overloaded_error"


class Refused(ValueError):
    """A request that is not served.

    Args:
        message: what is wrong, and what is allowed.
        param: the field of the request that it is about.
        status: of HTTP.
    """

    def __init__(self, message: str, param: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.param, self.status = param, status


@dataclass(frozen=True)
class Failure:
    """Why there is no picture.

    Args:
        status: of HTTP.
        message: for the user.
        param: the field of the request that it is about.
        kind: ``type`` of OpenAI's error.
        code: a word that programs tell it by.
        retry_after: seconds after which it may work.
    """

    status: int
    message: str
    param: str | None = None
    kind: str = WRONG
    code: str | None = None
    retry_after: int | None = None

    def to_dict(self) -> dict[str, Any]:
        error = {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}
        return {"error": error}

    @classmethod
    def of(cls, error: BaseException) -> Failure:
        """What an exception means to who sent the request.

        ``ValueError`` and ``NotImplementedError`` are about the request, all others about us.
        """
        if isinstance(error, Failed):
            return error.failure
        if isinstance(error, Refused):
            return cls(error.status, str(error), error.param)
        if isinstance(error, NotImplementedError):
            return cls(400, str(error), code="not_supported")
        if isinstance(error, ValueError):
            return cls(400, str(error))
        return cls(500, f"{type(error).__name__}: {error}", kind=SERVER)


class Failed(Exception):
    """Carries a :class:`Failure` to where it is answered."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.message)
        self.failure = failure


def overloaded(waiting: int, retry_after: int) -> Failure:
    """The queue is full.

    Args:
        waiting: requests in it.
        retry_after: seconds until there is room, about.
    """
    message = f"{waiting} requests are waiting already; try again in {retry_after} s"
    return Failure(503, message, None, BUSY, "queue_full", retry_after)
