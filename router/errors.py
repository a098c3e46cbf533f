"""What can go wrong, said once: whose fault it is and whether a retry can help.

Callers' errors (`RouterError`) carry a text meant for the caller. Backends' errors (`BackendError`) tell the pool what
to do with the batch and never reach a caller as they are. No HTTP or gRPC numbers here: those stand in one table each
at the edge.
"""

from enum import Enum
from typing import ClassVar


class RouterError(Exception):
    """A row's or a call's failure, with a text for its caller.

    `retry_after_s`: seconds after which a retry may succeed; None where the router names no time.
    """

    def __init__(self, message: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.retry_after_s = retry_after_s


class InvalidArgument(RouterError):
    """The caller's fault; the same request fails again."""


class NotFound(RouterError):
    """No such model; the same request fails until somebody configures or loads it."""


class Unsupported(RouterError):
    """A model that the router cannot serve as it is; the message tells what would help."""


class DeadlineExceeded(RouterError):
    """The caller's time was up first; a retry needs more of it."""


class ResourceExhausted(RouterError):
    """A bound was reached; a retry later helps. `reason` is a short label for the refusal counter."""

    def __init__(self, message: str, *, reason: str, retry_after_s: float | None = None) -> None:
        super().__init__(message, retry_after_s=retry_after_s)
        self.reason = reason


class Unavailable(RouterError):
    """The router is leaving, or the backends failed too often; a retry later, or elsewhere, helps."""


class Cancelled(RouterError):
    """The caller gave up; nobody is there to read this."""


class ModelFailed(RouterError):
    """The model refused the rows or answered nonsense; its own text is in the message."""


class InternalError(RouterError):
    """A bug of ours; the caller gets a fixed text, the log the rest."""

    def __init__(self) -> None:
        super().__init__("internal error")


class BackendError(Exception):
    """What came back from a replica instead of an answer. `may_requeue`: another try may succeed, later or elsewhere.

    `reason` is a short label for the counter of failed rows.
    """

    may_requeue: ClassVar[bool]
    reason: ClassVar[str]

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message

    def for_caller(self) -> RouterError:
        """The error of the batch's rows once no further try is made."""
        return Unavailable(self.message, retry_after_s=1.0)


class StreamLost(BackendError):
    """The replica, or the way to it, is gone. Whether the batch was computed is unknown."""

    may_requeue = True
    reason = "lost"


class BatchTimeout(BackendError):
    """No answer within `batch_timeout_s`; a late one is never read."""

    may_requeue = True
    reason = "timeout"


class BackendExhausted(BackendError):
    """The replica has no room; nothing was computed."""

    may_requeue = True
    reason = "exhausted"

    def for_caller(self) -> RouterError:
        """The caller meets the backend's back-pressure as the router's own."""
        return ResourceExhausted(self.message, reason="backend", retry_after_s=1.0)


class Blame(Enum):
    """Who made a model refuse a batch."""

    ROWS = "some of the rows: refused by every replica, and the others are fine without them"
    UNCLEAR = "some of the rows or the replica"
    MODEL = "neither: no rows would fare better anywhere"


class Refused(BackendError):
    """The model's own error. `as_caller_error` is the class its rows fail with."""

    may_requeue = False
    reason = "refused"

    def __init__(
        self, message: str, as_caller_error: type[RouterError] = ModelFailed, blame: Blame = Blame.UNCLEAR
    ) -> None:
        super().__init__(message)
        self.as_caller_error = as_caller_error
        self.blame = blame

    def for_caller(self) -> RouterError:
        """The model's text under the code that fits it."""
        return self.as_caller_error(self.message)


class Malformed(BackendError):
    """An answer that does not fit its batch: wrong rows, type, shape or id, or values that may not be."""

    may_requeue = False
    reason = "malformed"

    def for_caller(self) -> RouterError:
        """A failure of the model, told as such."""
        return ModelFailed(self.message)
