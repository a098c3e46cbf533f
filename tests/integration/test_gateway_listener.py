"""Closing a listening socket in steps."""

import socket
import sys
from collections.abc import Iterator

import pytest

from rest_gateway.config import Settings
from rest_gateway.listener import bind, has_waiting, refuse_new, url_of

SYN_SENT, ESTABLISHED = 2, 1  # the first byte of TCP_INFO


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with bind(Settings(listen="127.0.0.1:0")) as listener:
        yield listener


def connecting(listener: socket.socket) -> socket.socket:
    """On the loopback a handshake is over when the call returns."""
    client = socket.socket()
    client.setblocking(False)
    client.connect_ex(listener.getsockname())
    return client


def state(client: socket.socket) -> int:
    return client.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0]


def test_a_connection_waits_until_it_is_accepted(listener: socket.socket) -> None:
    assert not has_waiting(listener)
    with connecting(listener):
        assert has_waiting(listener)
        listener.accept()[0].close()
        assert not has_waiting(listener)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can")
def test_after_the_door_is_shut_those_inside_are_served_and_nobody_comes_in(listener: socket.socket) -> None:
    with connecting(listener) as early:
        # Newer kernels let root only; others' late clients come in until the socket is closed.
        expected = SYN_SENT if refuse_new(listener) else ESTABLISHED
        with connecting(listener) as late:
            assert (state(early), state(late)) == (ESTABLISHED, expected)
            accepted, _ = listener.accept()
            assert has_waiting(listener) is (expected == ESTABLISHED)
    with accepted, connecting(listener) as later:
        refuse_new(listener)  # twice is no fault
        assert state(later) == expected


def test_the_url_has_the_port_that_the_kernel_chose(listener: socket.socket) -> None:
    assert url_of(listener) == f"http://127.0.0.1:{listener.getsockname()[1]}"


def test_where_only_root_may_refuse_new_connections_the_drain_goes_on() -> None:
    """A kernel that forbids users the filter once ended the drain, silently, and the gateway never left."""

    class Forbidding(socket.socket):
        def setsockopt(self, *_: object) -> None:
            raise PermissionError("Operation not permitted")

    with Forbidding() as listener:
        assert not refuse_new(listener)
