"""What the chaos tests of jobs are made of: gateways that die and come back, clients that never give up, and a ledger.

The ledger believes nobody. It holds what the clients asked for under which key, every job id that a gateway
acknowledged, and every state of every job that anybody was shown: in answers, long polls, streams of events, pages.
`History` compares these while they come; `Books` reads from the gateways' logs which process ran which attempt when.
"""

import asyncio
import contextlib
import datetime as dt
import itertools
import json
import queue
import random
import re
import signal
import time
from collections import Counter
from collections.abc import AsyncGenerator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal, NamedTuple, TypeAlias

import numpy as np

from mock_nn.models import expected
from mock_nn.sentiment import score
from rest_gateway.jobs.states import STATUSES, TERMINAL
from tests.acceptance.processes import Program

Document: TypeAlias = dict[str, Any]
ANSWER_S: Final = 2.0  # a client goes to another gateway when one has been silent for so long
AGAIN_S: Final = 0.1  # between two tries of one request
MAX_LOST_LEASES: Final = 5  # what a job may lose before it is given up; rest_gateway.jobs.records.StoreSettings


# Gateways


@dataclass(eq=False)
class Life:
    """One process of a gateway."""

    program: Program
    killed_at_s: float | None = None


class Seat:
    """A gateway's place: one process after the other, each on another port. Times are those of `time.time`."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._environment = environment
        self.lives: list[Life] = []
        self.address: tuple[str, int] | None = None
        self.state: Literal["serving", "frozen", "down"] = "down"
        self.is_up = asyncio.Event()

    async def start(self) -> None:
        life = Life(Program(["rest_gateway"], self._environment))
        self.lives.append(life)
        try:
            match = await asyncio.to_thread(life.program.wait_for, r"listening on http://([\d.]+):(\d+)")
        except queue.Empty:
            raise AssertionError(f"a gateway does not start: {life.program.lines}") from None
        self.address, self.state = (match[1], int(match[2])), "serving"
        self.is_up.set()

    async def kill(self) -> None:
        life, self.state, self.address = self.lives[-1], "down", None
        self.is_up.clear()
        life.killed_at_s = time.time()
        life.program.send(signal.SIGKILL)
        assert await asyncio.to_thread(life.program.wait) == -signal.SIGKILL

    def freeze(self) -> None:
        """Its port still takes connections; nobody answers."""
        self.state = "frozen"
        self.lives[-1].program.send(signal.SIGSTOP)

    def thaw(self) -> None:
        self.state = "serving"
        self.lives[-1].program.send(signal.SIGCONT)

    async def stop(self) -> int:
        """Drains; the exit code."""
        self.lives[-1].program.send(signal.SIGTERM)
        return await asyncio.to_thread(self.lives[-1].program.wait)

    def end(self) -> None:
        for life in self.lives:
            life.program.end()


# Clients


class Unanswered(Exception):
    """Nobody knows whether the request was carried out."""


class Reply(NamedTuple):
    status: int
    document: Document


class Client:
    """One keep-alive connection, by hand, to whatever gateway answers; after a failure it goes to the next one."""

    def __init__(self, seats: Sequence[Seat], rng: random.Random) -> None:
        first = rng.randrange(len(seats))
        self._seats = [*seats[first:], *seats[:first]]
        self._connection: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(
        self,
        method: str,
        path: str,
        body: Document | None = None,
        headers: Mapping[str, str] | None = None,
        patience_s: float = ANSWER_S,
    ) -> Reply:
        """Raises Unanswered."""
        with self._closing_on_failure():
            async with asyncio.timeout(patience_s):
                reader = await self._send(method, path, body, headers or {})
                status, answered = await _read_head(reader)
                content = await reader.readexactly(int(answered["content-length"]))
        return Reply(status, json.loads(content))

    async def events(self, path: str, seen: int, patience_s: float) -> AsyncGenerator[Document, None]:
        """The job's changes after version `seen`, until the stream ends. Raises Unanswered."""
        try:
            with self._closing_on_failure():
                async with asyncio.timeout(patience_s):
                    reader = await self._send("GET", f"{path}/events", None, {"Last-Event-ID": str(seen)})
                    status, _ = await _read_head(reader)
                    while status == 200 and (event := await _read_chunk(reader)):
                        if data := re.search(rb"^data: (.*)$", event, re.MULTILINE):
                            yield json.loads(data[1])
        finally:
            self.close()

    async def _send(
        self, method: str, path: str, body: Document | None, headers: Mapping[str, str]
    ) -> asyncio.StreamReader:
        if self._connection is None:
            self._connection = await asyncio.open_connection(*await self._next_address())
        reader, writer = self._connection
        content = b"" if body is None else json.dumps(body).encode()
        fields = {"Host": "gateway", "Content-Length": str(len(content)), **headers}
        head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
        writer.write(f"{method} {path} HTTP/1.1\r\n{head}\r\n".encode() + content)
        return reader

    async def _next_address(self) -> tuple[str, int]:
        """Of a gateway that is there, frozen or not, as soon as there is one."""
        while True:
            for seat in tuple(self._seats):
                self._seats.append(self._seats.pop(0))
                if seat.address is not None:
                    return seat.address
            await self._seats[0].is_up.wait()

    @contextlib.contextmanager
    def _closing_on_failure(self) -> Iterator[None]:
        try:
            yield
        except (OSError, EOFError, TimeoutError) as error:
            self.close()
            raise Unanswered(repr(error)) from error
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        if self._connection is not None:
            self._connection[1].close()
            self._connection = None


