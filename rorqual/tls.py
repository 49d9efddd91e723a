"""TLS between processes: files of a certificate, their check, and credentials that follow the files.

The options of routers, workers and the autoscaler (`add_tls_options`, `read_tls`) and of the router's gateways
(`read_gateway_tls`). Between components TLS is mutual: a server demands a certificate of the CA, and a client checks
the server's name, which is one name for all, since workers are reached by IP. Files are looked at whenever a connection
begins, so a renewed certificate needs no restart; files that cannot be used leave the last good ones in place. It never
writes a file, and never logs what is in one.
"""

from __future__ import annotations

import argparse
import logging
import ssl
import threading
from dataclasses import dataclass
from pathlib import Path

import grpc

from rorqual.errors import ConfigError
from rorqual.telemetry import fields

log = logging.getLogger(__name__)

NAME = "rorqual.internal"
HANDSHAKE_SECONDS_MAX = 10.0
"""Whoever connects and does not finish the handshake is cut off."""

SERVER_OPTIONS = (("grpc.server_handshake_timeout_ms", int(HANDSHAKE_SECONDS_MAX * 1000)),)

_EXPIRED, _NOT_YET, _WRONG_NAME = 10, 9, 62  # OpenSSL's X509_V_ERR_...
_ROUNDS_MAX = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class TlsFiles:
    """PEM files. Without `ca` (gateways) clients are asked for no certificate."""

    cert: Path  # the chain, own certificate first
    key: Path
    ca: Path | None = None
    name: str = NAME  # in the certificates of servers
    option: str = "--tls"  # what the options begin with, for messages

    def check(self, *, serves: bool) -> None:
        """Raises ConfigError naming the option: missing, unreadable, not a pair, expired, not a CA, of another CA, or,
        of a server, without the name."""
        for what, path in (("cert", self.cert), ("key", self.key), ("ca", self.ca)):
            if path is not None:
                _check_readable(path, f"{self.option}-{what}")
        server = self.server_context()
        client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        client.check_hostname = self.ca is not None and serves
        if self.ca is None:
            # The certificate vouches for itself: what is left to find is whether it is in time and for servers.
            client.verify_flags |= ssl.VerifyFlags.VERIFY_X509_PARTIAL_CHAIN
            client.load_verify_locations(self.cert)
        else:
            self._load_ca(client)
            client.load_cert_chain(self.cert, self.key, password="")
        try:
            _shake_hands(client, server, name=self.name if client.check_hostname else None)
        except ssl.SSLCertVerificationError as error:
            raise ConfigError(self._flaw(error)) from None
        except ssl.SSLError as error:
            raise ConfigError(f"{self.option}-cert: {self.cert} cannot be used: {_reason(error)}") from None

    def server_context(self) -> ssl.SSLContext:
        """Of `ssl`, for servers that are not gRPC's. Raises ConfigError."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        try:
            # The empty password is for a key that has one: OpenSSL would ask the terminal.
            context.load_cert_chain(self.cert, self.key, password="")
        except (ssl.SSLError, OSError, ValueError) as error:
            raise ConfigError(
                f"{self.option}-cert and {self.option}-key: {self.cert} and {self.key} are no pair of a certificate"
                f" and its key without a password: {_reason(error)}"
            ) from None
        if self.ca is not None:
            self._load_ca(context)
            context.verify_mode = ssl.CERT_REQUIRED
        return context

    def _load_ca(self, context: ssl.SSLContext) -> None:
        try:
            context.load_verify_locations(self.ca)
        except (ssl.SSLError, OSError) as error:
            raise ConfigError(
                f"{self.option}-ca: {self.ca} has no certificate in PEM: {_reason(error)}"
            ) from None
        if context.cert_store_stats()["x509_ca"] == 0:
            raise ConfigError(f"{self.option}-ca: {self.ca} has no certificate of a CA")

    def _flaw(self, error: ssl.SSLCertVerificationError) -> str:
        what = f"{self.option}-cert: {self.cert}"
        if error.verify_code == _EXPIRED:
            return f"{what}, or its CA's certificate, has expired"
        if error.verify_code == _NOT_YET:
            return f"{what}, or its CA's certificate, is not valid yet; is this machine's clock right?"
        if error.verify_code == _WRONG_NAME:
            return f"{what} has no subject alternative name {self.name!r}, which peers ask for (--tls-name)"
        of_ca = "" if self.ca is None else f" against {self.option}-ca {self.ca}"
        return f"{what} does not hold{of_ca}: {error.verify_message}"


class TlsKeeper:
    """The last good content of the files. Of any thread: gRPC asks from its own."""

    def __init__(self, files: TlsFiles, *, serves: bool) -> None:
        """Raises ConfigError: the files must be good at the start."""
        self.files = files
        self.version = 0  # counts contents
        self._serves = serves
        self._lock = threading.Lock()
        self._seen = _signature(files)
        self._content = self._read()
        self._context: ssl.SSLContext = files.server_context()

    def server_credentials(self) -> grpc.ServerCredentials:
        """For a gRPC server. Each handshake uses what the files hold then."""
        known = -1

        def fetch() -> grpc.ServerCertificateConfiguration | None:
            nonlocal known
            self.look()
            if known == self.version:
                return None
            known = self.version
            return self._configuration()

        known = self.version
        return grpc.dynamic_ssl_server_credentials(
            self._configuration(),
            fetch,  # pyright: ignore[reportArgumentType]  # None: as before, which the stubs do not know
            require_client_authentication=self.files.ca is not None,
        )

    def client_credentials(self) -> grpc.ChannelCredentials:
        """For one gRPC channel, as the files are now."""
        self.look()
        cert, key, ca = self._content
        return grpc.ssl_channel_credentials(ca or None, key, cert)

    def client_options(self) -> tuple[tuple[str, str], ...]:
        return (("grpc.ssl_target_name_override", self.files.name),)

    def listening_context(self) -> ssl.SSLContext:
        """For a server of asyncio. Each handshake is given the context of the files as they are then."""
        front = self.files.server_context()

        def turn(connection: ssl.SSLObject, _name: str | None, _front: ssl.SSLContext) -> None:
            self.look()
            connection.context = self._context

        front.sni_callback = turn  # called for clients that name no server, too
        return front

    def look(self) -> None:
        """Take what has changed, if it can be used. What is wrong with a change is logged once."""
        with self._lock:
            signature = _signature(self.files)
            if signature == self._seen:
                return
            self._seen = signature
            try:
                content = self._read()
                context = self.files.server_context()
                if _signature(self.files) != signature:
                    self._seen = ()  # they were just being replaced: looked at again at the next connection
                    return
            except ConfigError as error:
                log.warning("kept the last good certificate %s", fields(error=str(error)))
                return
            self._content, self._context = content, context
            self.version += 1
        log.info("took a new certificate %s", fields(file=self.files.cert))

    def _read(self) -> tuple[bytes, bytes, bytes]:
        self.files.check(serves=self._serves)
        try:
            ca = b"" if self.files.ca is None else self.files.ca.read_bytes()
            return self.files.cert.read_bytes(), self.files.key.read_bytes(), ca
        except OSError as error:
            raise ConfigError(f"{self.files.option}-cert: cannot be read: {error.strerror}") from None

    def _configuration(self) -> grpc.ServerCertificateConfiguration:
        cert, key, ca = self._content
        return grpc.ssl_server_certificate_configuration([(key, cert)], root_certificates=ca or None)


def add_tls_options(parser: argparse.ArgumentParser) -> None:
    """The options of every process that talks to workers or routers."""
    group = parser.add_argument_group(
        "TLS between components",
        "All three files or none. Peers must have certificates of the same CA. Files are read anew as they change."
        " One-sided reads of memory and the metrics port are not encrypted.",
    )
    group.add_argument("--tls-cert", type=Path, metavar="FILE", help="certificate chain of this process, PEM")
    group.add_argument("--tls-key", type=Path, metavar="FILE", help="its key, PEM, without a password")
    group.add_argument("--tls-ca", type=Path, metavar="FILE", help="certificates of the CA of all peers, PEM")
    group.add_argument(
        "--tls-name",
        default=NAME,
        metavar="NAME",
        help=f"in the certificate of every worker; its address is not looked at (default {NAME})",
    )


def add_gateway_tls_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("TLS towards clients", "For HTTP and gRPC. Both files or neither.")
    group.add_argument("--gateway-tls-cert", type=Path, metavar="FILE", help="certificate chain, PEM")
    group.add_argument(
        "--gateway-tls-key", type=Path, metavar="FILE", help="its key, PEM, without a password"
    )


def read_tls(args: argparse.Namespace, *, serves: bool) -> TlsFiles | None:
    """What `add_tls_options` has parsed, checked; None: no TLS. `serves`: peers connect to this process, so its
    certificate must have the name. Raises ConfigError naming the option."""
    given = {f"--tls-{what}": getattr(args, f"tls_{what}") for what in ("cert", "key", "ca")}
    if not _all_or_none(given):
        return None
    if not args.tls_name:
        raise ConfigError("--tls-name must not be empty")
    files = TlsFiles(cert=args.tls_cert, key=args.tls_key, ca=args.tls_ca, name=args.tls_name)
    files.check(serves=serves)
    return files


def read_gateway_tls(args: argparse.Namespace) -> TlsFiles | None:
    """What `add_gateway_tls_options` has parsed, checked. Raises ConfigError naming the option."""
    given = {f"--gateway-tls-{what}": getattr(args, f"gateway_tls_{what}") for what in ("cert", "key")}
    if not _all_or_none(given):
        return None
    files = TlsFiles(cert=args.gateway_tls_cert, key=args.gateway_tls_key, option="--gateway-tls")
    files.check(serves=True)
    return files


def explain_unreachable(details: str, *, is_tls: bool) -> str:
    """gRPC's text on a connection that failed, as one line that says so when the cause is TLS on one side only, or a
    certificate."""
    line = " ".join(details.split())
    lower = line.lower()
    if is_tls and ("wrong_version_number" in lower or "http_request" in lower):
        return "the peer does not speak TLS, and we do (--tls-cert)"
    if (is_tls and "certificate_verify_failed" in lower) or "hostname verification" in lower:
        return f"the peer's certificate is not of our CA (--tls-ca) or has not the name --tls-name: {line}"
    if is_tls and ("alert" in lower or "certificate" in lower):
        return f"the TLS handshake failed; does the peer know our CA (--tls-ca)? {line}"
    is_cut = "socket closed" in lower or "connection reset" in lower or "before settings" in lower
    if is_tls and is_cut and "failed to connect" in lower:
        # With TLS 1.3 a client is done before the server has looked at its certificate.
        return (
            f"the peer closed the connection as it began; is our certificate of its CA (--tls-cert)? {line}"
        )
    if not is_tls and is_cut:
        return f"the peer closed the connection; does it speak TLS (--tls-cert)? {line}"
    return line


def _all_or_none(given: dict[str, Path | None]) -> bool:
    missing = [option for option, value in given.items() if value is None]
    if missing and len(missing) < len(given):
        there = [option for option in given if option not in missing]
        raise ConfigError(f"{' and '.join(there)} need {' and '.join(missing)} too")
    return not missing


def _check_readable(path: Path, option: str) -> None:
    try:
        with path.open("rb") as file:
            file.read(1)
    except OSError as error:
        raise ConfigError(f"{option}: {path}: {error.strerror}") from None


def _shake_hands(client: ssl.SSLContext, server: ssl.SSLContext, *, name: str | None) -> None:
    """In memory, as two processes with these files would. Raises ssl.SSLError."""
    to_client, to_server = ssl.MemoryBIO(), ssl.MemoryBIO()
    sides = [
        client.wrap_bio(to_client, to_server, server_hostname=name),
        server.wrap_bio(to_server, to_client, server_side=True),
    ]
    for _ in range(_ROUNDS_MAX):
        for side in list(sides):
            try:
                side.do_handshake()
                sides.remove(side)
            except ssl.SSLWantReadError:
                pass
        if not sides:
            return
    raise ssl.SSLError("the handshake did not end")


def _signature(files: TlsFiles) -> tuple[tuple[int, int, int], ...]:
    """Changes whenever a file is replaced or written. Of a file that is missing: zeros."""
    found: list[tuple[int, int, int]] = []
    for path in (files.cert, files.key, files.ca):
        if path is not None:
            try:
                status = path.stat()
                found.append((status.st_ino, status.st_mtime_ns, status.st_size))
            except OSError:
                found.append((0, 0, 0))
    return tuple(found)


def _reason(error: Exception) -> str:
    return getattr(error, "reason", None) or getattr(error, "strerror", None) or str(error)
