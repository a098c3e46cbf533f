"""Certificates: what a backend's TLS settings point to, and whether it has changed meanwhile.

Certificates are rotated by whoever issues them, in their files and without telling anybody. A connection keeps what it
was opened with for as long as it lasts, so the files are read again for each new replica and whenever a connection
cannot be had: that is all that a rotation needs. What does not fit together is passed over, as a file may be half
written, or the key there and its certificate not yet; then what was known last stays.
"""

import logging
import os
import ssl
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import grpc

from router.config import TlsSettings, check_certificates

logger = logging.getLogger(__name__)

# Where systems keep the authorities they trust, if Python does not know it; as Go's crypto/x509 has it.
SYSTEM_BUNDLES = (
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
    "/etc/ssl/cert.pem",
)
GRPC_BUNDLE_VARIABLE = "GRPC_DEFAULT_SSL_ROOTS_FILE_PATH"


@dataclass(frozen=True, slots=True)
class Pems:
    """The contents of the files; None where there is none. Without authorities gRPC has its own."""

    ca: bytes | None
    key: bytes | None
    cert: bytes | None

    def credentials(self) -> grpc.ChannelCredentials:
        """For a channel."""
        return grpc.ssl_channel_credentials(self.ca, self.key, self.cert)


class Certificates:
    """The files of one backend. Raises ValueError when they cannot be used."""

    def __init__(self, tls: TlsSettings) -> None:
        self._tls = tls
        # State: what was found last that fits together, and what was wrong since.
        self._known = _read(tls)
        self._complaint = ""

    @property
    def options(self) -> Sequence[tuple[str, str]]:
        """The options of a channel: the name that the server's certificate must bear, if it is not the address."""
        return [("grpc.ssl_target_name_override", self._tls.server_name)] if self._tls.server_name else []

    def read(self) -> Pems:
        """What is in the files now. From any thread."""
        try:
            self._known = _read(self._tls)
        except ValueError as error:
            if self._complaint != str(error):
                logger.warning("certificates: %s; those known before stay", error)
            self._complaint = str(error)
        else:
            self._complaint = ""
        return self._known


def _read(tls: TlsSettings) -> Pems:
    check_certificates(tls)
    try:
        ca, key, cert = (
            Path(file).read_bytes() if file else None for file in (tls.ca_file, tls.key_file, tls.cert_file)
        )
    except OSError as error:
        raise ValueError(str(error)) from error
    return Pems(ca or _system_authorities(), key, cert)


def _system_authorities() -> bytes | None:
    """None: gRPC's own bundle, or the one that its variable names."""
    if GRPC_BUNDLE_VARIABLE in os.environ:
        return None
    for file in (ssl.get_default_verify_paths().cafile, *SYSTEM_BUNDLES):
        if file and Path(file).is_file():
            return Path(file).read_bytes()
    return None
