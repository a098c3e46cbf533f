"""The listening socket, and how to close one without losing a connection.

The kernel completes handshakes by itself and puts the connections into the socket's backlog, to be accepted. Their
clients are connected and may have sent a request already; closing the socket resets them all. Under load there is
always one of them, so a server that just closes loses some (32 callers: 17 per stop, measured). Hence three steps:
`refuse_new`, then accept until nothing `has_waiting`, then close.
"""

import ctypes
import select
import socket
import struct
import sys

from rest_gateway.config import Settings, split_address

SO_ATTACH_FILTER = 26  # linux/asm-generic/socket.h

# Classic BPF over the TCP header: drop what has SYN without ACK (flags: byte 13), keep the rest.
_DROP_SYN = struct.pack(
    "HBBI" * 4,
    *(0x30, 0, 0, 13),  # load the byte
    *(0x54, 0, 0, 0x12),  # keep the bits of SYN and ACK
    *(0x15, 1, 0, 0x02),  # only SYN: skip one
    *(0x06, 0, 0, 0xFFFFFFFF),  # accept the packet
) + struct.pack("HBBI", 0x06, 0, 0, 0)  # drop it


def bind(settings: Settings) -> socket.socket:
    """A listening socket for `settings.listen`. Raises OSError, when the port is in use among others."""
    host, port = split_address(settings.listen)
    family, *_ = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    return socket.create_server((host, port), family=family, backlog=2048)


def url_of(listener: socket.socket) -> str:
    """`http://127.0.0.1:8000`, with the port that the kernel chose for port 0."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def refuse_new(listener: socket.socket) -> bool:
    """Lets no further handshake begin, in no process that shares the socket; those that have begun end well.

    False where that cannot be had.

    A refused client's kernel tries again after a second, finds the port closed and says so. Only Linux has this, and
    newer kernels allow it to root only; elsewhere connections go on to come in until the socket is closed.
    """
    if sys.platform != "linux":
        return False
    code = ctypes.create_string_buffer(_DROP_SYN, len(_DROP_SYN))
    program = struct.pack("HP", len(_DROP_SYN) // 8, ctypes.addressof(code))
    try:
        listener.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, program)
    except PermissionError:
        return False
    return True


def has_waiting(listener: socket.socket) -> bool:
    """Whether there is a connection to accept."""
    poller = select.poll()
    poller.register(listener, select.POLLIN)
    return bool(poller.poll(0))
