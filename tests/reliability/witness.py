"""A model server that misbehaves where a row tells it to, and writes down every row that it was given.

`python -m tests.reliability.witness --listen HOST:PORT --record FILE …`; several addresses are several replicas in one
process. Right answers are the mock's. What a row's third number asks for is what `mock_nn` has no use for: this one
strikes where and as often as a scenario needs, and its record outlives a kill.

SIGUSR1 makes it sick, and the next one well again: then a share `--errors` of its batches ends in UNAVAILABLE, and all
take `--slow` times as long.
"""

import argparse
import asyncio
import contextlib
import json
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TextIO, TypeAlias

import grpc
import grpc.aio
import numpy as np
import uvloop

from mock_nn.models import answer, expected, read_agent_type, read_matrix
from protos.open_inference import open_inference_pb2 as pb
from tests.reliability.faults import FAULTS, Message
from tests.reliability.ledger import Matrix, row_ids

# Marks.
POISON = 1.0  # this row cannot be computed, ever
CRASH = 2.0  # this row kills the process
NAMED = 4.0  # this row cannot be computed, and the answer says so of it alone
STRIKE = 10.0  # this and above: the row meets the fault of that number, once
# Outcomes as they stand in the record; of a strike it is the name of the fault.
ANSWERED, POISONED, NAMING, UNAVAILABLE, CRASHED = "answered", "poisoned", "naming", "unavailable", "crashed"

Context: TypeAlias = "grpc.aio.ServicerContext[object, object]"
Infer: TypeAlias = Callable[[pb.ModelInferRequest, Context], Awaitable[list[Message]]]


class Executed(NamedTuple):
    """One batch as a replica was given it; times are those of `time.monotonic`."""

    began_at: float
    outcome: str
    listen: str
    batch_id: str
    ids: tuple[int, ...]


def read_record(path: Path) -> list[Executed]:
    """All batches, in the order in which they were written down."""
    return [_parse(*line.split()) for line in path.read_text().splitlines()]


