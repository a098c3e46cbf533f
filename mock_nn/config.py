"""What the mock is told to be: settings as frozen values, and the flags they are read from.

It knows texts and values only: how a latency is drawn, when a fault strikes and what an answer looks like stand in
`latency.py`, `faults.py` and `models.py`.

A latency is `SECONDS` (always that long) or `LOW-HIGH` (uniform), with `NAME=` in front for one model. The text model
has one of its own unless the command line names one, for it or for all models.

A fault is `KIND[:option,…]`: at most one trigger, `code=` and `model=`.

    rate=R    each batch with probability R, 0 < R <= 1 (no trigger at all: every batch)
    every=N   batches N, 2N, 3N, …
    first=N   the first N batches
    value=V   a batch with a row whose first number is V (a text that is the number V)
    code=C    error and poison only: a gRPC status, which ends a stream (without it the stream gets an error message)
    model=M   batches of other models neither count nor suffer
"""

import argparse
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TypeVar

_T = TypeVar("_T")


class ConfigError(ValueError):
    """A setting that makes no sense; the text is for the person who wrote it."""


class FaultKind(StrEnum):
    """The ways to misbehave. On a unary call `duplicate` and `out_of_order` change nothing: it has one answer."""

    ERROR = "error"  # the model fails
    POISON = "poison"  # the model fails because of one row; the usual trigger is value=666
    STALL = "stall"  # never answers; the batch keeps its instance until its caller leaves
    DROP = "drop"  # ends the stream with OK and without an answer; unary: UNAVAILABLE
    CRASH = "crash"  # the process is gone, as after kill -9
    SHORT = "short"  # the last row is missing
    NAN = "nan"  # the first row's answer is NaN, of a text its confidence
    DUPLICATE = "duplicate"  # the answer comes twice
    OUT_OF_ORDER = "out_of_order"  # the stream's previous message (its first: foreign_id) comes in front of this one
    FOREIGN_ID = "foreign_id"  # the answer bears an id that nobody sent
    WRONG_SHAPE = "wrong_shape"  # the shape claims one row more than the bytes hold
    WRONG_DATATYPE = "wrong_datatype"  # FP32 bytes (and texts) declared as FP64
    MISSING_OUTPUT = "missing_output"  # an answer without outputs
    ROW_ERRORS = "row_errors"  # the answer names the rows with the value (else the first) in its parameter row_errors


class Trigger(StrEnum):
    """When a fault strikes; see the module's text."""

    RATE = "rate"
    EVERY = "every"
    FIRST = "first"
    VALUE = "value"


# https://grpc.github.io/grpc/core/md_doc_statuscodes.html without OK.
STATUS_CODES = (
    "CANCELLED",
    "UNKNOWN",
    "INVALID_ARGUMENT",
    "DEADLINE_EXCEEDED",
    "NOT_FOUND",
    "ALREADY_EXISTS",
    "PERMISSION_DENIED",
    "RESOURCE_EXHAUSTED",
    "FAILED_PRECONDITION",
    "ABORTED",
    "OUT_OF_RANGE",
    "UNIMPLEMENTED",
    "INTERNAL",
    "UNAVAILABLE",
    "DATA_LOSS",
    "UNAUTHENTICATED",
)


# The one model that takes texts (`sentiment.py`); every other name is a model of vectors.
SENTIMENT_MODEL = "sentiment"


@dataclass(frozen=True, slots=True)
class LatencyRange:
    """Seconds per batch, uniform between both ends; equal ends are a fixed latency."""

    low_s: float
    high_s: float


@dataclass(frozen=True, slots=True)
class Fault:
    """One way to misbehave and when. `code` "" is an error message on a stream; `model_name` "" is every model."""

    kind: FaultKind
    trigger: Trigger = Trigger.RATE
    amount: float = 1.0
    code: str = ""
    model_name: str = ""


_MODEL_LATENCIES = {SENTIMENT_MODEL: LatencyRange(5.0, 5.0)}


@dataclass(frozen=True, slots=True)
class MockConfig:
    """Everything the mock can be told; the defaults are those of the command line. 0 is "no limit" for counts."""

    listen: str = "127.0.0.1:50061"
    latency: LatencyRange = LatencyRange(3.0, 7.0)
    model_latencies: Mapping[str, LatencyRange] = field(default_factory=lambda: dict(_MODEL_LATENCIES))
    seed: int = 0
    models: frozenset[str] = frozenset()  # empty: every name is a model
    max_batch_size: int = 0  # rows
    output_width: int = 0  # 0: answers of shape [rows], else [rows, output_width]
    vector_input: str = ""  # of models of vectors; empty: any name
    vector_datatype: str = ""  # FP32 or FP64; empty: either
    vector_output: str = "output"
    instances: int = 0  # batches of one model at a time
    faults: tuple[Fault, ...] = ()
    drain_delay_s: float = 5.0
    drain_timeout_s: float = 30.0
    log_format: str = "text"
    is_quiet: bool = False  # no line per batch

    def latency_of(self, model_name: str) -> LatencyRange:
        """The range to draw from for one model."""
        return self.model_latencies.get(model_name, self.latency)


