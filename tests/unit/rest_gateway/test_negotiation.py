"""Accept and Content-Type, case by case."""

import pytest
from starlette.datastructures import Headers

from rest_gateway.errors import NotAcceptableError, UnsupportedMediaError
from rest_gateway.routes.negotiation import check_content, choose_form


@pytest.mark.parametrize(
    ("accept", "form"),
    [
        ("", "json"),
        ("*/*", "json"),
        ("application/json", "json"),
        ("application/*", "json"),
        ("text/*", "sse"),
        ("text/event-stream", "sse"),
        ("Text/Event-Stream", "sse"),
        ("text/event-stream; charset=utf-8", "sse"),
        ("application/x-ndjson", "ndjson"),
        ("application/json, text/event-stream", "json"),
        ("text/event-stream, application/json", "json"),
        ("text/event-stream, */*", "sse"),
        ("application/x-ndjson, */*;q=0.9", "ndjson"),
        ("application/json;q=0.5, text/event-stream", "sse"),
        ("application/json;q=0.5, text/event-stream;q=0.4, application/x-ndjson;q=0.6", "ndjson"),
        ("text/event-stream;q=0, */*", "json"),
        ("application/json;q=0, */*;q=0.1", "sse"),
        ("application/json;q=0, text/event-stream;q=0, */*", "ndjson"),
        ("text/html, application/xhtml+xml, */*;q=0.8", "json"),
        ("application/json;q=1.000", "json"),
        ("application/problem+json, application/json", "json"),
        (",, application/x-ndjson ,", "ndjson"),
    ],
)
def test_the_best_form_that_the_client_accepts_is_chosen(accept: str, form: str) -> None:
    assert choose_form(Headers({"accept": accept})) == form


def test_no_accept_header_means_json_and_several_are_one() -> None:
    assert choose_form(Headers({})) == "json"
    raw = [(b"accept", b"text/html"), (b"accept", b"application/x-ndjson")]
    assert choose_form(Headers(raw=raw)) == "ndjson"


@pytest.mark.parametrize(
    "accept", ["text/html", "application/json;q=0", "*/*;q=0", "image/*", "json", "application/json;q=x"]
)
def test_a_client_that_accepts_nothing_of_ours_is_told_so(accept: str) -> None:
    with pytest.raises(NotAcceptableError, match="application/json, text/event-stream, application/x-ndjson"):
        choose_form(Headers({"accept": accept}))


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"content-type": "application/json"},
        {"content-type": "Application/JSON; charset=utf-8"},
        {"content-type": "application/vnd.agents+json"},
        {"content-encoding": "identity"},
        {"content-encoding": ""},
    ],
)
def test_json_by_any_name_or_none_is_read(headers: dict[str, str]) -> None:
    check_content(Headers(headers))


@pytest.mark.parametrize(
    "headers",
    [
        {"content-type": "text/plain"},
        {"content-type": "application/x-www-form-urlencoded"},
        {"content-type": "multipart/form-data; boundary=x"},
        {"content-type": "application/jsonp"},
        {"content-type": "json"},
        {"content-type": ""},
        {"content-encoding": "gzip"},
        {"content-encoding": "br", "content-type": "application/json"},
        {"content-encoding": "identity, gzip"},
    ],
)
def test_what_is_encoded_or_says_it_is_not_json_is_refused(headers: dict[str, str]) -> None:
    with pytest.raises(UnsupportedMediaError):
        check_content(Headers(headers))
