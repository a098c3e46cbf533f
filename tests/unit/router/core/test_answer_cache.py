"""AnswerCache: how long answers are known, and what goes when there are too many."""

import math

from router.core.answer_cache import ROW_OVERHEAD_BYTES, AnswerCache
from router.core.types import BatchAnswer, Tensor

ROW = ROW_OVERHEAD_BYTES + 4


def make_answer(rows: int) -> BatchAnswer:
    return BatchAnswer((Tensor("output", "FP32", (rows,), bytes(4 * rows)),), "b-1", rows, "fake:1", 0.0, 1.0)


def test_an_answer_is_known_until_its_time_is_up() -> None:
    cache, answer = AnswerCache(10.0, 10_000), make_answer(3)
    cache.put([b"a", b"b"], answer, 1, now=100.0)
    assert cache.find(b"a", 109.999) == (answer, 1)
    assert cache.find(b"b", 109.999) == (answer, 2)
    assert cache.find(b"c", 100.0) is None
    assert cache.wake_at == 110.0
    assert cache.find(b"a", 110.0) is None
    cache.expire(109.999)
    assert cache.wake_at == 110.0
    cache.expire(110.0)
    assert repr(cache) == "<AnswerCache 0 rows in 0 answers, 0 bytes>"
    assert cache.wake_at == math.inf


def test_the_parts_of_one_answer_are_kept_and_counted_as_one() -> None:
    cache, answer = AnswerCache(10.0, 10_000), make_answer(3)
    cache.put([b"a"], answer, 0, now=0.0)
    cache.put([b"b", b"c"], answer, 1, now=0.0)
    assert repr(cache) == f"<AnswerCache 3 rows in 1 answers, {3 * ROW} bytes>"


def test_past_the_bound_the_oldest_answer_goes() -> None:
    cache = AnswerCache(10.0, 4 * ROW)
    for at, digests in enumerate([[b"a", b"b"], [b"c", b"d"]]):
        cache.put(digests, make_answer(2), 0, now=at)
    assert cache.find(b"a", 1.0)
    cache.put([b"e"], make_answer(1), 0, now=2.0)
    assert [one for one in (b"a", b"b", b"c", b"d", b"e") if cache.find(one, 2.0)] == [b"c", b"d", b"e"]


def test_what_is_larger_than_the_bound_is_not_kept() -> None:
    cache = AnswerCache(10.0, 2 * ROW - 1)
    cache.put([b"a", b"b"], make_answer(2), 0, now=0.0)
    assert repr(cache) == "<AnswerCache 0 rows in 0 answers, 0 bytes>"


def test_a_row_that_was_answered_again_outlives_its_older_answer() -> None:
    cache, newer = AnswerCache(10.0, 10_000), make_answer(1)
    cache.put([b"a"], make_answer(1), 0, now=0.0)
    cache.put([b"a"], newer, 0, now=5.0)
    cache.expire(10.0)
    assert cache.find(b"a", 10.0) == (newer, 0)
