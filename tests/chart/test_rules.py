"""Each alert is about metrics that we have, fires when it should, and is silent when it should be."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.harness.charts import CHART, render
from tests.harness.cluster_tools import system_tool
from tests.harness.promql import problems

RULES = CHART / "files" / "rules.yaml"
OF_RELEASE = 'namespace="n", app_kubernetes_io_instance="demo"'
ROUTER = f'{{{OF_RELEASE}, pod="r", instance="r:80"}}'
WORKER = (
    f'{{{OF_RELEASE}, pod="w", instance="w:90", app_kubernetes_io_component="worker",'
    ' rorqual_io_role="decode"}'
)
AUTOSCALER = f'{{{OF_RELEASE}, pod="a", instance="a:90"}}'
LATE = "rorqual_router_first_token_seconds_bucket"
APART = "rorqual_router_inter_token_seconds_bucket"


def series(name: str, of: str, values: str, **labels: str) -> dict[str, str]:
    more = "".join(f', {key}="{value}"' for key, value in labels.items())
    return {"series": f"{name}{of[:-1]}{more}}}", "values": values}


def buckets(name: str, *, edge: str, over: int) -> list[dict[str, str]]:
    """Of 100 observations a minute, so many are above the edge, and none above 60 s."""
    return [
        series(name, ROUTER, f"0+{100 - over}x120", le=edge),
        series(name, ROUTER, "0+100x120", le="60"),
        series(name, ROUTER, "0+100x120", le="+Inf"),
    ]


CONNECTED = "rorqual_router_workers_connected"
SLOTS, DRAINING = "rorqual_worker_slots_total", "rorqual_worker_draining_bool"
UP = [series("up", WORKER, "1x120")]
SERVING = [*UP, series(SLOTS, WORKER, "16x120"), series(DRAINING, WORKER, "0x120")]
OVERLOADED, REQUESTS = "rorqual_router_requests_overloaded_total", "rorqual_router_requests_total"
ANSWERED = series(REQUESTS, ROUTER, "0+100x120", route="chat", status="200")
FAULTS, STALE = "rorqual_router_internal_errors_total", "rorqual_router_discovery_stale_seconds"
STARTED, OVERDUE = "rorqual_worker_sequences_opened_created", "rorqual_worker_steps_overdue_total"
SERVERS = "rorqual_worker_store_servers"
CLOSED = series(SERVERS, WORKER, "1x120", state="closed")
DECIDED, MOST = "rorqual_autoscaler_replicas_decided", "rorqual_autoscaler_replicas_max"
POOL_MOST = series(MOST, AUTOSCALER, "4x120", pool="decode")
LEADER, LOOKED = "rorqual_autoscaler_leader", "rorqual_autoscaler_seconds_since_look"
LEADS = series(LEADER, AUTOSCALER, "1x120")
REJECTED, HOLDS = "rorqual_autoscaler_reload_failures_total", "rorqual_autoscaler_holds"
PENDING, PROBLEM = "rorqual_autoscaler_writes_pending", "rorqual_autoscaler_pool_problem"

Series = list[dict[str, str]]
CASES: list[tuple[str, str, Series, Series]] = [
    # alert, what it is about, series with which it fires within 100 minutes, series with which it does not
    (
        "RorqualNoRouterServes",
        "none connected",
        [series(CONNECTED, ROUTER, "0x120")],
        [series(CONNECTED, ROUTER, "1x120")],
    ),
    (
        "RorqualNoRouterServes",
        "none scraped",
        [],
        [
            series(CONNECTED, ROUTER, "0x120"),
            series(CONNECTED, ROUTER.replace('pod="r"', 'pod="s"'), "2x120"),
        ],
    ),
    ("RorqualNoWorkerOfRole", "loading", UP, SERVING),
    (
        "RorqualNoWorkerOfRole",
        "draining",
        [*UP, series(SLOTS, WORKER, "16x120"), series(DRAINING, WORKER, "1x120")],
        SERVING,
    ),
    (
        "RorqualFirstTokenLate",
        "many",
        buckets(LATE, edge="2", over=20),
        buckets(LATE, edge="2", over=5),
    ),
    (
        "RorqualTokensLate",
        "many",
        buckets(APART, edge="0.05", over=20),
        buckets(APART, edge="0.05", over=5),
    ),
    (
        "RorqualRequestsRefused",
        "some",
        [ANSWERED, series(OVERLOADED, ROUTER, "0+5x120")],
        [ANSWERED, series(OVERLOADED, ROUTER, "0x120")],
    ),
    (
        "RorqualInternalErrors",
        "one",
        [series(FAULTS, ROUTER, "0x95 1x30", route="chat")],
        [series(FAULTS, ROUTER, "7x120", route="chat")],
    ),
    (
        "RorqualDiscoveryStale",
        "lost",
        [series(STALE, ROUTER, "0x10 0+60x110", source="kubernetes:")],
        [series(STALE, ROUTER, "0x50 45 0x70", source="kubernetes:")],
    ),
    ("RorqualWorkerGone", "down", [series("up", WORKER, "0x120")], UP),
    (
        "RorqualWorkerRestarts",
        "three times",
        [series(STARTED, WORKER, "1x60 2x10 3x10 4x60")],
        [series(STARTED, WORKER, "1x60 2x10 3x60")],
    ),
    (
        "RorqualWorkerDrainsForLong",
        "an hour",
        [series(DRAINING, WORKER, "0x20 1x100")],
        [series(DRAINING, WORKER, "0x80 1x40")],
    ),
    (
        "RorqualStepsOverdue",
        "one",
        [series(OVERDUE, WORKER, "0x95 1x30")],
        [series(OVERDUE, WORKER, "0x120")],
    ),
    (
        "RorqualStoreDown",
        "all",
        [series(SERVERS, WORKER, "0x120", state="closed"), series(SERVERS, WORKER, "1x120", state="open")],
        [CLOSED, series(SERVERS, WORKER, "0x120", state="open")],
    ),
    (
        "RorqualAutoscalerAtMaximum",
        "full",
        [POOL_MOST, series(DECIDED, AUTOSCALER, "4x120", pool="decode")],
        [POOL_MOST, series(DECIDED, AUTOSCALER, "3x120", pool="decode")],
    ),
    (
        "RorqualAutoscalerHeld",
        "long",
        [series(HOLDS, AUTOSCALER, "1x120")],
        [series(HOLDS, AUTOSCALER, "0x80 1x40")],
    ),
    (
        "RorqualAutoscalerNoLeader",
        "none",
        [series(LEADER, AUTOSCALER, "0x120")],
        [LEADS, series(LEADER, AUTOSCALER.replace('pod="a"', 'pod="b"'), "0x120")],
    ),
    (
        "RorqualAutoscalerStale",
        "blind",
        [LEADS, series(LOOKED, AUTOSCALER, "0+60x120")],
        [series(LEADER, AUTOSCALER, "0x120"), series(LOOKED, AUTOSCALER, "0+60x120")],
    ),
    (
        "RorqualAutoscalerPolicyRejected",
        "one",
        [series(REJECTED, AUTOSCALER, "0x95 1x30")],
        [series(REJECTED, AUTOSCALER, "3x120")],
    ),
    (
        "RorqualAutoscalerCannotSet",
        "two",
        [series(PENDING, AUTOSCALER, "2x120")],
        [series(PENDING, AUTOSCALER, "0x98 1x22")],
    ),
    (
        "RorqualPoolCannotStart",
        "long",
        [series(PROBLEM, AUTOSCALER, "1x120", pool="decode")],
        [series(PROBLEM, AUTOSCALER, "0x120", pool="decode")],
    ),
]


def alerts() -> dict[str, dict[str, Any]]:
    groups = yaml.safe_load(RULES.read_text())["groups"]
    return {rule["alert"]: rule for group in groups for rule in group["rules"]}


def check(folder: Path, alert: str, given: Series, *, fires: bool) -> subprocess.CompletedProcess[str]:
    """promtool's verdict on whether it has fired after 100 minutes."""
    firing = f'count(ALERTS{{alertname="{alert}", alertstate="firing"}})'
    test = {
        "interval": "1m",
        # Without any series promtool evaluates nothing.
        "input_series": given or [{"series": "something_else", "values": "1x120"}],
        "promql_expr_test": [
            {
                "expr": firing,
                "eval_time": "100m",
                "exp_samples": [{"labels": "{}", "value": 1}] if fires else [],
            }
        ],
    }
    file = folder / "test.yaml"
    file.write_text(
        yaml.safe_dump({"rule_files": [str(RULES)], "evaluation_interval": "1m", "tests": [test]})
    )
    command = [str(system_tool("promtool")), "test", "rules", str(file)]
    return subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)


