"""Flags: what they mean and how wrong ones are refused."""

import pytest

from mock_nn.config import (
    ConfigError,
    Fault,
    FaultKind,
    LatencyRange,
    MockConfig,
    Trigger,
    parse_config,
    parse_fault,
    split_address,
)


def test_no_flags_are_the_defaults() -> None:
    assert parse_config([]) == MockConfig()


def test_every_flag_has_its_setting() -> None:
    flags = (
        "--listen [::1]:0 --latency 0.05 --latency a=1-2 --latency b=c=0 --seed 7 --models a,b=c --max-batch-size 8 "
        "--output-width 3 --vector-input INPUT0 --vector-datatype FP64 --vector-output OUTPUT0 --instances 2 "
        "--fault stall:first=1 --fault nan --drain-delay 0.5 --drain-timeout 1.5 --log-format json --quiet"
    )
    assert parse_config(flags.split()) == MockConfig(
        listen="[::1]:0",
        latency=LatencyRange(0.05, 0.05),
        model_latencies={"a": LatencyRange(1, 2), "b=c": LatencyRange(0, 0)},
        seed=7,
        models=frozenset({"a", "b=c"}),
        max_batch_size=8,
        output_width=3,
        vector_input="INPUT0",
        vector_datatype="FP64",
        vector_output="OUTPUT0",
        instances=2,
        faults=(Fault(FaultKind.STALL, Trigger.FIRST, 1), Fault(FaultKind.NAN)),
        drain_delay_s=0.5,
        drain_timeout_s=1.5,
        log_format="json",
        is_quiet=True,
    )


def test_a_later_latency_of_the_same_model_wins() -> None:
    config = parse_config(["--latency", "1", "--latency", "a=2", "--latency", "3", "--latency", "a=4"])
    assert config.latency_of("other") == LatencyRange(3, 3)
    assert config.latency_of("a") == LatencyRange(4, 4)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("stall", Fault(FaultKind.STALL, Trigger.RATE, 1)),
        ("short:every=3", Fault(FaultKind.SHORT, Trigger.EVERY, 3)),
        ("error:rate=0.1,code=UNAVAILABLE", Fault(FaultKind.ERROR, Trigger.RATE, 0.1, code="UNAVAILABLE")),
        ("poison", Fault(FaultKind.POISON, Trigger.VALUE, 666)),
        ("row_errors", Fault(FaultKind.ROW_ERRORS, Trigger.VALUE, 666)),
        ("poison:value=-1.5,code=INTERNAL", Fault(FaultKind.POISON, Trigger.VALUE, -1.5, code="INTERNAL")),
        ("crash:value=13", Fault(FaultKind.CRASH, Trigger.VALUE, 13)),
        ("drop:model=a:b,first=2", Fault(FaultKind.DROP, Trigger.FIRST, 2, model_name="a:b")),
    ],
)
def test_a_fault_is_a_kind_and_its_options(text: str, fault: Fault) -> None:
    assert parse_fault(text) == fault


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sleep", "unknown fault 'sleep'; the faults are error, poison, stall"),
        ("", "unknown fault ''"),
        ("nan:sometimes", "fault 'nan:sometimes': 'sometimes' is none of rate=, every=, first=, value=, code=, model="),
        ("nan:every=", "'every=' is none of"),
        ("nan:every=2,", "'' is none of"),
        ("nan:every=2,every=3", "every= stands there twice"),
        ("nan:every=2,first=3", "only one of every, first can be the trigger"),
        ("nan:rate=0", "rate must be above 0 and at most 1"),
        ("nan:rate=1.1", "rate must be above 0 and at most 1"),
        ("nan:rate=x", "rate must be above 0 and at most 1"),
        ("nan:every=0", "every must be a whole number of batches from 1"),
        ("nan:first=1.5", "first must be a whole number of batches from 1"),
        ("nan:value=inf", "value must be a number that float32 can hold"),
        ("nan:value=1e39", "value must be a number that float32 can hold"),
        ("nan:code=INTERNAL", "only error and poison take a code"),
        ("error:code=OK", "unknown code 'OK'; the codes are CANCELLED, UNKNOWN"),
    ],
)
def test_a_wrong_fault_is_refused_with_its_reason(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        parse_fault(text)
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--latency", "fast"], "argument --latency: 'fast' is not a number of seconds"),
        (["--latency", "-1"], "argument --latency: '-1' is not a number of seconds"),
        (["--latency", "7-3"], "argument --latency: latency '7-3': the first number must not be above the second"),
        (["--latency", "=3"], "argument --latency: latency '=3': no model name before '='"),
        (["--latency", "nan"], "argument --latency: 'nan' is not a number of seconds"),
        (["--latency", "1.2.3-4"], "argument --latency: '1.2.3' is not a number of seconds"),
        (["--listen", "50061"], "argument --listen: address '50061' is not HOST:PORT"),
        (["--listen", "localhost:65536"], "argument --listen: address 'localhost:65536' is not HOST:PORT"),
        (["--models", "a,,b"], "argument --models: models 'a,,b': a name is empty"),
        (["--instances", "-2"], "argument --instances: '-2' is not a whole number from 0"),
        (["--instances", "many"], "argument --instances: 'many' is not a whole number from 0"),
        (["--drain-timeout", "x"], "argument --drain-timeout: 'x' is not a number of seconds"),
        (["--fault", "nan:rate=2"], "argument --fault: fault 'nan:rate=2': rate must be above 0 and at most 1"),
        (["--log-format", "xml"], "argument --log-format: invalid choice: 'xml'"),
        (["--lat", "1"], "unrecognized arguments: --lat 1"),
    ],
)
def test_wrong_flags_leave_with_code_two_and_the_reason(
    flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        parse_config(flags)
    assert left.value.code == 2
    assert message in capsys.readouterr().err


def test_help_can_be_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        parse_config(["--help"])
    assert left.value.code == 0
    assert "--fault" in capsys.readouterr().out


def test_an_address_is_taken_apart() -> None:
    assert split_address("127.0.0.1:50061") == ("127.0.0.1", 50061)
    assert split_address("[::1]:0") == ("[::1]", 0)


@pytest.mark.parametrize(
    ("flags", "seconds"),
    [
        ("", 5.0),
        ("--latency churn=1", 5.0),
        ("--latency 0.05", 0.05),
        ("--latency sentiment=2", 2.0),
        ("--latency 0.05 --latency sentiment=2", 2.0),
    ],
)
def test_the_text_model_takes_five_seconds_unless_somebody_says_otherwise(flags: str, seconds: float) -> None:
    latency = parse_config(flags.split()).latency_of("sentiment")
    assert (latency.low_s, latency.high_s) == (seconds, seconds)
