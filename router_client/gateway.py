"""One gateway over REST: requests asked again where that is safe, problem documents as exceptions. Knows no routes.

What becomes of an attempt that is not answered with 2xx:

    429, 503                                asked again after Retry-After, or soon where none is named
    no connection                           asked again soon
    connection lost, or no answer in time   asked again soon, where the request may be repeated
    everything else                         the caller's, as an exception of the tree in errors.py

All attempts of a request share its deadline.
"""

import asyncio
import ipaddress
import json
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Self

import httpx

from router_client.errors import DeadlineExceeded, Internal, InvalidArgument, RouterError, Unavailable, error_of
from router_client.jobs import UNREADABLE, read_errors
from router_client.retry import RetryPolicy, left_s

CODE_OF_STATUS = {
    401: "UNAUTHENTICATED",
    403: "PERMISSION_DENIED",
    404: "NOT_FOUND",
    408: "DEADLINE_EXCEEDED",
    409: "ABORTED",
    429: "RESOURCE_EXHAUSTED",
    499: "CANCELLED",
    500: "INTERNAL",
    501: "UNIMPLEMENTED",
    502: "UNKNOWN",
    503: "UNAVAILABLE",
    504: "DEADLINE_EXCEEDED",
}
"""The gateway's table, read backwards; other 4xx are INVALID_ARGUMENT, the rest UNKNOWN."""

RETRIED = frozenset({429, 503})
CONNECT_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A request of the job API. ``may_repeat``: an attempt that may have been executed may be sent once more.

    ``accepted``: the statuses that are answers; others are errors.
    """

    method: str
    path: str
    body: Mapping[str, Any] | None = None
    headers: Mapping[str, str] | None = None
    query: Mapping[str, str] | None = None
    may_repeat: bool = True
    accepted: frozenset[int] = frozenset({200, 202, 204})


class Closed(Unavailable):
    """The client was closed before there was an answer; to ask again is no use."""


class _Lost(Exception):
    """An attempt without an answer, or with one that asks to come back later."""

    def __init__(self, error: RouterError, *, may_repeat: bool) -> None:
        super().__init__(str(error))
        self.error = error
        self.may_repeat = may_repeat


class Gateway:
    """The gateway at ``url``. Belongs to one event loop; close it.

    A proxy of the environment is used unless ``url`` is on the loopback. ``transport`` and ``chance`` are for tests.
    """

    def __init__(
        self,
        url: str,
        policy: RetryPolicy,
        *,
        headers: Mapping[str, str] | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
        chance: Callable[[], float] = random.random,
    ) -> None:
        self._url = check_url(url)
        self._policy = policy
        self._chance = chance
        self._http = httpx.AsyncClient(
            base_url=self._url,
            headers=headers,
            transport=transport,
            trust_env=not is_loopback(self._url),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=20),
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close every connection; what is open then fails with Unavailable."""
        await self._http.aclose()

    async def ask(self, request: Request, *, timeout_s: float, policy: RetryPolicy | None = None) -> Any:  # noqa: ANN401
        """Return the JSON of the answer, None for an answer without a body.

        Args:
            request: what to ask for.
            timeout_s: seconds for all attempts.
            policy: in place of the client's own.

        Raises:
            RouterError: there is no answer that the request accepts.
        """
        deadline = _now() + timeout_s
        sent = 0
        while True:
            try:
                return await self._try(request, left_s(deadline, _now()))
            except _Lost as lost:
                sent += 1
                delay_s = self._delay_s(lost, sent, left_s(deadline, _now()), policy or self._policy)
                if delay_s is None:
                    raise lost.error from lost.__cause__
            await asyncio.sleep(delay_s)

    def _delay_s(self, lost: _Lost, sent: int, left_s: float, policy: RetryPolicy) -> float | None:
        return policy.delay_s(sent, lost.error.retry_after_s, left_s, self._chance()) if lost.may_repeat else None

    def _check_open(self) -> None:
        if self._http.is_closed:
            raise Closed("the client was closed")

    async def _try(self, request: Request, timeout_s: float) -> Any:  # noqa: ANN401 -- JSON
        self._check_open()
        try:
            async with asyncio.timeout(timeout_s):
                response = await self._send(request)
        except TimeoutError as exc:
            raise DeadlineExceeded(f"no answer from the gateway at {self._url} in time") from exc
        except (httpx.ConnectError, httpx.ConnectTimeout, httpx.ProxyError) as exc:
            raise _Lost(Unavailable(f"no gateway at {self._url}: {_words(exc)}"), may_repeat=True) from exc
        except httpx.TransportError as exc:
            self._check_open()
            error = Unavailable(f"the connection to the gateway at {self._url} was lost: {_words(exc)}")
            raise _Lost(error, may_repeat=request.may_repeat) from exc
        except httpx.HTTPError as exc:
            raise Internal(f"the answer from {self._url} cannot be read: {_words(exc)}") from exc
        return self._read(response, request)

    async def _send(self, request: Request) -> httpx.Response:
        return await self._http.request(
            request.method,
            request.path,
            content=None if request.body is None else _dump(request.body),
            headers={"Content-Type": "application/json", **(request.headers or {})},
            params=request.query,
            timeout=httpx.Timeout(None, connect=CONNECT_TIMEOUT_S),
        )

    def _read(self, response: httpx.Response, request: Request) -> Any:  # noqa: ANN401 -- JSON
        if response.status_code not in request.accepted:
            error = problem_of(response)
            if response.status_code in RETRIED:
                raise _Lost(error, may_repeat=True)
            raise error
        if not response.content:
            return None
        try:
            return response.json()
        except (ValueError, RecursionError) as exc:
            raise Internal(f"{self._url} answers no JSON; is that a gateway?") from exc


