"""Every command line in the chart is taken by the program that it starts, and the schema knows all options."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from autoscaler import options as autoscaler_options
from decode_worker import process as decode_process
from engine.worker import options as worker_options
from kvstore.store import cli as kv_cli
from prefill_worker import process as prefill_process
from rorqual.errors import ConfigError
from router import process as router_process
from tests.harness.certificates import Authority
from tests.harness.charts import CHART, VALUE_SETS, Manifest, containers, pod_specs, render

ALL_SETS = ("", *VALUE_SETS, "everything")
PARSERS: dict[str, Callable[[list[str]], Any]] = {
    "router": router_process.parse_options,
    "prefill": prefill_process.parse_options,
    "decode": decode_process.parse_options,
    "worker": worker_options.parse_options,
    "autoscaler": lambda argv: autoscaler_options.parse_options(argv, hostname="a"),
}
SAMPLES = {
    "POD_IP": "10.1.2.3",
    "POD_NAME": "demo-rorqual-decode-6d4cf56db6-x2xtw",
    "REDIS_PASSWORD": "s3cret",
    "LWS_WORKER_INDEX": "0",
    "LWS_LEADER_ADDRESS": "demo-0.demo.serving",
}
OWNED = {
    # Options that the chart itself gives, or that make no sense in a pod; values cannot.
    *("help", "model", "listen", "metrics-port", "worker-id", "drain-seconds", "ready-file", "http", "grpc"),
    *("worker", "discover", "served-name", "api-key", "api-key-file", "store", "nodes", "node", "leader"),
    *("tls-cert", "tls-key", "tls-ca", "tls-name", "gateway-tls-cert", "gateway-tls-key"),
}


@pytest.fixture(scope="module")
def mounted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What pods find under /etc/rorqual."""
    folder = tmp_path_factory.mktemp("etc")
    authority = Authority(folder)
    files = authority.issue("pod")
    for part in ("tls", "gateway-tls", "api-keys"):
        (folder / part).mkdir()
    for part in ("tls", "gateway-tls"):
        (folder / part / "tls.crt").write_bytes(files.cert.read_bytes())
        (folder / part / "tls.key").write_bytes(files.key.read_bytes())
    (folder / "tls" / "ca.crt").write_bytes(authority.file.read_bytes())
    (folder / "api-keys" / "keys").write_text("a-key-that-is-long-enough-for-anything\n")
    return folder


def filled(text: str, variables: dict[str, str]) -> str:
    return re.sub(r"\$\((\w+)\)", lambda found: variables[found[1]], text)