_RANGE = re.compile(r"(?P<low>[\d.]+)-(?P<high>[\d.]+)")


def parse_latency(text: str) -> LatencyRange:
    """Read `0.05` or `3-7`."""
    bounds = _RANGE.fullmatch(text)
    low_s, high_s = (_seconds(bounds["low"]), _seconds(bounds["high"])) if bounds else (_seconds(text), _seconds(text))
    if low_s > high_s:
        raise ConfigError(f"latency {text!r}: the first number must not be above the second")
    return LatencyRange(low_s, high_s)


def parse_model_latency(text: str) -> tuple[str, LatencyRange]:
    """Read `0.05` or `NAME=0.05`; the name is "" when there is none. A name may itself hold `=`."""
    model_name, separator, latency = text.rpartition("=")
    if separator and not model_name:
        raise ConfigError(f"latency {text!r}: no model name before '='")
    return model_name, parse_latency(latency)


def parse_fault(text: str) -> Fault:
    """Read `KIND[:option,…]`, for example `short:every=3` or `error:rate=0.1,code=UNAVAILABLE`."""
    name, _, options_text = text.partition(":")
    kind = _fault_kind(name)
    options = _fault_options(text, options_text)
    code = options.pop("code", "")
    model_name = options.pop("model", "")
    trigger, amount = _trigger(text, options, _DEFAULT_TRIGGERS.get(kind, (Trigger.RATE, 1.0)))
    _check_code(text, kind, code)
    return Fault(kind, trigger, amount, code, model_name)


def parse_config(arguments: Sequence[str]) -> MockConfig:
    """Read command-line flags; leaves the process with exit code 2 and a message when they make no sense."""
    flags = _parser().parse_args(arguments)
    latencies: dict[str, LatencyRange] = dict(flags.latency)
    if "" not in latencies:  # what is said of all models goes for the text model, too
        latencies = _MODEL_LATENCIES | latencies
    return MockConfig(
        listen=flags.listen,
        latency=latencies.pop("", MockConfig().latency),
        model_latencies=latencies,
        seed=flags.seed,
        models=flags.models,
        max_batch_size=flags.max_batch_size,
        output_width=flags.output_width,
        vector_input=flags.vector_input,
        vector_datatype=flags.vector_datatype,
        vector_output=flags.vector_output,
        instances=flags.instances,
        faults=tuple(flags.fault),
        drain_delay_s=flags.drain_delay,
        drain_timeout_s=flags.drain_timeout,
        log_format=flags.log_format,
        is_quiet=flags.quiet,
    )


def split_address(text: str) -> tuple[str, int]:
    """Take `HOST:PORT` apart; an IPv6 host keeps its brackets. Port 0 is "any free one"."""
    host, _, port = text.rpartition(":")
    if not host or not (port.isascii() and port.isdigit()) or int(port) > 65535:
        raise ConfigError(f"address {text!r} is not HOST:PORT with a port of 0 to 65535")
    return host, int(port)


_DEFAULT_TRIGGERS = dict.fromkeys((FaultKind.POISON, FaultKind.ROW_ERRORS), (Trigger.VALUE, 666.0))
_KINDS_WITH_CODE = (FaultKind.ERROR, FaultKind.POISON)


_LARGEST_FP32 = 3.4028234663852886e38


def _is_count(amount: float) -> bool:
    return amount >= 1 and amount.is_integer()


_AMOUNTS: Mapping[Trigger, tuple[Callable[[float], bool], str]] = {
    Trigger.RATE: (lambda amount: 0 < amount <= 1, "above 0 and at most 1"),
    Trigger.EVERY: (_is_count, "a whole number of batches from 1"),
    Trigger.FIRST: (_is_count, "a whole number of batches from 1"),
    Trigger.VALUE: (lambda amount: abs(amount) <= _LARGEST_FP32, "a number that float32 can hold"),
}


def _fault_kind(name: str) -> FaultKind:
    try:
        return FaultKind(name)
    except ValueError:
        raise ConfigError(f"unknown fault {name!r}; the faults are {', '.join(FaultKind)}") from None


def _fault_options(fault_text: str, options_text: str) -> dict[str, str]:
    known = (*Trigger, "code", "model")
    options: dict[str, str] = {}
    for option in options_text.split(",") if options_text else ():
        name, _, value = option.partition("=")
        if name not in known or not value:
            raise ConfigError(
                f"fault {fault_text!r}: {option!r} is none of {', '.join(f'{known}=' for known in known)}"
            )
        if name in options:
            raise ConfigError(f"fault {fault_text!r}: {name}= stands there twice")
        options[name] = value
    return options


