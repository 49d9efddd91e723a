"""A prefill worker, a decode worker and a router that speak mutual TLS: a prompt's state is handed over."""

from __future__ import annotations

import ssl
from pathlib import Path

import grpc
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.harness.certificates import Authority, arguments
from tests.harness.pools import Pools
from tests.harness.system import IDS_CONFIG, run_command

pytestmark = pytest.mark.minutes

PROMPT = [3 + 7 * i % (IDS_CONFIG["vocab_size"] - 3) for i in range(300)]


def test_state_is_handed_over_under_mutual_tls(ids_model: Path, tmp_path: Path):
    ca = Authority(tmp_path)
    tls = arguments(ca.issue("worker"))
    pools = Pools(ids_model, tmp_path, "--pages", "16", "--slots", "4", "--exact", *tls)
    try:
        pools.start("prefill")
        pools.start("decode")
        pools.start_router(*arguments(ca.issue("router", hosts=("router",))))
        (choice,) = pools.complete(PROMPT, max_tokens=8)["choices"]
        assert len(choice["token_ids"]) == 8
        pools.wait_until_idle()
        assert pools["decode-0"].metrics()["rorqual_worker_hand_overs_total"] == 1
        # A router without certificates reaches none of them, and says why in its one line.
        plain = ["--model", str(ids_model), "--http", "127.0.0.1:0", "--grpc", "127.0.0.1:0"]
        address = pools["prefill-0"].address
        done = run_command("router", *plain, "--worker", address, "--start-seconds", "3")
        assert done.returncode == 1
        assert "does it speak TLS" in done.stdout.splitlines()[-1]
    finally:
        pools.close()


def test_clients_speak_https_to_the_router(ids_model: Path, tmp_path: Path):
    ca = Authority(tmp_path)
    gate = ca.issue("gate", hosts=("127.0.0.1",))
    pools = Pools(ids_model, tmp_path, "--pages", "16", "--slots", "4")
    try:
        pools.start("both")
        pools.start_router("--gateway-tls-cert", str(gate.cert), "--gateway-tls-key", str(gate.key))
        url = pools.http
        assert url.startswith("https://")
        context = ssl.create_default_context(cafile=ca.file)
        body = {
            "model": ids_model.name,
            "prompt": PROMPT[:50],
            "max_tokens": 4,
            "ignore_eos": True,
            "stream": True,
        }
        with httpx.Client(base_url=url, verify=context, timeout=60) as client:
            answer = client.post("/v1/completions", json=body)
            assert answer.status_code == 200, answer.text
            assert answer.text.rstrip().endswith("data: [DONE]")
            whole = client.post("/v1/completions", json=body | {"stream": False})
            assert whole.json()["usage"]["completion_tokens"] == 4
        credentials = grpc.ssl_channel_credentials(ca.file.read_bytes())
        with grpc.secure_channel(pools.grpc, credentials) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            serving = health_pb2.HealthCheckResponse.SERVING
            assert stub.Check(health_pb2.HealthCheckRequest(), timeout=20).status == serving
        with grpc.insecure_channel(pools.grpc) as channel, pytest.raises(grpc.RpcError):
            health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=5)
    finally:
        pools.close()
