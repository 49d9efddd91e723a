"""Dashboards of Grafana are whole, and each of their queries is one that our metrics answer."""

import http.server
import json
import re
import socket
import subprocess
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import generate_latest

from tests.harness.charts import CHART, render
from tests.harness.cluster_tools import system_tool
from tests.harness.expositions import registries
from tests.harness.promql import problems

FILES = sorted((CHART / "files" / "dashboards").glob("*.json"))
NAMES = [file.stem for file in FILES]


def load(name: str) -> dict[str, Any]:
    return json.loads((CHART / "files" / "dashboards" / f"{name}.json").read_text())


def expressions(name: str) -> list[str]:
    """As Grafana asks them, with all namespaces and releases chosen."""
    found = [target["expr"] for panel in load(name)["panels"] for target in panel.get("targets", [])]
    return [re.sub(r"\$(namespace|release)", ".*", text.replace("$__rate_interval", "5m")) for text in found]


def test_these_dashboards_are_there():
    assert set(NAMES) == {"overview", "router", "workers", "autoscaler"}
    assert len({load(name)["uid"] for name in NAMES}) == len(NAMES)
    assert len({load(name)["title"] for name in NAMES}) == len(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_panels_are_whole_and_do_not_overlap(name: str):
    dashboard = load(name)
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert max(x for x, _ in cells) < 24, panel["title"]
        assert not cells & taken, panel["title"]
        taken |= cells
        if panel["type"] != "row":
            assert panel["datasource"]["uid"] == "${datasource}"
            assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
            assert panel["targets"], panel["title"]
            assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])


@pytest.mark.parametrize("name", NAMES)
def test_data_source_namespace_and_release_can_be_chosen(name: str):
    variables = {one["name"]: one for one in load(name)["templating"]["list"]}
    assert list(variables) == ["datasource", "namespace", "release"]
    assert variables["datasource"]["query"] == "prometheus"
    for variable in ("namespace", "release"):
        asked = re.fullmatch(r"label_values\((\w+), (\w+)\)", variables[variable]["query"]["query"])
        assert asked is not None
        assert problems(asked[1]) == []


@pytest.mark.parametrize("name", NAMES)
def test_every_query_asks_for_metrics_that_we_have(name: str):
    assert expressions(name)
    assert {text: told for text in expressions(name) if (told := problems(text))} == {}


@pytest.mark.parametrize("name", NAMES)
def test_every_query_keeps_to_the_chosen_release(name: str):
    for panel in load(name)["panels"]:
        for target in panel.get("targets", []):
            selectors = target["expr"].count("rorqual_") - target["expr"].count("rorqual_io_")
            assert target["expr"].count('app_kubernetes_io_instance=~"$release"') == selectors


@pytest.mark.parametrize("name", NAMES)
def test_legends_name_labels_that_the_query_keeps(name: str):
    for panel in load(name)["panels"]:
        for target in panel.get("targets", []):
            kept = {
                part.strip()
                for found in re.findall(r"\bby \(([^)]*)\)", target["expr"])
                for part in found.split(",")
            }
            assert set(re.findall(r"{{(\w+)}}", target["legendFormat"])) <= kept, target


def test_the_chart_makes_config_maps_of_them_that_grafana_looks_for():
    maps = [
        one
        for one in render("everything")
        if one["kind"] == "ConfigMap" and one["metadata"]["labels"].get("grafana_dashboard") == "1"
    ]
    found = {key: text for one in maps for key, text in one["data"].items()}
    assert found == {file.name: file.read_text() for file in FILES}
    assert all(one["metadata"]["labels"]["release"] == "prometheus" for one in maps)
    assert sum(len(text) for text in found.values()) < 900_000  # a release is a Secret of at most a MiB


class Exposition(http.server.BaseHTTPRequestHandler):
    """/router, /prefill ...: what such a program exposes."""

    def do_GET(self) -> None:
        body = generate_latest(registries()[self.path.strip("/")])
        self.send_response(200)
        self.send_header("Content-Type", "text/plain; version=0.0.4")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


def scrape(name: str, address: str) -> dict[str, Any]:
    component = name if name in ("router", "autoscaler") else "worker"
    labels = {"namespace": "n", "pod": name, "app_kubernetes_io_instance": "demo"}
    labels |= {"app_kubernetes_io_component": component, "rorqual_io_role": name}
    return {
        "job_name": name,
        "metrics_path": f"/{name}",
        "static_configs": [{"targets": [address], "labels": labels}],
    }


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a real Prometheus that has scraped all our programs."""
    program, folder = system_tool("prometheus"), tmp_path_factory.mktemp("prometheus")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Exposition)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"127.0.0.1:{server.server_address[1]}"
    config = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": [str(CHART / "files" / "rules.yaml")],
        "scrape_configs": [scrape(name, address) for name in registries()],
    }
    (folder / "config.yaml").write_text(json.dumps(config))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    arguments = [
        f"--config.file={folder / 'config.yaml'}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
    ]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([str(program), *arguments], stdout=log, stderr=log)
        try:
            wait_for_scrapes(url, process, folder)
            yield url
        finally:
            process.terminate()
            process.wait(30)
            server.shutdown()
            server.server_close()


def wait_for_scrapes(url: str, process: subprocess.Popen[bytes], folder: Path) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        assert process.poll() is None, (folder / "log").read_text()[-2000:]
        try:
            if len(query(url, "count_over_time(up[1m]) >= 3 and up == 1")) == len(registries()):
                return
        except OSError:
            pass
        time.sleep(0.1)
    raise AssertionError(f"Prometheus did not scrape us: {(folder / 'log').read_text()[-2000:]}")


def query(url: str, expression: str) -> list[Any]:
    """Its result. An error of the query is an HTTPError, which is an OSError, with the reason in its body."""
    body = urllib.parse.urlencode({"query": expression}).encode()
    with urllib.request.urlopen(f"{url}/api/v1/query", data=body, timeout=10) as reply:
        answer = json.load(reply)
    assert answer["status"] == "success"
    assert not answer.get("warnings")
    return answer["data"]["result"]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_real_prometheus_answers_every_query(name: str, prometheus: str):
    empty = [text for text in expressions(name) if not query(prometheus, text)]
    assert empty == []


@pytest.mark.slow
def test_a_real_prometheus_takes_and_evaluates_the_rules(prometheus: str):
    with urllib.request.urlopen(f"{prometheus}/api/v1/rules", timeout=10) as reply:
        groups = json.load(reply)["data"]["groups"]
    found = [rule for group in groups for rule in group["rules"]]
    assert len(found) >= 19
    assert [(rule["name"], rule["lastError"]) for rule in found if rule.get("lastError")] == []


@pytest.mark.slow
def test_when_a_worker_started_is_exposed(prometheus: str):
    """An alert on restarts asks for it."""
    assert query(prometheus, "rorqual_worker_sequences_opened_created > 1e9")
