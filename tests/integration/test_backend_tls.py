"""Backends over TLS: whose certificates are taken, what is told when they are not, and certificates that change."""

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import pytest
import trustme

from router.config import TlsSettings
from router.dispatch.certificates import Certificates
from router.dispatch.replica import Replica
from router.server import RouterServer
from tests.builders import make_batch, make_block
from tests.integration.stack import router_settings
from tests.open_inference_server import OpenInferenceServer, ServedModel

pytestmark = pytest.mark.anyio

PATIENCE_S = 30.0
LOOPBACK = "127.0.0.1"


class Authority:
    """An authority, its file, and what it has signed."""

    def __init__(self, folder: Path, name: str) -> None:
        self._ca = trustme.CA(organization_name=name)
        self._folder = folder
        self.file = folder / f"{name}.pem"
        self._ca.cert_pem.write_to_path(str(self.file))

    def server(self, *names: str, asks_clients: bool = False) -> grpc.ServerCredentials:
        """Of a server by these names; it may ask clients for certificates of this authority."""
        key, chain = self._sign(*names)
        roots = self._ca.cert_pem.bytes() if asks_clients else None
        return grpc.ssl_server_credentials([(key, chain)], roots, require_client_auth=asks_clients)

    def client(self) -> dict[str, str]:
        """The settings of a client's certificate."""
        key, chain = self._sign("router.test")
        files = {"key_file": self._folder / "client.key", "cert_file": self._folder / "client.pem"}
        files["key_file"].write_bytes(key)
        files["cert_file"].write_bytes(chain)
        return {name: str(file) for name, file in files.items()}

    def _sign(self, *names: str) -> tuple[bytes, bytes]:
        signed = self._ca.issue_cert(*names)
        return signed.private_key_pem.bytes(), b"".join(blob.bytes() for blob in signed.cert_chain_pems)


@pytest.fixture
def ours(tmp_path: Path) -> Authority:
    return Authority(tmp_path, "ours")


@pytest.fixture
def theirs(tmp_path: Path) -> Authority:
    return Authority(tmp_path, "theirs")


def server_of(credentials: grpc.ServerCredentials, listen: str = f"{LOOPBACK}:0") -> OpenInferenceServer:
    return OpenInferenceServer({"m": ServedModel()}, credentials=credentials, listen=listen)


@asynccontextmanager
async def replica_at(address: str, **tls: str) -> AsyncIterator[Replica]:
    replica = Replica(
        address,
        batch_timeout_s=60,
        max_message_bytes=2**20,
        max_in_flight=1,
        certificates=Certificates(TlsSettings(**tls)),
    )
    replica.start(lambda: None)
    try:
        yield replica
    finally:
        await replica.aclose()


async def until(condition: Callable[[], bool]) -> None:
    """There is no event of all that is waited for here."""
    async with asyncio.timeout(PATIENCE_S):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def answers(replica: Replica) -> bool:
    await until(lambda: replica.is_connected)
    return (await replica.infer(make_batch(make_block(1).whole()))).batch_rows == 1


async def test_a_server_of_the_named_authority_is_taken(ours: Authority) -> None:
    async with (
        server_of(ours.server(LOOPBACK)) as server,
        replica_at(server.address, ca_file=str(ours.file)) as replica,
    ):
        assert await answers(replica)


