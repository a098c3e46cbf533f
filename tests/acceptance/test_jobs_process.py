"""Jobs in a gateway as a user starts it, as far as they need no router: storage, starts, restarts, refusals."""

import asyncio
import re
import signal
import sqlite3
import sys
from pathlib import Path

import pytest

from rest_gateway.jobs.schema import VERSION_TABLE
from tests.acceptance.databases import NO_DATABASE
from tests.acceptance.gateways import Gateway, environment, gateway_with, start

pytestmark = pytest.mark.anyio

TEXT = {"text": "This product is amazing!"}


@pytest.fixture
def database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of the test's gateways, in a directory that does not exist yet."""
    path = tmp_path / "var" / "jobs.sqlite3"
    monkeypatch.setattr("tests.acceptance.gateways.new_database", lambda: f"sqlite:///{path}")
    return path


async def refused(**variables: str) -> tuple[int | None, str]:
    """Exit status and the last line of a gateway that does not start."""
    process = await start(**variables)
    _, stderr = await process.communicate()
    return process.returncode, stderr.decode().splitlines()[-1]


async def until_claimed_for(gateway: Gateway) -> None:
    """Without a router nothing is claimed; the database is known soon."""
    async with asyncio.timeout(30), gateway.http() as http:
        while (await http.get("/readyz")).json()["database"] != "connected":  # noqa: ASYNC110
            await asyncio.sleep(0.05)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
async def test_an_accepted_job_and_its_key_outlive_the_process(database: Path, number: signal.Signals) -> None:
    headers = {"Idempotency-Key": "order-17"}
    async with gateway_with() as gateway, gateway.http() as http:
        response = await http.post("/predict", json=TEXT, headers=headers)
        assert response.status_code == 202
        assert database.stat().st_size > 0  # noqa: ASYNC240
        gateway.process.send_signal(number)
        assert await gateway.exit_status() == (0 if number == signal.SIGTERM else -number)
    async with gateway_with() as gateway, gateway.http() as http:
        again = await http.post("/predict", json=TEXT, headers=headers)
        assert (again.status_code, again.json()["job_id"]) == (200, response.json()["job_id"])
        other = await http.post("/predict", json={"text": "Another"}, headers=headers)
        assert other.status_code == 422
        job = (await http.get(response.headers["location"])).json()
        assert (job["status"], job["attempt"]) == ("pending", 0)  # no router is no attempt


async def test_a_second_process_on_the_same_file_is_refused_in_one_line(database: Path) -> None:
    async with gateway_with():
        status, line = await refused()
    assert status == 1
    assert line.startswith("rest_gateway: ")
    assert "jobs.sqlite3" in line


async def test_several_workers_on_a_file_are_refused_in_one_line() -> None:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "rest_gateway"),
        env=environment(WORKERS="2") | {"DATABASE_URL": "sqlite:///./var/x.sqlite3"},
        stderr=asyncio.subprocess.PIPE,
    )
    _, stderr = await process.communicate()
    assert process.returncode == 2
    (line,) = stderr.decode().splitlines()
    assert line.startswith("rest_gateway: bad setting: GATEWAY_WORKERS=2 needs a database that several processes")


# Bug: a traceback for the port; and a gateway that took the other for a database that is away, and waited for it.
@pytest.mark.parametrize("url", ["postgresql://h:5432x/d", "postgresql://h/d?sslmode=x"])
async def test_a_url_that_only_its_driver_can_judge_is_refused_in_one_line(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.acceptance.gateways.new_database", lambda: url)
    status, line = await refused()
    assert status == 1
    assert line.startswith("rest_gateway: DATABASE_URL: cannot be used: ")


async def test_tables_that_are_missing_or_newer_are_refused_in_one_line(database: Path) -> None:
    status, line = await refused(MIGRATE="false")
    assert status == 1
    assert line.startswith("rest_gateway: ")
    async with gateway_with() as gateway:
        await until_claimed_for(gateway)
    connection = sqlite3.connect(database)
    with connection:
        connection.execute(f"UPDATE {VERSION_TABLE} SET version_num = 'of_next_year'")
    connection.close()
    status, line = await refused()
    assert status == 1
    assert line.startswith("rest_gateway: ")
    assert "of_next_year" in line


async def test_the_gateway_starts_without_its_database_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.acceptance.gateways.new_database", lambda: NO_DATABASE)
    async with gateway_with() as gateway, gateway.http() as http:
        assert any("the gateway starts without it" in line for line in gateway.log)
        assert (await http.get("/healthz")).status_code == 200
        for method, path in (("POST", "/predict"), ("GET", "/jobs")):
            response = await http.request(method, path, json=TEXT)
            assert (response.status_code, response.headers["retry-after"]) == (503, "2")
            assert response.headers["content-type"] == "application/problem+json"
        assert (await http.get("/readyz")).json()["database"] == "away"
        gateway.process.send_signal(signal.SIGTERM)
        assert await gateway.exit_status() == 0


async def test_each_transition_is_a_line_with_the_jobs_id(database: Path) -> None:
    async with gateway_with() as gateway, gateway.http() as http:
        path = (await http.post("/predict", json=TEXT)).headers["location"]
        await http.post(f"{path}/cancel")
        gateway.process.send_signal(signal.SIGTERM)
        assert await gateway.exit_status() == 0
        job_id = path.removeprefix("/jobs/")
        lines = [line for line in gateway.log if job_id in line]
        assert [re.sub(r".* INFO rest_gateway\.jobs\.\w+: ", "", line) for line in lines] == [
            f"job {job_id} text: pending",
            f"job {job_id} text: cancelled",
        ]
