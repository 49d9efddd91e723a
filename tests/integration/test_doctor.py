"""`rorqual doctor` against real workers, a real store and this machine: what is well, and what stands still."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from kvstore.checks import look_at_store, look_at_transfer
from kvstore.store.embedded import EmbeddedServer
from rorqual import __version__
from rorqual.doctor import network
from rorqual.doctor.finding import Finding, Status
from rorqual.errors import ConfigError
from tests.cluster.stand_in.cluster import StandIn
from tests.cluster.stand_in.controllers import BY_NAME
from tests.harness.certificates import Authority, arguments
from tests.harness.charts import NAMESPACE, RELEASE, render

Start = Any


def only(findings: list[Finding], status: Status) -> list[str]:
    return [finding.found for finding in findings if finding.status is status]


async def doctor(*options: str, kubeconfig: Path | None = None) -> tuple[int, dict[str, dict[str, str]]]:
    """Exit status, and findings by check, the last of each."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("KUBE")}
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "rorqual.cli", "doctor", "--json", "--transfer", "none", *options),
        stdout=asyncio.subprocess.PIPE,
        env=environment | {"HOME": "/nonexistent"} | ({"KUBECONFIG": str(kubeconfig)} if kubeconfig else {}),
    )
    output, _ = await process.communicate()
    assert process.returncode is not None
    return process.returncode, {each["check"]: each for each in json.loads(output)}


@pytest.mark.slow
async def test_a_worker_that_serves_stands_still_or_is_gone(start_worker: Start):
    worker = await start_worker()
    ready = await worker.ready()
    address = ready["address"]
    status, found = await doctor("--worker", address)
    assert (status, found[f"worker {address}"]["status"]) == (0, "ok")
    assert f"both, rorqual {__version__}, protocol" in found[f"worker {address}"]["found"]
    assert found["worker versions"]["status"] == "ok"
    # Its port is taken, and it is said by whom.
    status, found = await doctor("--listen", address)
    assert status == 1
    assert "gRPC server" in found[f"port {address}"]["found"]
    worker.signal(signal.SIGSTOP)
    status, found = await doctor("--worker", address)
    worker.signal(signal.SIGCONT)
    assert (status, found[f"worker {address}"]["status"]) == (1, "fail")
    assert "no answer" in found[f"worker {address}"]["found"]
    worker.signal(signal.SIGTERM)
    await worker.ended()
    assert "cannot be reached" in (await doctor("--worker", address))[1][f"worker {address}"]["found"]


@pytest.mark.slow
async def test_tls_on_one_side_only_is_told_as_such(start_worker: Start, tmp_path: Path):
    tls = arguments(Authority(tmp_path).issue("worker"))
    address = (await (await start_worker(*tls)).ready())["address"]
    assert (await doctor("--worker", address, *tls))[0] == 0
    status, found = await doctor("--worker", address)
    assert status == 1
    assert "does it speak TLS" in found[f"worker {address}"]["found"]


@pytest.mark.slow
async def test_a_stand_in_api_server_is_asked_for_rights_and_kinds():
    async with StandIn() as cluster:
        status, found = await doctor(kubeconfig=cluster.kubeconfig)
        kubeconfig = cluster.kubeconfig.read_text(encoding="utf-8")
    assert status == 0, found
    assert "namespace default" in found["kubernetes"]["found"]
    assert found["rights"]["status"] == "ok"
    assert "LeaderWorkerSet" in found["kinds"]["found"]
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        # It has ended: nobody answers there.
        file.write(kubeconfig)
        file.flush()
        status, found = await doctor(kubeconfig=Path(file.name))
    assert (status, found["kubernetes"]["status"]) == (1, "fail")
    assert "cannot be reached" in found["kubernetes"]["found"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("account", "told"),
    [
        ("router", "all that a router needs, and none of an autoscaler's"),
        ("autoscaler", "all that router and autoscaler need"),
    ],
)
async def test_the_charts_accounts_have_the_rights_that_are_asked_for(
    account: str, told: str, tmp_path: Path
):
    name = f"{RELEASE}-rorqual-{account}"
    async with StandIn() as cluster:
        for item in render("h200"):
            if item["kind"] in ("Role", "RoleBinding"):
                cluster.objects.create(
                    BY_NAME[item["kind"]], item["metadata"].get("namespace", NAMESPACE), item
                )
        token = cluster.server.rights.token_of(NAMESPACE, name)
        kubeconfig = tmp_path / "kubeconfig"
        kubeconfig.write_text(cluster.server.kubeconfig(token=token, namespace=NAMESPACE), encoding="utf-8")
        status, found = await doctor(kubeconfig=kubeconfig)
    assert (status, found["rights"]) == (0, found["rights"] | {"status": "ok", "found": told})


async def test_several_nodes_are_refused_in_one_line(start_worker: Start):
    worker = await start_worker("--nodes", "2", "--node", "0", "--leader", "10.0.0.1")
    status, output = await worker.ended()
    assert status == 1
    assert "--nodes must be 1, not 2" in output
    assert len(output.splitlines()) == 1


@pytest.fixture
def store() -> Any:
    with EmbeddedServer(memory_bytes=16 << 20, password="right") as server:
        yield server


async def test_a_store_that_is_well(store: EmbeddedServer):
    findings = await look_at_store(store.url)
    assert {finding.status for finding in findings} == {Status.OK}
    assert any("written, read and removed" in finding.found for finding in findings)


async def test_a_wrong_password_is_told_without_it(store: EmbeddedServer):
    url = store.url.replace("right", "wr0ng")
    assert url != store.url
    (finding,) = await look_at_store(url)
    assert finding.status is Status.FAIL
    assert "password" in finding.cure
    assert "wr0ng" not in finding.found + finding.check


async def test_a_store_that_stands_still_is_given_up(store: EmbeddedServer, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("kvstore.checks.ANSWER_SECONDS_MAX", 0.3)
    os.kill(store.pid, signal.SIGSTOP)
    try:
        async with asyncio.timeout(20):
            (finding,) = await look_at_store(store.url)
    finally:
        os.kill(store.pid, signal.SIGCONT)
    assert finding.status is Status.FAIL
    assert "not answer" in finding.found


async def test_a_url_that_is_none_is_told():
    (finding,) = await look_at_store("http://nowhere")
    assert finding.status is Status.FAIL


async def test_state_is_read_through_shared_memory():
    (finding,) = await look_at_transfer("shm")
    assert finding.status is Status.OK
    assert "GB/s" in finding.found


def test_a_router_url_is_checked():
    with pytest.raises(ConfigError, match="--router"):
        network.look_at_router("127.0.0.1:8000", None)
