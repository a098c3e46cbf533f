"""Protobuf to core types and back, and the status table."""

import itertools
import math
import struct

import grpc
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protos.inference_router.v1 import inference_router_pb2 as pb
from router import errors
from router.config import Settings, load
from router.core.types import BatchAnswer, Tensor
from router.errors import InvalidArgument, ModelFailed, NotFound, RouterError
from router.servicers import convert, status
from tests.builders import Listener, make_batch, make_block, values_of


@pytest.fixture(scope="module")
def settings() -> Settings:
    return load()


def route(settings: Settings) -> convert.Route:
    return convert.Routes(settings).find("buyer", "churn", 2)


def test_a_native_row_becomes_one_input_of_the_models_name(settings: Settings) -> None:
    key = route(settings).key
    assert (key.model_name, key.agent_type) == ("churn", "buyer")
    (spec,) = key.inputs
    assert (spec.name, spec.datatype, spec.row_shape) == ("vector", "FP32", (2,))
    assert key.parameters == (("agent_type", "buyer"),)


def test_models_may_name_their_tensors_and_do_without_the_agent_type() -> None:
    settings = Settings(
        backends={"b": {"addresses": ["h:1"]}},  # type: ignore[dict-item]
        models=[{"backend": "b", "vector_input": "x", "vector_output": "y", "send_agent_type": False}],  # type: ignore[list-item]
    )
    found = route(settings)
    assert found.key.inputs[0].name == "x"
    assert found.key.parameters == ()
    assert found.output == "y"


def test_without_an_agent_type_no_parameter_is_sent(settings: Settings) -> None:
    assert convert.Routes(settings).find("", "churn", 2).key.parameters == ()


@pytest.mark.parametrize(
    ("agent_type", "model", "dim", "message"),
    [
        ("a", "", 1, "model_name is empty"),
        ("a", "m", 0, "vector is empty"),
        ("a", "m", 65_537, "vector has 65537 values, at most 65536"),
        ("a", "m" * 257, 1, "model_name has 257 characters, at most 256"),
        ("a" * 257, "m", 1, "agent_type has 257 characters, at most 256"),
    ],
)
def test_a_row_that_cannot_be_routed_is_the_callers_fault(
    settings: Settings, agent_type: str, model: str, dim: int, message: str
) -> None:
    with pytest.raises(InvalidArgument, match=message):
        convert.Routes(settings).find(agent_type, model, dim)


@pytest.mark.parametrize("name", ["m" * 256, "modèle-é", "模型", "\x00", "a b\n"])
def test_odd_names_are_names(settings: Settings, name: str) -> None:
    assert convert.Routes(settings).find(name, name, 65_536).key.model_name == name


def test_an_unknown_model_is_not_found_and_a_row_over_max_batch_bytes_refused() -> None:
    settings = Settings(
        backends={"b": {"addresses": ["h:1"]}},  # type: ignore[dict-item]
        models=[{"match": {"model_name": "known"}, "backend": "b", "max_batch_bytes": 12}],  # type: ignore[list-item]
    )
    routes = convert.Routes(settings)
    with pytest.raises(NotFound, match="no model 'other' for agent type 'a'"):
        routes.find("a", "other", 1)
    with pytest.raises(InvalidArgument, match="16 bytes is over max_batch_bytes = 12"):
        routes.find("a", "known", 4)
    assert routes.find("a", "known", 3).key.row_bytes == 12


@pytest.mark.parametrize(
    ("asked_s", "rpc_s", "expected_s"),
    [
        (None, None, 60),
        (5, None, 5),
        (None, 5, 4.98),
        (5, 3, 2.98),
        (3, 5, 3),
        (10_000, None, 600),
        (math.inf, None, 600),
        (None, 10_000, 600),
        (None, 0.01, -0.01),
    ],
)
def test_the_earliest_deadline_counts(
    settings: Settings, asked_s: float | None, rpc_s: float | None, expected_s: float
) -> None:
    assert convert.timeout_s(asked_s, rpc_s, settings) == pytest.approx(expected_s)


