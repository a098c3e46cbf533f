"""`python -m router_client health ADDRESS`: a container probe. Knows grpc.health.v1, nothing of inference."""

import argparse
from collections.abc import Sequence
from math import inf

import grpc
from grpc_health.v1 import health_pb2


def main(arguments: Sequence[str] | None = None) -> int:
    """Ask the server at ADDRESS for its health, print one line, return 0 when it is SERVING and 1 otherwise."""
    options = _parser().parse_args(arguments)
    status = check(options.address, options.timeout)
    print(f"{options.address}: {status}")
    return 0 if status == "SERVING" else 1


def check(address: str, timeout_s: float) -> str:
    """Return the server's status by name, or why there is none."""
    with grpc.insecure_channel(address, [("grpc.enable_http_proxy", 0)]) as channel:
        ask = channel.unary_unary(
            "/grpc.health.v1.Health/Check",
            request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
            response_deserializer=health_pb2.HealthCheckResponse.FromString,
        )
        try:
            answer = ask(health_pb2.HealthCheckRequest(), timeout=timeout_s)
        except grpc.RpcError as exc:
            return f"{exc.code().name}: {' '.join((exc.details() or '').split())}"
    return health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m router_client", description="Tools around the router.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    health = commands.add_parser("health", help="exit 0 when the server is SERVING, 1 otherwise")
    health.add_argument("address", metavar="ADDRESS", help="such as 127.0.0.1:50051")
    health.add_argument("--timeout", metavar="S", type=seconds, default=3.0, help="seconds to wait (3)")
    return parser


def seconds(text: str) -> float:
    seconds = float(text)
    if not 0 < seconds < inf:
        raise ValueError(text)
    return seconds
