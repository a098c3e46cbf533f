"""From silence to suspicion, event by event."""

import math

import pytest

from router.core.pulse import Pulse, Sign


def silent(misses: int) -> Pulse:
    pulse = Pulse()
    for _ in range(misses):
        pulse.waited()
        pulse.missed()
    return pulse


def test_a_replica_is_innocent_before_it_was_asked() -> None:
    pulse = Pulse()
    assert (pulse.is_ready, pulse.is_doubtful, pulse.is_suspect) == (True, False, False)
    assert pulse.suspect_at(None) == math.inf


def test_a_probe_that_is_out_for_long_makes_it_doubtful_and_no_more() -> None:
    pulse = Pulse()
    pulse.waited()
    assert (pulse.is_doubtful, pulse.misses, pulse.suspect_at(None)) == (True, 0, math.inf)


def test_one_miss_makes_nobody_suspect_and_two_do_where_no_batch_is_held() -> None:
    assert silent(1).suspect_at(None) == math.inf
    assert silent(2).suspect_at(None) == -math.inf


def test_with_batches_two_misses_make_it_suspect_when_the_oldest_is_due() -> None:
    assert silent(2).suspect_at(17.5) == 17.5
    assert silent(1).suspect_at(17.5) == math.inf


def test_any_answer_begins_it_anew() -> None:
    pulse = silent(2)
    pulse.heard()
    assert (pulse.is_doubtful, pulse.suspect_at(None)) == (False, math.inf)
    pulse.missed()
    assert pulse.suspect_at(None) == math.inf


@pytest.mark.parametrize("sign", [Sign.READY, Sign.UNREADY])
def test_only_an_answered_probe_clears_a_suspect(sign: Sign) -> None:
    pulse = silent(2)
    pulse.is_suspect = True
    pulse.heard()
    assert pulse.is_suspect
    pulse.answered(sign)
    assert (pulse.is_suspect, pulse.is_doubtful, pulse.is_ready) == (False, False, sign is Sign.READY)


def test_a_suspect_cannot_become_one() -> None:
    pulse = silent(2)
    pulse.is_suspect = True
    pulse.missed()
    assert pulse.suspect_at(None) == math.inf
