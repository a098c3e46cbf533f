"""Client: AsyncClient for code that knows no event loop. The same words, the same errors; it waits where those await.

with Client() as client:
    results = client.predict({"ann": Agent("churn", [0.1, 0.2])}, timeout_s=30)
    job = client.wait(client.submit("This product is amazing!"), timeout_s=60)
"""

from collections.abc import Callable, Generator, Mapping
from typing import Self

from router_client.addresses import GATEWAY, METRICS, ROUTER
from router_client.async_client import AsyncClient
from router_client.background import shared_loop
from router_client.blocks import Agent, AgentResult
from router_client.jobs import Job, JobKind, JobStatus, Priority
from router_client.models import ModelEntry
from router_client.results import Results
from router_client.status import Status


class Client:
    """A client of one router and one gateway; arguments and errors as of AsyncClient.

    Any number of threads may use it at once: they share its connections. Its work is done in a daemon thread that all
    clients of the process share. Ctrl-C cancels the call that waits. gRPC does not survive a fork: a forked child can
    use no client, neither an old one (RuntimeError) nor a new one that asks the router; start children by spawn, or
    make the first client after the fork. Close it, best by ``with``; what is open then fails with Unavailable.
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
        self._loop = shared_loop()
        self._client = AsyncClient(
            router,
            gateway,
            metrics=metrics,
            tenant=tenant,
            retries=retries,
            router_wait_s=router_wait_s,
            gateway_timeout_s=gateway_timeout_s,
            headers=headers,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """See `AsyncClient.aclose`."""
        self._loop.run(self._client.aclose())

    def predict(
        self,
        agents: Mapping[str, Agent],
        *,
        timeout_s: float | None = None,
        priority: Priority = "interactive",
        explain: bool = False,
        request_id: str = "",
    ) -> Results:
        """See `AsyncClient.predict`."""
        return self._loop.run(
            self._client.predict(agents, timeout_s=timeout_s, priority=priority, explain=explain, request_id=request_id)
        )

    def stream(
        self,
        agents: Mapping[str, Agent],
        *,
        timeout_s: float | None = None,
        priority: Priority = "interactive",
        explain: bool = False,
        request_id: str = "",
    ) -> Generator[tuple[str, AgentResult], None, None]:
        """See `AsyncClient.stream`. Leaving the loop that reads it gives the rest up."""
        return self._loop.iterate(
            self._client.stream(agents, timeout_s=timeout_s, priority=priority, explain=explain, request_id=request_id)
        )

    def submit(
        self,
        work: str | Mapping[str, Agent],
        *,
        job_timeout_s: float | None = None,
        priority: Priority = "interactive",
        explain: bool = False,
        idempotency_key: str | None = None,
    ) -> Job:
        """See `AsyncClient.submit`."""
        return self._loop.run(
            self._client.submit(
                work,
                job_timeout_s=job_timeout_s,
                priority=priority,
                explain=explain,
                idempotency_key=idempotency_key,
            )
        )

    def job(self, job: Job | str) -> Job:
        """See `AsyncClient.job`."""
        return self._loop.run(self._client.job(job))

    def wait(
        self,
        job: Job | str,
        *,
        timeout_s: float | None = None,
        on_change: Callable[[Job], None] | None = None,
    ) -> Job:
        """See `AsyncClient.wait`. ``on_change`` is called in this thread."""
        if on_change is None:
            return self._loop.run(self._client.wait(job, timeout_s=timeout_s))
        for seen in self.changes(job, timeout_s=timeout_s):
            on_change(seen)
        return seen

    def changes(self, job: Job | str, *, timeout_s: float | None = None) -> Generator[Job, None, None]:
        """See `AsyncClient.changes`."""
        return self._loop.iterate(self._client.changes(job, timeout_s=timeout_s))

    def jobs(
        self, *, status: JobStatus | None = None, kind: JobKind | None = None, limit: int | None = None
    ) -> Generator[Job, None, None]:
        """See `AsyncClient.jobs`."""
        return self._loop.iterate(self._client.jobs(status=status, kind=kind, limit=limit))

    def cancel(self, job: Job | str) -> Job:
        """See `AsyncClient.cancel`."""
        return self._loop.run(self._client.cancel(job))

    def delete(self, job: Job | str) -> None:
        """See `AsyncClient.delete`."""
        self._loop.run(self._client.delete(job))

    def models(self, *, only_ready: bool = False, timeout_s: float = 10.0) -> list[ModelEntry]:
        """See `AsyncClient.models`."""
        return self._loop.run(self._client.models(only_ready=only_ready, timeout_s=timeout_s))

    def status(self, *, timeout_s: float = 5.0) -> Status:
        """See `AsyncClient.status`."""
        return self._loop.run(self._client.status(timeout_s=timeout_s))
