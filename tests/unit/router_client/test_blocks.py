"""Agents to blocks and answers back to agents."""

import math
import struct
from array import array
from itertools import pairwise
from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protos.inference_router.v1 import inference_router_pb2 as pb
from router_client import Agent, AgentError, AgentResult, Explanation, Roster, group, pack, spread
from router_client.blocks import Coverage, check_shape, cut, decode, encode
from router_client.errors import ProtocolError

NAMES = [["ann", "bob", "cid"], ["dan"]]


def floats(*values: float) -> bytes:
    """Float32 little-endian."""
    return struct.pack(f"<{len(values)}f", *values)


def answer(block: int, first_row: int, *values: float, done: bool = False) -> pb.Answer:
    """One value a row."""
    return pb.Answer(block=block, first_row=first_row, rows=len(values), outputs=floats(*values), done=done)


def codes(rows: list[tuple[str, bytes | pb.Error, pb.Explanation | None]]) -> dict[str, str]:
    """The codes of those that failed, by name."""
    return {name: outcome.code for name, outcome, _ in rows if isinstance(outcome, pb.Error)}


# group


def test_agents_of_one_type_model_and_length_share_a_block() -> None:
    blocks, names = group(
        [
            ("ann", "t", "m", floats(1, 2)),
            ("bob", "t", "n", floats(3, 4)),
            ("cid", "t", "m", floats(5, 6)),
            ("dan", "u", "m", floats(7, 8)),
            ("eve", "t", "m", floats(9)),
        ]
    )
    assert names == [["ann", "cid"], ["bob"], ["dan"], ["eve"]]
    assert blocks[0] == pb.Block(agent_type="t", model_name="m", rows=2, dim=2, vectors=floats(1, 2, 5, 6))
    assert [(b.agent_type, b.model_name, b.rows, b.dim) for b in blocks[1:]] == [
        ("t", "n", 1, 2),
        ("u", "m", 1, 2),
        ("t", "m", 1, 1),
    ]


def test_no_agents_are_no_blocks() -> None:
    assert group([]) == ([], [])


def test_an_empty_vector_is_the_routers_to_refuse() -> None:
    blocks, _ = group([("ann", "", "m", b"")])
    assert (blocks[0].rows, blocks[0].dim) == (1, 0)


def test_bytes_that_are_no_floats_are_refused() -> None:
    with pytest.raises(ValueError, match="5 bytes"):
        group([("ann", "", "m", bytes(5))])


@given(
    st.dictionaries(
        st.text(), st.tuples(st.sampled_from("tu"), st.sampled_from("mn"), st.integers(1, 3)), min_size=1, max_size=30
    ),
    st.randoms(use_true_random=False),
)
def test_every_agent_gets_its_own_row_back_whatever_the_batches(
    agents: dict[str, tuple[str, str, int]], random: Random
) -> None:
    rows = [(name, kind, model, floats(at) * dim) for at, (name, (kind, model, dim)) in enumerate(agents.items())]
    blocks, names = group(rows)
    answers = []
    for at, block in enumerate(blocks):
        whole = pb.Answer(block=at, rows=block.rows, outputs=block.vectors)
        cuts = sorted({0, block.rows, *(random.randint(0, block.rows) for _ in range(3))})
        answers += [cut(whole, first, stop) for first, stop in pairwise(cuts)]
    random.shuffle(answers)
    outcomes = list(spread(answers, names))
    assert len(outcomes) == len(rows)
    assert {name: outcome for name, outcome, _ in outcomes} == {name: vector for name, _, _, vector in rows}


# Roster and spread


def test_parts_find_their_names() -> None:
    roster = Roster(NAMES)
    assert roster.take(answer(0, 1, 2, 3)) == [("bob", floats(2), None), ("cid", floats(3), None)]
    assert roster.agents_left == 2
    assert roster.take(answer(1, 0, 4)) == [("dan", floats(4), None)]
    assert roster.take(answer(0, 0, 1, done=True)) == [("ann", floats(1), None)]
    assert roster.agents_left == 0


def test_an_output_may_be_wider_than_one_value() -> None:
    part = pb.Answer(rows=2, outputs=floats(1, 2, 3, 4, 5, 6))
    assert Roster(NAMES).take(part) == [("ann", floats(1, 2, 3), None), ("bob", floats(4, 5, 6), None)]


def test_an_explanation_goes_to_every_agent_of_its_answer() -> None:
    why = pb.Explanation(batch_id="b7", batch_rows=3)
    part = pb.Answer(rows=2, outputs=floats(1, 2), explanation=why)
    assert [explanation for _, _, explanation in Roster(NAMES).take(part)] == [why, why]


def test_failed_rows_fail_their_agents_alone() -> None:
    roster = Roster(NAMES)
    assert codes(roster.take(pb.Answer(first_row=1, rows=1, error=pb.Error(code="UNKNOWN")))) == {"bob": "UNKNOWN"}
    assert roster.agents_left == 3


def test_an_error_without_rows_fails_every_agent_that_is_still_open() -> None:
    roster = Roster(NAMES)
    roster.take(answer(0, 1, 2))
    failed = roster.take(pb.Answer(error=pb.Error(code="UNAVAILABLE"), done=True))
    assert codes(failed) == {"ann": "UNAVAILABLE", "cid": "UNAVAILABLE", "dan": "UNAVAILABLE"}


