"""What a client says about the manner of its answer: Prefer (RFC 7240) and Idempotency-Key."""

import re
from dataclasses import dataclass

from starlette.datastructures import Headers

from rest_gateway.errors import InvalidRequestError

MAX_WAIT_S = 60
MAX_KEY_LENGTH = 255
# A longer header is no preference; quotes that never end would cost its length squared.
MAX_PREFER_LENGTH = 1000
# A comma or semicolon inside of a quoted string separates nothing.
_PREFERENCE = re.compile(r'(?:"(?:[^"\\]|\\.)*"|[^,"])+')
_VALUE = re.compile(r'\s*([\w!#$%&\'*+.^`|~-]+)\s*(?:=\s*("(?:[^"\\]|\\.)*"|[^\s;,"]*))?\s*(?:;.*)?', re.DOTALL)
_QUOTED_KEY = re.compile(r'"((?:[ !#-\[\]-~]|\\["\\])*)"')
_BARE_KEY = re.compile(r"[!#-~]+")


@dataclass(frozen=True, slots=True)
class Preferences:
    """`wait_s`: seconds that the client waits for an answer; None: it said nothing of that."""

    respond_async: bool = False
    wait_s: int | None = None

    def applied(self) -> dict[str, str]:
        """The header that tells what was honoured."""
        tokens = ["respond-async"] * self.respond_async + [f"wait={self.wait_s}"] * (self.wait_s is not None)
        return {"Preference-Applied": ", ".join(tokens)} if tokens else {}


def read_preferences(headers: Headers) -> Preferences:
    """What is not understood is no preference; of two equal names the first counts. A wait over 60 s is one of 60 s."""
    text = ",".join(headers.getlist("prefer"))
    found: dict[str, str] = {}
    for part in _PREFERENCE.findall(text) if len(text) <= MAX_PREFER_LENGTH else ():
        if match := _VALUE.fullmatch(part):
            found.setdefault(match[1].lower(), (match[2] or "").strip('"'))
    wait = found.get("wait", "")
    wait_s = min(int(wait[:9]), MAX_WAIT_S) if re.fullmatch(r"[0-9]+", wait) else None
    return Preferences(respond_async="respond-async" in found, wait_s=wait_s)


def read_idempotency_key(headers: Headers) -> str | None:
    """The key without its quotes, which may be left out. Raises InvalidRequestError."""
    match headers.getlist("idempotency-key"):
        case []:
            return None
        case [text]:
            return _parse_key(text.strip())
        case _:
            raise InvalidRequestError("there is more than one Idempotency-Key")


def _parse_key(text: str) -> str:
    if match := _QUOTED_KEY.fullmatch(text):
        key = re.sub(r"\\(.)", r"\1", match[1])
    elif _BARE_KEY.fullmatch(text):
        key = text
    else:
        raise InvalidRequestError("the Idempotency-Key must be a quoted string, or printable ASCII without spaces")
    if not 0 < len(key) <= MAX_KEY_LENGTH:
        raise InvalidRequestError(f"the Idempotency-Key must have 1 to {MAX_KEY_LENGTH} characters")
    return key
