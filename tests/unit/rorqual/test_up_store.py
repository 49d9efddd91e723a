"""Which store `rorqual up` gives its workers, how they learn of it, and its life beside theirs."""

from __future__ import annotations

import json
import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from rorqual.errors import ConfigError
from rorqual.up_options import parse_options, plan_workers, worker_arguments
from rorqual.up_store import embedded_url, plan_store

URL = "redis://:secret@cache:6379"


def plan(*argv: str, environment: dict[str, str] | None = None, has_embedded: bool = True) -> str:
    found = plan_store(parse_options(["--model", "m", *argv]), environment or {}, has_embedded=has_embedded)
    if found.is_embedded:
        return "required" if found.is_required else "embedded"
    return found.url


@pytest.mark.parametrize(
    ("argv", "environment", "expected"),
    [
        ((), {}, "embedded"),
        (("--redis", "embedded"), {}, "required"),
        (("--redis", "none"), {"RORQUAL_STORE": URL}, ""),
        (("--redis", URL), {"RORQUAL_STORE": "redis://other"}, URL),
        ((), {"RORQUAL_STORE": URL}, URL),
        ((), {"RORQUAL_STORE": "none"}, ""),
        (("--redis", "embedded"), {"RORQUAL_STORE": URL}, "required"),
        (("--prefix-cache", "off"), {"RORQUAL_STORE": URL}, ""),
        (("--prefix-cache", "off"), {}, ""),
    ],
    ids=str,
)
def test_the_option_comes_before_the_environment_and_that_before_an_embedded_store(
    argv, environment, expected
):
    assert plan(*argv, environment=environment) == expected


def test_without_the_package_there_is_none_by_default():
    assert plan(has_embedded=False) == ""


def test_what_a_person_is_told_has_no_password():
    options = parse_options(["--model", "m", "--redis", f"{URL}/2?ssl_ca_certs=x"])
    found = plan_store(options, {}, has_embedded=True)
    assert found.told == "cache:6379/2"
    assert "secret" not in repr(found)
    assert "secret" not in repr(options)


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        (["--redis", "http://:secret@x"], "--redis is embedded, none, or a URL .* not 'http'"),
        (["--redis", "secret"], "--redis is embedded, none, or a URL"),
        (["--redis", URL, "--prefix-cache", "off"], "--prefix-cache on has computed; it is off"),
        (["--redis-bytes", "much"], "--redis-bytes must be a size"),
        (["--redis", "none", "--redis-bytes", "1GB"], "--redis-bytes is the memory of the store"),
        (["--store-tenant-bytes", "0"], "--store-tenant-bytes must be above 0"),
        (["--store-budget-ms", "0"], "--store-budget-ms must be above 0"),
        (["--store-ttl-seconds", "-1"], "--store-ttl-seconds must be above 0"),
    ],
    ids=str,
)
def test_values_that_make_no_sense_are_refused_by_name_and_without_the_password(argv, complaint):
    with pytest.raises(ConfigError, match=complaint) as failure:
        parse_options(["--model", "m", *argv])
    assert "secret" not in str(failure.value)


def test_workers_are_told_how_to_use_it_and_never_where_it_is(tmp_path):
    given = ("--store-budget-ms", "5.0", "--store-writes", "never", "--store-tenant-bytes", "1GB")
    options = parse_options(["--model", "m", "--redis", URL, *given, "--store-ttl-seconds", "60.0"])
    for worker in plan_workers(options, num_cores=4):
        arguments = worker_arguments(options, worker, ready_file=tmp_path / "ready")
        told = dict(zip(arguments[::2], arguments[1::2], strict=False))
        assert told["--store-budget-ms"] == "5.0"
        assert told["--store-writes"] == "never"
        assert told["--store-ttl-seconds"] == "60.0"
        assert told["--store-tenant-bytes"] == "1GB"
        assert not any("secret" in argument for argument in arguments)
    plain = replace(options, store_budget_ms=None)
    (worker, _) = plan_workers(plain, num_cores=4)
    assert "--store-budget-ms" not in worker_arguments(plain, worker, ready_file=tmp_path)


def test_an_embedded_store_has_a_password_of_its_own_each_time(tmp_path):
    short, long = Path("/tmp/x"), tmp_path / ("x" * 100)
    urls = [urlsplit(embedded_url(folder)) for folder in (short, short, long)]
    passwords = [url.password or "" for url in urls]
    assert len(set(passwords)) == 3
    assert all(len(password) == 32 for password in passwords)
    assert [url.scheme for url in urls] == ["unix", "unix", "redis"], "too long a path takes a port"
    assert urls[0].path == "/tmp/x/store.sock"
    assert urls[2].hostname == "127.0.0.1"


def told_to_workers(cluster) -> list[str]:
    router = json.loads(cluster.ready()["http"])
    options = router["options"]
    told = [json.loads(options[at + 1])["store"] for at, word in enumerate(options) if word == "--worker"]
    assert set(told) == {router["store"]}, "the router asks another store than workers read"
    return told


def test_a_given_store_reaches_workers_by_the_environment_alone(start_cluster):
    cluster = start_cluster({}, "--redis", URL)
    assert told_to_workers(cluster) == [URL, URL]
    deadline = time.monotonic() + 10  # people are told after programs
    while "\n  store cache:6379\n" not in cluster.output.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_without_one_the_environments_does_not_slip_through(start_cluster):
    cluster = start_cluster({}, "--redis", "none", environment={"RORQUAL_STORE": URL})
    assert told_to_workers(cluster) == ["", ""]
    assert "\n  store " not in cluster.output.read_text()


def test_an_embedded_store_is_a_child_like_others(start_cluster):
    cluster = start_cluster({}, "--redis", "embedded", "--redis-bytes", "64MB")
    first, second = told_to_workers(cluster)
    assert first == second
    password = urlsplit(first).password
    assert password
    processes = cluster.ready()["processes"]
    assert len(processes) == 1 + 2 * 2 + 1
    commands = [Path(f"/proc/{pid}/cmdline").read_bytes().decode() for pid in processes]
    assert "serve\0--memory\x0064MB" in commands[-1]
    assert not any(password in command for command in commands[1:]), "the fake router's tells all it was told"
    assert cluster.stop(signal.SIGTERM) == 0
    cluster.assert_gone(processes)


def test_a_store_that_was_asked_for_and_cannot_start_ends_it(start_cluster):
    cluster = start_cluster({"kv": {"says": ["no server here"], "exits": 1}}, "--redis", "embedded")
    assert cluster.wait() == 1
    assert cluster.errors.read_text().startswith("rorqual up: store (process ")
    assert "no server here" in cluster.errors.read_text()


def test_a_store_that_dies_later_is_told_once_and_the_rest_goes_on(start_cluster, is_alive):
    cluster = start_cluster({}, "--redis", "embedded")
    *others, store = cluster.ready()["processes"]
    os.kill(store, signal.SIGKILL)
    deadline = time.monotonic() + 10
    while "serving goes on without a store: store (process " not in cluster.output.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(0.3)
    assert cluster.process.poll() is None
    assert all(is_alive(pid) for pid in others)
    assert cluster.output.read_text().count("goes on without") == 1
    assert cluster.stop(signal.SIGTERM) == 0
    cluster.assert_gone([*others, store])