def parse(container: Manifest, mounted: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """What our parser makes of a container's command line and variables."""
    variables: dict[str, str] = dict(SAMPLES)
    monkeypatch.delenv("RORQUAL_STORE", raising=False)
    for one in container["env"]:
        value = filled(one["value"], variables) if "value" in one else variables[one["name"]]
        variables[one["name"]] = value
        monkeypatch.setenv(one["name"], value)
    program, name, *more = container["command"]
    assert program == "rorqual"
    argv = [filled(text, variables).replace("/etc/rorqual", str(mounted)) for text in container["args"]]
    return PARSERS[name]([*more, *argv])


def ours(name: str, command: str) -> list[Manifest]:
    return [
        one
        for manifest in render(name)
        for pod in pod_specs(manifest)
        for one in pod["spec"]["containers"]
        if one["command"][1] == command
    ]


@pytest.mark.parametrize("name", ALL_SETS)
def test_every_command_line_is_taken_by_its_program(
    name: str, mounted: Path, monkeypatch: pytest.MonkeyPatch
):
    parsed: list[str] = []
    for command in PARSERS:
        for container in ours(name, command):
            if "--nodes=2" in container["args"]:
                with pytest.raises(ConfigError, match="--nodes"):
                    parse(container, mounted, monkeypatch)
            else:
                parse(container, mounted, monkeypatch)
            parsed.append(command)
    assert {"router", "prefill", "decode"} <= set(parsed)
    everything = [one for manifest in render(name) for pod in pod_specs(manifest) for one in containers(pod)]
    assert {one["name"] for one in everything} <= {"router", "worker", "autoscaler", "redis", "download"}


def test_what_the_values_ask_for_arrives(mounted: Path, monkeypatch: pytest.MonkeyPatch):
    (router,) = ours("everything", "router")
    options, _ = parse(router, mounted, monkeypatch)
    assert options.requests_max == 2048
    assert options.served_name == "org/some model"
    assert options.tls is not None
    assert options.gateway_tls is not None
    assert options.drain_seconds_max == 120
    assert len(options.api_keys.files) == 1
    assert options.store == "redis://:s3cret@all-redis:6379"
    (worker,) = ours("everything", "prefill")
    made, _, _ = parse(worker, mounted, monkeypatch)
    assert (made.drafts, made.host_bytes, made.prefill_tokens_max) == ("auto", 2**30, 2048)
    assert made.store is not None


def test_an_address_of_version_6_is_in_brackets(mounted: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(SAMPLES, "POD_IP", "fd00::7")
    (router,) = ours("everything", "router")
    options, _ = parse(router, mounted, monkeypatch)
    assert options.http == ("::", 8000)
    (worker,) = ours("everything", "prefill")
    assert parse(worker, mounted, monkeypatch)[0].listen == ("fd00::7", 9000)


def test_the_autoscaler_gets_its_lease_and_no_leave_to_act_on_a_dry_run(
    mounted: Path, monkeypatch: pytest.MonkeyPatch
):
    (container,) = ours("everything", "autoscaler")
    options, _ = parse(container, mounted, monkeypatch)
    assert (options.dry_run, options.lease, options.metrics_port) == (True, "all-autoscaler", 9090)


@pytest.mark.parametrize("name", ["local", "everything"])
def test_the_store_gets_its_address_and_memory(name: str, monkeypatch: pytest.MonkeyPatch):
    (container,) = ours(name, "kv")
    served: list[tuple[str, int, bool]] = []

    def serve(url: str, *, memory_bytes: int, ready_file: Path | None, network: bool) -> None:
        served.append((url, memory_bytes, network))

    monkeypatch.setattr(kv_cli, "serve", serve)
    url = {one["name"]: one.get("value", "") for one in container["env"]}["RORQUAL_STORE"]
    monkeypatch.setenv("RORQUAL_STORE", filled(url, SAMPLES))
    assert kv_cli.main([*container["command"][2:], *container["args"]]) == 0
    host = "10.1.2.3" if name == "local" else "[10.1.2.3]"
    size = 128 * 2**20 if name == "local" else 4 * 2**30
    assert served == [(f"redis://:s3cret@{host}:6379", size, True)]


def test_workers_of_many_nodes_ask_for_them():
    (container,) = ours("everything", "decode")
    assert {"--nodes=2", "--node=$(LWS_WORKER_INDEX)", "--leader=$(LWS_LEADER_ADDRESS)"} <= set(
        container["args"]
    )
    assert {"--exact", "--kernel=attention=numba", "--kernel=moe=numba"} <= set(container["args"])


def options_of(command: str, capsys: pytest.CaptureFixture[str]) -> set[str]:
    with pytest.raises(SystemExit):
        PARSERS[command](["--help"])
    return set(re.findall(r"^  (?:-\w, )?--([a-z][a-z-]*)", capsys.readouterr().out, re.M))


def camel(option: str) -> str:
    first, *rest = option.split("-")
    return first + "".join(part.capitalize() for part in rest)


def test_the_schema_has_exactly_the_options_that_the_chart_leaves_to_values(
    capsys: pytest.CaptureFixture[str],
):
    properties = json.loads((CHART / "values.schema.json").read_text())["properties"]
    router = set(properties["router"]["properties"]["options"]["properties"])
    assert router == {camel(one) for one in options_of("router", capsys) - OWNED}
    workers = set[str]().union(*(options_of(one, capsys) for one in ("prefill", "decode", "worker"))) - OWNED
    assert set(properties["workers"]["properties"]["options"]["properties"]) == {
        camel(one) for one in workers
    }
    pool = properties["pools"]["additionalProperties"]["properties"]["options"]
    assert pool == properties["workers"]["properties"]["options"]


def leaves(values: dict[str, Any], prefix: str = "") -> set[str]:
    found: set[str] = set()
    for key, value in values.items():
        path = f"{prefix}{key}"
        inner = isinstance(value, dict) and value
        opaque = ("pools", "podSecurityContext", "containerSecurityContext")
        if inner and path not in opaque and not path.endswith("resources"):
            found |= leaves(value, f"{path}.")
        else:
            found.add(path)
    return found


def test_every_value_is_described_and_every_description_is_of_a_value():
    text = (CHART / "values.yaml").read_text()
    described = re.findall(r"^## @param (\S+) \S", text, re.M)
    assert len(described) == len(set(described))
    assert set(described) == leaves(yaml.safe_load(text))


def test_every_value_is_in_the_schema_and_the_other_way_round():
    schema = json.loads((CHART / "values.schema.json").read_text())
    values = yaml.safe_load((CHART / "values.yaml").read_text())

    def compare(found: dict[str, Any], described: dict[str, Any], place: str) -> None:
        properties = described.get("properties")
        if properties is None or place.endswith(("options", "resources")):
            return
        assert set(found) == set(properties) - {"global"}, place
        for key, value in found.items():
            if isinstance(value, dict):
                compare(value, properties[key], f"{place}.{key}")

    compare(values, schema, "")