@pytest.mark.parametrize("asked_s", [0.0, -1.0, math.nan, -math.inf])
def test_a_timeout_that_is_no_time_is_refused(settings: Settings, asked_s: float) -> None:
    with pytest.raises(InvalidArgument, match="timeout_s"):
        convert.timeout_s(asked_s, None, settings)


def test_an_unknown_class_is_refused() -> None:
    convert.check_class(pb.PRIORITY_CLASS_BATCH)
    with pytest.raises(InvalidArgument, match="priority_class 7 is not one of"):
        convert.check_class(7)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (pb.Call(), "the call has no blocks"),
        (pb.Call(blocks=[pb.Block(rows=1), pb.Block()]), "block 1 has no rows"),
        (pb.Call(blocks=[pb.Block(rows=1)], tenant="t" * 257), "tenant has 257 characters"),
        (pb.Call(blocks=[pb.Block(rows=1)], priority_class=9), "priority_class 9"),  # type: ignore[arg-type]
    ],
)
def test_a_fault_of_the_call_refuses_it_whole(settings: Settings, call: pb.Call, message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        convert.check_call(read(call), settings.limits)


def read(call: pb.Call) -> convert.RawCall:
    ((one,),) = convert.read_calls([call], 1, 10)
    return one


def test_calls_are_read_in_lists_of_bounded_size_and_none_beyond_its_limit() -> None:
    calls = [pb.Call(call_id=number, blocks=[pb.Block(rows=1)] * blocks) for number, blocks in enumerate([1, 1, 9, 0])]
    lists = list(convert.read_calls(calls, 4, 2))
    assert [[(call.message.call_id, len(call.blocks)) for call in some] for some in lists] == [
        [(0, 1), (1, 1)],
        [(2, 3)],
        [(3, 0)],
    ]


def test_a_call_with_more_blocks_than_may_be_is_told_how_many_it_has(settings: Settings) -> None:
    call = pb.Call(blocks=[pb.Block(rows=1)] * 2000)
    ((one,),) = convert.read_calls([call], 1, settings.limits.max_agents)
    with pytest.raises(InvalidArgument, match="the call has 2000 blocks, at most 1024 are allowed"):
        convert.check_call(one, settings.limits)


@pytest.mark.parametrize("nbytes", [0, 7, 9, 12])
def test_bytes_that_do_not_fit_the_shape_are_refused(nbytes: int) -> None:
    convert.check_size(bytes(8), 2, 1)
    with pytest.raises(InvalidArgument, match="which is not 2 rows of 1 float32"):
        convert.check_size(bytes(nbytes), 2, 1)


bad_values = st.sampled_from([math.nan, math.inf, -math.inf])
values = st.one_of(st.floats(width=32, allow_nan=False, allow_infinity=False), bad_values)


@given(
    st.integers(1, 4).flatmap(
        lambda dim: st.lists(st.lists(values, min_size=dim, max_size=dim), min_size=1, max_size=9)
    )
)
def test_bad_rows_are_told_apart_and_good_ones_go_on_unchanged(rows: list[list[float]]) -> None:
    vectors = np.array(rows, "<f4").tobytes()
    runs = convert.finite_runs(vectors, len(rows), len(rows[0]))
    told = [run.error is None for run in runs for _ in range(run.rows)]
    assert told == [all(math.isfinite(value) for value in row) for row in rows]
    assert [run.first for run in runs] == np.cumsum([0, *(run.rows for run in runs[:-1])]).tolist()
    assert all(run.rows == 1 for run in runs if run.error is not None)
    assert not any(one.error is None and two.error is None for one, two in itertools.pairwise(runs))


@pytest.mark.parametrize(
    ("vectors", "is_known_good"),
    [
        ([], True),
        ([struct.pack("<2f", 1, 2), struct.pack("<f", 3)], True),
        ([struct.pack("<2f", 1, 2), struct.pack("<f", math.nan)], False),
        ([struct.pack("<f", math.inf), b""], False),
        # Two bytes too many and two too few: together they fit, and everything between them would be read askew.
        ([bytes(6), struct.pack("<f", math.nan), bytes(2)], False),
    ],
)
def test_many_vectors_are_looked_at_together(vectors: list[bytes], is_known_good: bool) -> None:
    assert convert.are_finite(vectors) is is_known_good


def test_a_bad_rows_message_names_the_value() -> None:
    (bad, _) = convert.finite_runs(struct.pack("<4f", 0, math.inf, 1, 1), 2, 2)
    assert bad.error is not None
    assert bad.error.message == "vector[1] is inf; every value must be finite as a float32"


@pytest.mark.parametrize(("bad_rows", "is_refused"), [(1024, False), (1025, True)])
def test_a_block_full_of_bad_rows_is_refused_whole(bad_rows: int, is_refused: bool) -> None:
    vectors = np.tile(np.array([0, math.nan], "<f4"), bad_rows).tobytes()
    if not is_refused:
        assert len(convert.finite_runs(vectors, 2 * bad_rows, 1)) == 2 * bad_rows
        return
    with pytest.raises(InvalidArgument, match="1025 rows hold NaN or infinity"):
        convert.finite_runs(vectors, 2 * bad_rows, 1)


def test_good_runs_become_blocks_in_the_callers_coordinates(settings: Settings) -> None:
    vectors = struct.pack("<8f", 0, 0, math.nan, 1, 2, 2, 3, 3)
    runs = convert.finite_runs(vectors, 4, 2)
    blocks = list(convert.to_blocks(route(settings), 5, vectors, runs, convert.Terms(1.0, 2.0), Listener()))
    assert [(block.index, block.first_row, block.rows) for block in blocks] == [(5, 0, 1), (5, 2, 2)]
    assert values_of(tuple(block.whole() for block in blocks)) == [0, 2, 3]
    assert blocks[0].deadline == 3.0


def test_agents_are_split_by_key_and_bad_ones_come_back_by_name(settings: Settings) -> None:
    agents = {
        "alice": pb.Agent(model_name="churn", agent_type="buyer", vector=[1, 2]),
        "bob": pb.Agent(model_name="churn", agent_type="buyer", vector=[]),
        "carol": pb.Agent(model_name="fraud", vector=[3]),
        "dave": pb.Agent(model_name="churn", agent_type="buyer", vector=[4, 5]),
        "x" * 300: pb.Agent(model_name="churn", vector=[1]),
    }
    blocks, failed = convert.from_agents(agents, convert.Routes(settings), 256)
    assert [block.names for block in blocks] == [("alice", "dave"), ("carol",)]
    assert blocks[0].raw.vectors == struct.pack("<4f", 1, 2, 4, 5)
    assert set(failed) == {"bob", "x" * 300}
    assert failed["bob"].message == "vector is empty"


def answer_of(*tensors: Tensor) -> BatchAnswer:
    return BatchAnswer(tensors, "b-1", 2, "replica:1", 5.0, 8.0)


def floats(data: bytes) -> list[float]:
    return [float(value) for value in np.frombuffer(data, "<f4")]


@pytest.mark.parametrize(
    ("datatype", "dtype", "value"),
    [
        ("FP32", "<f4", 1.5),
        ("FP64", "<f8", 1.5),
        ("FP16", "<f2", 1.5),
        ("INT8", "i1", -3),
        ("INT16", "<i2", -3),
        ("INT32", "<i4", -3),
        ("INT64", "<i8", -3),
        ("UINT8", "u1", 200),
        ("UINT16", "<u2", 200),
        ("UINT32", "<u4", 200),
        ("UINT64", "<u8", 200),
        ("BOOL", "?", True),
    ],
)
def test_every_number_reaches_a_native_caller_as_float32(datatype: str, dtype: str, value: float) -> None:
    tensor = Tensor("output", datatype, (2, 2), np.array([0, 0, value, 1], dtype).tobytes())
    assert floats(convert.VectorOutputs().rows(answer_of(tensor), None, 1, 1)) == [float(value), 1.0]


def test_text_has_no_form_as_floats() -> None:
    tensor = Tensor("output", "BYTES", (2,), struct.pack("<II", 0, 0))
    with pytest.raises(ModelFailed, match="'output' is BYTES, which has no form as floats"):
        convert.VectorOutputs().rows(answer_of(tensor), None, 0, 1)


def test_the_output_is_the_configured_one_else_output_else_the_first() -> None:
    one, output = (
        Tensor(name, "FP32", (2,), np.array(v, "<f4").tobytes()) for name, v in (("one", [1, 2]), ("output", [3, 4]))
    )
    assert floats(convert.VectorOutputs().rows(answer_of(one, output), None, 0, 2)) == [3, 4]
    assert floats(convert.VectorOutputs().rows(answer_of(one, output), "one", 0, 2)) == [1, 2]
    assert floats(convert.VectorOutputs().rows(answer_of(one), None, 0, 2)) == [1, 2]
    with pytest.raises(ModelFailed, match="no output 'two', only 'one', 'output'"):
        convert.VectorOutputs().rows(answer_of(one, output), "two", 0, 2)


def test_answers_and_outputs_in_turn_are_not_taken_for_each_other() -> None:
    one, two = (
        answer_of(*(Tensor(name, "FP64", (2,), np.array([value, value + 1.0]).tobytes()) for name, value in values))
        for values in ((("a", 1), ("b", 3)), (("a", 5), ("b", 7)))
    )
    outputs = convert.VectorOutputs()
    asked = [(one, "a"), (one, "b"), (two, "b"), (two, None), (one, None), (one, "a")]
    assert [floats(outputs.rows(answer, name, 1, 1)) for answer, name in asked] == [[2], [4], [8], [6], [2], [2]]


def test_an_explanation_tells_where_the_time_went() -> None:
    batch = make_batch(make_block(1, 2, at=3.0).whole().tried())
    told = convert.explain(batch.parts[0], answer_of())
    assert told == pb.Explanation(
        queued_s=2.0, backend_s=3.0, batch_id="b-1", batch_rows=2, replica="replica:1", attempts=2
    )


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.InvalidArgument("x"), "INVALID_ARGUMENT"),
        (errors.NotFound("x"), "NOT_FOUND"),
        (errors.DeadlineExceeded("x"), "DEADLINE_EXCEEDED"),
        (errors.ResourceExhausted("x", reason="y"), "RESOURCE_EXHAUSTED"),
        (errors.Unavailable("x"), "UNAVAILABLE"),
        (errors.Cancelled("x"), "CANCELLED"),
        (errors.ModelFailed("x"), "UNKNOWN"),
        (errors.InternalError(), "INTERNAL"),
    ],
)
def test_every_error_has_its_status(error: RouterError, code: str) -> None:
    assert status.status_of(error) is grpc.StatusCode[code]
    assert status.to_proto(error).code == code


def test_no_error_is_missing_from_the_table() -> None:
    assert set(status.CODES) == set(RouterError.__subclasses__())


@pytest.mark.parametrize(("seconds", "told_ms"), [(None, None), (0.0001, 1), (1.0, 1000), (1.2345, 1235)])
def test_the_time_to_retry_travels_in_whole_milliseconds(seconds: float | None, told_ms: int | None) -> None:
    error = status.to_proto(errors.Unavailable("x", retry_after_s=seconds))
    assert (error.retry_pushback_ms if error.HasField("retry_pushback_ms") else None) == told_ms
    expected = () if told_ms is None else (("grpc-retry-pushback-ms", str(told_ms)),)
    assert status.trailing_metadata(told_ms) == expected
