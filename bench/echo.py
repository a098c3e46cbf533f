"""The bare grpc.aio server: `python -m bench.echo`. It takes the same messages as the router and answers at once.

It does what no Python gRPC server can leave out: parse the request, serialise an answer of the right size. The answer
is made once for each number of agents.
"""

import functools
import sys

import grpc.aio
import uvloop

from protos.inference_router.v1 import inference_router_pb2 as pb

SERVICE = "inference_router.v1.InferenceRouterService"


async def predict(
    request: pb.PredictRequest,
    context: "grpc.aio.ServicerContext[pb.PredictRequest, pb.PredictResponse]",  # noqa: ARG001 -- gRPC's signature
) -> pb.PredictResponse:
    """One output for each agent."""
    return _answer(len(request.agents))


@functools.cache
def _answer(agents: int) -> pb.PredictResponse:
    return pb.PredictResponse(results={f"agent-{number}": pb.AgentResult(output=[0.5]) for number in range(agents)})


async def serve() -> None:
    """Serve on a free port until the process is ended; the bench needs no drain."""
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    handler = grpc.unary_unary_rpc_method_handler(
        predict,
        request_deserializer=pb.PredictRequest.FromString,
        response_serializer=pb.PredictResponse.SerializeToString,
    )
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {"Predict": handler}),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(f"echo listens on 127.0.0.1:{port}", file=sys.stderr, flush=True)
    await server.wait_for_termination()


if __name__ == "__main__":
    uvloop.run(serve())
