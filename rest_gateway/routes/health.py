"""Operations: /healthz, /readyz, /metrics, and / until there is a page to show."""

from fastapi import FastAPI, Response
from fastapi.responses import RedirectResponse

from rest_gateway.jobs.service import Jobs
from rest_gateway.metrics import Metrics
from rest_gateway.router import Router
from rest_gateway.routes.lifetime import OpenRequests
from rest_gateway.schemas import json_text
from rest_gateway.schemas.openapi import HEALTHZ_RESPONSES, METRICS_RESPONSES, READYZ_RESPONSES

PROMETHEUS_TEXT = "text/plain; version=0.0.4; charset=utf-8"


class HealthRoutes:
    """What probes and scrapers ask; answers from memory, at once."""

    def __init__(self, router: Router, jobs: Jobs, metrics: Metrics, open_requests: OpenRequests) -> None:
        self._router = router
        self._jobs = jobs
        self._metrics = metrics
        self._open_requests = open_requests

    def add_to(self, app: FastAPI) -> None:
        """Adds the routes; HEAD too, which some load balancers probe with."""
        for path, endpoint, responses in (
            ("/healthz", self.healthz, HEALTHZ_RESPONSES),
            ("/readyz", self.readyz, READYZ_RESPONSES),
            ("/metrics", self.metrics, METRICS_RESPONSES),
        ):
            app.add_api_route(path, endpoint, tags=["operations"], response_class=Response, responses=responses)
            app.add_api_route(path, endpoint, methods=["HEAD"], include_in_schema=False)
        app.add_api_route("/", self.root, methods=["GET", "HEAD"], include_in_schema=False)

    async def healthz(self) -> Response:
        """Says that the event loop turns."""
        return _json(200, {"status": "ok"})

    async def readyz(self) -> Response:
        """Says whether new requests are welcome: not while draining, without a router, or before jobs were looked for.

        A database that is away costs jobs, not predictions, and so does not make the gateway unready.
        """
        is_connected = self._router.is_connected
        is_ready = is_connected and self._jobs.has_tried_to_claim
        status = "draining" if self._open_requests.is_draining else "ready" if is_ready else "not ready"
        router = "connected" if is_connected else "unreachable"
        body = {"status": status, "router": router, "database": self._jobs.database}
        return _json(200 if status == "ready" else 503, body)

    async def metrics(self) -> Response:
        """Every metric in the Prometheus text format."""
        return Response(self._metrics.render(), media_type=PROMETHEUS_TEXT)

    async def root(self) -> Response:
        """Leads to the API documentation."""
        return RedirectResponse("/docs")


def _json(status: int, document: dict[str, str]) -> Response:
    return Response(json_text.dump(document), status, {"Cache-Control": "no-store"}, media_type="application/json")
