"""Prefer and Idempotency-Key, case by case."""

import pytest
from starlette.datastructures import Headers

from rest_gateway.errors import InvalidRequestError
from rest_gateway.routes.preferences import Preferences, read_idempotency_key, read_preferences


@pytest.mark.parametrize(
    ("prefer", "preferences"),
    [
        ("", Preferences()),
        ("respond-async", Preferences(respond_async=True)),
        ("Respond-Async", Preferences(respond_async=True)),
        ("wait=10", Preferences(wait_s=10)),
        ('wait="10"', Preferences(wait_s=10)),
        ("wait = 10", Preferences(wait_s=10)),
        ("respond-async, wait=10", Preferences(respond_async=True, wait_s=10)),
        ("wait=10,respond-async", Preferences(respond_async=True, wait_s=10)),
        ("respond-async; foo=bar, wait=5; x", Preferences(respond_async=True, wait_s=5)),
        ('foo="a, wait=3", wait=4', Preferences(wait_s=4)),
        ("wait=1, wait=2", Preferences(wait_s=1)),
        ("wait=0", Preferences(wait_s=0)),
        ("wait=60", Preferences(wait_s=60)),
        ("wait=61", Preferences(wait_s=60)),
        ("wait=" + "9" * 500, Preferences(wait_s=60)),
        ("wait=9," + '"\\' * 30_000, Preferences()),
        ("wait=-1", Preferences()),
        ("wait=1.5", Preferences()),
        ("wait=٣", Preferences()),
        ("wait", Preferences()),
        ("wait=", Preferences()),
        ("return=minimal, handling=lenient", Preferences()),
        (",, wait=7 ,", Preferences(wait_s=7)),
        ('"', Preferences()),
        ('wait="1', Preferences()),
    ],
)
def test_what_is_understood_is_a_preference(prefer: str, preferences: Preferences) -> None:
    raw = [(b"prefer", prefer.encode())]
    assert read_preferences(Headers(raw=raw)) == preferences


def test_several_headers_are_one() -> None:
    raw = [(b"prefer", b"respond-async"), (b"prefer", b"wait=3")]
    assert read_preferences(Headers(raw=raw)) == Preferences(respond_async=True, wait_s=3)
    assert read_preferences(Headers({})) == Preferences()


@pytest.mark.parametrize(
    ("preferences", "applied"),
    [
        (Preferences(), None),
        (Preferences(respond_async=True), "respond-async"),
        (Preferences(wait_s=0), "wait=0"),
        (Preferences(respond_async=True, wait_s=9), "respond-async, wait=9"),
    ],
)
def test_what_was_applied_is_told(preferences: Preferences, applied: str | None) -> None:
    assert preferences.applied().get("Preference-Applied") == applied


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("abc", "abc"),
        ('"abc"', "abc"),
        ('"a b, c"', "a b, c"),
        (r'"a\"b\\c"', r'a"b\c'),
        ("5b0b8a1c-6f7d-4e0f-9c2a-4d7e8b6c1f03", "5b0b8a1c-6f7d-4e0f-9c2a-4d7e8b6c1f03"),
        ("x" * 255, "x" * 255),
        ("  abc  ", "abc"),
    ],
)
def test_a_key_is_quoted_or_bare(text: str, key: str) -> None:
    assert read_idempotency_key(Headers({"idempotency-key": text})) == key


@pytest.mark.parametrize("text", ["", '""', '"', "a b", 'a"b', '"a', '"a"b', "x" * 256, "é", r'"a\b"', "\x00"])
def test_what_is_no_key_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequestError, match="Idempotency-Key"):
        read_idempotency_key(Headers(raw=[(b"idempotency-key", text.encode("latin-1"))]))


def test_one_key_is_enough_and_none_is_none() -> None:
    assert read_idempotency_key(Headers({})) is None
    with pytest.raises(InvalidRequestError, match="more than one"):
        read_idempotency_key(Headers(raw=[(b"idempotency-key", b"a"), (b"idempotency-key", b"a")]))