def problem_of(response: httpx.Response) -> RouterError:
    """Return the exception that a response stands for: a problem document, or anything else that a proxy writes."""
    status = response.status_code
    default = "INVALID_ARGUMENT" if 400 <= status < 500 else "UNKNOWN"
    document = _problem(response)
    try:
        agents = read_errors(document)
    except UNREADABLE:
        agents = {}
    return error_of(
        CODE_OF_STATUS.get(status, default),
        str(document.get("detail") or f"HTTP {status} {response.reason_phrase}"),
        retry_after_s=_retry_after_s(response.headers),
        agents=agents,
    )


def check_url(url: str) -> str:
    """Return a gateway's URL without a slash at its end.

    Raises:
        InvalidArgument: it is no HTTP URL with a host.
    """
    try:
        parsed = httpx.URL(url)
    except (httpx.InvalidURL, TypeError) as exc:
        raise InvalidArgument(f"{url!r} is no URL: {exc}") from exc
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise InvalidArgument(f"{url!r} is no URL such as http://127.0.0.1:8000")
    return url.rstrip("/")


def is_loopback(url: str) -> bool:
    """True for an address of this machine, which no proxy has any business with."""
    host = httpx.URL(url).host
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _problem(response: httpx.Response) -> Mapping[str, Any]:
    try:
        document = response.json()
    except (ValueError, RecursionError):
        return {}
    return document if isinstance(document, dict) else {}


def _retry_after_s(headers: httpx.Headers) -> float | None:
    """Whole seconds; a date, which nobody here sends, is no time, nor is one beyond all calendars."""
    told = headers.get("retry-after", "")
    return float(told) if told.isascii() and told.isdecimal() and len(told) <= 10 else None


def _dump(body: Mapping[str, Any]) -> bytes:
    """Raises InvalidArgument for what JSON cannot hold: NaN, infinity."""
    try:
        return json.dumps(body, allow_nan=False, separators=(",", ":")).encode()
    except (ValueError, TypeError) as exc:
        raise InvalidArgument(str(exc)) from exc


def _words(exc: Exception) -> str:
    return str(exc) or type(exc).__name__


def _now() -> float:
    return asyncio.get_running_loop().time()
