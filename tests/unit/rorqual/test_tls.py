"""TLS files, checked at the start; and the session server and its clients over loopback with real certificates."""

from __future__ import annotations

import argparse
import asyncio
import logging
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from engine.worker.session_server import SessionServer
from engine.worker.sharing.lenders import LendingFailed
from engine.worker.sharing.lending_client import GrpcLenders
from rorqual.clock import SystemClock
from rorqual.errors import ConfigError
from rorqual.ids import Incarnation, LeaseName, WorkerId
from rorqual.session import PROTOCOL, Hello
from rorqual.tls import TlsFiles, TlsKeeper, add_tls_options, explain_unreachable, read_tls
from router.gateway.http1 import HttpLimits, HttpReply, HttpRequest, HttpServer
from router.session_client import GrpcTransport
from router.worker_link import SessionLost
from tests.harness.certificates import Authority, arguments


@pytest.fixture
def ca(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


def parsed(*options: str) -> TlsFiles | None:
    parser = argparse.ArgumentParser()
    add_tls_options(parser)
    return read_tls(parser.parse_args(options), serves=True)


# --- files


def test_without_options_there_is_no_tls():
    assert parsed() is None


def test_a_good_pair_is_taken(ca: Authority):
    files = ca.issue("worker")
    assert parsed(*arguments(files)) == files


@pytest.mark.parametrize("left_out", [0, 2, 4])
def test_only_some_of_the_three_are_refused_by_name(ca: Authority, left_out: int):
    options = arguments(ca.issue("worker"))
    missing = options[left_out]
    del options[left_out : left_out + 2]
    with pytest.raises(ConfigError, match=f"need {missing} too"):
        parsed(*options)


@pytest.mark.parametrize("what", ["cert", "key", "ca"])
def test_a_missing_file_is_named(ca: Authority, what: str):
    files: Any = replace(ca.issue("worker"), **{what: ca.folder / "none"})
    with pytest.raises(ConfigError, match=f"--tls-{what}: .*none: No such file"):
        files.check(serves=True)


def test_a_key_of_another_certificate_is_refused(ca: Authority):
    files = replace(ca.issue("worker"), key=ca.issue("other").key)
    with pytest.raises(ConfigError, match=r"--tls-cert and --tls-key: .* no pair"):
        files.check(serves=True)


def test_an_expired_certificate_is_refused(ca: Authority):
    with pytest.raises(ConfigError, match=r"--tls-cert: .*expired"):
        ca.issue("worker", days=-2).check(serves=True)


def test_an_expired_certificate_of_a_gateway_is_refused(ca: Authority):
    files = replace(ca.issue("gate", days=-2), ca=None, option="--gateway-tls")
    with pytest.raises(ConfigError, match=r"--gateway-tls-cert: .*expired"):
        files.check(serves=True)
    replace(ca.issue("gate"), ca=None).check(serves=True)


def test_what_is_not_a_ca_is_refused(ca: Authority):
    files = ca.issue("worker")
    with pytest.raises(ConfigError, match=r"--tls-ca: .*no certificate of a CA"):
        replace(files, ca=files.cert).check(serves=True)


def test_a_ca_that_did_not_sign_is_refused(ca: Authority, tmp_path: Path):
    with pytest.raises(ConfigError, match=r"--tls-cert: .*does not hold against --tls-ca"):
        replace(ca.issue("worker"), ca=Authority(tmp_path, "other").file).check(serves=True)


def test_the_name_matters_to_servers_alone(ca: Authority):
    files = ca.issue("worker", hosts=("elsewhere",))
    with pytest.raises(ConfigError, match=r"--tls-name"):
        files.check(serves=True)
    files.check(serves=False)


# --- sessions and lending


@asynccontextmanager
async def session_server(tls: TlsFiles | None, *, port: int = 0) -> AsyncIterator[str]:
    """A worker that loads: who gets through to it hears so."""
    server = SessionServer(tls=tls)
    address = await server.start(host="127.0.0.1", port=port)
    try:
        yield address
    finally:
        await server.stop()


async def said(address: str, tls: TlsFiles | None) -> str:
    """Why a session with it ended. gRPC's core says INTERNAL now and then, with TLS and without, where a server refuses
    while we still write: asked again."""
    for _ in range(5):
        line = await said_once(address, tls)
        if "Internal error from Core" not in line:
            break
    return line


async def said_once(address: str, tls: TlsFiles | None) -> str:
    channel = await GrpcTransport(silence_seconds_max=5, tls=tls).connect(address)
    try:
        async with asyncio.timeout(20):
            await channel.send(Hello(protocol=PROTOCOL, router_id="router"))
            await channel.receive()
    except SessionLost as error:
        return str(error)
    finally:
        await channel.close()
    raise AssertionError("a worker that loads has welcomed us")


async def test_the_right_pair_gets_through(ca: Authority):
    async with session_server(ca.issue("worker")) as address:
        assert "worker is loading" in await said(address, ca.issue("router"))


async def test_a_client_without_a_certificate_is_refused(ca: Authority):
    files = ca.issue("worker")
    credentials = grpc.ssl_channel_credentials(files.ca.read_bytes() if files.ca else None)
    options = (("grpc.ssl_target_name_override", files.name), ("grpc.use_local_subchannel_pool", 1))
    async with (
        session_server(files) as address,
        grpc.aio.secure_channel(address, credentials, options=options) as channel,
    ):
        call: Any = channel.unary_unary("/grpc.health.v1.Health/Check", None, None)
        with pytest.raises(grpc.aio.AioRpcError) as told:
            await call(b"", timeout=10)
    assert told.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_a_client_of_another_ca_is_refused(ca: Authority, tmp_path: Path):
    stranger = Authority(tmp_path, "stranger").issue("router")
    both = tmp_path / "both.crt"
    both.write_bytes(ca.file.read_bytes() + (stranger.ca or both).read_bytes())
    # It trusts the worker's CA: only the worker can refuse.
    async with session_server(ca.issue("worker")) as address:
        line = await said(address, replace(stranger, ca=both))
    assert "loading" not in line
    assert "UNAVAILABLE" in line


async def test_a_server_of_another_ca_is_refused(ca: Authority, tmp_path: Path):
    async with session_server(Authority(tmp_path, "stranger").issue("worker")) as address:
        line = await said(address, ca.issue("router"))
    assert "--tls-ca" in line
    assert "\n" not in line


async def test_a_server_of_another_name_is_refused(ca: Authority):
    async with session_server(ca.issue("worker")) as address:
        line = await said(address, replace(ca.issue("router"), name="somebody.else"))
    assert "loading" not in line
    assert "--tls-name" in line


async def test_plain_text_to_tls_and_the_reverse_give_one_line(ca: Authority):
    files = ca.issue("worker")
    async with session_server(files) as address:
        line = await said(address, None)
        assert "does it speak TLS" in line
        assert "\n" not in line
    async with session_server(None) as address:
        line = await said(address, files)
        assert "the peer does not speak TLS" in line
        assert "\n" not in line


async def test_a_renewed_ca_is_taken_without_a_restart(ca: Authority, tmp_path: Path):
    worker = ca.issue("worker")
    async with session_server(worker) as address:
        assert "loading" in await said(address, ca.issue("router"))
        new = Authority(tmp_path, "new")
        replaced = new.issue("worker")
        assert worker.ca is not None
        worker.ca.write_bytes(new.file.read_bytes())
        assert replaced.cert == worker.cert
        assert "loading" in await said(address, new.issue("router"))


async def test_files_that_went_bad_leave_the_last_good_ones(ca: Authority, caplog: pytest.LogCaptureFixture):
    worker, router = ca.issue("worker"), ca.issue("router")
    async with session_server(worker) as address:
        worker.cert.write_text("nonsense")
        with caplog.at_level(logging.WARNING):
            assert "loading" in await said(address, router)
            assert "loading" in await said(address, router)
    kept = [record for record in caplog.records if "kept the last good" in record.message]
    assert len(kept) == 1


async def test_lending_speaks_tls(ca: Authority):
    worker = ca.issue("worker")
    lenders, plain = GrpcLenders(tls=worker), GrpcLenders()
    try:
        async with session_server(worker) as address:
            lease: Any = _Source(address)
            # Nobody lends here: that the call arrived is what it shows.
            with pytest.raises(LendingFailed, match="UNIMPLEMENTED"):
                await lenders.renew(lease, seconds_max=10)
            with pytest.raises(LendingFailed, match=r"DEADLINE_EXCEEDED|UNAVAILABLE"):
                await plain.renew(lease, seconds_max=1)
    finally:
        await lenders.close()
        await plain.close()


async def test_lending_reconnects_with_renewed_certificates(ca: Authority, tmp_path: Path):
    worker = ca.issue("worker")
    lenders = GrpcLenders(tls=worker)
    try:
        async with session_server(worker) as address:
            lease: Any = _Source(address)
            with pytest.raises(LendingFailed, match="UNIMPLEMENTED"):
                await lenders.renew(lease, seconds_max=10)
        Authority(tmp_path, "ca").issue("worker")  # in the place of the first
        # Started again with the new files: who still had the old ones would be refused.
        async with session_server(worker, port=int(address.rpartition(":")[2])):
            with pytest.raises(LendingFailed, match="UNIMPLEMENTED"):
                await lenders.renew(lease, seconds_max=10)
    finally:
        await lenders.close()


class _Source:
    def __init__(self, address: str) -> None:
        self.address = address
        self.lease = LeaseName(
            worker_id=WorkerId("prefill"), incarnation=Incarnation(1), lease_id=1, generation=1
        )


def test_texts_that_are_not_about_tls_stay():
    assert explain_unreachable("worker is loading", is_tls=True) == "worker is loading"


# --- HTTPS


@asynccontextmanager
async def https_server(files: TlsFiles) -> AsyncIterator[int]:
    async def answer(request: HttpRequest, reply: HttpReply) -> None:
        if request.path == "/stream":
            reply.start(200, content_type=b"text/plain")
            for part in range(3):
                reply.write(b"part %d\n" % part)
                await reply.drain()
                await asyncio.sleep(0)
            reply.finish()
        else:
            reply.send(413 if request.refusal else 200, b"whole\n", content_type=b"text/plain")

    limits = HttpLimits(body_bytes_max=10)
    server = HttpServer(answer, limits=limits, clock=SystemClock(), cut_off=lambda reason: None)
    port = await server.start(host="127.0.0.1", port=0, tls=TlsKeeper(files, serves=True).listening_context())
    try:
        yield port
    finally:
        await server.stop(drain_seconds=1)


async def fetched(port: int, path: str, ca_file: Path, *, body: bytes = b"") -> bytes:
    context = ssl.create_default_context(cafile=ca_file)
    reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context)
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body)
    try:
        async with asyncio.timeout(10):
            return await reader.read()
    finally:
        writer.close()