async def test_without_an_authority_the_systems_are_taken(ours: Authority, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GRPC_DEFAULT_SSL_ROOTS_FILE_PATH", raising=False)  # has the last word where it is set
    monkeypatch.setenv("SSL_CERT_FILE", str(ours.file))  # what OpenSSL goes by
    async with server_of(ours.server(LOOPBACK)) as server, replica_at(server.address) as replica:
        assert await answers(replica)


@pytest.mark.parametrize("is_named", [True, False])
async def test_a_server_of_another_authority_is_told_of_once_with_the_reason_and_never_connected(
    ours: Authority, theirs: Authority, is_named: bool, caplog: pytest.LogCaptureFixture
) -> None:
    tls = {"ca_file": str(ours.file)} if is_named else {}  # else the system's
    async with server_of(theirs.server(LOOPBACK)) as server, replica_at(server.address, **tls) as replica:
        complaint = f"backend {server.address} cannot be reached, trying on: "
        await until(lambda: complaint in caplog.text)
        assert "CERTIFICATE_VERIFY_FAILED" in caplog.text
        await asyncio.sleep(0.5)  # some attempts more
        assert caplog.text.count(complaint) == 1
        assert not replica.is_connected


async def test_a_server_by_another_name_is_taken_only_where_that_is_said(
    ours: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    async with server_of(ours.server("triton.test")) as server:
        async with replica_at(server.address, ca_file=str(ours.file)) as replica:
            await until(lambda: "cannot be reached, trying on" in caplog.text)
            assert "Hostname Verification Check failed" in caplog.text
            assert not replica.is_connected
        async with replica_at(server.address, ca_file=str(ours.file), server_name="triton.test") as replica:
            assert await answers(replica)


async def test_a_server_that_asks_for_a_certificate_gets_ours(
    ours: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    async with server_of(ours.server(LOOPBACK, asks_clients=True)) as server:
        async with replica_at(server.address, ca_file=str(ours.file), **ours.client()) as replica:
            assert await answers(replica)
        async with replica_at(server.address, ca_file=str(ours.file)) as replica:
            await until(lambda: "cannot be reached, trying on" in caplog.text)
            assert not replica.is_connected


async def test_certificates_that_have_changed_are_taken_with_the_next_connection(
    ours: Authority, theirs: Authority, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    trusted = tmp_path / "trusted.pem"
    trusted.write_bytes(ours.file.read_bytes())
    async with (
        server_of(ours.server(LOOPBACK)) as server,
        replica_at(server.address, ca_file=str(trusted)) as replica,
    ):
        assert await answers(replica)
        await server.__aexit__()
        await until(lambda: not replica.is_connected)
        async with server_of(theirs.server(LOOPBACK), server.address):
            trusted.write_bytes(b"half a fi")
            await until(lambda: "those known before stay" in caplog.text)
            assert not replica.is_connected
            trusted.write_bytes(theirs.file.read_bytes())
            assert await answers(replica)
    assert caplog.text.count("certificates have changed") == 1


async def test_no_plaintext_reaches_a_server_with_tls(ours: Authority) -> None:
    with socket.socket() as taken:
        taken.bind((LOOPBACK, 0))
        taken.listen()
        taken.setblocking(False)
        address = f"{LOOPBACK}:{taken.getsockname()[1]}"
        async with replica_at(address, ca_file=str(ours.file)):
            loop = asyncio.get_running_loop()
            peer, _ = await asyncio.wait_for(loop.sock_accept(taken), PATIENCE_S)
            with peer:
                hello = await asyncio.wait_for(loop.sock_recv(peer, 3), PATIENCE_S)
    assert hello[:2] == b"\x16\x03"  # a TLS handshake


@pytest.mark.parametrize("entry", ["{address}", "dns:///localhost:{port}", "file:{file}"])
async def test_all_kinds_of_addresses_are_reached_by_tls(ours: Authority, entry: str, tmp_path: Path) -> None:
    async with server_of(ours.server("triton.test")) as server:
        file = tmp_path / "replicas"
        file.write_text(server.address)
        entry = entry.format(address=server.address, port=server.address.rpartition(":")[2], file=file)
        tls = {"ca_file": str(ours.file), "server_name": "triton.test"}
        settings = router_settings([], backends={"mock": {"addresses": [entry], "tls": tls}})
        router = RouterServer(settings)
        await router.start()
        try:
            labels = {"backend": "mock"}
            await until(lambda: router.metrics.registry.get_sample_value("router_ready_replicas", labels) == 1)
        finally:
            await router.stop()