@pytest.mark.parametrize(
    "malformed",
    [
        answer(2, 0, 1),
        answer(0, 2, 1, 2),
        answer(0, 2**32 - 1, 1),
        answer(0, 0, 1, 2),
        pb.Answer(block=1, rows=1),
        pb.Answer(block=1, rows=1, outputs=bytes(3)),
        pb.Answer(first_row=1, rows=2, outputs=bytes(12)),
        pb.Answer(done=True),
        pb.Answer(error=pb.Error(code="UNKNOWN")),
    ],
    ids=lambda part: " ".join(str(part).split()),
)
def test_an_answer_that_does_not_fit_fails_what_is_open_and_shifts_nothing(malformed: pb.Answer) -> None:
    roster = Roster(NAMES)
    assert roster.take(answer(0, 0, 1)) == [("ann", floats(1), None)]
    assert codes(roster.take(malformed)) == {"bob": "INTERNAL", "cid": "INTERNAL", "dan": "INTERNAL"}
    assert roster.agents_left == 0


def test_agents_without_an_answer_at_the_end_are_told_so() -> None:
    assert codes(Roster(NAMES).take(answer(0, 0, 1, 2, 3, done=True))) == {"dan": "INTERNAL"}
    assert codes(list(spread([answer(1, 0, 4)], NAMES))) == {"ann": "INTERNAL", "bob": "INTERNAL", "cid": "INTERNAL"}


# Coverage, check_shape, cut


@given(st.lists(st.tuples(st.integers(0, 12), st.integers(1, 6)), max_size=12), st.integers(0, 12), st.integers(0, 12))
def test_coverage_is_a_set_of_rows(marks: list[tuple[int, int]], first: int, stop: int) -> None:
    coverage, answered = Coverage([3, 12]), set[int]()
    for at, rows in marks:
        wanted = set(range(at, at + rows))
        if wanted <= set(range(12)) - answered:
            coverage.mark(1, at, rows)
            answered |= wanted
        else:
            with pytest.raises(ProtocolError):
                coverage.mark(1, at, rows)
    assert coverage.rows_left == 15 - len(answered)
    gaps = list(coverage.gaps(1, first, stop))
    assert [row for a, b in gaps for row in range(a, b)] == sorted(set(range(first, stop)) - answered)
    assert list(coverage.gaps(0, 0, 3)) == [(0, 3)]


def test_coverage_costs_nothing_per_row() -> None:
    coverage = Coverage([2**32 - 1])  # a caller may lie about its rows
    coverage.mark(0, 0, 2**32 - 1)
    assert coverage.rows_left == 0


def test_rows_or_an_error_are_an_answer() -> None:
    check_shape(answer(0, 0, 1))
    check_shape(pb.Answer(rows=3, outputs=bytes(24)))
    check_shape(pb.Answer(rows=3, error=pb.Error(code="UNKNOWN")))
    check_shape(pb.Answer(error=pb.Error(code="UNKNOWN"), done=True))


def test_a_cut_keeps_code_and_explanation() -> None:
    whole = pb.Answer(call_id=7, block=1, first_row=4, rows=3, outputs=floats(1, 2, 3, 4, 5, 6))
    assert cut(whole, 5, 6) == pb.Answer(call_id=7, block=1, first_row=5, rows=1, outputs=floats(3, 4))
    failed = pb.Answer(first_row=4, rows=3, error=pb.Error(code="UNKNOWN"))
    assert cut(failed, 4, 6) == pb.Answer(first_row=4, rows=2, error=pb.Error(code="UNKNOWN"))


# pack, encode, decode


@pytest.mark.parametrize(
    "vector",
    [
        [1, 2.5],
        (1.0, 2.5),
        array("f", [1, 2.5]),
        array("d", [1, 2.5]),
        np.array([1, 2.5], "f4"),
        np.array([1, 2.5], ">f4"),
        np.array([1, 2.5], "f8"),
        np.array([1, 9, 2.5, 9], "f4")[::2],
    ],
    ids=str,
)
def test_a_vector_is_packed_as_float32_little_endian(vector: list[float]) -> None:
    assert pack(vector) == floats(1, 2.5)


def test_what_is_finite_or_not_is_the_routers_to_judge() -> None:
    assert all(
        math.isnan(value) or math.isinf(value) for (value,) in struct.iter_unpack("<f", pack([math.nan, math.inf]))
    )


@pytest.mark.parametrize(
    "vector", [[1e39], ["1"], "ab", None, 1.0, np.float32(1), np.zeros((2, 2), "f4"), [[1.0]]], ids=str
)
def test_what_is_no_vector_of_floats_is_refused(vector: list[float]) -> None:
    with pytest.raises(ValueError, match=r"."):
        pack(vector)


def test_a_bad_agent_is_refused_alone() -> None:
    blocks, names, refused = encode(
        {"ann": Agent("m", [1.0]), "bob": Agent("m", [1e39]), "cid": Agent("\ud800", [1.0])}
    )
    assert (len(blocks), names) == (1, [["ann"]])
    assert {name: result.error.code for name, result in refused.items() if result.error} == {
        "bob": "INVALID_ARGUMENT",
        "cid": "INVALID_ARGUMENT",
    }


def test_a_result_holds_output_or_error_and_the_explanation() -> None:
    why = pb.Explanation(queued_s=1, backend_s=2, batch_id="b", batch_rows=3, replica="r", attempts=4)
    assert decode(floats(1, 2.5), None) == AgentResult([1.0, 2.5])
    assert decode(floats(1), why) == AgentResult([1.0], None, Explanation(1.0, 2.0, "b", 3, "r", 4))
    busy = pb.Error(code="RESOURCE_EXHAUSTED", message="full", retry_pushback_ms=0)
    assert decode(busy, None) == AgentResult([], AgentError("RESOURCE_EXHAUSTED", "full", 0))
    assert decode(pb.Error(code="UNKNOWN"), None).error == AgentError("UNKNOWN", "", None)
