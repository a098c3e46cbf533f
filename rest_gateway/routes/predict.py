"""POST /predict: agents in, outputs out, at once (JSON) or each as it arrives (SSE, NDJSON)."""

from collections.abc import Mapping

from fastapi import FastAPI, Request, Response
from fastapi.routing import APIRoute
from starlette.types import Scope

from rest_gateway.config import Settings
from rest_gateway.convert import Outcome
from rest_gateway.errors import Fault, InvalidRequestError
from rest_gateway.metrics import Metrics
from rest_gateway.routes import problems
from rest_gateway.routes.lifetime import OpenRequests
from rest_gateway.routes.negotiation import MEDIA_TYPES, check_content, choose_form, read_body
from rest_gateway.routes.prediction import Prediction
from rest_gateway.routes.router import Router
from rest_gateway.routes.streaming import StreamedAnswer
from rest_gateway.schemas import json_text
from rest_gateway.schemas.openapi import PREDICT_BODY, PREDICT_RESPONSES
from rest_gateway.schemas.predict import Limits, parse_predict


class PredictRoute:
    """The route with what it needs."""

    def __init__(self, router: Router, settings: Settings, metrics: Metrics, open_requests: OpenRequests) -> None:
        self._router = router
        self._settings = settings
        self._limits = Limits(settings.max_agents, settings.max_vector_length, settings.max_name_length)
        self._metrics = metrics
        self._open_requests = open_requests

    def add_to(self, app: FastAPI) -> None:
        """Adds the route as Starlette's: FastAPI's would look for parameters to inject, which costs 50 µs a request."""
        app.add_route("/predict", self.predict, methods=["POST"])

    def document(self) -> APIRoute:
        """The same as FastAPI's route, for the API document only."""
        return APIRoute(
            "/predict",
            self.predict,
            methods=["POST"],
            tags=["predictions"],
            summary="Run named agents through their models",
            response_class=Response,
            responses=PREDICT_RESPONSES,
            openapi_extra={"requestBody": PREDICT_BODY},
        )

    async def predict(self, request: Request) -> Response:
        """Answers each agent on its own: one agent's fault leaves the others alone.

        Ask for `text/event-stream` or `application/x-ndjson` to get each agent as soon as its model has answered.
        """
        form = choose_form(request.headers)
        check_content(request.headers)
        with self._open_requests.open() as lifetime:
            prediction = await self._read(request)
            if form != "json":
                return StreamedAnswer(prediction, form, self._open_requests)
            lifetime.watch(request.receive)
            outcomes = await prediction.infer()
        return _answer(request.scope, prediction.names, outcomes)

    async def _read(self, request: Request) -> Prediction:
        body = await read_body(request, self._settings.max_body_bytes)
        call = parse_predict(body, self._limits)
        return Prediction(self._router, self._metrics, request.scope, call, self._tenant(request))

    def _tenant(self, request: Request) -> str:
        """Whom the rows are counted for; a client's own word only where the operator trusts it."""
        tenant = request.headers.get("x-tenant", "") if self._settings.trust_tenant else ""
        if len(tenant) > self._settings.max_name_length:
            raise InvalidRequestError(f"X-Tenant has more than {self._settings.max_name_length:,} characters")
        return tenant


def _answer(scope: Scope, names: list[str], outcomes: Mapping[str, Outcome]) -> Response:
    """200, 207, or the problem when nobody has an output; agents in the order of the request."""
    results: dict[str, Outcome] = {}
    agent_errors: dict[str, dict[str, object]] = {}
    for name in names:
        outcome = outcomes[name]
        if isinstance(outcome, Fault):
            agent_errors[name] = problems.agent_error(outcome)
        else:
            results[name] = outcome
    if not results:
        return problems.all_failed(scope, agent_errors)
    body = json_text.dump({"results": results, "errors": agent_errors})
    return Response(body, 207 if agent_errors else 200, media_type=MEDIA_TYPES["json"])
