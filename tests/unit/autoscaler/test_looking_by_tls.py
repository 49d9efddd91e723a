"""Observing sessions by mutual TLS: what gets through, what is refused and how that is told, and files that change."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from rorqual.tls import TlsFiles
from tests.harness.certificates import Authority, arguments
from tests.harness.mounted import Mounted
from tests.harness.observed import READINGS, Worker, looking, until

pytestmark = pytest.mark.slow

POLICY = """
version: 1
interval_seconds: 1
objectives: {ttft: {percentile: 90, seconds: 2}, itl: {percentile: 90, seconds: 0.1}}
pools:
  both: {role: both, replicas: {min: 1, max: 2}}
"""


@pytest.fixture
def ca(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


@asynccontextmanager
async def a_worker(tls: TlsFiles | None, *, port: int = 0) -> AsyncIterator[tuple[Worker, str]]:
    worker = Worker(tls)
    address = await worker.start(port)
    try:
        yield worker, address
    finally:
        await worker.stop()


async def said(address: str, tls: TlsFiles | None, *, part: str) -> str:
    """What is said of a worker that cannot be observed, once `part` is in it. gRPC's core says INTERNAL now and then
    where a server refuses while we still write; the next attempt tells."""
    async with looking(address, tls=tls) as looker:
        await until(lambda: any(part in line for line in looker.failures()))
        assert looker.num_missing == 1
        assert looker.look(READINGS, now=1.0).pools["pool"].workers == ()
        (line,) = looker.failures()
    assert line.startswith(f"{address}: ")
    assert "\n" not in line
    return line


async def test_load_and_usage_arrive_by_tls(ca: Authority) -> None:
    async with (
        a_worker(ca.issue("worker")) as (worker, address),
        looking(address, tls=ca.issue("autoscaler", hosts=("autoscaler",))) as looker,
    ):
        await until(lambda: looker.num_known == 1 and not looker.failures())
        looker.look(READINGS, now=1.0)
        await worker.serve(1, length=7, max_tokens=5)
        await asyncio.sleep(0.3)
        seen = looker.look(READINGS, now=2.0)
        assert [sample.prompt_tokens for sample in seen.traffic.prompts] == [7]
        (state,) = seen.pools["pool"].workers
        assert (state.address, state.load.slots_total) == (address, 4)


async def test_a_worker_of_another_ca_is_told_of_as_such(ca: Authority, tmp_path: Path) -> None:
    async with a_worker(Authority(tmp_path, "other").issue("worker")) as (_, address):
        await said(address, ca.issue("autoscaler"), part="not of our CA (--tls-ca)")


async def test_a_worker_of_another_name_is_told_of_as_such(ca: Authority) -> None:
    async with a_worker(ca.issue("worker")) as (_, address):
        await said(address, replace(ca.issue("autoscaler"), name="else.where"), part="--tls-name")


async def test_a_worker_that_demands_a_certificate_refuses_whoever_has_none(ca: Authority) -> None:
    async with a_worker(ca.issue("worker")) as (_, address):
        await said(address, None, part="does it speak TLS (--tls-cert)?")


async def test_a_worker_refuses_a_certificate_of_another_ca(ca: Authority, tmp_path: Path) -> None:
    stranger = Authority(tmp_path, "stranger").issue("autoscaler")
    both = tmp_path / "both.crt"
    both.write_bytes(ca.file.read_bytes() + (tmp_path / "stranger.crt").read_bytes())
    # It trusts the worker's CA: only the worker can refuse.
    async with a_worker(ca.issue("worker")) as (_, address):
        await said(address, replace(stranger, ca=both), part="is our certificate of its CA (--tls-cert)?")


async def test_a_worker_without_tls_is_told_of_as_such(ca: Authority) -> None:
    async with a_worker(None) as (_, address):
        await said(address, ca.issue("autoscaler"), part="the peer does not speak TLS, and we do")


def content(pair: TlsFiles, ca: Authority) -> dict[str, bytes]:
    """Of a Secret."""
    return {
        "tls.crt": pair.cert.read_bytes(),
        "tls.key": pair.key.read_bytes(),
        "ca.crt": ca.file.read_bytes(),
    }


def files_of(secret: Mounted) -> TlsFiles:
    folder = secret.folder
    return TlsFiles(cert=folder / "tls.crt", key=folder / "tls.key", ca=folder / "ca.crt")


async def test_a_secret_that_was_renewed_is_taken_for_the_next_session(ca: Authority, tmp_path: Path) -> None:
    secret = Mounted(tmp_path / "secret", content(ca.issue("autoscaler"), ca))
    new = Authority(tmp_path, "new")
    async with a_worker(ca.issue("worker")) as (worker, address):
        port = int(address.rpartition(":")[2])
        async with looking(address, tls=files_of(secret)) as looker:
            await until(lambda: looker.num_known == 1 and not looker.failures())
            secret.hold(content(new.issue("autoscaler"), new))
            await asyncio.sleep(0.3)
            assert not looker.failures()  # what is open stays so
            await worker.stop()
            await until(lambda: looker.num_missing == 1)
            async with a_worker(new.issue("worker"), port=port) as (again, _):
                await until(lambda: not looker.failures())
                await again.serve(1, length=7, max_tokens=2)
                await until(lambda: looker.look(READINGS, now=1.0).traffic.num_prompts == 1)


async def test_a_secret_that_cannot_be_used_changes_nothing(
    ca: Authority, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    secret = Mounted(tmp_path / "secret", content(ca.issue("autoscaler"), ca))
    async with (
        a_worker(ca.issue("worker")) as (worker, address),
        looking(address, tls=files_of(secret)) as looker,
    ):
        await until(lambda: looker.num_known == 1 and not looker.failures())
        secret.hold(content(ca.issue("late", days=-1), ca))
        await worker.stop()
        await until(lambda: looker.num_missing == 1)
        async with a_worker(ca.issue("worker"), port=int(address.rpartition(":")[2])):
            await until(lambda: not looker.failures())
    (kept,) = [record.getMessage() for record in caplog.records if "kept the last good" in record.msg]
    assert "has expired" in kept


@asynccontextmanager
async def an_autoscaler(folder: Path, *options: str) -> AsyncIterator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "rorqual.cli", "autoscaler", "--policy", str(folder / "policy.yaml")),
        *("--target", "local", "--local-folder", str(folder), "--dry-run", *options),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(60):
            yield process
    finally:
        if process.returncode is None:
            process.kill()
            await process.communicate()


def write_workers(folder: Path, *addresses: str) -> None:
    (folder / "policy.yaml").write_text(POLICY)
    workers = [{"address": address, "pool": "both"} for address in addresses]
    pools = {"both": {"wanted": len(addresses), "starting_seconds": []}}
    (folder / "workers.json").write_text(json.dumps({"workers": workers, "pools": pools}))
    (folder / "routers.json").write_text(json.dumps({"workers": []}))


@pytest.mark.minutes  # it waits
async def test_the_process_sees_whom_it_shares_a_ca_with_and_says_whom_it_does_not_see(
    ca: Authority, tmp_path: Path
) -> None:
    async with (
        a_worker(ca.issue("worker")) as (_, ours),
        a_worker(Authority(tmp_path, "other").issue("worker")) as (_, theirs),
    ):
        write_workers(tmp_path, ours, theirs)
        async with an_autoscaler(tmp_path, "--once", *arguments(ca.issue("autoscaler"))) as process:
            output, errors = (text.decode() for text in await process.communicate())
        assert process.returncode == 0, errors
        assert "both: 2 wanted, 1 ready" in output
        (line,) = [line for line in output.splitlines() if line.startswith("not seen: ")]
        assert line.startswith(f"not seen: {theirs}: the session ended with")
        assert "not of our CA (--tls-ca)" in line
        (line,) = [line for line in errors.splitlines() if "lost sight of a worker" in line]
        assert theirs in line


async def test_workers_that_demand_a_certificate_are_missing_to_a_process_without_one(
    ca: Authority, tmp_path: Path
) -> None:
    async with a_worker(ca.issue("worker")) as (_, address):
        write_workers(tmp_path, address)
        ready = tmp_path / "ready.json"
        async with an_autoscaler(tmp_path, "--ready-file", str(ready)) as process:
            await until(ready.exists)
            url = json.loads(ready.read_text())["metrics"]
            assert process.stderr is not None
            while b"does it speak TLS (--tls-cert)?" not in (line := await process.stderr.readline()):
                assert line, "the process has ended"
            async with httpx.AsyncClient() as http:
                metrics = (await http.get(url)).text
            assert "rorqual_autoscaler_workers_missing 1.0" in metrics


async def test_only_some_of_the_files_end_the_process_with_one_line(ca: Authority, tmp_path: Path) -> None:
    write_workers(tmp_path)
    async with an_autoscaler(tmp_path, "--tls-ca", str(ca.file)) as process:
        _, errors = await process.communicate()
    assert process.returncode == 1
    (line,) = errors.decode().splitlines()
    assert "--tls-ca need --tls-cert and --tls-key too" in line