def _trigger(fault_text: str, options: Mapping[str, str], default: tuple[Trigger, float]) -> tuple[Trigger, float]:
    if len(options) > 1:
        raise ConfigError(f"fault {fault_text!r}: only one of {', '.join(options)} can be the trigger")
    for name, value in options.items():
        trigger = Trigger(name)
        is_valid, wanted = _AMOUNTS[trigger]
        amount = _finite(value)
        if amount is None or not is_valid(amount):
            raise ConfigError(f"fault {fault_text!r}: {name} must be {wanted}")
        return trigger, amount
    return default


def _check_code(fault_text: str, kind: FaultKind, code: str) -> None:
    if code and kind not in _KINDS_WITH_CODE:
        raise ConfigError(f"fault {fault_text!r}: only {' and '.join(_KINDS_WITH_CODE)} take a code")
    if code and code not in STATUS_CODES:
        raise ConfigError(f"fault {fault_text!r}: unknown code {code!r}; the codes are {', '.join(STATUS_CODES)}")


def _finite(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _seconds(text: str) -> float:
    number = _finite(text)
    if number is None or number < 0:
        raise ConfigError(f"{text!r} is not a number of seconds from 0 (or a range of two, like 3-7)")
    return number


def _model_names(text: str) -> frozenset[str]:
    names = frozenset(name.strip() for name in text.split(","))
    if "" in names:
        raise ConfigError(f"models {text!r}: a name is empty")
    return names


def _name(text: str) -> str:
    if not text:
        raise ConfigError("the name is empty")
    return text


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise ConfigError(f"{text!r} is not a whole number from 0")
    return int(text)


def _address(text: str) -> str:
    split_address(text)
    return text


def _flag(parse: Callable[[str], _T]) -> Callable[[str], _T]:
    """Let argparse print a ConfigError's own words; of a plain ValueError it keeps nothing."""

    def parse_flag(text: str) -> _T:
        try:
            return parse(text)
        except ConfigError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return parse_flag


def _parser() -> argparse.ArgumentParser:
    default = MockConfig()
    parser = argparse.ArgumentParser(
        prog="python -m mock_nn",
        description="A model server for tests: slow, deterministic, and able to misbehave on demand.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--listen", type=_flag(_address), default=default.listen, metavar="HOST:PORT", help="port 0: any free one")
    add(
        "--latency",
        type=_flag(parse_model_latency),
        action="append",
        default=[],
        metavar="[NAME=]SECONDS|LOW-HIGH",
        help="time per batch, for all models or for one (repeatable; default 3-7, uniform, and sentiment=5)",
    )
    add("--seed", type=int, default=default.seed, help="of latencies and faults (default 0)")
    add("--models", type=_flag(_model_names), default=default.models, metavar="A,B", help="only these exist")
    add("--max-batch-size", type=_flag(_count), default=0, metavar="ROWS", help="refuse more rows (0: no limit)")
    add("--output-width", type=_flag(_count), default=0, metavar="K", help="answer [rows, K] (0: [rows])")
    add(
        "--vector-input",
        default=default.vector_input,
        metavar="NAME",
        help="vectors come in this tensor, and metadata says so (by default in any; metadata says 'vector')",
    )
    add(
        "--vector-datatype",
        choices=("FP32", "FP64"),
        default=default.vector_datatype,
        help="and of this datatype (by default of either; metadata says FP32)",
    )
    add(
        "--vector-output",
        type=_flag(_name),
        default=default.vector_output,
        metavar="NAME",
        help="and are answered in this one (default 'output')",
    )
    add("--instances", type=_flag(_count), default=0, metavar="N", help="batches of a model at a time (0: no limit)")
    add(
        "--fault",
        type=_flag(parse_fault),
        action="append",
        default=[],
        metavar="KIND[:OPTION,…]",
        help=f"misbehave (repeatable; the first that strikes counts). KIND: {', '.join(FaultKind)}. OPTION: one of "
        "rate=R, every=N, first=N, value=V; code=STATUS; model=NAME",
    )
    add(
        "--drain-delay",
        type=_flag(_seconds),
        default=default.drain_delay_s,
        metavar="SECONDS",
        help="after a signal go on at least this long, open streams or not: longer than the router's drain_delay_s and "
        "the gateway's, where all are stopped together; 0 where the callers are stopped first (default 5)",
    )
    add(
        "--drain-timeout",
        type=_flag(_seconds),
        default=default.drain_timeout_s,
        metavar="SECONDS",
        help="and at most this long (default 30)",
    )
    add("--log-format", choices=("text", "json"), default=default.log_format)
    add("--quiet", action="store_true", help="no line per batch")
    return parser