async def test_https_answers_and_streams(ca: Authority):
    files = replace(ca.issue("gate", hosts=("127.0.0.1",)), ca=None)
    async with https_server(files) as port:
        assert b"whole" in await fetched(port, "/", ca.file)
        assert b"part 2" in await fetched(port, "/stream", ca.file)
        assert b" 413 " in await fetched(port, "/", ca.file, body=b"x" * 100)


async def test_plain_http_to_https_ends_without_a_word_in_the_log(
    ca: Authority, caplog: pytest.LogCaptureFixture
):
    files = replace(ca.issue("gate", hosts=("127.0.0.1",)), ca=None)
    async with https_server(files) as port:
        for _ in range(3):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
            async with asyncio.timeout(10):
                assert b"whole" not in await reader.read()
            writer.close()
        assert b"whole" in await fetched(port, "/", ca.file)
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == []


async def test_https_takes_a_renewed_certificate(ca: Authority, tmp_path: Path):
    files = replace(ca.issue("gate", hosts=("127.0.0.1",)), ca=None)
    async with https_server(files) as port:
        new = Authority(tmp_path, "new")
        new.issue("gate", hosts=("127.0.0.1",))
        assert b"whole" in await fetched(port, "/", new.file)
        with pytest.raises(ssl.SSLCertVerificationError):
            await fetched(port, "/", ca.file)


async def test_half_open_handshakes_end(ca: Authority, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("router.gateway.http1.HANDSHAKE_SECONDS_MAX", 0.2)
    files = replace(ca.issue("gate", hosts=("127.0.0.1",)), ca=None)
    async with https_server(files) as port:
        with socket.create_connection(("127.0.0.1", port)) as idle:
            idle.setblocking(False)
            async with asyncio.timeout(10):
                assert await asyncio.get_running_loop().sock_recv(idle, 1) == b""


@pytest.mark.minutes
async def test_half_open_handshakes_of_a_worker_end(ca: Authority):
    async with session_server(ca.issue("worker")) as address:
        host, _, port = address.rpartition(":")
        with socket.create_connection((host, int(port))) as idle:
            idle.setblocking(False)
            async with asyncio.timeout(30):
                assert await asyncio.get_running_loop().sock_recv(idle, 1) == b""
