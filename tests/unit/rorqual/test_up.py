"""`rorqual up` with small real processes as workers and router: lives, deaths, and what is left behind."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's parent-death signal")


def options_of(text: str) -> list[str]:
    return json.loads(text)["options"]


def value_of(options: list[str], option: str) -> str | None:
    return options[options.index(option) + 1] if option in options else None


def workers_of(cluster) -> list[dict]:
    """What each worker tells about itself, in the order in which the router got to know them."""
    router = options_of(cluster.ready()["http"])
    return [json.loads(router[i + 1]) for i, option in enumerate(router) if option == "--worker"]


@pytest.mark.parametrize("counts", [("--both", "2"), ("--prefill", "1", "--decode", "1"), ()])
def test_the_ready_file_names_the_addresses_and_every_process(start_cluster, counts):
    cluster = start_cluster({}, *counts)
    ready = cluster.ready()
    assert set(ready) == {"http", "grpc", "processes"}
    assert ready["grpc"] == "127.0.0.1:2"
    processes = ready["processes"]
    assert len(processes) == len(set(processes)) == 1 + 2 * 2
    for pid in processes:
        os.kill(pid, 0)
    assert cluster.stop(signal.SIGTERM) == 0
    cluster.assert_gone(processes)
    assert not cluster.ready_file.exists(), "a stale ready file would mislead the next reader"


def test_with_no_counts_there_is_one_worker_of_each_kind(start_cluster):
    workers = workers_of(start_cluster())
    assert [worker["role"] for worker in workers] == ["prefill", "decode"]
    assert [value_of(worker["options"], "--worker-id") for worker in workers] == ["prefill-0", "decode-0"]


def test_every_kind_of_worker_is_started_by_its_own_command(start_cluster):
    workers = workers_of(start_cluster({}, "--prefill", "1", "--decode", "2", "--both", "1"))
    assert [(worker["role"], value_of(worker["options"], "--worker-id")) for worker in workers] == [
        ("prefill", "prefill-0"),
        ("decode", "decode-0"),
        ("decode", "decode-1"),
        ("worker", "both-0"),
    ]


def test_children_get_their_options_and_the_router_every_workers_address(start_cluster):
    counts = ("--prefill", "1", "--decode", "1", "--both", "1")
    given = ("--served-name", "whale", "--numerics", "served", "--slots", "7", "--transfer", "shm")
    cluster = start_cluster({}, *counts, *given, "--bind-early-tokens", "0", "--hand-over-seconds", "5")
    router = options_of(cluster.ready()["http"])
    assert value_of(router, "--served-name") == "whale"
    assert value_of(router, "--bind-early-tokens") == "0"
    assert value_of(router, "--hand-over-seconds") == "5.0"
    assert "--credit-seconds" not in router
    assert "--api-key-file" not in router
    workers = workers_of(cluster)
    assert len(workers) == 3
    for worker in workers:
        options = worker["options"]
        assert value_of(options, "--listen") == "127.0.0.1:0"
        assert value_of(options, "--numerics") == "served"
        assert value_of(options, "--slots") == "7"
        assert value_of(options, "--transfer") == (None if worker["role"] == "worker" else "shm")
        assert "--pages" not in options
        assert "--exact" not in options


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, {"UCX_NET_DEVICES": "lo", "UCX_LOG_LEVEL": "error"}),
        ({"UCX_NET_DEVICES": "eth0"}, {"UCX_NET_DEVICES": "eth0", "UCX_LOG_LEVEL": "error"}),
        (
            {"UCX_LOG_LEVEL": "", "UCX_TLS": "tcp"},
            {"UCX_NET_DEVICES": "lo", "UCX_LOG_LEVEL": "", "UCX_TLS": "tcp"},
        ),
    ],
    ids=str,
)
def test_transfers_stay_on_this_machine_unless_the_environment_says_otherwise(
    start_cluster, environment, expected
):
    assert [worker["ucx"] for worker in workers_of(start_cluster(environment=environment))] == [expected] * 2


def test_keys_reach_the_router_in_a_file_of_its_own_and_never_in_an_argument(start_cluster, tmp_path):
    given = tmp_path / "keys"
    given.write_text("secret-b\n\nsecret-c\n")
    cluster = start_cluster({}, "--api-key", "secret-a", "--api-key-file", str(given))
    router = options_of(cluster.ready()["http"])
    assert not any("secret" in option for option in router)
    file = Path(router[router.index("--api-key-file") + 1])
    assert file != given
    assert file.read_text() == "secret-a\nsecret-b\nsecret-c\n"
    assert file.stat().st_mode & 0o777 == 0o600
    assert cluster.stop(signal.SIGTERM) == 0
    assert not file.exists()


def test_threads_are_shared_out_and_written_into_the_environment(start_cluster):
    cluster = start_cluster()  # the fake machine has 4 cores
    ready = json.loads(cluster.ready()["http"])
    assert ready["threads"] == "1", "the router computes nothing"
    workers = workers_of(cluster)
    assert [worker["threads"] for worker in workers] == ["2", "1"]
    assert [value_of(worker["options"], "--threads") for worker in workers] == ["2", "1"]


def test_a_number_of_threads_is_every_workers(start_cluster):
    workers = workers_of(start_cluster({}, "--threads", "3"))
    assert [worker["threads"] for worker in workers] == ["3", "3"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_stop_signal_leaves_no_process_and_exits_zero(start_cluster, number):
    cluster = start_cluster()
    processes = cluster.ready()["processes"]
    assert cluster.stop(number) == 0
    cluster.assert_gone(processes)
    assert cluster.errors.read_text() == ""


@linux_only
def test_its_own_sigkill_leaves_no_process(start_cluster):
    cluster = start_cluster()
    processes = cluster.ready()["processes"]
    assert cluster.stop(signal.SIGKILL) == -signal.SIGKILL
    cluster.assert_gone(processes)


def test_a_stop_while_the_model_still_loads_is_orderly(start_cluster):
    cluster = start_cluster({"prefill": {"says": ["weights 1 of 16 GB"], "is_never_ready": True}})
    while "weights 1 of 16 GB" not in cluster.output.read_text():
        assert cluster.process.poll() is None
    assert cluster.stop(signal.SIGINT) == 0
    assert not cluster.ready_file.exists()


def test_a_childs_death_is_told_with_its_last_lines_and_ends_the_rest(start_cluster):
    cluster = start_cluster({"router": {"says": ["the last straw"], "lives_seconds": 0.2}}, "--both", "2")
    processes = cluster.ready()["processes"]
    assert cluster.wait() == 1
    told = cluster.errors.read_text()
    assert told.startswith("rorqual up: router (process ")
    assert "killed by SIGKILL" in told
    assert "the last straw" in told
    assert "Traceback" not in told
    cluster.assert_gone(processes)


def test_a_dead_worker_is_named(start_cluster):
    cluster = start_cluster()
    processes = cluster.ready()["processes"]
    os.kill(processes[3], signal.SIGKILL)  # the router's, prefill-0's host and rank, decode-0's host
    assert cluster.wait() == 1
    assert cluster.errors.read_text().startswith(f"rorqual up: decode-0 (process {processes[3]}) died")
    cluster.assert_gone(processes)


def test_a_worker_that_cannot_start_ends_it_before_the_router_is_started(start_cluster):
    cluster = start_cluster({"decode": {"says": ["rorqual decode: shard 3 is broken"], "exits": 1}})
    assert cluster.wait() == 1
    assert "decode-0" in cluster.errors.read_text()
    assert "exit status 1" in cluster.errors.read_text()
    assert "shard 3 is broken" in cluster.errors.read_text()
    assert "router |" not in cluster.output.read_text()


def test_a_child_that_ignores_sigterm_is_killed_at_the_deadline(start_cluster):
    cluster = start_cluster({"prefill": {"is_deaf": True}}, "--stop-seconds", "0.4")
    processes = cluster.ready()["processes"]
    assert cluster.stop(signal.SIGTERM) == 0
    cluster.assert_gone(processes)
    assert "prefill-0 did not stop in time and was killed" in cluster.output.read_text()


def test_a_second_ctrl_c_does_not_wait_for_the_deadline(start_cluster):
    cluster = start_cluster({"decode": {"is_deaf": True}}, "--stop-seconds", "60")
    processes = cluster.ready()["processes"]
    cluster.process.send_signal(signal.SIGINT)
    while "stopping" not in cluster.output.read_text():
        assert cluster.process.poll() is None
    assert cluster.stop(signal.SIGINT) == 0  # within the 20 s that `stop` allows
    cluster.assert_gone(processes)


def test_a_start_that_takes_too_long_is_given_up(start_cluster):
    cluster = start_cluster({"decode": {"is_never_ready": True}}, "--start-seconds", "0.3")
    assert cluster.wait() == 1
    assert "starting prefill-0, decode-0: not done after 0.3 s" in cluster.errors.read_text()


@pytest.mark.parametrize(
    ("ready", "complaint"),
    [
        ({"http": 7, "grpc": "x", "pid": 1}, "no text under 'http'"),
        ({"http": "x", "grpc": "x", "pid": "1"}, "names '1' as a process"),
        ([], "must hold a JSON object"),
    ],
)
def test_a_ready_file_of_the_wrong_shape_is_refused(start_cluster, ready, complaint):
    cluster = start_cluster({"router": {"ready": ready}})
    assert cluster.wait() == 1
    assert complaint in cluster.errors.read_text()


def test_every_line_of_a_child_carries_its_name(start_cluster):
    cluster = start_cluster({"prefill": {"says": ["loading", "ready"]}, "router": {"says": ["listening"]}})
    cluster.ready()
    cluster.stop(signal.SIGTERM)
    output = cluster.output.read_text()
    assert "prefill-0 | loading\nprefill-0 | ready\n" in output
    assert "router    | listening\n" in output
    assert "\x1b" not in output, "no colour into a file"
    assert "curl -N" in output


@pytest.mark.slow
def test_output_that_nobody_reads_stops_neither_children_nor_signals(start_cluster):
    cluster = start_cluster({"decode": {"floods_lines": 3000}}, stdout=subprocess.PIPE)
    processes = cluster.ready()["processes"]  # 3 MB were written into a pipe of 64 KiB
    assert cluster.stop(signal.SIGTERM) == 0
    cluster.assert_gone(processes)


def test_a_port_in_use_is_told_before_any_process_is_started(start_cluster):
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        cluster = start_cluster({}, "--http", str(port))
        assert cluster.wait() == 1
    assert f"--http: cannot listen on 127.0.0.1:{port}: Address already in use" in cluster.errors.read_text()
    assert "starting" not in cluster.output.read_text()


def test_an_unwritable_ready_file_is_one_clear_line(start_cluster, tmp_path):
    cluster = start_cluster({}, "--ready-file", str(tmp_path / "nowhere" / "ready.json"))
    assert cluster.wait() == 1
    assert "--ready-file" in cluster.errors.read_text()
    assert cluster.errors.read_text().count("\n") == 1