class Strikes:
    """How often each fault has struck, by a record that is still being written."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._read_bytes = 0
        self._counts: Counter[str] = Counter()

    def count(self, fault: str) -> int:
        """Until now."""
        with self._path.open("rb") as record:
            record.seek(self._read_bytes)
            content = record.read()
        whole = content[: content.rfind(b"\n") + 1]
        self._read_bytes += len(whole)
        self._counts.update(line.split()[1].decode() for line in whole.splitlines())
        return self._counts[fault]


def _parse(began_at: str, outcome: str, listen: str, batch_id: str, *ids: str) -> Executed:
    return Executed(float(began_at), outcome, listen, batch_id, tuple(map(int, ids)))


@dataclass
class Character:
    """What all replicas of the process have in common."""

    low_s: float
    high_s: float
    slow: float
    errors: float
    record: TextIO
    chance: random.Random
    is_sick: bool = False
    struck: set[int] = field(default_factory=set)

    def draw_s(self) -> float:
        """How long the next batch takes."""
        return self.chance.uniform(self.low_s, self.high_s) * (self.slow if self.is_sick else 1.0)

    def strike(self, ids: list[int], marks: Matrix) -> str:
        """The fault that one of these rows asks for, for the first time; "" for none."""
        for row, mark in zip(ids, marks.tolist(), strict=True):
            if mark >= STRIKE and row not in self.struck:
                self.struck.add(row)
                return list(FAULTS)[int(mark - STRIKE)]
        return ""

    def turn(self) -> None:
        """Fall sick, or recover."""
        self.is_sick = not self.is_sick
        print("sick" if self.is_sick else "well", file=sys.stderr, flush=True)


class Replica:
    """One replica."""

    def __init__(self, listen: str, character: Character) -> None:
        self._listen = listen
        self._character = character

    async def infer(self, request: pb.ModelInferRequest, context: Context) -> list[Message]:
        """The messages that a batch is answered with."""
        character = self._character
        began_at = time.monotonic()
        matrix = read_matrix(request)
        ids = row_ids(matrix)
        marks = matrix[:, 2]

        def note(outcome: str) -> None:
            print(f"{began_at:.6f}", outcome, self._listen, request.id, *ids, file=character.record, flush=True)

        await asyncio.sleep(character.draw_s())
        if (marks == CRASH).any():
            note(CRASHED)
            os._exit(70)
        if (marks == POISON).any():
            note(POISONED)
            return [Message(error_message=f"[request id: {request.id}] one of the rows cannot be computed")]
        if character.is_sick and character.chance.random() < character.errors:
            note(UNAVAILABLE)
            await context.abort(grpc.StatusCode.UNAVAILABLE, "sick")
        right = answer(request, expected(request.model_name, read_agent_type(request), matrix))
        if fault := character.strike(ids, marks):
            note(fault)
            return await FAULTS[fault](right)
        named = {str(row): "cannot be computed" for row in np.flatnonzero(marks == NAMED)}
        if named:
            right.infer_response.parameters["row_errors"].string_param = json.dumps(named)
        note(NAMING if named else ANSWERED)
        return [right]


async def serve(listen: str, infer: Infer) -> grpc.aio.Server:
    """The methods that the router calls; it goes on being live and ready."""

    async def stream(_requests: object, context: Context) -> None:
        while isinstance(request := await context.read(), pb.ModelInferRequest):
            for message in await infer(request, context):
                await context.write(message)

    async def live(_request: pb.ServerLiveRequest, _context: object) -> pb.ServerLiveResponse:
        return pb.ServerLiveResponse(live=True)

    async def ready(_request: pb.ServerReadyRequest, _context: object) -> pb.ServerReadyResponse:
        return pb.ServerReadyResponse(ready=True)

    methods: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
        "ModelStreamInfer": grpc.stream_stream_rpc_method_handler(
            stream, pb.ModelInferRequest.FromString, Message.SerializeToString
        ),
        "ServerLive": grpc.unary_unary_rpc_method_handler(
            live, pb.ServerLiveRequest.FromString, pb.ServerLiveResponse.SerializeToString
        ),
        "ServerReady": grpc.unary_unary_rpc_method_handler(
            ready, pb.ServerReadyRequest.FromString, pb.ServerReadyResponse.SerializeToString
        ),
    }
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0), ("grpc.max_receive_message_length", -1)])
    handler = grpc.method_handlers_generic_handler("inference.GRPCInferenceService", methods)
    server.add_generic_rpc_handlers((handler,))
    server.add_insecure_port(listen)
    await server.start()
    return server


async def _serve(options: argparse.Namespace, record: TextIO) -> None:
    low, _, high = options.latency.partition("-")
    chance = random.Random(options.seed)
    character = Character(float(low), float(high or low), options.slow, options.errors, record, chance)
    async with contextlib.AsyncExitStack() as stack:
        for listen in options.listen:
            server = await serve(listen, Replica(listen, character).infer)
            stack.push_async_callback(server.stop, None)
        is_over = asyncio.Event()
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, is_over.set)
        loop.add_signal_handler(signal.SIGUSR1, character.turn)
        print(f"listening on {options.listen[0]}", file=sys.stderr, flush=True)
        await is_over.wait()


def main() -> None:
    """Serve until SIGTERM."""
    parser = argparse.ArgumentParser(prog="python -m tests.reliability.witness")
    parser.add_argument("--listen", action="append", required=True)
    parser.add_argument("--record", required=True)
    parser.add_argument("--latency", default="0.02-0.05")
    parser.add_argument("--seed", default="0")
    parser.add_argument("--slow", type=float, default=1.0)
    parser.add_argument("--errors", type=float, default=0.0)
    options = parser.parse_args()
    with Path(options.record).open("a") as record:
        uvloop.run(_serve(options, record))


if __name__ == "__main__":
    main()