@pytest.mark.parametrize(("alert", "what", "bad", "good"), CASES, ids=[f"{c[0]}-{c[1]}" for c in CASES])
def test_an_alert_fires_when_it_should_and_not_else(
    alert: str, what: str, bad: Series, good: Series, tmp_path: Path
):
    done = check(tmp_path, alert, bad, fires=True)
    assert done.returncode == 0, f"does not fire: {what}\n{done.stdout}{done.stderr}"
    done = check(tmp_path, alert, good, fires=False)
    assert done.returncode == 0, f"fires:\n{done.stdout}{done.stderr}"


def test_every_alert_has_a_case():
    assert {case[0] for case in CASES} == set(alerts())


def test_promtool_takes_the_rules():
    command = [str(system_tool("promtool")), "check", "rules", str(RULES)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("alert", alerts())
def test_an_alert_asks_for_metrics_that_we_have(alert: str):
    assert problems(alerts()[alert]["expr"]) == []


@pytest.mark.parametrize("alert", alerts())
def test_an_alert_tells_a_person_what_and_what_to_do(alert: str):
    rule = alerts()[alert]
    assert set(rule["annotations"]) == {"summary", "description", "runbook"}
    assert rule["labels"]["severity"] in ("info", "warning", "critical")
    assert rule["annotations"]["description"].endswith(".")


@pytest.mark.parametrize(
    ("expression", "told"),
    [
        ("rorqual_router_worker_connected", "no metric of ours"),
        ("rorqual_router_workers_connected{pool='a'}", "no label pool"),
        ("sum by (pool) (rorqual_router_workers_connected)", "label pool to group by"),
        ("rate(rorqual_router_workers_connected[5m])", "is a gauge"),
        ("rorqual_router_requests_total", "ask for its rate"),
        ("sum(rate(rorqual_router_requests_total[5m])", "not PromQL"),
        ("vector(1)", "no metric"),
    ],
)
def test_what_our_metrics_do_not_answer_is_told(expression: str, told: str):
    assert any(told in problem for problem in problems(expression))


def rendered(*sets: str) -> dict[str, dict[str, Any]]:
    (one,) = (one for one in render("everything", *sets) if one["kind"] == "PrometheusRule")
    return {rule["alert"]: rule for group in one["spec"]["groups"] for rule in group["rules"]}


def test_the_chart_renders_the_rules_as_they_are():
    assert rendered() == alerts()


def test_objectives_of_the_values_are_those_of_the_alerts():
    ttft, itl = {"percentile": 95, "seconds": 3.5}, {"percentile": 99.9, "seconds": 0.1}
    found = rendered(f"autoscaler.objectives={json.dumps({'ttft': ttft, 'itl': itl})}")
    first, apart = found["RorqualFirstTokenLate"]["expr"], found["RorqualTokensLate"]["expr"]
    assert "quantile(0.95," in first
    assert first.strip().endswith("> 3.5")
    assert "quantile(0.999," in apart
    assert apart.strip().endswith("> 0.1")
