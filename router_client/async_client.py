"""AsyncClient: everything a user asks of router and gateway, on one event loop. Each half is opened with its first use.

    async with AsyncClient() as client:
        results = await client.predict({"ann": Agent("churn", [0.1, 0.2])}, timeout_s=30)
        job = await client.wait(await client.submit("This product is amazing!"), timeout_s=60)

What fails raises one of the exceptions in errors.py. What a server pushes back is sent again, see retry.py.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from math import isfinite
from typing import Self

from router_client.addresses import GATEWAY, METRICS, ROUTER
from router_client.blocks import Agent, AgentResult
from router_client.client import RouterClient
from router_client.errors import InvalidArgument, Unavailable
from router_client.gateway import Gateway, check_url
from router_client.job_api import LOOK_S, JobApi
from router_client.jobs import Job, JobKind, JobStatus, Priority
from router_client.models import ModelEntry, ask_models
from router_client.prediction import CallOptions, Predictor
from router_client.results import Results
from router_client.retry import RetryPolicy
from router_client.status import Status, ask_gateway, ask_router


class AsyncClient:
    """A client of one router and one gateway. Belongs to one event loop; any number of tasks may use it at once.

    Args:
        router: gRPC target of the router; `predict`, `stream` and `models` go there.
        gateway: URL of the REST gateway; all about jobs goes there, and `status`.
        metrics: URL of the router's metrics, for `status`.
        tenant: on whose account everything counts, where the servers trust their callers to say so; printable ASCII.
        retries: how often a request that is pushed back is sent again at most; 0: never.
        router_wait_s: seconds that a call waits for a router that is away.
        gateway_timeout_s: seconds that a request to the gateway may take, all attempts together; waits take longer.
        headers: sent with every request to the gateway, such as the credentials of a proxy in front of it.

    A cancelled caller leaves nothing behind but jobs: the router is told.

    Raises:
        InvalidArgument: ``gateway`` or ``metrics`` is no URL, or ``tenant`` is not printable ASCII.
    """

    def __init__(
        self,
        router: str = ROUTER,
        gateway: str = GATEWAY,
        *,
        metrics: str = METRICS,
        tenant: str = "",
        retries: int = 2,
        router_wait_s: float = 2.0,
        gateway_timeout_s: float = 10.0,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        if not (tenant.isascii() and tenant.isprintable()):  # no header could carry it
            raise InvalidArgument(f"tenant {tenant!r} is not printable ASCII")
        self._router_target = router
        self._gateway_url = check_url(gateway)
        self._metrics_url = check_url(metrics)
        self._tenant = tenant
        self._policy = RetryPolicy(retries)
        self._router_wait_s = router_wait_s
        self._gateway_timeout_s = gateway_timeout_s
        self._headers = {**({"X-Tenant": tenant} if tenant else {}), **(headers or {})}
        # The two halves, from their first use on:
        self._router: RouterClient | None = None
        self._gateway: Gateway | None = None
        self._is_closed = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Fail open calls with Unavailable and end every connection. The client cannot be used again."""
        self._is_closed = True
        halves = (self._router, self._gateway)
        self._router = self._gateway = None
        await asyncio.gather(*(half.aclose() for half in halves if half is not None))

    @property
    def router(self) -> RouterClient:
        """The native client beneath, for blocks and tensors; opened now if it was not.

        Raises:
            Unavailable: the client is closed.
        """
        self._check_open()
        if self._router is None:
            self._router = RouterClient(self._router_target, router_wait_s=self._router_wait_s)
        return self._router

    async def predict(
        self,
        agents: Mapping[str, Agent],
        *,
        timeout_s: float | None = None,
        priority: Priority = "interactive",
        explain: bool = False,
        request_id: str = "",
    ) -> Results:
        """Send named agents and return each one's result under its name, when all are there.

        Agents that fail beside others that are answered do not raise: their results hold the error; call
        `Results.raise_for_errors` on what comes back where one bad agent makes the others worthless.

        Args:
            agents: by name; together at most 16 MiB of vectors. Each is a row, float32.
            timeout_s: seconds from now, retries included; None: 60 s, or what the router is set to.
            priority: rows of class `batch` have the seats that interactive rows leave.
            explain: ask where the time of each answer went.
            request_id: for the router's logs.

        Raises:
            RouterError: every agent failed. InvalidArgument, NotFound (no such model), DeadlineExceeded,
                ResourceExhausted, Unavailable (no router), ModelFailed, Internal: of the class of the gravest;
                ``agents`` tells each one's.
        """
        options = self._options(timeout_s, priority, request_id, explain=explain)
        return await Predictor(self.router, self._policy).predict(agents, options)

    async def stream(
        self,
        agents: Mapping[str, Agent],
        *,
        timeout_s: float | None = None,
        priority: Priority = "interactive",
        explain: bool = False,
        request_id: str = "",
    ) -> AsyncGenerator[tuple[str, AgentResult], None]:
        """Send named agents and yield ``(name, result)`` of each as it arrives; arguments as for `predict`.

        Each agent comes once, with an output or an error; agents that fail do not raise, not even all of them. One that
        is pushed back comes when it was sent again. Close the iterator (``contextlib.aclosing``) to give the rest up.
        """
        options = self._options(timeout_s, priority, request_id, explain=explain)
        async with aclosing(Predictor(self.router, self._policy).stream(agents, options)) as results:
            async for item in results:
                yield item

    async def submit(
        self,
        work: str | Mapping[str, Agent],
        *,
        job_timeout_s: float | None = None,
        priority: Priority = "interactive",
        explain: bool = False,
        idempotency_key: str | None = None,
    ) -> Job:
        """Make a job of a text, or of named agents, and return it. It is on the gateway's disk then.

        Args:
            work: a text for the sentiment model, or agents as for `predict`.
            job_timeout_s: seconds after which the job fails; None: what the gateway is set to (an hour).
            priority: of agents; texts are always of class `batch`.
            explain: ask where the time of each agent's answer went.
            idempotency_key: the same key and work find the same job, for as long as it is kept; None: a new one, so
                that a request that is sent again makes one job.

        Raises:
            InvalidArgument: this is no work (all agents are bad, the text is blank or too long), or the key belongs to
                another job.
            ResourceExhausted: too many jobs wait.
            Unavailable: no gateway, or its database is away.
            DeadlineExceeded: no answer within ``gateway_timeout_s``; there may be a job all the same.
        """
        return await self._jobs().submit(
            work,
            job_timeout_s=job_timeout_s,
            priority=priority,
            explain=explain,
            idempotency_key=idempotency_key,
        )

    async def job(self, job: Job | str) -> Job:
        """Return a job as it is now; ``job`` is one, or its id.

        Raises:
            NotFound: there is no such job, or it was deleted.
            Unavailable, DeadlineExceeded: no gateway, or no answer within ``gateway_timeout_s``.
        """
        return await self._jobs().get(_id(job))

    async def wait(
        self,
        job: Job | str,
        *,
        timeout_s: float | None = None,
        on_change: Callable[[Job], None] | None = None,
    ) -> Job:
        """Return a job once it has ended: completed, failed or cancelled. `Job.raise_for_failure` tells them apart.

        A gateway that restarts meanwhile is waited for, up to a minute.

        Args:
            job: the job, or its id.
            timeout_s: seconds from now; None: however long it takes.
            on_change: called with the job as it is, and again whenever its state has changed, at most 2 s later.

        Raises:
            DeadlineExceeded: the time is over; the job goes on.
            NotFound: there is no such job, or it was deleted.
            Unavailable: the gateway was away for a minute.
        """
        if on_change is None:
            return await self._jobs().wait(_id(job), timeout_s=timeout_s)
        async with aclosing(self.changes(job, timeout_s=timeout_s)) as changes:
            async for seen in changes:
                on_change(seen)
        return seen

    async def changes(self, job: Job | str, *, timeout_s: float | None = None) -> AsyncGenerator[Job, None]:
        """Yield a job as it is, and again whenever its state has changed, until it has ended; errors as for `wait`."""
        async with aclosing(self._jobs().changes(_id(job), timeout_s=timeout_s, hold_s=LOOK_S)) as changes:
            async for seen in changes:
                yield seen

    async def jobs(
        self, *, status: JobStatus | None = None, kind: JobKind | None = None, limit: int | None = None
    ) -> AsyncGenerator[Job, None]:
        """Yield jobs, newest first, page by page as they are read.

        Args:
            status: only those in this state.
            kind: only those of this kind.
            limit: at most so many; None: all.

        Raises:
            Unavailable, DeadlineExceeded: no gateway, or no answer within ``gateway_timeout_s`` for a page.
        """
        async with aclosing(self._jobs().pages(status, kind, limit)) as jobs:
            async for job in jobs:
                yield job

    async def cancel(self, job: Job | str) -> Job:
        """End a job that has not ended and return it; cancelling twice is the same as once.

        Raises:
            Aborted: it is completed or failed.
            NotFound: there is no such job.
            Unavailable, DeadlineExceeded: no gateway, or no answer within ``gateway_timeout_s``.
        """
        return await self._jobs().cancel(_id(job))

    async def delete(self, job: Job | str) -> None:
        """Delete a job that has ended, and free its idempotency key.

        Raises:
            Aborted: it has not ended.
            NotFound: there is no such job.
            Unavailable, DeadlineExceeded: no gateway, or no answer within ``gateway_timeout_s``; it may be gone.
        """
        await self._jobs().delete(_id(job))

    async def models(self, *, only_ready: bool = False, timeout_s: float = 10.0) -> list[ModelEntry]:
        """Return the router's models: those of its settings, of its backends, and in use.

        Raises:
            Unavailable, DeadlineExceeded: no router, or no answer within ``timeout_s`` seconds.
        """
        self._check_open()
        return await ask_models(self._router_target, only_ready=only_ready, timeout_s=timeout_s)

    async def status(self, *, timeout_s: float = 5.0) -> Status:
        """Return how gateway and router are. Does not raise for one that is away: that is what it tells.

        ``timeout_s``: seconds that each may take.
        """
        self._check_open()
        gateway = ask_gateway(self._gateway_url, timeout_s=timeout_s)
        return Status(*await asyncio.gather(gateway, ask_router(self._metrics_url, timeout_s=timeout_s)))

    def _jobs(self) -> JobApi:
        self._check_open()
        if self._gateway is None:
            self._gateway = Gateway(self._gateway_url, self._policy, headers=self._headers)
        return JobApi(self._gateway, timeout_s=self._gateway_timeout_s)

    def _options(self, timeout_s: float | None, priority: Priority, request_id: str, *, explain: bool) -> CallOptions:
        if timeout_s is not None and not isfinite(timeout_s):
            raise InvalidArgument(f"timeout_s must be a finite number of seconds, not {timeout_s}")
        if priority not in ("interactive", "batch"):
            raise InvalidArgument(f"priority must be interactive or batch, not {priority!r}")
        return CallOptions(
            timeout_s=timeout_s, priority=priority, tenant=self._tenant, explain=explain, request_id=request_id
        )

    def _check_open(self) -> None:
        if self._is_closed:
            raise Unavailable("the client was closed")


def _id(job: Job | str) -> str:
    return job if isinstance(job, str) else job.id
