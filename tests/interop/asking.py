"""One way to ask for all clients of others: gRPC, REST, streams; synchronous ones run in a thread of their own.

A test says what is sent and what must come back; which client carries it is another matter.
"""

import asyncio
import itertools
import queue
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import tritonclient.grpc
import tritonclient.grpc.aio
import tritonclient.http
import tritonclient.http.aio
from tritonclient.utils import InferenceServerException

from tests.interop.values import Array

# tritonclient has no types.
Client: TypeAlias = Any
Result: TypeAlias = Any

PATIENCE_S = 60


# tritonclient has no JSON for it.
ONLY_BINARY = ("BF16",)


@dataclass(frozen=True, slots=True)
class Given:
    """An input tensor."""

    datatype: str
    values: Array


@dataclass(frozen=True, slots=True)
class Asked:
    """One request. `options` are tritonclient's own arguments of `infer`."""

    model: str
    inputs: Mapping[str, Given]
    outputs: Sequence[str] = ()
    options: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back: outputs in their order."""

    request_id: str
    outputs: dict[str, Array]


# What a status is called where the client tells it.
HTTP_STATUS = {"INVALID_ARGUMENT": "422", "NOT_FOUND": "404", "DEADLINE_EXCEEDED": "504", "UNKNOWN": "502"} | {
    "UNIMPLEMENTED": "501"
}


class Ask(ABC):
    """A client in use. `infer` raises tritonclient's InferenceServerException."""

    @abstractmethod
    async def infer(self, asked: Asked) -> Answer: ...

    @abstractmethod
    async def call(self, method: str, *arguments: object) -> Any:  # noqa: ANN401 -- whatever the method returns
        """Another method of the client, its answer as plain JSON."""

    def status(self, code: str) -> str | None:
        """How this client tells a code; None: not at all."""
        return f"StatusCode.{code}"


class GrpcSync(Ask):
    """tritonclient.grpc."""

    def __init__(self, client: Client, thread: ThreadPoolExecutor) -> None:
        self._client = client
        self._thread = thread

    async def infer(self, asked: Asked) -> Answer:
        return grpc_answer(await self._run(lambda: self._client.infer(**grpc_arguments(asked))))

    async def call(self, method: str, *arguments: object) -> Any:  # noqa: ANN401
        return await self._run(lambda: getattr(self._client, method)(*arguments, **_as_json(method)))

    async def _run(self, work: Callable[[], Result]) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)


class GrpcAio(Ask):
    """tritonclient.grpc.aio."""

    def __init__(self, client: Client) -> None:
        self._client = client

    async def infer(self, asked: Asked) -> Answer:
        return grpc_answer(await self._client.infer(**grpc_arguments(asked)))

    async def call(self, method: str, *arguments: object) -> Any:  # noqa: ANN401
        return await getattr(self._client, method)(*arguments, **_as_json(method))


class GrpcStream(GrpcSync):
    """tritonclient.grpc's stream: what comes back is told apart by its id, errors by the id in their text."""

    def __init__(self, client: Client, thread: ThreadPoolExecutor) -> None:
        super().__init__(client, thread)
        self._numbers = itertools.count()
        self._waiting: dict[str, queue.SimpleQueue[Result]] = {}
        client.start_stream(self._on_result)

    def status(self, code: str) -> str | None:
        return None

    async def infer(self, asked: Asked) -> Answer:
        arguments = grpc_arguments(asked)
        request_id = arguments.setdefault("request_id", f"stream-{next(self._numbers)}")
        mine = self._waiting[request_id] = queue.SimpleQueue()
        self._client.async_stream_infer(**arguments)
        result = await asyncio.to_thread(mine.get, timeout=PATIENCE_S)
        if isinstance(result, InferenceServerException):
            raise result
        return grpc_answer(result)

    def _on_result(self, result: Result, error: InferenceServerException | None) -> None:
        request_id = _id_of_error(error) if error is not None else result.get_response().id
        self._waiting.pop(request_id).put(error if error is not None else result)


class GrpcAioStream(GrpcAio):
    """tritonclient.grpc.aio's stream, one per request."""

    def status(self, code: str) -> str | None:
        return None

    async def infer(self, asked: Asked) -> Answer:
        async def requests() -> AsyncIterator[dict[str, Any]]:
            yield grpc_arguments(asked)

        answers = self._client.stream_infer(requests())
        result, error = await anext(answers)
        if error is not None:
            raise error
        with_no_more = [one async for one in answers]
        assert with_no_more == []
        return grpc_answer(result)