async def _read_head(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    status_line, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().splitlines()
    headers = dict(line.lower().split(": ", 1) for line in lines if line)
    return int(status_line.split()[1]), headers


async def _read_chunk(reader: asyncio.StreamReader) -> bytes:
    """Of a chunked body; empty at its end."""
    size = int(await reader.readuntil(b"\r\n"), 16)
    return (await reader.readexactly(size + 2))[:-2]


# What is asked for

_WORDS: Final = (
    *("amazing", "great", "good", "fine", "nice", "okay", "bad", "poor", "awful", "horrible", "love", "hate", "not"),
    *("very", "hardly", "extremely", "boring", "brilliant", "broken", "happy", "sad", "terrible", "useful", "useless"),
)
_KEYS: Final = (("churn", "buyer", 3), ("churn", "seller", 3), ("fraud", "", 4))


@dataclass
class Order:
    """One job that a client wants, and what came of it."""

    key: str
    body: Document
    ids: set[str] = field(default_factory=set)
    # What POST /jobs/{id}/cancel answered at last: 200 or 409; 0: somebody asked, nobody answered; None: never asked.
    cancel: int | None = None

    @property
    def is_text(self) -> bool:
        return "text" in self.body

    @property
    def headers(self) -> dict[str, str]:
        return {"Idempotency-Key": self.key} | ({} if self.is_text else {"Prefer": "respond-async"})

    def is_answered_by(self, result: Any) -> bool:  # noqa: ANN401 - JSON
        """By the mock's documented functions."""
        if self.is_text:
            sentiment, confidence = score(self.body["text"])
            return _is_json(result, {"sentiment", "confidence"}) and (
                (result["sentiment"], np.float32(result["confidence"])) == (sentiment, np.float32(confidence))
            )
        agents = self.body["agents"]
        return (
            _is_json(result, {"results", "errors"})
            and result["errors"] == {}
            and (
                result["results"].keys() == agents.keys()
                and all(_is_output_of(agent, result["results"][name]["output"]) for name, agent in agents.items())
            )
        )


def _is_json(value: object, keys: set[str]) -> bool:
    return isinstance(value, dict) and value.keys() == keys


def _is_output_of(agent: Document, output: list[float]) -> bool:
    row = np.array([agent["vector"]], "<f4")
    wanted = expected(agent["model_name"], agent["agent_type"], row)
    return np.array(output, "<f4").tobytes() == wanted.tobytes()


def draw_order(rng: random.Random, number: int) -> Order:
    """One job in ten has agents."""
    key = f"order-{number}"
    if rng.random() < 0.9:
        return Order(key, {"text": f"Number {number} is {' '.join(rng.choices(_WORDS, k=5))}!"})
    agents = {}
    for row in range(rng.randint(1, 3)):
        model, agent_type, dim = rng.choice(_KEYS)
        vector = np.array([number, *(rng.uniform(-9, 9) for _ in range(dim - 1))], "<f4").tolist()
        agents[f"agent {row}"] = {"vector": vector, "model_name": model, "agent_type": agent_type}
    return Order(key, {"agents": agents})


# The ledger


class History:
    """All that was ever shown of one job."""

    def __init__(self) -> None:
        self._versions: dict[int, tuple[str, int]] = {}
        self.end: Document | None = None
        self._ended_at_s = 0.0

    def add(self, document: Document, asked_at_s: float) -> str | None:
        """What is wrong with it, seen after the others. `asked_at_s`: when its client began to ask for it."""
        version, status, attempt = document["version"], document["status"], document["attempt"]
        if status not in STATUSES:
            return f"unknown status in {document}"
        if self._versions.setdefault(version, (status, attempt)) != (status, attempt):
            return f"version {version} was {self._versions[version]}: {document}"
        if self.end is None and status in TERMINAL:
            self.end, self._ended_at_s = document, time.monotonic()
        elif self.end is not None and status in TERMINAL and document != self.end:
            return f"ended as {self.end} and then as {document}"
        if self.end is not None and max(self._versions) > self.end["version"]:
            return f"went on after {self.end}: {document}"
        if self.end is not None and status not in TERMINAL and asked_at_s > self._ended_at_s:
            return f"was alive again after {self.end}: {document}"
        return None


class Ledger:
    """The clients' own book."""

    def __init__(self) -> None:
        self.orders: dict[str, Order] = {}  # by key
        self.histories: dict[str, History] = {}  # by job id
        self.counts: Counter[str] = Counter()
        self.problems: list[str] = []

    def saw(self, document: Document, asked_at_s: float) -> History:
        history = self.histories.setdefault(document["job_id"], History())
        if problem := history.add(document, asked_at_s):
            self.problems.append(f"job {document['job_id']} {problem}")
        return history

    def acknowledged(self, order: Order, job_id: str) -> None:
        """A gateway has answered the order with 202 or 200."""
        order.ids.add(job_id)
        self.histories.setdefault(job_id, History())

    def acknowledged_ids(self) -> set[str]:
        return {job_id for order in self.orders.values() for job_id in order.ids}

    def open_ids(self) -> list[str]:
        """Of jobs that nobody has seen end."""
        return [job_id for job_id, history in self.histories.items() if history.end is None]

    def ends(self) -> Counter[str]:
        return Counter(history.end["status"] if history.end else "lost" for history in self.histories.values())


def wrong_ends(ledger: Ledger) -> Iterator[str]:
    """Every order has one job, every job one order, and the end that its order allows."""
    known: Counter[str] = Counter(itertools.chain.from_iterable(order.ids for order in ledger.orders.values()))
    yield from (f"{job_id} belongs to {known[job_id]} orders" for job_id in ledger.histories if known[job_id] != 1)
    for order in ledger.orders.values():
        if len(order.ids) != 1:
            yield f"{order.key} has the jobs {order.ids or 'none'}"
        for job_id in order.ids:
            end = ledger.histories[job_id].end
            if end is None:
                yield f"{job_id} never ended"
            elif not _is_allowed(order, end):
                yield f"{order} ended as {end}"


def _is_allowed(order: Order, end: Document) -> bool:
    if order.cancel == 200 or (order.cancel is not None and end["status"] == "cancelled"):
        return (end["status"], end["result"], end["error"]) == ("cancelled", None, None)
    if end["status"] == "failed":  # the one reason that a fault gives
        message = str(end["error"]["message"])
        return bool(end["attempt"] >= MAX_LOST_LEASES) and message.startswith("too many processes ended")
    return end["status"] == "completed" and end["error"] is None and order.is_answered_by(end["result"])


# Clients that never give up


class Customers:
    """Everything that clients do, told to the ledger."""

    def __init__(self, seats: Sequence[Seat], ledger: Ledger, rng: random.Random) -> None:
        self._seats = seats
        self._ledger = ledger
        self._rng = rng

    @contextlib.contextmanager
    def client(self) -> Iterator[Client]:
        client = Client(self._seats, self._rng)
        try:
            yield client
        finally:
            client.close()

    async def submit(self, client: Client, order: Order) -> str:
        """Returns the job's id when a gateway has acknowledged it, however often that has to be asked for."""
        self._ledger.orders[order.key] = order
        reply = await self._insist(client, "submits", "POST", "/predict", order.body, order.headers, (200, 202))
        self._ledger.acknowledged(order, reply.document["job_id"])
        return str(reply.document["job_id"])

    async def submit_something_else(self, client: Client, order: Order) -> None:
        """With the same key: refused."""
        await self._insist(client, "misuses", "POST", "/predict", {"text": "something else"}, order.headers, (422,))

    async def cancel(self, client: Client, order: Order, job_id: str) -> None:
        order.cancel = 0
        reply = await self._insist(client, "cancels", "POST", f"/jobs/{job_id}/cancel", None, {}, (200, 409))
        order.cancel = reply.status

    async def follow_events(self, client: Client, job_id: str) -> None:
        """Until the terminal state, from gateway to gateway."""
        seen = 0
        while True:
            asked_at_s = time.monotonic()
            with contextlib.suppress(Unanswered):
                async with contextlib.aclosing(client.events(f"/jobs/{job_id}", seen, 5 * ANSWER_S)) as events:
                    async for document in events:
                        self._ledger.saw(document, asked_at_s)
                        if document["version"] <= seen:
                            self._ledger.problems.append(f"an event of version {document['version']} after {seen}")
                        seen = document["version"]
                        if document["status"] in TERMINAL:
                            return
            await asyncio.sleep(AGAIN_S)

    async def follow_polls(self, client: Client, job_id: str) -> None:
        """Until the terminal state, by long polls."""
        wait_s = round(2 * ANSWER_S)
        headers = {"Prefer": f"wait={wait_s}"}
        while True:
            path = f"/jobs/{job_id}"
            reply = await self._insist(client, "polls", "GET", path, None, headers, (200, 202), wait_s + ANSWER_S)
            if reply.document["status"] in TERMINAL:
                return

    async def look_at_pages(self, client: Client, pages: int | None = None) -> set[str]:
        """The newest jobs, or all of them; returns their ids."""
        ids: set[str] = set()
        cursor = ""
        for _ in itertools.count() if pages is None else range(pages):
            reply = await self._insist(client, "pages", "GET", f"/jobs?limit=200{cursor}", None, {}, (200,))
            ids |= {job["job_id"] for job in reply.document["jobs"]}
            if reply.document["next_cursor"] is None:
                break
            cursor = f"&cursor={reply.document['next_cursor']}"
        return ids

    async def _insist(
        self,
        client: Client,
        what: str,
        method: str,
        path: str,
        body: Document | None,
        headers: Mapping[str, str],
        wanted: tuple[int, ...],
        patience_s: float = ANSWER_S,
    ) -> Reply:
        """Asks until it is answered. 429 and 503 are no answers; every other that is not wanted is a defect."""
        while True:
            asked_at_s = time.monotonic()
            self._ledger.counts[what] += 1
            try:
                reply = await client.ask(method, path, body, headers, patience_s)
            except Unanswered:
                self._ledger.counts[f"{what} unanswered"] += 1
            else:
                for document in _jobs_in(reply.document):
                    self._ledger.saw(document, asked_at_s)
                if reply.status in wanted:
                    return reply
                self._ledger.counts[f"{what} refused with {reply.status}"] += 1
                assert reply.status in (429, 503), f"{method} {path} {body} {headers}: {reply}"
                client.close()  # the next gateway may be better off
            await asyncio.sleep(AGAIN_S)


def _jobs_in(document: Document) -> Iterable[Document]:
    if "version" in document:
        return [document]
    jobs: list[Document] = document.get("jobs", [])
    return jobs


# Faults


class Fault(NamedTuple):
    """What was done to whom; `until_s`: when it could do no more harm. Times are those of `time.time`."""

    kind: str
    from_s: float
    until_s: float


def overlapping(faults: Iterable[Fault], from_s: float, until_s: float) -> list[Fault]:
    return [fault for fault in faults if fault.from_s <= until_s and fault.until_s >= from_s]


# The gateways' logs


class Run(NamedTuple):
    life: Life
    at_s: float


_LINE: Final = re.compile(r"(\S+ \S+) \w+ rest_gateway\.jobs\.\w+: job (\S+) (.*)$")
_BEGUN: Final = re.compile(r"\w+: processing, attempt (\d+)$")
_OVER: Final = re.compile(r"\w+: (completed|failed|pending, again|cancelled)|had ended, or|is not ours any more")
_ENDED: Final = re.compile(r"\w+: (completed|failed)")
FENCED: Final = re.compile(r"had ended, or was not ours any more: attempt \d+ is void$")
_COMPLAINT: Final = re.compile(r"Traceback|(internal|unexpected) error|this is a bug")
ABANDONED: Final = re.compile(r"is not ours any more, attempt \d+ is abandoned$")


class Books:
    """What the gateways say that they did."""

    def __init__(self, lives: Iterable[Life]) -> None:
        self.runs: dict[tuple[str, int], list[Run]] = {}  # by job id and attempt
        self.held: dict[Life, dict[str, int]] = {}  # job id to attempt, when the log ends
        self.enders: dict[str, list[Life]] = {}  # by job id: who wrote that it has completed or failed
        self.notes: Counter[re.Pattern[str]] = Counter()
        self.complaints: list[str] = []  # lines that tell of a bug
        for life in lives:
            held = self.held[life] = {}
            for line in life.program.lines:
                if match := _LINE.search(line):
                    self._read(life, held, *match.groups())
                if _COMPLAINT.search(line):
                    self.complaints.append(line)

    def _read(self, life: Life, held: dict[str, int], stamp: str, job_id: str, note: str) -> None:
        self.notes.update(pattern for pattern in (FENCED, ABANDONED) if pattern.search(note))
        if begun := _BEGUN.match(note):
            held[job_id] = int(begun[1])
            self.runs.setdefault((job_id, int(begun[1])), []).append(Run(life, _seconds(stamp)))
        elif _OVER.match(note):
            held.pop(job_id, None)
        if _ENDED.match(note):
            self.enders.setdefault(job_id, []).append(life)

    def runs_twice(self) -> Iterator[str]:
        """An attempt is one process's."""
        for (job_id, attempt), runs in self.runs.items():
            if len(runs) > 1:
                yield f"{job_id}: attempt {attempt} was run {len(runs)} times"

    def ends_of_others(self, ledger: Ledger) -> Iterator[str]:
        """The fence: a job is ended once, and by who ran its last attempt."""
        for job_id, enders in self.enders.items():
            end = ledger.histories[job_id].end
            runners = [run.life for run in self.runs.get((job_id, end["attempt"] if end else 0), [])]
            if len(enders) > 1 or enders[0] not in runners:
                yield f"{job_id} was ended by {len(enders)} processes, or by one that did not run it then: {end}"

    def claimed_again(self, ledger: Ledger) -> Iterator[tuple[float, float]]:
        """For each run that a kill cut short: when its process was killed, and the seconds until the next attempt.

        Left out are those that had ended in the database, and those whose next claim no log tells of since the process
        that made it was ended before it could write the line.
        """
        for life, held in self.held.items():
            if life.killed_at_s is None:
                continue
            for job_id, attempt in held.items():
                end = ledger.histories[job_id].end
                if end is not None and end["attempt"] > attempt and (job_id, attempt + 1) in self.runs:
                    yield life.killed_at_s, self.runs[job_id, attempt + 1][0].at_s - life.killed_at_s


def too_many_runs(ledger: Ledger, faults: Sequence[Fault]) -> Iterator[str]:
    """Without a fault in its life a job is run once; each fault may cost one run."""
    for job_id, history in ledger.histories.items():
        if (end := history.end) is not None:
            suffered = overlapping(faults, _instant(end["created_at"]), _instant(end["finished_at"]))
            if end["attempt"] - 1 > len(suffered):
                yield f"{end['attempt']} attempts of {job_id} for the faults {suffered}: {end}"


def _seconds(stamp: str) -> float:
    return dt.datetime.strptime(stamp, "%Y-%m-%d %H:%M:%S,%f").astimezone().timestamp()


def _instant(text: str) -> float:
    return dt.datetime.fromisoformat(text).timestamp()
