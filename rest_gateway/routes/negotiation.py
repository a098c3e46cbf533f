"""What the headers and the body's bytes decide before any JSON is looked at."""

import re
import zlib
from typing import Literal

from starlette.datastructures import Headers
from starlette.requests import Request

from rest_gateway.config import Settings
from rest_gateway.errors import (
    BodyTooLargeError,
    ClientGoneError,
    InvalidRequestError,
    NotAcceptableError,
    NotJsonError,
    UnsupportedMediaError,
)

Form = Literal["json", "sse", "ndjson"]

# In the order in which they are preferred when the client has no preference.
MEDIA_TYPES: dict[Form, str] = {
    "json": "application/json",
    "sse": "text/event-stream",
    "ndjson": "application/x-ndjson",
}
# zlib tells the two apart itself.
_COMPRESSED = frozenset({"gzip", "x-gzip", "deflate"})
_GZIP_OR_ZLIB = zlib.MAX_WBITS | 32
_JSON_TYPE = re.compile(r"application/(json|[\w.+-]+\+json)", re.IGNORECASE)


def choose_form(headers: Headers) -> Form:
    """The form of the answer by RFC 9110, 12.5.1: highest q, then the most specific range, then JSON first.

    No Accept header means JSON. Raises NotAcceptableError when every form is excluded.
    """
    accept = ",".join(headers.getlist("accept")).strip()
    if accept in ("", "*/*", "application/json"):
        return "json"
    ranges = [_parse_range(part) for part in accept.split(",") if part.strip()]
    ranked = [(*_quality(media_type, ranges), -order, form) for order, (form, media_type) in enumerate(_forms())]
    quality, *_, form = max(ranked)
    if quality <= 0:
        raise NotAcceptableError(f"this route answers {', '.join(MEDIA_TYPES.values())}")
    return form


def _forms() -> list[tuple[Form, str]]:
    return list(MEDIA_TYPES.items())


def _parse_range(part: str) -> tuple[str, float]:
    """`text/*;q=0.5` → ("text/*", 0.5). Other parameters are ignored; a q that is no number counts as 0."""
    media_range, *parameters = [piece.strip().lower() for piece in part.split(";")]
    for parameter in parameters:
        name, _, value = parameter.partition("=")
        if name.strip() == "q":
            return media_range, _parse_quality(value.strip())
    return media_range, 1.0


def _parse_quality(text: str) -> float:
    return min(float(text), 1.0) if re.fullmatch(r"\d(\.\d{0,3})?", text) else 0.0


def _quality(media_type: str, ranges: list[tuple[str, float]]) -> tuple[float, int]:
    """(q, specificity) of a media type: the most specific range that names it decides, though it may say 0."""
    candidates = ("*/*", media_type.partition("/")[0] + "/*", media_type)
    matches = [(candidates.index(media_range), quality) for media_range, quality in ranges if media_range in candidates]
    specificity, quality = max(matches, default=(-1, 0.0))
    return quality, specificity


def check_content(headers: Headers) -> None:
    """Refuses encoded bodies and bodies that say they are not JSON. No Content-Type at all is taken for JSON."""
    if _encoding_of(headers):
        raise UnsupportedMediaError("a Content-Encoding is not supported; send the JSON as it is")
    content_type = headers.get("content-type", "application/json").partition(";")[0].strip()
    if not _JSON_TYPE.fullmatch(content_type):
        raise UnsupportedMediaError("the Content-Type must be application/json")


def _encoding_of(headers: Headers) -> str:
    """ "" where the body is as it is."""
    encoding = headers.get("content-encoding", "").strip().lower()
    return "" if encoding == "identity" else encoding


def decode_content(headers: Headers, body: bytes, max_bytes: int) -> bytes:
    """The body without its Content-Encoding, gzip or deflate; what it unpacks to has the same limit.

    Raises UnsupportedMediaError for another one, NotJsonError for bytes that are not so encoded, and BodyTooLargeError.
    """
    encoding = _encoding_of(headers)
    if not encoding:
        return body
    if encoding not in _COMPRESSED:
        raise UnsupportedMediaError("a Content-Encoding other than gzip and deflate is not supported")
    unpacker = zlib.decompressobj(_GZIP_OR_ZLIB)
    try:
        unpacked = unpacker.decompress(body, max_bytes + 1)
    except zlib.error as exc:
        raise NotJsonError(f"the body is not {encoding}: {exc}") from exc
    if len(unpacked) > max_bytes:
        raise _too_large(max_bytes)
    if not unpacker.eof or unpacker.unused_data:
        raise NotJsonError(f"the body is not {encoding}: it is cut off, or more follows")
    return unpacked


def tenant_of(headers: Headers, settings: Settings) -> str:
    """On whose account a request is; "" where nobody says. A client's own word counts only where it is trusted."""
    tenant = headers.get("x-tenant", "") if settings.trust_tenant else ""
    if len(tenant) > settings.max_name_length:
        raise InvalidRequestError(f"X-Tenant has more than {settings.max_name_length:,} characters")
    if not (tenant.isascii() and tenant.isprintable()):  # no header of gRPC could carry it to the router
        raise InvalidRequestError("X-Tenant is not printable ASCII")
    return tenant


async def read_body(request: Request, max_bytes: int) -> bytes:
    """The whole body. Stops at the first byte too many, whether or not the client said how many there are.

    Raises BodyTooLargeError, and ClientGoneError when the client leaves while it sends.
    """
    if _declared_bytes(request.headers) > max_bytes:
        raise _too_large(max_bytes)
    chunks: list[bytes] = []
    size = 0
    while True:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientGoneError
        chunks.append(message["body"])
        size += len(message["body"])
        if size > max_bytes:
            raise _too_large(max_bytes)
        if not message.get("more_body", False):
            return b"".join(chunks)


def _declared_bytes(headers: Headers) -> int:
    """What Content-Length says; the server has refused one that is no number, and 0 stands for none."""
    declared = headers.get("content-length", "")
    return int(declared) if declared.isdecimal() else 0


def _too_large(max_bytes: int) -> BodyTooLargeError:
    return BodyTooLargeError(f"the body has more than {max_bytes:,} bytes")
