"""Connection: the channel to one address, kept connected, in plaintext or by TLS.

It tells when the connection comes and goes, and once, why it cannot be had. While it cannot, the certificates are
looked at now and then; if they have changed another channel takes over. What is under way ends with its own channel.
"""

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any

import grpc
import grpc.aio

from protos.open_inference import open_inference_pb2 as pb
from protos.open_inference import open_inference_pb2_grpc as pb_grpc
from router.dispatch.certificates import Certificates, Pems
from router.dispatch.wire import LOST

logger = logging.getLogger(__name__)

# To find out why there is no connection.
WHY_S = 3.0
# How often certificates are looked at while there is none.
RENEW_S = 2.0
# For what is under way on a channel that was lost.
CLOSE_S = 5.0


def channel_options(max_message_bytes: int) -> list[tuple[str, int | str]]:
    """No keepalive: foreign servers answer pings with GOAWAY. Reconnects after 0.1 s at first, every 2 s at most."""
    return [
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.max_send_message_length", max_message_bytes),
        ("grpc.enable_http_proxy", 0),
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.min_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 2000),
    ]


class Connection:
    """One connection; opens at once, so make it on the loop. `on_change`: when `is_connected` has changed."""

    def __init__(
        self,
        address: str,
        *,
        max_message_bytes: int,
        certificates: Certificates | None,
        on_change: Callable[[], None],
    ) -> None:
        self._address = address
        self._max_message_bytes = max_message_bytes
        self._certificates = certificates
        self._on_change = on_change
        # State: with what certificates the channel was opened, the channel, the task that watches it; the tasks that
        # ask why there is no connection, look for other certificates, and close the channel before.
        self.is_connected = False
        self._pems = certificates.read() if certificates else None
        self._channel, self.stub, self._watch_task = self._open()
        self._side_tasks: set[asyncio.Task[None]] = set()
        if certificates:
            self._beside(self._renew(certificates), "renew")

    async def aclose(self) -> None:
        """Disconnect; what is under way is lost."""
        tasks = [self._watch_task, *self._side_tasks]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._channel.close()

    def _open(self) -> "tuple[grpc.aio.Channel, pb_grpc.GRPCInferenceServiceAsyncStub, asyncio.Task[None]]":
        options = channel_options(self._max_message_bytes)
        if self._certificates and self._pems:
            options += self._certificates.options
            channel = grpc.aio.secure_channel(self._address, self._pems.credentials(), options=options)
        else:
            channel = grpc.aio.insecure_channel(self._address, options=options)
        watch = asyncio.create_task(self._watch(channel), name=f"watch {self._address}")
        return channel, pb_grpc.GRPCInferenceServiceStub(channel), watch

    async def _watch(self, channel: grpc.aio.Channel) -> None:
        """Follow the channel's state; asking for it with try_to_connect is what makes gRPC reconnect."""
        is_told = False
        while True:
            state = channel.get_state(try_to_connect=True)
            if state is grpc.ChannelConnectivity.TRANSIENT_FAILURE and not is_told:
                is_told = True
                self._beside(self._tell_why(), "ask why")
            elif state is grpc.ChannelConnectivity.READY and not self.is_connected:
                logger.info("backend %s connected", self._address)
                self.is_connected, is_told = True, False
                self._on_change()
            elif state is not grpc.ChannelConnectivity.READY and self.is_connected:
                logger.warning("backend %s lost, reconnecting", self._address)
                self.is_connected = False
                self._on_change()
            await channel.wait_for_state_change(state)

    async def _tell_why(self) -> None:
        """The channel's state has no reason; a call that fails by it has."""
        try:
            await self.stub.ServerLive(pb.ServerLiveRequest(), timeout=WHY_S)
        except grpc.aio.AioRpcError as error:
            if error.code() in LOST and not self.is_connected:
                logger.warning("backend %s cannot be reached, trying on: %s", self._address, error.details())

    async def _renew(self, certificates: Certificates) -> None:
        """A channel that has failed tells of no further attempt, so this has a clock of its own."""
        while True:
            await asyncio.sleep(RENEW_S)
            if not self.is_connected:
                self._renew_once(await asyncio.to_thread(certificates.read))

    def _renew_once(self, pems: Pems) -> None:
        if pems == self._pems or self.is_connected:
            return
        logger.info("backend %s: certificates have changed", self._address)
        self._watch_task.cancel()
        self._beside(self._channel.close(CLOSE_S), "close")
        self._pems = pems
        self._channel, self.stub, self._watch_task = self._open()

    def _beside(self, work: Coroutine[Any, Any, None], name: str) -> None:
        task = asyncio.create_task(work, name=f"{name} {self._address}")
        self._side_tasks.add(task)
        task.add_done_callback(self._side_tasks.discard)