class HttpSync(Ask):
    """tritonclient.http. `is_binary`: tensors behind the JSON, else in it."""

    def __init__(self, client: Client, thread: ThreadPoolExecutor, *, is_binary: bool) -> None:
        self._client = client
        self._thread = thread
        self._is_binary = is_binary

    def status(self, code: str) -> str | None:
        return HTTP_STATUS[code]

    async def infer(self, asked: Asked) -> Answer:
        arguments = http_arguments(asked, is_binary=self._is_binary)
        return http_answer(await self._run(lambda: self._client.infer(**arguments)))

    async def call(self, method: str, *arguments: object) -> Any:  # noqa: ANN401
        return await self._run(lambda: getattr(self._client, method)(*arguments))

    async def _run(self, work: Callable[[], Result]) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)


class HttpAio(Ask):
    """tritonclient.http.aio."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def status(self, code: str) -> str | None:
        return HTTP_STATUS[code]

    async def infer(self, asked: Asked) -> Answer:
        return http_answer(await self._client.infer(**http_arguments(asked, is_binary=True)))

    async def call(self, method: str, *arguments: object) -> Any:  # noqa: ANN401
        return await getattr(self._client, method)(*arguments)


@asynccontextmanager
async def asking(kind: str, router: str, gateway: str) -> AsyncIterator[Ask]:
    """A client of this kind for the length of a block; synchronous ones are made in the thread that they run in."""
    with ThreadPoolExecutor(1) as thread:
        run = asyncio.get_running_loop().run_in_executor
        match kind:
            case "gRPC" | "gRPC stream":
                with tritonclient.grpc.InferenceServerClient(router) as client:
                    yield GrpcSync(client, thread) if kind == "gRPC" else GrpcStream(client, thread)
            case "gRPC aio" | "gRPC aio stream":
                async with tritonclient.grpc.aio.InferenceServerClient(router) as client:
                    yield GrpcAio(client) if kind == "gRPC aio" else GrpcAioStream(client)
            case "HTTP JSON" | "HTTP binary":
                client = await run(thread, tritonclient.http.InferenceServerClient, gateway)
                yield HttpSync(client, thread, is_binary=kind == "HTTP binary")
                await run(thread, client.close)
            case "HTTP aio":
                async with tritonclient.http.aio.InferenceServerClient(gateway) as client:
                    yield HttpAio(client)
            case _:
                raise AssertionError(f"no client {kind!r}: this is a bug")


def grpc_arguments(asked: Asked) -> dict[str, Any]:
    """What tritonclient.grpc's `infer` takes."""
    outputs = [tritonclient.grpc.InferRequestedOutput(name) for name in asked.outputs]
    return _arguments(asked, tritonclient.grpc.InferInput, outputs)


def http_arguments(asked: Asked, *, is_binary: bool) -> dict[str, Any]:
    """What tritonclient.http's `infer` takes. Outputs come as JSON only where they are asked for so by name."""
    form = {"binary_data": is_binary or any(given.datatype in ONLY_BINARY for given in asked.inputs.values())}
    outputs = [tritonclient.http.InferRequestedOutput(name, **form) for name in asked.outputs]
    return _arguments(asked, tritonclient.http.InferInput, outputs, **form)


def _arguments(asked: Asked, make_input: Callable[..., Any], outputs: list[Any], **form: bool) -> dict[str, Any]:
    inputs = []
    for name, given in asked.inputs.items():
        tensor = make_input(name, list(given.values.shape), given.datatype)
        tensor.set_data_from_numpy(given.values, **form)
        inputs.append(tensor)
    return {"model_name": asked.model, "inputs": inputs, "outputs": outputs or None, **asked.options}


def grpc_answer(result: Result) -> Answer:
    """What tritonclient.grpc makes of an answer."""
    response = result.get_response()
    return Answer(response.id, {output.name: result.as_numpy(output.name) for output in response.outputs})


def http_answer(result: Result) -> Answer:
    """What tritonclient.http makes of an answer."""
    response = result.get_response()
    names = [output["name"] for output in response["outputs"]]
    return Answer(response.get("id", ""), {name: result.as_numpy(name) for name in names})


def _as_json(method: str) -> dict[str, bool]:
    """Its gRPC clients give messages unless told otherwise."""
    return {"as_json": True} if method.startswith("get_") else {}


def _id_of_error(error: InferenceServerException) -> str:
    return str(error.message()).partition("[request id: ")[2].partition("]")[0]
