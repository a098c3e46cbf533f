"""POST /predict: agents in, outputs out, at once (JSON) or each as it arrives (SSE, NDJSON); or later, by a job."""

from fastapi import FastAPI, Request, Response
from fastapi.routing import APIRoute
from starlette.types import ASGIApp, Receive, Scope, Send

from rest_gateway.config import Settings
from rest_gateway.metrics import Metrics
from rest_gateway.router import Router
from rest_gateway.routes import answers
from rest_gateway.routes.lifetime import OpenRequests
from rest_gateway.routes.negotiation import Form, check_content, choose_form, read_body, tenant_of
from rest_gateway.routes.prediction import Prediction
from rest_gateway.routes.preferences import read_preferences
from rest_gateway.routes.streaming import StreamedAnswer
from rest_gateway.routes.submission import Submission
from rest_gateway.schemas.openapi import PREDICT_BODY, PREDICT_RESPONSES
from rest_gateway.schemas.openapi_jobs import PREDICT_PARAMETERS
from rest_gateway.schemas.predict import Limits, TextCall, parse_predict

PATH = "/predict"


class PredictRoute:
    """The route with what it needs."""

    def __init__(
        self,
        router: Router,
        settings: Settings,
        metrics: Metrics,
        open_requests: OpenRequests,
        submission: Submission,
    ) -> None:
        self._router = router
        self._submission = submission
        self._settings = settings
        self._limits = Limits(
            settings.max_agents, settings.max_vector_length, settings.max_name_length, settings.max_text_length
        )
        self._metrics = metrics
        self._open_requests = open_requests

    def add_to(self, app: FastAPI) -> None:
        """Adds the route as Starlette's: FastAPI's would look for parameters to inject, which costs 50 µs a request."""
        app.add_route(PATH, self.predict, methods=["POST"])

    def pass_by(self, app: ASGIApp) -> ASGIApp:
        """`app`, but for the requests of this route: the layers of FastAPI cost a tenth of one with 16 agents."""

        async def serve(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] != "http" or scope["method"] != "POST" or scope["path"] != PATH:
                await app(scope, receive, send)
                return
            # As Starlette does; the access layer reads them.
            scope.update({"endpoint": self.predict, "path_params": {}})
            response = await self.predict(Request(scope, receive, send))
            await response(scope, receive, send)

        return serve

    def document(self) -> APIRoute:
        """The same as FastAPI's route, for the API document only."""
        return APIRoute(
            PATH,
            self.predict,
            methods=["POST"],
            tags=["predictions"],
            summary="Run named agents through their models, or a text through the sentiment model",
            response_class=Response,
            responses=PREDICT_RESPONSES,
            openapi_extra={"requestBody": PREDICT_BODY, "parameters": PREDICT_PARAMETERS},
        )

    async def predict(self, request: Request) -> Response:
        """Agents are answered at once, each on its own: one agent's fault leaves the others alone.

        Ask for `text/event-stream` or `application/x-ndjson` to get each agent as soon as its model has answered, or
        prefer `respond-async` to be answered 202 with a job. A `text` always makes a job; prefer `wait=10` to wait
        for its end. See the job at `Location`.
        """
        form = choose_form(request.headers)
        check_content(request.headers)
        with self._open_requests.open() as lifetime:
            body = await read_body(request, self._settings.max_body_bytes)
            call = parse_predict(body, self._limits)
            tenant = tenant_of(request.headers, self._settings)
            if isinstance(call, TextCall) or _is_for_later(request, form):
                return await self._submission.answer(request, call, form, tenant, lifetime)
            prediction = Prediction(self._router, self._metrics, request.scope, call, tenant)
            if form != "json":
                return StreamedAnswer(prediction, form, self._open_requests)
            lifetime.watch(request.receive)
            outcomes = await prediction.infer()
        return answers.answer(request.scope, prediction.names, outcomes)


def _is_for_later(request: Request, form: Form) -> bool:
    """Who asks for a stream wants to read it now."""
    return form == "json" and "prefer" in request.headers and read_preferences(request.headers).respond_async
