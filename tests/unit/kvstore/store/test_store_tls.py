"""A store over TLS: certificates are checked. The server is a real one behind a proxy that speaks TLS."""

import shutil
import ssl
import subprocess

import pytest
from fake_proxy import FakeProxy

from kvstore.store.contract import Miss
from tests.harness.stores import BUDGET, eventually, page_key, payload, running, timed_read, write_all

KEYS = [page_key(number) for number in range(3)]

pytestmark = pytest.mark.skipif(
    shutil.which("openssl") is None, reason="needs the openssl command, for a certificate"
)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tls")
    command = (
        "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=store"
    )
    files = [
        "-addext",
        "subjectAltName=IP:127.0.0.1",
        "-keyout",
        str(folder / "key"),
        "-out",
        str(folder / "cert"),
    ]
    subprocess.run([*command.split(), *files], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "cert", folder / "key")
    return folder / "cert", context


def encrypted(proxy, server):
    return server.url.replace("redis://", "rediss://").replace(f":{server.port}", f":{proxy.port}")


async def test_a_store_with_a_known_certificate_is_used(server, certificate):
    file, context = certificate
    async with (
        FakeProxy(server.port, tls=context) as proxy,
        running(encrypted(proxy, server) + f"?ssl_ca_certs={file}") as store,
    ):
        await write_all(store, KEYS)
        assert await store.read(KEYS, budget_seconds=BUDGET) == [payload(number) for number in range(3)]


async def test_a_store_with_an_unknown_certificate_is_not(server, certificate, caplog):
    _, context = certificate
    async with (
        FakeProxy(server.port, tls=context) as proxy,
        running(encrypted(proxy, server), is_up=False) as store,
    ):
        assert await timed_read(store, KEYS, budget_seconds=1.0) == [None] * 3
        assert store.counts.values_missed == {Miss.FAILED: 3}
        await eventually(lambda: "certificate" in caplog.text.lower())


async def test_a_certificate_file_that_is_not_there_is_a_miss(server, certificate, tmp_path):
    _, context = certificate
    async with FakeProxy(server.port, tls=context) as proxy:
        url = encrypted(proxy, server) + f"?ssl_ca_certs={tmp_path / 'none'}"
        async with running(url, is_up=False) as store:
            assert await timed_read(store, KEYS, budget_seconds=1.0) == [None] * 3
