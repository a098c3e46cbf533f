"""The pure parts of the supervisor."""

import pytest

from rest_gateway.supervisor import describe_exit, pause_s


def test_the_first_replacement_comes_at_once_and_later_ones_later_and_later() -> None:
    assert [pause_s(short_lives) for short_lives in range(9)] == [0, 0, 0.5, 1, 2, 4, 8, 8, 8]
    assert pause_s(10_000) == 8


@pytest.mark.parametrize(
    ("status", "text"),
    [
        (0, "exited with status 0"),
        (3, "exited with status 3"),
        (-9, "was killed by SIGKILL"),
        (-11, "was killed by SIGSEGV"),
        (-40, "was killed by signal 40"),
    ],
)
def test_an_exit_is_told_in_words(status: int, text: str) -> None:
    assert describe_exit(status) == text
